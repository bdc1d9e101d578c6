# ruff: noqa: N802 - methods have the protos' names
"""Encrypted connections: who is trusted, who is refused, and certificates that change while services run."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import AsyncExitStack
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import ValidationError

from asd.errors import Unavailable
from asd.transport.channel import call_stream, call_unary
from asd.transport.files import UnusableFile
from asd.v1 import cascade_pb2, cascade_pb2_grpc, stage_pb2, stage_pb2_grpc
from services.common.channel import open_channel
from services.common.server import (
    CannotListen,
    ServerOptions,
    ServiceRegistration,
    start_health_server,
    start_server,
)
from services.common.tls import ClientTls, ServerTls, server_credentials
from services.router.clients.replicas import Replicas
from tests.integration.common.certificates import Authority
from tests.integration.common.conftest import CALL_S, PROCESS_S, Health, running
from tests.integration.router.conftest import FakeStage, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    Serve = Callable[..., Any]

HOST = "127.0.0.1"
STATUS = stage_pb2.StatusRequest()
WRITE = stage_pb2.StageServiceGenerateRequest(prompt="hi")


class Peers(FakeStage):
    """A stage that knows from which connection each call came."""

    def __init__(self, **options: Any) -> None:
        super().__init__("small", **options)
        self.peers: list[str] = []

    async def Status(self, request: object, context: Any) -> Any:
        self.peers.append(context.peer())
        return await super().Status(request, context)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Return a function that serves a stage with TLS settings and returns its target."""
    async with AsyncExitStack() as stack:

        async def start(tls: ServerTls, stage: FakeStage | None = None) -> str:
            fake = stage or FakeStage("small")
            server, port = await start_server(
                f"{HOST}:0", [ServiceRegistration(fake.full_name, fake.add)], options=ServerOptions(tls)
            )
            stack.push_async_callback(server.stop, 0)
            return f"{HOST}:{port}"

        yield start


async def status(target: str, tls: ClientTls | None) -> str:
    """Return the name of the model that a stage says it has, over a channel of its own."""
    async with open_channel(target, tls=tls) as channel:
        return await ask(stage_pb2_grpc.StageServiceStub(channel))


async def ask(stub: Any) -> str:
    answer = await call_unary(stub.Status, STATUS, timeout_ms=CALL_S * 1e3)
    return answer.models[0].name  # type: ignore[no-any-return]


def server_tls(pair: tuple[Path, Path], client_ca_file: Path | None = None) -> ServerTls:
    return ServerTls(cert_file=pair[0], key_file=pair[1], client_ca_file=client_ca_file)


async def test_a_client_that_trusts_the_authority_is_answered(authority: Authority, serve: Serve) -> None:
    target = await serve(server_tls(authority.issue("server", HOST)))
    assert await status(target, ClientTls(ca_file=authority.file)) == "small"


