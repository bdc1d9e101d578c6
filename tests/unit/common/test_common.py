"""Errors, status, cost and settings."""

from __future__ import annotations

import grpc
import pytest

from services.common import errors
from services.common.cost import verify_cost
from services.common.settings import Section, ServiceSettings, SettingsError, service_config
from services.common.status import STATUS_TABLE, public_message, status_of, to_rpc_status


def test_every_error_has_a_row():
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {kind for kind, _ in STATUS_TABLE} == kinds
    assert STATUS_TABLE[-1][0] is errors.AsdError
    for kind, code in STATUS_TABLE:
        assert status_of(kind("x")) is code


def test_foreign_errors_keep_their_text_from_callers():
    assert status_of(ValueError("secret")) is grpc.StatusCode.INTERNAL
    assert "secret" not in to_rpc_status(ValueError("secret")).message
    assert len(public_message(errors.NotFound("x" * 50_000))) == 1000


@pytest.mark.parametrize(
    ("proposed", "passes", "tokens", "expected"),
    [
        (64, 1, 64, 10 * 2.408 / 65),  # All accepted: one pass of 1 + 0.022 * 64.
        (10, 6, 11, 10 * 6.22 / 12),
        (10, 60, 11, 10.0),  # Never above the whole answer's cost.
        (0, 1, 0, 10.0),
    ],
)
def test_verify_cost(proposed, passes, tokens, expected):
    assert verify_cost(10.0, proposed, passes, tokens) == pytest.approx(expected)


class Inner(Section):
    target: str = "a"


class Sample(ServiceSettings):
    """Settings for a test."""

    model_config = service_config("ASD_SAMPLE_")
    listen: str = "x"
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


def test_variables_win_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("listen: file\ninner: {target: file}\nnames: [a, b]\n")
    assert Sample.load(file) == Sample(listen="file", inner=Inner(target="file"), names=("a", "b"))
    monkeypatch.setenv("ASD_SAMPLE_LISTEN", "variable")
    monkeypatch.setenv("ASD_SAMPLE_INNER__TARGET", "variable")
    loaded = Sample.load(file)
    assert (loaded.listen, loaded.inner.target, loaded.names) == ("variable", "variable", ("a", "b"))


def test_unknown_names_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("inner: {tarket: x}\n")
    with pytest.raises(SettingsError, match=r"inner\.tarket"):
        Sample.load(file)
    # What Kubernetes adds for a Service of this name is not ours.
    monkeypatch.setenv("ASD_SAMPLE_PORT_50050_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("ASD_SAMPLE_SERVICE_HOST", "10.0.0.1")
    assert Sample.load(None).listen == "x"
    monkeypatch.setenv("ASD_SAMPLE_LISTN", "y")
    with pytest.raises(SettingsError, match="ASD_SAMPLE_LISTEN"):
        Sample.load(None)
