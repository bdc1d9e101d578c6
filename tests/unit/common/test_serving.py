"""What the settings of servers, and the options of channels, come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from asd.transport.addresses import host_of, is_loopback
from policy_service.settings import PolicySettings
from services.common.addresses import check_target
from services.common.channel import open_channel
from services.common.server import ServerOptions
from services.common.settings import SettingsError
from services.common.tls import ServerTls
from services.router.settings import RouterSettings
from services.scaler.settings import ScalerSettings
from services.stage.settings import StageSettings

if TYPE_CHECKING:
    from services.common.serving import ServerSettings

FILE = """
listen: 0.0.0.0:1
health_listen: 0.0.0.0:2
metrics_listen: 0.0.0.0:3
tls: {cert_file: /tls/tls.crt, key_file: /tls/tls.key, client_ca_file: /tls/ca.crt}
grpc: {max_connection_age_ms: 30000, max_connection_age_grace_ms: 60000}
"""
OWN = {
    RouterSettings: "stages: [{name: small, target: a:1, cost: 1}]\nstatic_plan: [small]\n",
    PolicySettings: "artifact: /policy\n",
    StageSettings: "models: [{name: small, path: /models/small}]\n",
    ScalerSettings: "stages: [{name: small, deployment: asd-small, target: a:1}]\n",
}


def test_an_age_that_grpc_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(OWN[RouterSettings] + f"grpc: {{max_connection_age_ms: {2**31}}}\n")
    with pytest.raises(SettingsError, match="max_connection_age_ms"):
        RouterSettings.load(file)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_every_service_has_the_settings_of_a_server(kind: type[ServerSettings], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FILE + OWN[kind])
    settings = kind.load(file)
    tls = ServerTls(
        cert_file=Path("/tls/tls.crt"), key_file=Path("/tls/tls.key"), client_ca_file=Path("/tls/ca.crt")
    )
    options = settings.server_options()
    assert options == ServerOptions(tls, "0.0.0.0:2", 30_000, 60_000)
    assert options.channel_arguments() == [
        ("grpc.max_connection_age_ms", 30_000),
        ("grpc.max_connection_age_grace_ms", 60_000),
    ]
    assert settings.metrics_listen == "0.0.0.0:3"
    file.write_text(OWN[kind])
    assert kind.load(file).server_options() == ServerOptions()
    assert ServerOptions().channel_arguments() == []


def test_a_name_is_looked_up_again_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def capture(target: str, options: Any, interceptors: Any) -> None:
        given.update(options)

    monkeypatch.setattr(grpc.aio, "insecure_channel", capture)
    open_channel("dns:///asd-policy:50051", retry=False)
    assert given["grpc.dns_min_time_between_resolutions_ms"] == 1000


@pytest.mark.parametrize(
    ("target", "host", "loopback"),
    [
        ("dns:///asd-policy:50051", "asd-policy", False),
        ("asd-policy.models.svc:50051", "asd-policy.models.svc", False),
        ("10.0.0.1:1", "10.0.0.1", False),
        ("[::1]:1", "::1", True),
        ("localhost:1", "localhost", True),
        ("127.0.0.1:1", "127.0.0.1", True),
        ("127.0.0.1:1,127.0.0.2:1", "", True),
        ("127.0.0.1:1,10.0.0.1:1", "", False),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", "", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", "", False),
        ("unix:/run/asd", "", True),
        ("0.0.0.0:1", "0.0.0.0", False),
    ],
)
def test_a_targets_host_and_whether_it_is_here(target: str, host: str, loopback: bool) -> None:
    assert (host_of(target), is_loopback(target)) == (host, loopback)


@pytest.mark.parametrize(
    "target",
    ["a:1", "a:1, b:65535", "dns:///a:50061", "dns://8.8.8.8/a:50061", "[::1]:50061", "unix:/run/asd"],
)
def test_targets_that_can_be_called_are_taken(target):
    assert check_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        *["", "localhost", "a:abc", "a:0", "a:65536", "a:99999", ":50061", "a:1,b", "dns:///a", "a:-1"],
        *["::1", "fe80::1:50061", "my host:50061", "a:1\n", "http://a:80", "unix:", "a:٣"],
    ],
)
def test_targets_without_a_port_that_there_is_are_refused(target):
    with pytest.raises(ValueError, match="HOST:PORT"):
        check_target(target)