async def test_a_server_of_another_authority_is_refused(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    target = await serve(server_tls(authority.issue("server", HOST)))
    with pytest.raises(Unavailable):
        await status(target, ClientTls(ca_file=Authority(tmp_path, "other").file))
    with pytest.raises(Unavailable):
        # The system's authorities.
        await status(target, ClientTls())


async def test_a_plain_client_is_refused(authority: Authority, serve: Serve) -> None:
    target = await serve(server_tls(authority.issue("server", HOST)))
    with pytest.raises(Unavailable):
        await status(target, None)


async def test_a_client_that_shows_no_certificate_is_refused_where_one_is_wanted(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    target = await serve(server_tls(authority.issue("server", HOST), authority.file))
    cert, key = authority.issue("client", "router")
    known = ClientTls(ca_file=authority.file, cert_file=cert, key_file=key)
    assert await status(target, known) == "small"
    with pytest.raises(Unavailable):
        await status(target, ClientTls(ca_file=authority.file))
    cert, key = Authority(tmp_path, "other").issue("foreign", "router")
    with pytest.raises(Unavailable):
        await status(target, ClientTls(ca_file=authority.file, cert_file=cert, key_file=key))


async def test_the_name_in_the_certificate_is_checked(authority: Authority, serve: Serve) -> None:
    target = await serve(server_tls(authority.issue("server", "asd-stage-small")))
    with pytest.raises(Unavailable):
        await status(target, ClientTls(ca_file=authority.file))
    with pytest.raises(Unavailable):
        await status(target, ClientTls(ca_file=authority.file, server_name="asd-stage-large"))
    assert await status(target, ClientTls(ca_file=authority.file, server_name="asd-stage-small")) == "small"


@pytest.mark.parametrize(("name", "is_answered"), [("asd-stage-small", True), ("asd-stage-large", False)])
async def test_a_replica_called_by_its_address_must_show_its_services_name(
    authority: Authority, serve: Serve, name: str, is_answered: bool
) -> None:
    target = await serve(server_tls(authority.issue("server", "asd-stage-small")))

    async def resolve(asked: str) -> list[str]:
        assert asked == f"{name}:50061"
        return [target]

    replicas = Replicas(f"dns:///{name}:50061", lambda: 0.0, resolve, tls=ClientTls(ca_file=authority.file))
    replica = await replicas.choose("a")
    if is_answered:
        assert await ask(replica.stub) == "small"
    else:
        with pytest.raises(Unavailable):
            await ask(replica.stub)
    await replicas.close()


async def test_a_server_shows_its_new_certificate_without_a_restart(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    stage = FakeStage("small", pause_after=1)
    target = await serve(server_tls(authority.issue("server", HOST)), stage)
    renewed = Authority(tmp_path, "renewed")
    async with open_channel(target, tls=ClientTls(ca_file=authority.file)) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)
        stream = call_stream(stub.Generate, WRITE, timeout_ms=CALL_S * 1e3)
        await anext(stream)
        renewed.issue("server", HOST)
        assert await status(target, ClientTls(ca_file=renewed.file)) == "small"
        with pytest.raises(Unavailable):
            await status(target, ClientTls(ca_file=authority.file))
        # What was up stays up.
        assert await ask(stub) == "small"
        stage.gate.set()
        assert [event.result.text async for event in stream][-1] == "one two three"


async def test_a_server_asks_for_certificates_of_its_new_authority(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    clients = Authority(tmp_path, "clients")
    target = await serve(server_tls(authority.issue("server", HOST), clients.file))
    cert, key = clients.issue("client", "router")
    first = ClientTls(ca_file=authority.file, cert_file=cert, key_file=key)
    assert await status(target, first) == "small"
    renewed = Authority(tmp_path, "renewed")
    renewed.trust_instead(clients.file)
    with pytest.raises(Unavailable):
        await status(target, first)
    cert, key = renewed.issue("client2", "router")
    second = ClientTls(ca_file=authority.file, cert_file=cert, key_file=key)
    assert await status(target, second) == "small"


@pytest.mark.parametrize("damage", ["garbage", "another key", "gone"])
async def test_a_certificate_that_cannot_be_used_leaves_the_last_one_in_force(
    authority: Authority, serve: Serve, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = authority.issue("server", HOST)
    target = await serve(server_tls((cert, key)))
    if damage == "garbage":
        cert.write_text("no certificate")
    elif damage == "another key":
        authority.issue("other", HOST)[1].rename(key)
    else:
        key.unlink()
    with caplog.at_level(logging.ERROR, "asd.transport.files"):
        for _ in range(2):
            assert await status(target, ClientTls(ca_file=authority.file)) == "small"
    # It is said once, not for every connection.
    (record,) = caplog.records
    assert "stays in force" in record.message
    assert "tls.key_file" in record.message
    Authority(tmp_path, "renewed").issue("server", HOST)
    assert await status(target, ClientTls(ca_file=tmp_path / "renewed.pem")) == "small"


async def test_a_channel_takes_up_new_certificates_and_finishes_what_it_has(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    stage = Peers(pause_after=1)
    clients = Authority(tmp_path, "clients")
    target = await serve(server_tls(authority.issue("server", HOST), clients.file), stage)
    cert, key = clients.issue("client", "router")
    tls = ClientTls(ca_file=authority.file, cert_file=cert, key_file=key)
    async with open_channel(target, tls=tls) as channel:
        stub = stage_pb2_grpc.StageServiceStub(channel)
        stream = call_stream(stub.Generate, WRITE, timeout_ms=CALL_S * 1e3)
        await anext(stream)
        await ask(stub)
        await ask(stub)
        assert len(set(stage.peers)) == 1
        # Both ends renew: with what it read first, the channel could not connect again.
        renewed = Authority(tmp_path, "renewed")
        renewed.trust_instead(authority.file)
        renewed.trust_instead(clients.file)
        renewed.issue("server", HOST)
        renewed.issue("client", "router")
        assert await ask(stub) == "small"
        assert len(set(stage.peers)) == 2
        assert await ask(stub) == "small"
        assert len(set(stage.peers)) == 2
        stage.gate.set()
        assert [event.result.text async for event in stream][-1] == "one two three"


def unusable(tmp_path: Path, authority: Authority, case: str) -> ServerTls:
    cert, key = authority.issue("server", HOST)
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    return {
        "missing": ServerTls(cert_file=tmp_path / "no.crt", key_file=key),
        "no PEM": ServerTls(cert_file=junk, key_file=key),
        "another key": ServerTls(cert_file=cert, key_file=authority.issue("other", HOST)[1]),
        "no authority": ServerTls(cert_file=cert, key_file=key, client_ca_file=junk),
    }[case]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", r"^tls\.cert_file \S+/no\.crt cannot be read: no such file or directory$"),
        ("no PEM", r"^tls\.cert_file \S+/junk\.pem and tls\.key_file \S+: not a certificate and its key"),
        ("another key", r"other\.key: the key is not the certificate's$"),
        ("no authority", r"^tls\.client_ca_file \S+/junk\.pem: holds no certificate in PEM$"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    authority: Authority, tmp_path: Path, case: str, says: str
) -> None:
    with pytest.raises(UnusableFile, match=says):
        server_credentials(unusable(tmp_path, authority, case))


def test_a_clients_files_are_named_too(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match=r"^tls\.ca_file \S+/no\.pem cannot be read"):
        open_channel("127.0.0.1:1", tls=ClientTls(ca_file=tmp_path / "no.pem"))
    with pytest.raises(UnusableFile, match=r"^tls\.ca_file \S+/no\.pem cannot be read"):
        Replicas("dns:///stage:1", lambda: 0.0, tls=ClientTls(ca_file=tmp_path / "no.pem"))
    with pytest.raises(ValidationError, match="cert_file and key_file belong together"):
        ClientTls(cert_file=tmp_path / "a.crt")


async def failing(module: str, config: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Return the exit code and the last logged line of a process that cannot start."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "--config", str(file)), stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(PROCESS_S):
        _, log = await process.communicate()
    assert process.returncode is not None
    assert "Traceback" not in log.decode()
    return process.returncode, log.decode().splitlines()[-1]


def router_config(**more: Any) -> dict[str, Any]:
    return {
        "listen": f"{HOST}:0",
        "stages": [{"name": "small", "target": f"{HOST}:1", "cost": 1}],
        "static_plan": ["small"],
        **more,
    }


@pytest.mark.parametrize("where", ["server", "policy"])
async def test_a_router_without_its_files_ends_with_a_sentence(tmp_path: Path, where: str) -> None:
    missing = str(tmp_path / "no.pem")
    config = {
        "server": router_config(tls={"cert_file": missing, "key_file": missing}),
        "policy": router_config(policy={"target": f"{HOST}:1", "tls": {"ca_file": missing}}),
    }[where]
    name = {"server": "tls.cert_file", "policy": "policy.tls.ca_file"}[where]
    code, line = await failing("services.router", config, tmp_path)
    assert code == 1
    assert line.startswith(f"asd: {name} {missing} ")


async def test_a_health_port_serves_health_and_nothing_else() -> None:
    servicer = health.aio.HealthServicer()
    await servicer.set("asd.v1.StageService", health_pb2.HealthCheckResponse.SERVING)
    server, port = await start_health_server(f"{HOST}:0", servicer)
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        asked = health_pb2.HealthCheckRequest(service="asd.v1.StageService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=CALL_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stage_pb2_grpc.StageServiceStub(channel).Status(STATUS, timeout=CALL_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(CannotListen, match="set `health_listen`"):
        await start_health_server(f"{HOST}:{port}", servicer)
    await server.stop(0)


async def test_a_whole_cascade_is_encrypted_and_its_probes_are_not(
    authority: Authority, serve: Serve, tmp_path: Path
) -> None:
    stage = FakeStage("small")
    target = await serve(server_tls(authority.issue("stage", "asd-stage-small"), authority.file), stage)
    (cert, key), (own_cert, own_key) = authority.issue("client", "router"), authority.issue("router", HOST)
    client = {"ca_file": str(authority.file), "cert_file": str(cert), "key_file": str(key)}
    probed = f"{HOST}:{free_port()}"
    config = router_config(
        stages=[
            {
                "name": "small",
                "target": target,
                "cost": 1,
                "tls": {**client, "server_name": "asd-stage-small"},
            }
        ],
        tls={"cert_file": str(own_cert), "key_file": str(own_key)},
        health_listen=probed,
    )
    async with asyncio.timeout(PROCESS_S), AsyncExitStack() as stack:
        router = await stack.enter_async_context(running("services.router", config, tmp_path))
        tls = ClientTls(ca_file=authority.file)
        channel = await stack.enter_async_context(open_channel(router.target, tls=tls))
        stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        answer = await call_unary(
            stub.Generate, cascade_pb2.GenerateRequest(prompt="hi"), timeout_ms=CALL_S * 1e3
        )
        assert answer.text == stage.text
        plain = await stack.enter_async_context(grpc.aio.insecure_channel(probed))
        watched = Health(plain, "asd.v1.CascadeService")
        assert await watched.next() == "SERVING"
        router.process.send_signal(signal.SIGTERM)
        assert await watched.next() == "NOT_SERVING"
        code, _ = await router.end()
        assert code == 0
