"""Errors, status, cost and settings."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from asd import errors
from asd.transport.status import DETAILS_KEY, from_rpc_error, status_of
from services.common.cost import verify_cost
from services.common.errors import Draining
from services.common.settings import Section, ServiceSettings, SettingsError, service_config
from services.common.status import REASONS, STATUS_TABLE, public_message, to_rpc_status


def test_every_error_has_a_row():
    told = [kind for kind in vars(errors).values() if getattr(kind, "__module__", "") == errors.__name__]
    kinds = {kind for kind in (*told, Draining) if issubclass(kind, Exception)}
    assert {kind for kind, _ in STATUS_TABLE} == kinds
    assert STATUS_TABLE[-1][0] is errors.AsdError
    for kind, code in STATUS_TABLE:
        assert status_of(kind("x")) is code


def over_the_wire(error):
    """Return what the caller of a call that ended with an error makes of it."""
    trailing = grpc.aio.Metadata((DETAILS_KEY, to_rpc_status(error).SerializeToString()))
    failed = grpc.aio.AioRpcError(
        status_of(error), grpc.aio.Metadata(), trailing, details=public_message(error)
    )
    return from_rpc_error(failed, peer="stage small at 127.0.0.1:1")


@pytest.mark.parametrize(
    "kind",
    [kind for kind in REASONS if issubclass(kind, errors.InvalidRequest)],
    ids=lambda kind: kind.__name__,
)
def test_a_models_refusal_is_told_from_a_request_that_breaks_the_contract(kind):
    told = over_the_wire(kind("600 tokens", field="prompt"))
    assert (type(told), told.message, told.field) == (kind, "600 tokens", "prompt")
    told = over_the_wire(errors.InvalidRequest("temperature 3", field="sampling.temperature"))
    assert (type(told), told.field) == (errors.InvalidRequest, "sampling.temperature")


def test_the_reasons_of_others_are_not_ours():
    status = to_rpc_status(errors.PromptTooLong("x"))
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    for domain, code, kind in (
        ("example.com", grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        # A reason does not make one code into another.
        (info.domain, grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
    ):
        info.domain = domain
        detail.Pack(info)
        trailing = grpc.aio.Metadata((DETAILS_KEY, status.SerializeToString()))
        failed = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details="x")
        assert type(from_rpc_error(failed)) is kind


def test_foreign_errors_keep_their_text_from_callers():
    assert status_of(ValueError("secret")) is grpc.StatusCode.INTERNAL
    assert "secret" not in to_rpc_status(ValueError("secret")).message
    assert len(public_message(errors.NotFound("x" * 50_000))) == 1000


def as_told(error):
    """Return an error as whoever called the service that raised it sees it."""
    details = grpc.aio.Metadata((DETAILS_KEY, to_rpc_status(error).SerializeToString()))
    return from_rpc_error(grpc.aio.AioRpcError(status_of(error), grpc.aio.Metadata(), details, str(error)))


def test_a_service_that_is_about_to_end_is_told_from_one_that_says_what_is_away():
    # A router whose stage is away is there itself: calling it again tells nothing new.
    assert type(as_told(errors.Unavailable("no stage"))) is errors.Unavailable
    assert type(as_told(errors.Away("no stage"))) is errors.Unavailable
    assert type(as_told(Draining("shutting down"))) is errors.Away
    assert as_told(errors.InvalidRequest("no", field="prompt")).field == "prompt"


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.QueueFull, errors.ResourceExhausted])
def test_a_refusal_says_when_to_ask_again(kind):
    told = as_told(kind("full", retry_after_s=1.25))
    assert type(told) is kind
    assert told.retry_after_s == 1.25
    # What is too large stays so.
    assert as_told(kind("full")).retry_after_s is None


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        # What a stopped server does with calls that it has not handed to a handler.
        (grpc.StatusCode.CANCELLED, errors.Away),
        # A connection that is refused, or ends.
        (grpc.StatusCode.UNAVAILABLE, errors.Away),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.BudgetSpent),
        (grpc.StatusCode.INTERNAL, errors.AsdError),
    ],
)
def test_what_grpc_says_without_the_service_means_that_it_is_away(code, kind):
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), code.name)
    assert type(from_rpc_error(error)) is kind


# What gRPC 1.85 says of calls that broke: a reset, a cut connection, an answer that is no HTTP/2.
BROKEN = [
    (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "RST_STREAM (Received RST_STREAM with error code 11)"),
    (grpc.StatusCode.UNAVAILABLE, "Stream removed (Socket closed)"),
    (grpc.StatusCode.INTERNAL, "Stream removed (Failed parsing HTTP/2 (Incomplete header))"),
    (grpc.StatusCode.UNKNOWN, "Failed parsing HTTP/2"),
]


@pytest.mark.parametrize(("code", "text"), BROKEN)
def test_a_connection_that_broke_means_that_its_service_is_away(code, text):
    nothing = grpc.aio.Metadata()
    assert type(from_rpc_error(grpc.aio.AioRpcError(code, nothing, nothing, text))) is errors.Away
    # The text in quotes, as a proxy's message may have it, says nothing of this connection.
    quoted = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, nothing, nothing, f"no stage {text!r}")
    assert type(from_rpc_error(quoted)) is errors.NotFound


@pytest.mark.parametrize("text", [text for _, text in BROKEN])
def test_what_a_service_says_itself_is_no_broken_connection(text):
    """Its message may hold what the caller wrote."""
    for message in (text, f"no stage {text!r}; the cascade has small, large"):
        for kind in (errors.NotFound, errors.InvalidRequest, errors.ResourceExhausted, errors.AsdError):
            assert type(as_told(kind(message))) is kind


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


@pytest.mark.parametrize("text", ["[", "a,b"])
def test_a_variable_that_is_no_json_is_named(monkeypatch, text):
    monkeypatch.setenv("ASD_SAMPLE_NAMES", text)
    with pytest.raises(SettingsError, match=r"^ASD_SAMPLE_NAMES is not JSON"):
        Sample.load(None)


def test_a_variable_that_is_wrong_is_named_and_not_the_file_that_it_wins_over(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("names: [a, b]\n")
    monkeypatch.setenv("ASD_SAMPLE_NAMES", "[1]")
    with pytest.raises(SettingsError, match=r"^ASD_SAMPLE_NAMES: names\.0: "):
        Sample.load(file)
    # Where the file is wrong, too, it is named.
    file.write_text("inner: {tarket: x}\n")
    with pytest.raises(SettingsError, match=r"config\.yaml: .*inner\.tarket"):
        Sample.load(file)


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
