"""The client for programs of threads: as the one for asyncio, whose tests show what both share."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import closing

import pytest

from asd import (
    Answer,
    AsyncClient,
    Away,
    BudgetSpent,
    Client,
    Committed,
    Failure,
    InvalidRequest,
    Message,
    NotFound,
    PreconditionFailed,
    Request,
    Tls,
    Unauthenticated,
    Unavailable,
)
from asd.v1 import cascade_pb2, policy_pb2, policy_pb2_grpc
from services.common.auth import AuthSettings, TokenInterceptor
from services.common.server import ServerOptions, ServiceRegistration, start_server
from services.common.tls import ServerTls
from tests.integration.client.test_client import HangUp, Leaving
from tests.integration.common.certificates import Authority
from tests.integration.local.conftest import PROMPT
from tests.limits import CALL_S


@pytest.fixture
def cascade(up):
    with Client(up.target) as client:
        yield client


async def in_thread(work, *arguments):
    return await asyncio.wait_for(asyncio.to_thread(work, *arguments), CALL_S)


async def test_both_clients_give_the_same_answers(up):
    async with AsyncClient(up.target) as other:
        expected = await other.ask(PROMPT, max_new_tokens=3)
        described = await other.describe()
    with Client(up.target) as client:
        answer = await in_thread(lambda: client.ask(PROMPT, max_new_tokens=3))
        assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
        assert [each.stage for each in answer.stages] == [each.stage for each in expected.stages]
        assert await in_thread(client.describe) == described


def test_a_stream_is_an_iterator_that_ends_with_the_answer(cascade):
    *events, answer = cascade.stream([Message("user", PROMPT)])
    assert isinstance(answer, Answer)
    assert "".join(each.tokens.text for each in events if isinstance(each, Committed)) == answer.text


def test_a_batch_answers_what_it_can(cascade):
    items = {each.index: each.outcome for each in cascade.ask_batch([Request(PROMPT), Request("")])}
    assert items[0].stage == "medium"
    assert isinstance(items[1], Failure)


@pytest.mark.parametrize(
    ("question", "options", "error", "field"),
    [("", {}, InvalidRequest, "prompt"), ("Hi", {"stage": "huge"}, NotFound, "stage")],
)
def test_a_refused_request_raises_by_kind_and_field(cascade, question, options, error, field):
    for attempt in (cascade.ask, lambda *args, **given: next(cascade.stream(*args, **given))):
        with pytest.raises(error) as refused:
            attempt(question, **options)
        assert refused.value.field.removeprefix("request.") == field


def test_threads_share_a_client(cascade):
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(cascade.ask(PROMPT).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CALL_S)
    assert len(texts) == 4
    assert len(set(texts)) == 1


def test_every_call_ends_at_its_deadline_and_absence_is_told():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with Client(target) as client:
            for attempt in (
                lambda: client.ask(PROMPT, timeout_ms=50),
                lambda: client.describe(timeout_ms=50),
                lambda: next(client.stream(PROMPT, timeout_ms=50)),
            ):
                with pytest.raises(BudgetSpent, match="50 ms"):
                    attempt()
    with Client(target) as client, pytest.raises(Away, match="no cascade answers"):
        client.ask(PROMPT)
    with pytest.raises(BudgetSpent, match="no time left"):
        Client(target, timeout_ms=0).ask(PROMPT)


def texts(client):
    """Return the texts of a unary and of a streamed answer."""
    return client.ask("hi").text, [*client.stream("hi")][-1].text


async def test_calls_that_a_stopping_router_has_not_begun_are_made_again():
    router = Leaving(cancels=7)
    server, port = await router.start()
    with Client(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3) as client:
        await in_thread(client.describe)
        assert await in_thread(texts, client) == ("19", "19")
    assert router.calls == 7 + 2
    await server.stop(0)


async def test_a_router_that_restarts_is_waited_for():
    server, port = await Leaving().start()
    with Client(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3) as client:
        assert await in_thread(texts, client) == ("19", "19")
        await server.stop(0)
        hang_up = await HangUp.start(port)
        waiting = asyncio.create_task(in_thread(texts, client))
        await hang_up.often.wait()
        await hang_up.stop()
        server, _ = await Leaving().start(f"127.0.0.1:{port}")
        assert await waiting == ("19", "19")
    await server.stop(0)


async def test_a_stream_that_a_router_has_begun_is_not_made_again():
    router = Leaving(cancels=1, begins=True)
    server, port = await router.start()
    with Client(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3) as client:
        await in_thread(client.describe)
        with pytest.raises(Unavailable, match="shutting down"):
            await in_thread(lambda: [*client.stream("hi")])
    assert router.calls == 1
    await server.stop(0)


async def test_a_stream_that_is_left_ends_the_call():
    class Endless(Leaving):
        async def GenerateStream(self, request, context):  # noqa: N802 - the proto's name
            try:
                while True:
                    yield cascade_pb2.GenerateStreamResponse(
                        stage_started=cascade_pb2.StageStarted(stage="small")
                    )
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

    def leave(client):
        with closing(client.stream("hi")) as events:
            next(events)

    ended = asyncio.Event()
    server, port = await Endless().start()
    with Client(f"127.0.0.1:{port}") as client:
        await in_thread(leave, client)
        await asyncio.wait_for(ended.wait(), CALL_S)
    await server.stop(0)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_closed_client_says_so(kind):
    client = Client("127.0.0.1:1")
    client.close()
    with pytest.raises(PreconditionFailed, match="closed"):
        await in_thread(lambda: client.describe() if kind == "unary" else [*client.stream("hi")])


async def test_a_closed_client_for_asyncio_says_so():
    async with AsyncClient("127.0.0.1:1") as client:
        pass
    with pytest.raises(PreconditionFailed, match="closed"):
        await client.describe()


async def test_a_router_that_is_unavailable_keeps_its_own_words():
    class Unable(Leaving):
        async def Describe(self, request, context):  # noqa: N802 - the proto's name
            raise Unavailable("stage large is away")

    server, port = await Unable().start()
    client = Client(f"127.0.0.1:{port}", timeout_ms=CALL_S * 1e3)
    with client, pytest.raises(Unavailable, match="stage large is away"):
        await in_thread(client.describe)
    await server.stop(0)


async def test_what_is_no_router_is_told():
    server, port = await start_server("127.0.0.1:0", [])
    with Client(f"127.0.0.1:{port}") as client:
        with pytest.raises(PreconditionFailed, match="router"):
            await in_thread(client.describe)
        answer = Answer("r", "", (), "", "eos", "a", 0, 0.5, 1.0, 1.0, 0.0, "policy", "v", "", ())
        with pytest.raises(PreconditionFailed, match="policy service"):
            await in_thread(lambda: client.report(answer, correct=True, policy_target=f"127.0.0.1:{port}"))
    await server.stop(0)


async def test_a_report_reaches_the_policy_service():
    class Policy(policy_pb2_grpc.PolicyServiceServicer):
        async def Report(self, request, context):  # noqa: N802 - the proto's name
            received.append(request.correct)
            return policy_pb2.ReportResponse(reports=7)

    received = []
    registration = ServiceRegistration(
        "asd.v1.PolicyService",
        lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(Policy(), server),
    )
    server, port = await start_server("127.0.0.1:0", [registration])
    answer = Answer("r", "", (), "", "eos", "a", 0, 0.5, 1.0, 1.0, 0.0, "policy", "v", "", ())
    with Client() as client:
        receipt = await in_thread(
            lambda: client.report(answer, correct=True, policy_target=f"127.0.0.1:{port}")
        )
    assert (receipt.reports, received) == (7, [True])
    await server.stop(0)


async def test_it_shows_a_token_over_tls_and_takes_new_certificates(tmp_path):
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    tokens = tmp_path / "tokens"
    tokens.write_text("s3cret\n")
    trusted = tmp_path / "ca.crt"

    async def serve(authority, name):
        cert, key = authority.issue(name, "asd-router")
        guard = TokenInterceptor(AuthSettings(tokens_file=tokens))
        options = ServerOptions(guard=guard, tls=ServerTls(cert_file=cert, key_file=key))
        return await Leaving().start(options=options)

    server, port = await serve(first, "one")
    other_server, other_port = await serve(second, "two")
    trusted.write_bytes(first.file.read_bytes())
    tls = Tls(ca_file=trusted, server_name="asd-router")
    with Client(f"127.0.0.1:{port}", tls=tls, token="s3cret") as client:
        assert (await in_thread(client.describe)).version == "1"
    with Client(f"127.0.0.1:{port}", tls=tls) as client, pytest.raises(Unauthenticated):
        await in_thread(client.describe)
    with Client(f"127.0.0.1:{other_port}", tls=tls, token="s3cret") as client:
        with pytest.raises(Unavailable, match=r"tls\.ca_file"):
            await in_thread(client.describe)
        second.trust_instead(trusted)
        assert (await in_thread(client.describe)).version == "1"
    await server.stop(0)
    await other_server.stop(0)
