"""The command line: what is refused before anything is called, and what help costs."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

import pytest
from rich.console import Console
from rich.live import Live
from typer.testing import CliRunner

from asd.client import AsyncClient
from asd.errors import AsdError, InvalidRequest
from asd.values import (
    Acceptance,
    Answer,
    Candidate,
    Committed,
    Constraint,
    Description,
    Drafted,
    Message,
    Objective,
    PolicyDescription,
    PolicyStage,
    ReportReceipt,
    Request,
    Revised,
    Sampling,
    StageDescription,
    StageRecord,
    StageStarted,
    TokenDetail,
    Tokens,
)
from services.cli import console, files
from services.cli.asking import stream_live, stream_plain
from services.cli.commands import app
from services.common.terminal import LiteralConsole
from services.common.version import VERSION
from services.local import running
from services.local.running import Signalled

_RUNNER = CliRunner()
ANSWER = Answer("r", "right", (2,), "", "eos", "medium", 1, None, 1.0, 1.0, 0.0, "static", "", "", ())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask"], ["prompt", "standard input"]),
        (["ask", "hi", "--target", "nowhere"], ["HOST:PORT"]),
        (["ask", "hi", "--preference", "cheap"], ["fastest"]),
        *((["ask", "hi", "--timeout-ms", ms], ["--timeout-ms"]) for ms in ("0", "inf", "1e300", "nan")),
        (["describe", "--timeout-ms", "86400001"], ["--timeout-ms"]),
        (["ask", "hi", "--stage", "a", "--chain", "b"], ["--stage and --chain exclude each other"]),
        (["ask", "hi", "--regex", "a", "--choice", "b"], ["--json-schema, --regex and --choice exclude"]),
        (["ask", "hi", "--top-logprobs", "21"], ["--top-logprobs"]),
        (["ask", "hi", "--json-schema", "no-such.json"], ["no-such.json"]),
        *(
            (["ask", "hi", *named, *wish], ["--stage and --chain leave nothing to the policy"])
            for named, wish in (
                (["--stage", "a"], ["--preference", "best"]),
                (["--stage", "a"], ["--lambda", "0"]),
                (["--chain", "a", "--chain", "b"], ["--max-cost", "1"]),
                (["--chain", "a", "--chain", "b"], ["--max-latency-ms", "1"]),
                (["--stage", "a"], ["--min-quality", "0.5"]),
            )
        ),
        (["ask", "hi", "--preference", "best", "--lambda", "1"], ["--lambda and --preference exclude"]),
        (["ask", "hi", "--chain", "a"], ["--chain names two stages or more", "--stage a"]),
        *((["ask", "hi", "--tolerance", each], ["--tolerance", each]) for each in ("0", "1.5", "nan")),
        (["ask", "\udcff"], ["prompt", "not valid UTF-8"]),
        *(
            (["ask", "hi", option, "\udcff"], [option, "not valid UTF-8"])
            for option in ("--stage", "--chain", "--stop", "--session", "--system", "--task")
        ),
        (["ask", ""], ["prompt", "empty"]),
        *(
            (["ask", "hi", *given], [given[0].removesuffix("="), "empty"])
            for given in (["--stage", ""], ["--chain="], ["--task", ""], ["--system", ""], ["--session="])
        ),
        (["models", "pull", "a/b", "--to", ""], ["--to", "empty"]),
        (["models", "--cascade", "a.yaml", "pull", "a/b"], ["--cascade"]),
        (["models", "--cascade", "a.yaml", "prepare", "--cascade", "b.yaml"], ["--cascade is there twice"]),
        *(
            (["ask", "hi", "--max-new-tokens", each], [each, "a whole number from 1 to 4294967295"])
            for each in ("-4", "0", "3.5", "99999999999999")
        ),
        *(
            (["ask", "hi", "--seed", each], [each, "a whole number from 0 to 18446744073709551615"])
            for each in ("-5", "18446744073709551616")
        ),
        *(
            (["ask", "hi", "--timeout-ms", each], [each, "a number from 1 to 86400000"])
            for each in ("nan", "0", "inf", "soon")
        ),
        (["ask", "hi", "--lambda", "much"], ["much is not a number"]),
        *((["demo", "--prompts", number], ["--prompts"]) for number in ("0", "1000000000")),
        (["demo", "--target", "a:1", "--cascade", "b.yaml"], ["exclude"]),
        (["demo", "--json", "/no/such/place/demo.json"], ["/no/such/place"]),
        (["up", "--port-base", "0"], ["--port-base"]),
        (["up", "--gateway-port", "65536"], ["--gateway-port"]),
        (["up", "--gateway-port", "50061"], ["port 50061, for the gateway", "--gateway-port"]),
        (["up", "--gateway-port", "8001", "--no-gateway"], ["--gateway-port and --no-gateway exclude"]),
        (["up", "--cascade", "/no/such.yaml"], ["/no/such.yaml", "No such file"]),
        (["models", "--cascade", "/no/such.yaml"], ["/no/such.yaml"]),
        (["models", "prepare", "--cascade", "/no/such.yaml"], ["/no/such.yaml"]),
        (["models", "--cascade", "/no/such.yaml", "prepare"], ["/no/such.yaml"]),
        (["report", "-", "--policy", "nowhere", "--right"], ["HOST:PORT"]),
        (["report", "-"], ["say --right or --wrong"]),
        (["report", "-", "--right", "--wrong"], ["--right and --wrong exclude each other"]),
        (["report", "-", "--right", "--target", "unix:/run/asd"], ["--policy"]),
        (["report", "-", "--right", "--policy", ""], ["--policy"]),
        (["ask", "hi", "--tls-cert", "/dev/null"], ["--tls-cert and --tls-key"]),
        (["ask", "hi", "--token", "two words"], ["--token:", "one word"]),
        (["ask", "hi", "--token", "a", "--token-file", "/dev/null"], ["--token and --token-file"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(arguments, words):
    result = _RUNNER.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


@pytest.mark.parametrize(("option", "others"), [("--tls-ca", []), ("--tls-cert", ["--tls-key", "/no/key"])])
def test_a_file_for_tls_that_is_not_there_is_named_by_its_option(option, others):
    result = _RUNNER.invoke(app, ["describe", option, "/no/such", *others])
    assert result.exit_code == 1
    assert f"{option} /no/such cannot be read" in result.stderr


def test_a_file_for_a_token_that_is_not_there_is_named_by_its_option():
    result = _RUNNER.invoke(app, ["describe", "--token-file", "/no/such"])
    assert result.exit_code == 2
    assert "--token-file /no/such cannot be read" in result.stderr


def test_a_message_speaks_of_what_was_given():
    result = _RUNNER.invoke(app, ["ask", "hi", "--preference", "cheap"], env={"COLUMNS": "200"})
    assert "Value error" not in result.stderr
    for options, variables, is_named in ((["--target", "a"], {}, False), ([], {"ASD_TARGET": "a"}, True)):
        said = _RUNNER.invoke(app, ["ask", "hi", *options], env={"COLUMNS": "200", **variables}).stderr
        assert "'--target'" in said
        assert ("ASD_TARGET" in said) is is_named


@pytest.mark.parametrize(
    ("prompt", "words"), [("h\u00e9llo", b"LC_ALL=C.UTF-8"), (b"h\xff", b"the text is not valid UTF-8")]
)
def test_a_locale_that_lacks_a_character_is_told_from_a_text_that_is_not_utf8(prompt, words):
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", "ask", prompt],
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "COLUMNS": "200"},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"request_id": 5}', "what?", '{"asd": {}}', '{"asd": {"stages": [5]}}', '{"asd": 5}'],
)
def test_a_report_on_what_is_no_answer_is_refused(text):
    result = _RUNNER.invoke(app, ["report", "-", "--wrong"], input=text)
    assert result.exit_code == 2
    assert "no answer of `asd ask --json` or of the gateway" in result.output


def test_with_json_a_failure_is_an_object_on_standard_error():
    result = _RUNNER.invoke(app, ["ask", "hi", "--seed", "-1", "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert (error["code"], error["field"]) == ("INVALID_ARGUMENT", "--seed")
    assert "-1 " in error["message"]


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        (["ask", "--json", "--lambda", "abc", "hi"], "--lambda", "Invalid value for '--lambda'"),
        (["ask", "--json"], "prompt", "say what to ask"),
        (["ask", "--json", "hi", "--stage", ""], "--stage", "empty"),
        (["ask", "hi", "--json", "--nonsense"], "", "No such option"),
        (["ask", "hi", "--json", "--preference", "best", "--stage", "a"], "", "leave nothing to the policy"),
        (["describe", "--json", "--target", "nowhere"], "--target", "'nowhere' is not HOST:PORT"),
        (["report", "-", "--json"], "", "say --right or --wrong"),
        (["models", "nonsense", "--json"], "", "No such command 'nonsense'"),
        (["demo", "--json=-", "--prompts", "0"], "--prompts", "Invalid value for '--prompts'"),
        (["demo", "--json", "-", "--cascade", "/no/such.yaml"], "", "/no/such.yaml"),
        (["demo", "--json", "/no/such/demo.json"], "--json", "/no/such is not a directory"),
    ],
)
def test_with_json_wrong_usage_is_an_object_as_well(arguments, field, words):
    result = _RUNNER.invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    error = json.loads(result.stderr)["error"]
    assert (error["code"], error["field"]) == ("INVALID_ARGUMENT", field)
    assert words in error["message"]


def test_a_prompt_is_no_option():
    result = _RUNNER.invoke(app, ["ask", "--lambda", "abc", "--", "--json"])
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_an_unknown_process_is_refused_with_the_known_ones(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "cascade.yaml"
    file.write_text("stages: [{name: tiny, path: model, cost: 1}]")
    result = _RUNNER.invoke(app, ["up", "--cascade", str(file), "--only", "policy"])
    assert result.exit_code == 2
    assert "--only policy: this cascade has router, tiny, gateway" in result.output
    result = _RUNNER.invoke(app, ["up", "--cascade", str(file), "--only", "gateway", "--no-gateway"])
    assert result.exit_code == 2
    assert "--only gateway: this cascade has router, tiny" in result.output
    result = _RUNNER.invoke(app, ["up", "--cascade", str(file), "--port-base", "65530"])
    assert result.exit_code == 2
    assert "port 65541" in result.output


@pytest.mark.parametrize(
    ("options", "section", "port"),
    [
        ([], "", 8000),
        # Beside the first cascade.
        (["--port-base", "50150"], "", 50152),
        ([], "gateway: {port: 9000}", 9000),
        (["--port-base", "50150"], "gateway: {port: 9000}", 9000),
        (["--gateway-port", "8001"], "gateway: {port: 9000}", 8001),
        (["--no-gateway"], "gateway: {port: 9000}", None),
    ],
)
def test_the_gateways_port_is_the_options_the_files_or_follows_from_the_base(
    monkeypatch, tmp_path, options, section, port
):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "cascade.yaml"
    file.write_text(f"stages: [{{name: tiny, path: model, cost: 1}}]\n{section}")
    seen = []

    @asynccontextmanager
    async def end(cascade, ports, *_, **options):
        seen.append(ports.gateway)
        raise Signalled(signal.SIGTERM, has_served=True)
        yield

    monkeypatch.setattr(running, "running", end)
    assert _RUNNER.invoke(app, ["up", "--cascade", str(file), *options]).exit_code == 0
    assert seen == [port]


def test_the_curl_line_is_one_command_with_a_body_of_json():
    words = shlex.split(console.curl_line(8001, 'What\'s "it"?', {}))
    assert words[:2] == ["curl", "http://127.0.0.1:8001/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == {"model": "asd", "messages": [{"role": "user", "content": 'What\'s "it"?'}]}


@pytest.mark.parametrize(
    ("variables", "asked", "curled"),
    [
        ({}, 'asd ask "Hi"', "curl http://127.0.0.1:8001/v1/chat/completions"),
        (
            {"ASD_ROUTER_AUTH__TOKENS_FILE": "tokens"},
            'asd ask --token TOKEN "Hi"',
            "curl http://127.0.0.1:8001/v1/chat/completions -H 'content-type: application/json' "
            "-H 'authorization: Bearer TOKEN'",
        ),
        (
            {"ASD_ROUTER_TLS__CERT_FILE": "r.pem", "ASD_GATEWAY_TLS__CERT_FILE": "a b.pem"},
            'asd ask --tls-ca r.pem "Hi"',
            "curl --cacert 'a b.pem' https://127.0.0.1:8001/v1/chat/completions",
        ),
    ],
)
def test_commands_to_try_have_the_tokens_and_certificates_that_are_wanted(variables, asked, curled):
    assert console.ask_line("", "Hi", variables).strip() == asked
    assert console.curl_line(8001, "Hi", variables).strip().startswith(f"{curled} -")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "ascii", "utf-8-sig"])
def test_standard_input_in_another_encoding_is_refused(encoding):
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", "ask", "-", "--target", "127.0.0.1:1"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        input=b"h\xc3\xa9l\xff",
        capture_output=True,
        check=False,
    )
    said = result.stderr.decode(encoding)
    assert "Traceback" not in said
    assert (result.returncode, f"standard input is not {encoding} text" in said) == (2, True)


def test_standard_input_that_is_not_text_is_refused():
    result = _RUNNER.invoke(app, ["ask", "-"], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert "not utf-8 text" in result.output


@pytest.mark.parametrize(
    ("number", "has_served", "code"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGINT, False, 130),
        (signal.SIGHUP, False, 129),
        (signal.SIGTERM, True, 0),
        (signal.SIGHUP, True, 0),
        (signal.SIGINT, True, 130),
    ],
)
def test_a_signal_is_success_only_for_a_cascade_that_served(monkeypatch, number, has_served, code):
    @asynccontextmanager
    async def end(*_, **options):
        raise Signalled(number, has_served=has_served)
        yield

    monkeypatch.setattr(running, "running", end)
    assert _RUNNER.invoke(app, ["up"]).exit_code == code


@pytest.mark.parametrize("arguments", [["ask", "Hi"], ["ask", "Hi", "--json"], ["models"]])
def test_a_closed_output_is_no_place_for_a_result(arguments):
    code = (
        "import asd; from services.cli import __main__ as cli; from tests.unit.cli import test_cli as test;"
        "asd.AsyncClient.stream = test._HostileCascade.stream; cli.main()"
    )
    command = shlex.join([sys.executable, "-c", code, *arguments])
    result = subprocess.run(
        ["/bin/sh", "-c", f"{command} >&-"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (result.returncode, "standard output is closed" in result.stderr) == (1, True)


def test_a_wrong_telemetry_variable_is_named(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    result = _RUNNER.invoke(app, ["ask", "hi"])
    assert result.exit_code == 2
    assert "OTEL_TRACES_EXPORTER=zipkin" in result.output


class _Cascade:
    """Streams a draft that is revised."""

    async def stream(self, request, *, drafts):
        assert drafts
        yield StageStarted("small", 0, "generate")
        yield Drafted(Tokens((1,), "wrong"))
        yield StageStarted("medium", 1, "verify")
        yield Revised(0, 0)
        yield Committed(1, Tokens((2,), "right"))
        if request.input != "cut":
            yield ANSWER


async def test_a_terminal_shows_the_draft_and_keeps_the_answer(monkeypatch):
    shown = []
    monkeypatch.setattr(Live, "update", lambda self, renderable: shown.append(_text(renderable)))
    file = io.StringIO()
    output = LiteralConsole(file=file, force_terminal=True, width=80)
    assert await stream_live(_Cascade(), Request("Hi"), output) == ANSWER
    assert shown == [
        "\nsmall writes …\n",
        "wrong\nsmall writes …\n",
        "wrong\nmedium verifies …\n",
        "\nmedium verifies …\n",
        "right\nmedium verifies …\n",
        "right\nmedium verifies …\n",
    ]
    assert file.getvalue().endswith("right\n")
    with pytest.raises(AsdError, match="without an answer"):
        await stream_live(_Cascade(), Request("cut"), output)


def _text(renderable) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(renderable)
    return file.getvalue()


def test_every_option_of_ask_becomes_part_of_the_request(monkeypatch):
    async def ask(self, request):
        requests.append(request)
        return ANSWER

    requests: list[Request] = []
    monkeypatch.setattr(AsyncClient, "ask", ask)
    options = ["--preference", "best", "--max-cost", "1", "--max-latency-ms", "2", "--min-quality", "0.5"]
    options += ["--max-new-tokens", "3", "--temperature", "0.5", "--top-p", "0.9", "--tolerance", "0.25"]
    options += ["--seed", "7", "--stop", "zz", "--stop", "yy", "--session", "s", "--system", "Be brief."]
    chain = ["--chain", "small", "--chain", "large"]
    result = _RUNNER.invoke(app, ["ask", "--json", "Hi", *options])
    assert (result.exit_code, json.loads(result.stdout)["text"]) == (0, "right")
    assert _RUNNER.invoke(app, ["ask", "--json", "-", "--lambda", "2"], input="Ho\n\n").exit_code == 0
    assert _RUNNER.invoke(app, ["ask", "--json", "Hu", "--stage", "small"]).exit_code == 0
    assert _RUNNER.invoke(app, ["ask", "--json", "Ha", *chain]).exit_code == 0
    assert requests == [
        Request(
            (Message("system", "Be brief."), Message("user", "Hi")),
            Sampling(3, 0.5, 0.9, 7, ("zz", "yy")),
            Objective(None, 1.0, 2.0, 0.5, "best"),
            Acceptance("tolerant", 0.25),
            "s",
        ),
        Request("Ho\n", objective=Objective(quality_value=2.0)),
        Request("Hu", stage="small"),
        Request("Ha", chain=("small", "large")),
    ]


def test_the_form_of_the_answer_becomes_part_of_the_request(monkeypatch, tmp_path):
    async def ask(self, request):
        requests.append(request)
        return ANSWER

    requests: list[Request] = []
    monkeypatch.setattr(AsyncClient, "ask", ask)
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}')
    for options in (
        ["--json-schema", str(file), "--prediction", "As before."],
        ["--json-schema", ' {"type": "array"}', "--top-logprobs", "2"],
        ["--regex", "a+"],
        ["--choice", "a", "--choice", "b"],
    ):
        assert _RUNNER.invoke(app, ["ask", "--json", "Hi", *options]).exit_code == 0
    of_file = Sampling(constraint=Constraint(json_schema='{"type": "object"}'))
    typed = Sampling(constraint=Constraint(json_schema=' {"type": "array"}'), top_logprobs=2)
    assert requests == [
        Request("Hi", of_file, prediction="As before."),
        Request("Hi", typed),
        Request("Hi", Sampling(constraint=Constraint(regex="a+"))),
        Request("Hi", Sampling(constraint=Constraint(choice=("a", "b")))),
    ]


def test_log_probabilities_are_a_table_and_json(monkeypatch):
    async def ask(self, request):
        return scored

    half = (TokenDetail(b"\xc3", (Candidate(5, b"\xc3", 0.0), Candidate(6, b" a", -0.5))),)
    scored = replace(ANSWER, scored_tokens=Tokens((5,), "", (-0.25,), half))
    shown = _text(console.scores(scored.scored_tokens))
    assert [word in shown for word in ("\\xc3", "0.779", "1.000", "' a'", "0.607")] == [True] * 5
    assert "9 tokens more" in _text(console.scores(Tokens(details=half * 39, logprobs=(0.0,) * 39)))
    monkeypatch.setattr(AsyncClient, "ask", ask)
    written = json.loads(_RUNNER.invoke(app, ["ask", "--json", "Hi", "--top-logprobs", "1"]).stdout)
    assert written["scored_tokens"]["details"][0]["likeliest"][1] == {
        "token_id": 6,
        "text": " a",
        "logprob": -0.5,
    }
    assert written["scored_tokens"]["details"][0]["text"] == "\\xc3"


# Sets the title, writes to the clipboard, hides what came before, turns what follows around; and is markup.
HOSTILE = "\x1b]0;title\x07\x1b]52;c;eA==\x07 a\rb \x9b2J \u202e [bold]x[/bold] [/] :smile: é"
SHOWN = "\\x1b]0;title\\x07\\x1b]52;c;eA==\\x07 a\\rb \\x9b2J \\u202e [bold]x[/bold] [/] :smile: é"
_RECORD = StageRecord(
    HOSTILE, 0, HOSTILE, 1, 1, HOSTILE, HOSTILE, None, None, 1, 0, 1, 0, 0, 1, 0, 0, 0, "", (), HOSTILE
)
HOSTILE_ANSWER = Answer(
    *(HOSTILE, HOSTILE, (1,), HOSTILE, HOSTILE, HOSTILE, 0, None, 1.0, 60.0, 0.0, HOSTILE, HOSTILE, HOSTILE),
    stages=(_RECORD, replace(_RECORD, action="prefill")),
)


class _HostileCascade:
    async def stream(self, request, *, drafts=False):
        yield StageStarted(HOSTILE, 0, HOSTILE)
        if drafts:
            yield Drafted(Tokens((1,), HOSTILE))
        yield Committed(1, Tokens((1,), HOSTILE))
        yield HOSTILE_ANSWER


def _has_controls(text: str) -> bool:
    return bool(set(text) & set("\x07\x9b\u202e") or "\x1b]" in text)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


async def test_a_terminal_shows_controls_of_an_answer_and_of_names():
    for show, file in ((stream_live, io.StringIO()), (stream_plain, _Terminal())):
        output = LiteralConsole(file=file, force_terminal=show is stream_live, width=200)
        await show(_HostileCascade(), Request("Hi"), output)
        assert not _has_controls(file.getvalue())
        assert file.getvalue().endswith(f"{SHOWN}\n")
    stage = StageDescription(HOSTILE, 0, HOSTILE, HOSTILE, 1, 1, 1.0, True, 0, False, (HOSTILE,))
    policy = PolicyDescription(HOSTILE, (PolicyStage(HOSTILE, 1.0, 1.0, 0.5, 0.1),), 1, 2, 3, 4, 5)
    file = io.StringIO()
    output = LiteralConsole(file=file, width=1000)
    output.print(console.description(Description((stage,), policy, (HOSTILE,), HOSTILE)))
    output.print(console.answer_line(HOSTILE_ANSWER, "math"), soft_wrap=True)
    assert not _has_controls(file.getvalue())
    # Stage (thrice), model and adapter, engine, policy version, plan; and seven in the line.
    assert file.getvalue().count(SHOWN) >= 13


def test_a_pipe_gets_an_answer_as_it_is_and_json_escapes_it(monkeypatch):
    async def ask(self, request):
        return HOSTILE_ANSWER

    monkeypatch.setattr(AsyncClient, "stream", _HostileCascade.stream)
    monkeypatch.setattr(AsyncClient, "ask", ask)
    result = _RUNNER.invoke(app, ["ask", "Hi"])
    assert result.stdout_bytes == f"{HOSTILE}\n".encode()
    assert not _has_controls(result.stderr)
    assert SHOWN in result.stderr
    result = _RUNNER.invoke(app, ["ask", "Hi", "--json"])
    assert json.loads(result.stdout)["text"] == HOSTILE
    assert not _has_controls(result.stdout)


def test_a_message_of_a_server_is_shown(monkeypatch):
    async def ask(self, request):
        raise InvalidRequest(HOSTILE, field=HOSTILE)

    monkeypatch.setattr(AsyncClient, "ask", ask)
    monkeypatch.setattr(AsyncClient, "describe", lambda self: ask(self, None))
    for arguments in (["describe"], ["describe", "--json"], ["ask", "--json", "Hi"]):
        result = _RUNNER.invoke(app, arguments)
        assert result.exit_code == 2
        assert not _has_controls(result.output)
        if "--json" in arguments:
            assert SHOWN in json.loads(result.stderr)["error"]["message"]
        else:
            assert SHOWN in result.stderr


def test_what_is_asked_comes_from_standard_input_where_it_is_left_out(monkeypatch):
    async def ask(self, request):
        requests.append(request.input)
        return ANSWER

    requests: list[object] = []
    monkeypatch.setattr(AsyncClient, "ask", ask)
    for arguments in (["ask", "--json"], ["ask", "--json", "-"]):
        assert _RUNNER.invoke(app, arguments, input="What?\nNow.\n").exit_code == 0
    assert requests == ["What?\nNow."] * 2
    # Nothing was sent there, or somebody would have to type it.
    assert _RUNNER.invoke(app, ["ask"], input="").exit_code == 2
    monkeypatch.setattr("sys.stdin", _Terminal("typed"))
    for arguments, code in ((["ask", "--json"], 2), (["ask", "--json", "-"], 0)):
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        assert ended.value.code == code
    assert requests[2:] == ["typed"]


@pytest.mark.parametrize("options", [[], ["--json"], ["--system", "Be brief."]])
def test_a_prompt_that_no_message_holds_is_refused_by_its_name(options):
    result = _RUNNER.invoke(app, ["ask", *options], input="x" * 5_000_000)
    assert result.exit_code == 2
    assert "too long" in result.stderr
    if "--json" in options:
        assert json.loads(result.stderr)["error"]["field"] == "prompt"


@pytest.mark.parametrize(("most", "is_late"), [("59.5", True), ("60", False), (None, False)])
def test_a_missed_latency_is_said(monkeypatch, most, is_late):
    async def ask(self, request):
        return replace(ANSWER, latency_ms=60.0)

    async def stream(self, request, *, drafts=False):
        yield await ask(self, request)

    monkeypatch.setattr(AsyncClient, "ask", ask)
    monkeypatch.setattr(AsyncClient, "stream", stream)
    options = ["--max-latency-ms", most] if most else []
    line = _RUNNER.invoke(app, ["ask", "Hi", *options]).stderr
    assert ("over the 59.5 ms" in line) is is_late
    written = json.loads(_RUNNER.invoke(app, ["ask", "Hi", "--json", *options]).stdout)
    assert written["missed_max_latency"] is is_late
    # What is written goes to `asd report`, which says why it cannot report this one.
    refused = _RUNNER.invoke(app, ["report", "-", "--right"], input=json.dumps(written))
    assert "the policy did not judge this answer" in refused.stderr


@pytest.mark.parametrize(
    ("options", "variables", "target"),
    [
        ([], {}, "127.0.0.1:50051"),
        ([], {"ASD_TARGET": "10.0.0.1:7000"}, "10.0.0.1:7001"),
        (["--target", "[::1]:7000"], {"ASD_TARGET": "10.0.0.1:1"}, "[::1]:7001"),
        ([], {"ASD_TARGET": "10.0.0.1:1", "ASD_POLICY": "asd-policy:50051"}, "asd-policy:50051"),
        (["--policy", "a:1"], {"ASD_TARGET": "10.0.0.1:1", "ASD_POLICY": "b:2"}, "a:1"),
    ],
)
def test_a_report_goes_to_the_policy_of_the_cascade_that_answered(monkeypatch, options, variables, target):
    async def report(self, answer, **given):
        asked.append((given["policy_target"], given["correct"]))
        return ReportReceipt(1)

    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(AsyncClient, "report", report)
    judged = json.dumps(asdict(replace(ANSWER, p_correct=0.5, policy_version="v")))
    result = _RUNNER.invoke(app, ["report", "-", "--wrong", *options], input=judged, env=variables)
    assert result.exit_code == 0, result.output
    assert asked == [(target, False)]


@pytest.mark.parametrize("reported_before", [False, True])
def test_a_second_verdict_is_said_not_to_be_counted(monkeypatch, reported_before):
    async def report(self, answer, **given):
        return ReportReceipt(1, reported_before)

    monkeypatch.setattr(AsyncClient, "report", report)
    judged = json.dumps(asdict(replace(ANSWER, p_correct=0.5, policy_version="v")))
    said = _RUNNER.invoke(app, ["report", "-", "--wrong"], input=judged).stdout
    assert "holds 1 report " in said
    assert ("not counted again" in said, "first verdict counts" in said) == (reported_before, reported_before)
    written = json.loads(_RUNNER.invoke(app, ["report", "-", "--wrong", "--json"], input=judged).stdout)
    assert written == {"request_id": "r", "reports": 1, "reported_before": reported_before}


@pytest.mark.parametrize(
    ("options", "variables", "is_asked"),
    [
        ([], {"ASD_TARGET": "10.0.0.1:7000"}, True),
        (["--target", "10.0.0.1:7000"], {}, True),
        (["--cascade", "/no/such.yaml"], {"ASD_TARGET": "10.0.0.1:7000"}, False),
    ],
)
def test_a_demo_asks_the_cascade_of_the_variable(monkeypatch, options, variables, is_asked):
    async def describe(self):
        raise AsdError("asked")

    monkeypatch.setattr(AsyncClient, "describe", describe)
    result = _RUNNER.invoke(app, ["demo", *options], env=variables)
    assert ("10.0.0.1:7000" in result.stderr) is is_asked
    assert ("asd: asked" in result.stderr) is is_asked


def test_a_demo_refuses_a_file_that_cannot_be_written_before_it_asks(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    given = ["demo", "--cascade", "/no/such.yaml", "--json"]
    assert _RUNNER.invoke(app, [*given, str(tmp_path / "file")]).exit_code == 2
    assert _RUNNER.invoke(app, [*given, str(tmp_path / "demo.json")]).exit_code == 2
    # What is tried leaves nothing.
    assert not (tmp_path / "demo.json").exists()

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "open", refuse)
    result = _RUNNER.invoke(
        app, ["demo", "--json", str(tmp_path / "demo.json"), "--cascade", "/no/such.yaml"]
    )
    assert result.exit_code == 2
    assert "permission denied" in result.stderr
    assert "/no/such.yaml" not in result.stderr


def test_a_report_on_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "answer.json"
    file.write_bytes(b"\xff\xfe\x00")
    for arguments, given in (([str(file)], None), (["-"], b"\xff")):
        result = _RUNNER.invoke(app, ["report", *arguments, "--right"], input=given)
        assert result.exit_code == 2
        assert "`asd ask --json`" in result.stderr


def test_json_before_a_command_of_models_holds_for_the_command(tmp_path):
    result = _RUNNER.invoke(app, ["models", "--json", "--cascade", "/no/such.yaml", "prepare"])
    assert json.loads(result.stderr)["error"]["code"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_output_will_do(encoding):
    code = (
        "import asd; from services.cli import __main__ as cli; from tests.unit.cli import test_cli as test;"
        "asd.AsyncClient.stream = test._HostileCascade.stream; cli.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "ask", "Hi"],
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (
        0,
        f"{HOSTILE}\n".encode(encoding, "backslashreplace"),
    )
    assert b"Traceback" not in result.stderr


def _completions(line: str) -> set[str]:
    code = "import sys; from services.cli.__main__ import main; sys.argv[0] = 'asd'; main()"
    asked = {
        "_ASD_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    return set(result.stdout.split())


def test_names_are_completed(tmp_path):
    file = tmp_path / "cascade.yaml"
    file.write_text("stages: [{name: tiny, path: nowhere, cost: 1}, {name: big, path: nowhere, cost: 2}]")
    assert _completions("asd ask --stage ") == {"small", "medium", "large"}
    assert _completions("asd ask --chain small --chain l") == {"large"}
    always = {"router", "policy", "gateway"}
    assert _completions("asd up --only ") == always | {"small", "medium", "large"}
    assert _completions(f"asd up --cascade {file} --only ") == always | {"tiny", "big"}
    assert _completions(f"asd up --cascade {tmp_path / 'none.yaml'} --only ") == always


def test_version_and_help():
    assert _RUNNER.invoke(app, ["--version"]).output == f"asd {VERSION}\n"
    text = _RUNNER.invoke(app, ["--help"]).output
    for name in ("ask", "up", "demo", "describe", "models", "report", "--install-completion"):
        assert name in text


def test_help_loads_neither_grpc_nor_pydantic():
    code = "import sys, services.cli.commands as _; "
    code += "print({'grpc', 'pydantic', 'numpy', 'asd.v1'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
