"""The client and `asd` against a real cascade of two real models."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

import suites
from asd.client import AsyncClient, in_plain_words
from asd.errors import BudgetSpent, InvalidRequest, NotFound, PreconditionFailed, Unavailable
from asd.v1 import cascade_pb2, cascade_pb2_grpc, policy_pb2, policy_pb2_grpc
from asd.values import (
    Answer,
    Drafted,
    Failure,
    Message,
    Objective,
    ReportReceipt,
    Request,
    Sampling,
    StageStarted,
    StreamedText,
)
from services.cli.commands import app
from services.common.server import ServerOptions, ServiceRegistration, start_server
from tests.integration.local.conftest import PROMPT, asd, count_weights
from tests.limits import CALL_S, PROCESS_S
from tests.unit.cli.test_examples import python_in

# Of no suite, so that the stages are apt to differ.
UNUSUAL = "What is 12 plus 30?"


class Leaving(cascade_pb2_grpc.CascadeServiceServicer):
    """A router that cancels a number of calls, as one that is stopped does, and answers the others.

    begins: whether a stream sends something first.
    """

    def __init__(self, cancels: int = 0, *, begins: bool = False) -> None:
        self.cancels = cancels
        self.calls = 0
        self._begins = begins

    async def Describe(self, request, context):  # noqa: N802
        return cascade_pb2.DescribeResponse(version="1")

    async def Generate(self, request, context):  # noqa: N802
        await self._take(context)
        return cascade_pb2.GenerateResponse(text="19")

    async def GenerateStream(self, request, context):  # noqa: N802
        if self._begins:
            yield cascade_pb2.GenerateStreamResponse(stage_started=cascade_pb2.StageStarted(stage="small"))
        await self._take(context)
        yield cascade_pb2.GenerateStreamResponse(response=cascade_pb2.GenerateResponse(text="19"))

    async def _take(self, context):
        self.calls += 1
        if self.calls <= self.cancels:
            await context.abort(grpc.StatusCode.CANCELLED)

    def add(self, server):
        cascade_pb2_grpc.add_CascadeServiceServicer_to_server(self, server)

    async def start(self, listen="127.0.0.1:0", options=None):
        return await start_server(
            listen,
            [ServiceRegistration("asd.v1.CascadeService", self.add)],
            options=options or ServerOptions(),
        )


class HangUp:
    """Closes every connection: nobody is there, as far as a client can see. often: set after some of them."""

    def __init__(self):
        self.often = asyncio.Event()
        self._left = 4

    @classmethod
    async def start(cls, port):
        self = cls()
        self._server = await asyncio.start_server(self._close, "127.0.0.1", port)
        return self

    async def stop(self):
        self._server.close()
        await self._server.wait_closed()

    def _close(self, _, writer):
        writer.close()
        self._left -= 1
        if not self._left:
            self.often.set()


async def texts(client, request):
    """Return the texts of a unary and of a streamed answer."""
    events = [event async for event in client.stream(request)]
    return (await client.ask(request)).text, events[-1].text


# More than gRPC calls again by itself.
async def test_calls_that_a_stopping_router_has_not_begun_are_made_again():
    router = Leaving(cancels=7)
    server, port = await router.start()
    async with AsyncClient(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3) as client:
        await client.describe()
        assert await texts(client, Request("hi")) == ("19", "19")
    assert router.calls == 7 + 2
    await server.stop(0)


async def test_a_router_that_restarts_is_waited_for():
    before, after = Leaving(), Leaving()
    server, port = await before.start()
    async with AsyncClient(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3) as client:
        assert await texts(client, Request("hi")) == ("19", "19")
        await server.stop(0)
        hang_up = await HangUp.start(port)
        waiting = asyncio.create_task(texts(client, Request("hi")))
        await hang_up.often.wait()
        await hang_up.stop()
        server, _ = await after.start(f"127.0.0.1:{port}")
        assert await waiting == ("19", "19")
    assert after.calls == 2
    await server.stop(0)


async def test_a_stream_that_a_router_has_begun_is_not_made_again():
    router = Leaving(cancels=1, begins=True)
    server, port = await router.start()
    async with AsyncClient(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3) as client:
        await client.describe()
        with pytest.raises(Unavailable, match="shutting down"):
            await texts(client, Request("hi"))
    assert router.calls == 1
    await server.stop(0)


@pytest.fixture
async def cascade(up):
    async with AsyncClient(up.target) as client:
        yield client


async def test_an_answer_has_one_record_per_stage_of_the_static_plan(cascade):
    answer = await cascade.ask(Request(PROMPT))
    assert suites.extract_answer(answer.text) == "19"
    assert (answer.stage, answer.stage_index, answer.plan_source) == ("medium", 1, "static")
    assert [(each.stage, each.action, each.decision) for each in answer.stages] == [
        ("small", "generate", "escalate"),
        ("medium", "verify", "stop"),
    ]
    assert answer.stages[-1].text == answer.text
    assert answer.cost == pytest.approx(sum(each.cost for each in answer.stages))
    assert answer.p_correct is None


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, UNUSUAL])
async def test_a_stream_ends_as_the_unary_answer(cascade, prompt, drafts):
    unary = await cascade.ask(Request(prompt))
    events = [event async for event in cascade.stream(Request(prompt), drafts=drafts)]
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert (answer.text, answer.token_ids, answer.stage) == (unary.text, unary.token_ids, unary.stage)
    assert [each.stage for each in events if isinstance(each, StageStarted)] == ["small", "medium"]
    assert any(isinstance(each, Drafted) for each in events) is drafts
    text = StreamedText()
    for event in events[:-1]:
        text = text.after(event)
        assert unary.text.startswith(text.final)
        assert drafts or not text.draft
    assert (text.final, text.draft) == (unary.text, "")


async def test_a_batch_answers_what_it_can(cascade):
    requests = [Request(PROMPT), Request("Hi", stage="huge"), Request(PROMPT, stage="small")]
    items = {item.index: item.outcome async for item in cascade.ask_batch(requests)}
    assert suites.extract_answer(items[0].text) == "19"
    assert isinstance(items[1], Failure)
    # NOT_FOUND of google.rpc.Code.
    assert (items[1].code, items[1].field) == (5, "requests[1].stage")
    assert (items[2].stage, items[2].plan_source) == ("small", "fixed")


async def test_a_conversation_and_sampling_reach_the_stage(cascade):
    turns = (Message("user", PROMPT), Message("assistant", "Answer: 19"), Message("user", PROMPT))
    full = await cascade.ask(Request(PROMPT, stage="small"))
    longer = await cascade.ask(Request(turns, stage="small"))
    assert longer.stages[0].prompt_tokens > 2 * full.stages[0].prompt_tokens
    short = await cascade.ask(Request(PROMPT, Sampling(max_new_tokens=2), stage="small"))
    assert (len(short.token_ids), short.finish_reason) == (2, "length")
    stopped = await cascade.ask(Request(PROMPT, Sampling(stop=("Answer",)), stage="small"))
    assert (stopped.text, stopped.finish_reason) == (full.text.partition("Answer")[0], "stop")


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (Request(""), InvalidRequest, "prompt"),
        (Request("Hi", stage="huge"), NotFound, "stage"),
        (Request("Hi", Sampling(temperature=3)), InvalidRequest, "sampling.temperature"),
        (Request("Hi", objective=Objective(quality_value=float("nan"))), InvalidRequest, "objective.lambda"),
        (Request(()), InvalidRequest, "conversation.messages"),
    ],
)
async def test_a_refused_request_raises_by_kind_and_field(cascade, request_, error, field):
    for attempt in (cascade.ask(request_), anext(cascade.stream(request_))):
        with pytest.raises(error) as refused:
            await attempt
        assert refused.value.field.removeprefix("request.") == field


async def test_describe_tells_of_the_models_behind_the_stages(cascade):
    description = await cascade.describe()
    assert [(each.stage, each.cost, each.available) for each in description.stages] == [
        ("small", 1.6, True),
        ("medium", 4.2, True),
    ]
    assert [each.parameters for each in description.stages] == [
        count_weights("small"),
        count_weights("medium"),
    ]
    assert (description.policy, description.static_plan) == (None, ("small", "medium"))


@pytest.fixture
def silent_socket():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def _address(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


async def test_every_call_ends_at_its_deadline(silent_socket):
    target = _address(silent_socket)
    async with AsyncClient(target, timeout_ms=50) as client:
        request = Request(PROMPT)
        for attempt in (
            client.ask(request),
            client.describe(),
            anext(client.stream(request)),
            anext(client.ask_batch([request])),
        ):
            with pytest.raises(BudgetSpent, match=f"{target} .* 50 ms"):
                await attempt


async def test_where_nothing_listens_the_error_says_so(silent_socket):
    target = _address(silent_socket)
    silent_socket.close()
    async with AsyncClient(target) as client:
        for attempt in (client.ask(Request("Hi")), client.describe(), anext(client.stream(Request("Hi")))):
            with pytest.raises(Unavailable, match=f"^no cascade answers at {target}$"):
                await attempt


async def test_a_process_that_hangs_is_told_from_none(silent_socket):
    target = _address(silent_socket)
    async with AsyncClient(target) as client:
        for attempt in (client.ask(Request("Hi")), client.describe(), anext(client.stream(Request("Hi")))):
            with pytest.raises(Unavailable, match=f"^{target} takes the connection"):
                await attempt
    answer = Answer("r", "", (), "", "eos", "a", 0, 0.5, 1.0, 1.0, 0.0, "policy", "v", "", ())
    with pytest.raises(Unavailable, match=f"{target} .*takes the connection"):
        await client.report(answer, correct=True, policy_target=target)


async def test_a_report_reaches_the_policy_service(cascade):
    class Policy(policy_pb2_grpc.PolicyServiceServicer):
        async def Report(self, request, context):  # noqa: N802 - the proto's name
            received.append(request)
            return policy_pb2.ReportResponse(reports=7, reported_before=len(received) > 1)

    received = []
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(Policy(), server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    answer = await cascade.ask(Request(PROMPT))
    judged = Answer(**{**vars(answer), "p_correct": 0.5, "policy_version": "v7"})
    try:
        target = f"127.0.0.1:{port}"
        assert await cascade.report(judged, correct=True, policy_target=target) == ReportReceipt(7)
        again = await cascade.report(judged, correct=True, policy_target=target)
        assert again == ReportReceipt(7, reported_before=True)
    finally:
        await server.stop(None)
    assert (
        received
        == [
            policy_pb2.ReportRequest(
                request_id=answer.request_id, stage="medium", p_correct=0.5, policy_version="v7", correct=True
            )
        ]
        * 2
    )
    with pytest.raises(Unavailable, match=f"policy service at {target}"):
        await cascade.report(judged, correct=True, policy_target=target)


async def test_what_is_no_router_is_told_from_one_that_is_away(cascade):
    answer = await cascade.ask(Request(PROMPT))
    judged = Answer(**{**vars(answer), "p_correct": 0.5, "policy_version": "v7"})
    server, port = await start_server("127.0.0.1:0", [])
    target = f"127.0.0.1:{port}"
    try:
        async with AsyncClient(target) as client:
            request = Request("Hi")
            for attempt in (client.ask(request), client.describe(), anext(client.stream(request))):
                with pytest.raises(PreconditionFailed, match=f"^{target} is not a router: .* 50050"):
                    await attempt
        with pytest.raises(PreconditionFailed, match=f"^{target} is not a policy service: .* 50051"):
            await cascade.report(judged, correct=True, policy_target=target)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "stage large at 10.0.0.1:50061: connections to all backends failing; last error: UNKNOWN: "
            "ipv4:10.0.0.1:50061: Failed to connect to remote host: Connection refused",
            "stage large at 10.0.0.1:50061 does not answer (connection refused)",
        ),
        (
            "stage a at [::1]:5: failed to connect to all addresses; last error: UNAVAILABLE: "
            "ipv6:%5B::1%5D:5: Socket closed; no other stage can be asked",
            "stage a at [::1]:5 does not answer (socket closed); no other stage can be asked",
        ),
        ("the router is shutting down: call again", "the router is shutting down: call again"),
    ],
)
def test_words_of_grpc_are_left_out(message, words):
    assert in_plain_words(message) == words


def test_the_programs_of_the_clients_readme_run(up):
    codes = python_in(Path(__file__).parents[3] / "clients" / "python" / "README.md")
    assert len(codes) == 3
    for code in codes:
        asked = code.replace("127.0.0.1:50050", up.target)
        result = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert " medium None" in result.stdout


# The command.


async def test_ask_writes_the_answer_alone_to_a_pipe(up, cascade):
    expected = (await cascade.ask(Request(PROMPT))).text
    result = asd("ask", "--target", up.target, "-", text=f"{PROMPT}\n")
    assert (result.returncode, result.stdout) == (0, f"{expected}\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("medium · predicted quality – · ")
    assert "escalate: static plan" in line


async def test_ask_on_a_terminal_ends_with_the_answer(up, cascade):
    expected = (await cascade.ask(Request(UNUSUAL))).text
    result = asd("ask", "--target", up.target, UNUSUAL, FORCE_COLOR="1", COLUMNS="200")
    assert result.returncode == 0
    # The cursor was hidden while the answer was drawn, and what was drawn is gone.
    drawn, _, kept = result.stdout.rpartition("\x1b[?25h")
    assert "\x1b[?25l" in drawn
    assert kept.endswith(f"{expected}\n")


def test_ask_as_json_has_the_fields_of_an_answer(up):
    result = asd("ask", "--json", PROMPT, ASD_TARGET=up.target)
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert set(answer) == {*Answer.__dataclass_fields__, "missed_max_latency", "missed_min_quality"}
    assert (suites.extract_answer(answer["text"]), answer["stages"][1]["action"]) == ("19", "verify")

    result = asd("report", "-", "--right", text=result.stdout)
    assert result.returncode == 2
    assert "plan_source: static" in result.stderr


def test_ask_passes_every_option_on(up):
    def ask(*options: str, prompt: str = PROMPT) -> dict:
        result = CliRunner().invoke(app, ["ask", "--json", "--target", up.target, *options, prompt])
        assert result.exit_code == 0
        return json.loads(result.stdout)

    plain = ask("--stage", "small")
    assert (plain["stage"], plain["plan_source"]) == ("small", "fixed")
    instructed = ask("--stage", "small", "--system", "Be brief.")
    assert instructed["stages"][0]["prompt_tokens"] > plain["stages"][0]["prompt_tokens"]
    # Of the embedded models none has an adapter.
    assert ask("--stage", "small", "--task", "math")["token_ids"] == plain["token_ids"]
    wild = ("--stage", "small", "--temperature", "2", "--max-new-tokens", "40", "--seed")
    story = "Tell me a story about foxes and rivers"
    first, again, other = (ask(*wild, seed, prompt=story)["token_ids"] for seed in ("7", "7", "8"))
    assert first == again != other
    assert len(ask("--stage", "small", "--max-new-tokens", "3")["token_ids"]) == 3
    for wrong, option in (
        (["--top-p", "2"], "--top-p"),
        (["--lambda", "nan"], "--lambda"),
        (["--max-cost", "0"], "--max-cost"),
        (["--max-cost", "0.1"], "--max-cost"),
        (["--max-latency-ms", "-1"], "--max-latency-ms"),
        (["--min-quality", "1.5"], "--min-quality"),
        (["--session", "s" * 257], "--session"),
        (["--task", "Math!"], "--task"),
        (["--temperature", "2.5"], "--temperature"),
        (["--stop", "a", "--stop", ""], "--stop"),
        (["--stage", "huge"], "--stage"),
        (["--chain", "small", "--chain", "huge"], "--chain"),
        (["--chain", "medium", "--chain", "small"], "--chain"),
    ):
        refused = CliRunner().invoke(app, ["ask", "--json", "--target", up.target, *wrong, PROMPT])
        assert refused.exit_code == 2
        error = json.loads(refused.stderr)["error"]
        assert error["field"] == option
        # As a stream, whose fields are those of a request in it.
        refused = CliRunner().invoke(app, ["ask", "--target", up.target, *wrong, PROMPT], terminal_width=200)
        assert refused.exit_code == 2
        assert option in refused.stderr
        assert "(field" not in refused.stderr


def test_describe_as_json_and_as_a_table(up):
    result = asd("describe", "--target", up.target, "--json")
    assert [each["stage"] for each in json.loads(result.stdout)["stages"]] == ["small", "medium"]
    assert f"{count_weights('small'):,}" in asd("describe", "--target", up.target).stdout


def test_a_failure_is_one_sentence(silent_socket):
    target = _address(silent_socket)
    silent_socket.close()
    result = asd("ask", "--target", target, "Hi")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"asd: no cascade answers at {target}: start one with `asd up`, or name another with --target\n"
    )
    result = asd("describe", "--target", target, "--json")
    assert result.returncode == 1
    assert json.loads(result.stderr)["error"]["code"] == "UNAVAILABLE"


def test_an_interrupted_question_ends_clean(silent_socket):
    # Also where the tests run in the background, and so with SIGINT ignored.
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from services.cli.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "ask", "--target", _address(silent_socket), "Hi"]
    silent_socket.settimeout(PROCESS_S)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            # It is connected, and waits; a connection that closes would be an answer of its own.
            connection, _ = silent_socket.accept()
        except TimeoutError:
            process.kill()
            pytest.fail(f"it never connected: {process.communicate()[1]}")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=CALL_S)
    connection.close()
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_demo_compares_both_ways_and_writes_the_figures(up, tmp_path):
    file = tmp_path / "demo.json"
    result = asd("demo", "--target", up.target, "--prompts", "8", "--json", str(file))
    assert result.returncode == 0
    assert "always medium" in result.stdout
    figures = json.loads(file.read_text())
    rows = figures["rows"]
    assert figures["prompts"] == len(rows) == 8
    assert len({row["prompt"] for row in rows}) == 8
    assert {row["largest"]["plan_source"] for row in rows} == {"fixed"}
    for key, side in (("", "cascade"), ("_largest", "largest")):
        assert figures[f"accuracy{key}"] == pytest.approx(sum(row[side]["is_right"] for row in rows) / 8)
        assert figures[f"latency{key}_ms"] == pytest.approx(sum(row[side]["latency_ms"] for row in rows) / 8)
        assert figures[f"cost{key}"] == pytest.approx(sum(row[side]["cost"] for row in rows) / 8)
    assert figures["cost_largest"] == pytest.approx(4.2)
    # The static plan ends at the last stage, and EXACT acceptance gives that stage's own answer.
    assert figures["early_stop_share"] == 0
    for row in rows:
        assert row["cascade"]["text"] == row["largest"]["text"]


def test_demo_runs_a_cascade_of_its_own(cascade_file):
    result = asd("demo", "--cascade", str(cascade_file), "--prompts", "1", "--json", "-")
    assert result.returncode == 0
    assert json.loads(result.stdout)["prompts"] == 1


def test_models_are_listed_and_prepared(cascade_file, tmp_path):
    listed = json.loads(asd("models", "--cascade", str(cascade_file), "--json").stdout)["models"]
    assert [(each["name"], each["parameters"]) for each in listed] == [
        ("small", count_weights("small")),
        ("medium", count_weights("medium")),
    ]
    result = asd(
        "models", "--cascade", str(cascade_file), "prepare", "--json", ASD_CACHE_DIR=str(tmp_path / "cache")
    )
    prepared = json.loads(result.stdout)["prepared"]
    assert set(prepared) == {"small", "medium"}
    for place in prepared.values():
        assert place.startswith(str(tmp_path / "cache"))
        assert len(list(Path(place).glob("*.onnx"))) == 1
