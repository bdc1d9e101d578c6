# ruff: noqa: ASYNC240 - tests change small files
"""Tokens at the router: who is answered, who is refused, and what is open to all."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from asd.client import AsyncClient
from asd.errors import Unauthenticated
from asd.transport.files import UnusableFile
from asd.v1 import cascade_pb2, cascade_pb2_grpc, stage_pb2, stage_pb2_grpc
from asd.values import Request
from services.common.auth import AuthSettings, TokenInterceptor
from services.common.server import ServerOptions, ServiceRegistration, start_server
from tests.integration.common.certificates import Authority
from tests.integration.common.conftest import CALL_S, PROCESS_S, running
from tests.integration.common.test_tls import failing, router_config
from tests.integration.local.conftest import asd
from tests.integration.router.conftest import FakeStage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TOKENS = """
# Who asks what.
alice: s3cret-A
s3cret-B
"""
WRITE = stage_pb2.StageServiceGenerateRequest(prompt="hi")


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(TOKENS)
    return file


@pytest.fixture
async def guarded(tokens_file: Path) -> AsyncIterator[tuple[FakeStage, grpc.aio.Channel]]:
    """A stage behind tokens, for it has calls of every kind, and a plain channel to it."""
    stage = FakeStage("small")
    guard = TokenInterceptor(AuthSettings(tokens_file=tokens_file))
    server, port = await start_server(
        "127.0.0.1:0", [ServiceRegistration(stage.full_name, stage.add)], options=ServerOptions(guard=guard)
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield stage, channel
    await server.stop(0)


async def outcome(channel: grpc.aio.Channel, *values: str) -> str:
    """Return the version that a call with these authorizations gets, or the message of its refusal."""
    metadata = tuple(("authorization", value) for value in values)
    stub = stage_pb2_grpc.StageServiceStub(channel)
    call = stub.Status(stage_pb2.StatusRequest(), timeout=CALL_S, metadata=metadata)
    if await call.code() is grpc.StatusCode.UNAUTHENTICATED:
        return str(await call.details())
    return str((await call).models[0].name)


@pytest.mark.parametrize("value", ["Bearer s3cret-A", "Bearer s3cret-B", "bearer s3cret-B"])
async def test_a_known_token_is_answered(guarded: tuple[FakeStage, grpc.aio.Channel], value: str) -> None:
    assert await outcome(guarded[1], value) == "small"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((), "this cascade wants a token: send it as metadata 'authorization: Bearer TOKEN'"),
        (("Bearer s3cret-C",), "this cascade does not know the token"),
        (("Bearer s3cret",), "this cascade does not know the token"),
        (("Bearer alice: s3cret-A",), "this cascade does not know the token"),
        (("Bearer alice",), "this cascade does not know the token"),
        (("Bearer # Who asks what.",), "this cascade does not know the token"),
        (("Bearer ",), "this cascade does not know the token"),
        (("s3cret-A",), "must read 'Bearer TOKEN'"),
        (("Basic s3cret-A",), "must read 'Bearer TOKEN'"),
        (("Bearer wrong", "Bearer s3cret-A"), "this cascade does not know the token"),
    ],
)
async def test_others_are_refused_with_what_to_do(
    guarded: tuple[FakeStage, grpc.aio.Channel], values: tuple[str, ...], says: str
) -> None:
    message = await outcome(guarded[1], *values)
    assert says in message
    assert "s3cret" not in message


@pytest.mark.parametrize("kind", ["Generate", "VerifyStream"])
async def test_a_stream_is_refused_before_it_begins(
    guarded: tuple[FakeStage, grpc.aio.Channel], kind: str
) -> None:
    stage, channel = guarded
    stub: Any = stage_pb2_grpc.StageServiceStub(channel)
    # A stream of requests is refused though none has come.
    call = stub.Generate(WRITE, timeout=CALL_S) if kind == "Generate" else stub.VerifyStream(timeout=CALL_S)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert stage.calls == []


async def test_health_and_reflection_are_open(guarded: tuple[FakeStage, grpc.aio.Channel]) -> None:
    _, channel = guarded
    asked = health_pb2.HealthCheckRequest(service="asd.v1.StageService")
    answer = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=CALL_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=CALL_S)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = await call.read()
    call.cancel()
    assert "asd.v1.StageService" in {each.name for each in listed.list_services_response.service}


async def test_tokens_are_read_again(guarded: tuple[FakeStage, grpc.aio.Channel], tokens_file: Path) -> None:
    _, channel = guarded
    new = tokens_file.with_suffix(".new")
    new.write_text("s3cret-B\ns3cret-C\n")
    new.rename(tokens_file)
    assert "does not know" in await outcome(channel, "Bearer s3cret-A")
    assert await outcome(channel, "Bearer s3cret-C") == "small"
    # A file that says nothing sensible, or is away, takes nothing from anybody; one that names nobody does.
    tokens_file.write_text("two words\n")
    assert await outcome(channel, "Bearer s3cret-C") == "small"
    tokens_file.unlink()
    assert await outcome(channel, "Bearer s3cret-C") == "small"
    tokens_file.write_text("# nobody\n")
    assert "does not know" in await outcome(channel, "Bearer s3cret-C")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: no such file"),
        ("\n# nobody\n", "holds no token"),
        ("good\ntwo words\n", "line 2 is no token"),
        ("name:\n", "line 1 is no token"),
        ("name:one:two\n", "line 1 is no token"),
        ("gr\u00fc\u00dfe\n", "line 1 is no token"),
    ],
)
def test_a_file_without_usable_tokens_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UnusableFile, match=says) as caught:
        TokenInterceptor(AuthSettings(tokens_file=file))
    assert "auth.tokens_file" in str(caught.value)
    assert "words" not in str(caught.value)


async def test_a_router_that_lacks_its_tokens_ends_with_a_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    config = router_config(auth={"tokens_file": missing})
    code, line = await failing("services.router", config, tmp_path)
    assert code == 1
    assert line == f"asd: auth.tokens_file {missing} cannot be read: no such file or directory"


@pytest.fixture
async def secured(tmp_path: Path, tokens_file: Path) -> AsyncIterator[tuple[str, Authority]]:
    """A router with TLS, a stage behind it, and tokens; its target, and who signed its certificate."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("router", "asd-router")
    stage = FakeStage("small")
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        server, port = await start_server("127.0.0.1:0", [ServiceRegistration(stage.full_name, stage.add)])
        stack.push_async_callback(server.stop, 0)
        config = router_config(
            stages=[{"name": "small", "target": f"127.0.0.1:{port}", "cost": 1}],
            tls={"cert_file": str(cert), "key_file": str(key)},
            auth={"tokens_file": str(tokens_file)},
        )
        router = await stack.enter_async_context(running("services.router", config, tmp_path))
        yield router.target, authority


async def test_the_command_shows_its_token_and_checks_the_router(
    secured: tuple[str, Authority], tmp_path: Path
) -> None:
    target, authority = secured
    tls = ("--tls-ca", str(authority.file), "--tls-server-name", "asd-router")
    token = tmp_path / "token"
    token.write_text("s3cret-A\n")

    async def run(*arguments: str, **variables: str) -> Any:
        return await asyncio.to_thread(asd, *arguments, "--target", target, **variables)

    for arguments, variables in (
        ((*tls, "--token", "s3cret-A"), {}),
        ((*tls, "--token-file", str(token)), {}),
        (tls, {"ASD_TOKEN": "s3cret-B"}),
        (
            (),
            {
                "ASD_TOKEN_FILE": str(token),
                "ASD_TLS_CA": str(authority.file),
                "ASD_TLS_SERVER_NAME": "asd-router",
            },
        ),
    ):
        done = await run("ask", "hi", *arguments, **variables)
        assert (done.returncode, done.stdout) == (0, "one two three\n"), done.stderr
    described = await run("describe", "--json", *tls, "--token", "s3cret-A")
    assert described.returncode == 0, described.stderr

    for arguments, says in (
        (tls, "this cascade wants a token"),
        ((*tls, "--token", "s3cret-C"), "this cascade does not know the token"),
        (("--token", "s3cret-A", *tls[:2]), "shows a certificate for another name"),
        (
            ("--token", "s3cret-A", "--tls", "--tls-server-name", "asd-router"),
            "shows a certificate of an authority that is not trusted",
        ),
        (("--token", "s3cret-A"), "closes the connection: it may want TLS"),
    ):
        done = await run("ask", "hi", *arguments)
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr


async def test_a_batch_and_a_stream_show_the_token_as_well(
    guarded_router: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncClient(guarded_router, token="s3cret-A") as cascade:
        items = [item async for item in cascade.ask_batch([Request("a"), Request("b")])]
        assert len(items) == 2
        events = [event async for event in cascade.stream(Request("a"))]
        assert events[-1].text == "one two three"
    async with AsyncClient(guarded_router) as cascade:
        with pytest.raises(Unauthenticated, match="wants a token"):
            await cascade.ask(Request("a"))
    # On this machine nobody listens in.
    assert "in the clear" not in caplog.text


@pytest.fixture
async def guarded_router(world: Any, tokens_file: Path) -> AsyncIterator[str]:
    """A router in this process that wants tokens."""
    w = await world(FakeStage("small"), static_plan=("small",))
    guard = TokenInterceptor(AuthSettings(tokens_file=tokens_file))
    server, port = await start_server(
        "127.0.0.1:0", [w.servicer.registration()], options=ServerOptions(guard=guard)
    )
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.mark.parametrize(
    ("target", "warns"),
    [
        ("router.example:50050", True),
        ("dns:///asd-router:50050", True),
        ("10.0.0.7:50050", True),
        ("127.0.0.1:50050", False),
        ("localhost:50050", False),
        ("[::1]:50050", False),
        ("dns:///localhost:50050", False),
        ("unix:/run/asd", False),
    ],
)
async def test_a_token_that_travels_in_the_clear_is_warned_of(
    target: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncClient(target, token="s3cret-A"):
        assert ("goes to" in caplog.text and "in the clear" in caplog.text) is warns
    assert "s3cret" not in caplog.text
    caplog.clear()
    async with AsyncClient(target):
        assert caplog.text == ""


def test_what_cannot_be_a_token_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        AsyncClient(token="two\nlines")


async def test_a_refusal_carries_the_details_of_its_status(guarded_router: str) -> None:
    async with grpc.aio.insecure_channel(guarded_router) as channel:
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Describe(cascade_pb2.DescribeRequest(), timeout=CALL_S)
    assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata() or ())
