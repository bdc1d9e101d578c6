"""Stages that go away and come back: who waits for them, and who is answered by another one."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from asd.errors import AsdError, Away, InvalidRequest, NotFound, QueueFull, Unavailable
from asd.transport.patience import Patience
from asd.transport.status import DETAILS_KEY, status_of
from asd.v1 import stage_pb2
from asd.values import FinishReason
from services.common.status import to_rpc_status
from services.router.cascade import Cascade
from services.router.clients.stage import GrpcStage
from services.router.domain import (
    RoutedAnswer,
    RoutedRequest,
    ScoredTokens,
    Stage,
    StageResult,
    Timing,
    TokenUsage,
    Verification,
    Visibility,
)
from services.router.planning.static_plan import StaticPlan
from tests.unit.router.small_cascade import make_planner, show_nothing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator

TIMEOUT_MS = 60_000.0
CANCELLED = grpc.aio.AioRpcError(
    grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "CANCELLED"
)
REFUSED = grpc.aio.AioRpcError(
    grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "connection refused"
)
RESULT = stage_pb2.StageServiceGenerateResponse(
    result=stage_pb2.StageResult(text="19", token_ids=[1], finish_reason=1, model="m")
)


def said(error: AsdError) -> grpc.aio.AioRpcError:
    """Return an error as gRPC reports it where a service's handler raised it."""
    details = grpc.aio.Metadata((DETAILS_KEY, to_rpc_status(error).SerializeToString()))
    return grpc.aio.AioRpcError(status_of(error), grpc.aio.Metadata(), details, error.message)


class Time:
    """Seconds that pass while something sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses = 0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.now += seconds


class Call:
    """A call of gRPC's that sends messages, and ends with an error where there is one among them."""

    def __init__(self, script: list[Any]) -> None:
        self._script = script

    async def __aiter__(self) -> AsyncIterator[Any]:
        for each in self._script:
            if isinstance(each, Exception):
                raise each
            yield each

    def cancel(self) -> None:
        pass


class Site:
    """The replicas of a stage. scripts: by address, what each call there does; the last one again and again.

    appears: an address that is found once those that are known were tried.
    """

    def __init__(self, scripts: dict[str, list[list[Any]]], appears: str = "") -> None:
        self.scripts = scripts
        self.called: list[str] = []
        self._appears = appears
        self._known = [address for address in scripts if address != appears]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self._known)

    async def choose(self, key: str, tried: Collection[str] = ()) -> Any:
        for address in self._known:
            if address not in tried:
                return SimpleNamespace(address=address, stub=SimpleNamespace(Generate=self._method(address)))
        raise Away("no replica")

    async def find_other(self, tried: Collection[str]) -> bool:
        if self._appears and self._appears not in self._known:
            self._known.append(self._appears)
        return any(address not in tried for address in self._known)

    @contextmanager
    def calling(self, replica: Any) -> Iterator[None]:
        yield

    def _method(self, address: str) -> Any:
        def call(message: Any, **_: Any) -> Call:
            self.called.append(address)
            scripts = self.scripts[address]
            return Call(scripts.pop(0) if len(scripts) > 1 else scripts[0])

        return call


@pytest.fixture
def time() -> Time:
    return Time()


async def ask(site: Any, time: Time, request: RoutedRequest, *, was_there: bool = True) -> str:
    """Return the text of the result that a stage at a site gives."""
    patience = Patience(time, time.sleep)
    if was_there:
        patience.there()
    return await text_of(stage_at(site, time, patience), request)


def stage_at(site: Any, time: Time, patience: Patience) -> GrpcStage:
    return GrpcStage(Stage("small", 0, 1.0, TIMEOUT_MS), site, time, 1, (), patience)


async def text_of(stage: GrpcStage, request: RoutedRequest) -> str:
    async def emit(event: ScoredTokens | Verification) -> None:
        """Take what comes before the result."""

    return (await stage.generate(request, TIMEOUT_MS, emit)).text


FIXED = RoutedRequest("hi", id="id", stage="small")
CHAINED = RoutedRequest("hi", id="id", chain=("small", "large"))
PLANNED = RoutedRequest("hi", id="id")


@pytest.mark.parametrize("request_", [FIXED, CHAINED, PLANNED])
@pytest.mark.parametrize("error", [CANCELLED, REFUSED, said(Unavailable("no"))])
async def test_what_a_replica_has_not_begun_goes_to_another_one_at_once(
    time: Time, request_: RoutedRequest, error: Exception
) -> None:
    site = Site({"a": [[error]], "b": [[RESULT]]})
    assert await ask(site, time, request_) == "19"
    assert site.called == ["a", "b"]
    assert time.pauses == 0


async def test_a_replica_that_has_taken_the_place_of_another_is_looked_for(time: Time) -> None:
    site = Site({"old": [[CANCELLED]], "new": [[RESULT]]}, appears="new")
    assert await ask(site, time, PLANNED) == "19"
    assert site.called == ["old", "new"]


@pytest.mark.parametrize("request_", [FIXED, CHAINED])
async def test_a_request_that_names_its_stage_waits_for_its_return(
    time: Time, request_: RoutedRequest
) -> None:
    site = Site({"a": [[CANCELLED], [REFUSED], [REFUSED], [RESULT]]})
    assert await ask(site, time, request_) == "19"
    assert site.called == ["a"] * 4
    assert time.pauses == 3


async def test_a_request_that_another_stage_could_answer_does_not_wait(time: Time) -> None:
    site = Site({"a": [[CANCELLED], [RESULT]]})
    with pytest.raises(Away, match="stage small"):
        await ask(site, time, PLANNED)
    assert site.called == ["a"]


async def test_a_stage_that_never_answered_is_not_waited_for(time: Time) -> None:
    with pytest.raises(Away, match="connection refused"):
        await ask(Site({"a": [[REFUSED], [RESULT]]}), time, FIXED, was_there=False)
    assert time.pauses == 0


async def test_the_reason_is_told_before_the_deadline(time: Time) -> None:
    with pytest.raises(Away, match="connection refused"):
        await ask(Site({"a": [[REFUSED]]}), time, FIXED)
    assert 0 < time.now < TIMEOUT_MS / 1e3


async def test_what_a_stage_says_itself_is_no_reason_to_wait(time: Time) -> None:
    site = Site({"a": [[said(Unavailable("broken"))], [RESULT]]})
    with pytest.raises(Unavailable, match="broken"):
        await ask(site, time, FIXED)
    assert time.pauses == 0


@pytest.mark.parametrize(
    "error", [QueueFull("full"), InvalidRequest("no", field="prompt"), NotFound("no model")]
)
async def test_a_stage_that_refuses_a_request_is_there(time: Time, error: AsdError) -> None:
    """One that has answered in any way is waited for when it goes away next."""
    site = Site({"a": [[said(error)], [REFUSED], [RESULT]]})
    stage = stage_at(site, time, Patience(time, time.sleep))
    with pytest.raises(AsdError):
        await text_of(stage, FIXED)
    assert await text_of(stage, FIXED) == "19"


async def test_an_answer_that_has_begun_is_not_begun_again(time: Time) -> None:
    begun = stage_pb2.StageServiceGenerateResponse()
    begun.tokens.text = "1"
    site = Site({"a": [[begun, CANCELLED]], "b": [[RESULT]]})
    with pytest.raises(Away):
        await ask(site, time, FIXED)
    assert site.called == ["a"]


class Client:
    """A stage of the cascade: what each call does, the last one again and again."""

    def __init__(self, stage: Stage, script: list[AsdError | None]) -> None:
        self.stage = stage
        self.calls = 0
        self._script = script

    async def generate(self, request: RoutedRequest, timeout_ms: float, emit: object) -> StageResult:
        self.calls += 1
        error = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if error is not None:
            raise error
        return StageResult(
            text=self.stage.name,
            token_ids=(1,),
            tokenizer_fingerprint="f",
            finish_reason=FinishReason.EOS,
            usage=TokenUsage(4, 0, 1, 0, 0, 2),
            timing=Timing(0.0, 1.0, 1.0, 2.0),
            model="m",
        )


def cascade_of(time: Time, *scripts: list[AsdError | None]) -> tuple[Cascade, list[Client]]:
    """Return a cascade by a static plan of its first stage, and its stages; each has answered before."""
    clients = [
        Client(Stage(f"stage-{index}", index, 1.0, TIMEOUT_MS), script)
        for index, script in enumerate(scripts)
    ]
    observer: Any = SimpleNamespace(
        static_plan_used=lambda _: None,
        stage_answered=lambda *_, **__: None,
        stage_failed=lambda *_: None,
        request_answered=lambda *_: None,
    )
    plan = StaticPlan((0,), len(clients))
    stages = [client.stage for client in clients]
    patience = Patience(time, time.sleep)
    patience.there()
    planner = make_planner(stages, None, plan, observer, time, patience=patience)
    return Cascade(clients, planner, observer, time), clients  # type: ignore[arg-type]


async def outcome(cascade: Cascade, time: Time) -> RoutedAnswer:
    return await cascade.answer(PLANNED, time() + 60.0, Visibility.OUTCOME, show_nothing)


GONE = Away("gone")


async def test_while_another_stage_is_there_nobody_waits(time: Time) -> None:
    cascade, clients = cascade_of(time, [GONE], [None])
    assert (await outcome(cascade, time)).records[-1].answer.stage.name == "stage-1"
    assert [client.calls for client in clients] == [1, 1]
    assert time.pauses == 0


async def test_while_no_stage_is_there_all_are_asked_again(time: Time) -> None:
    cascade, clients = cascade_of(time, [GONE, GONE, None], [GONE])
    assert (await outcome(cascade, time)).records[-1].answer.stage.name == "stage-0"
    assert [client.calls for client in clients] == [3, 2]
    assert time.pauses == 2


async def test_a_cascade_that_is_gone_for_good_says_so(time: Time) -> None:
    cascade, clients = cascade_of(time, [Away("one")], [Away("two")])
    with pytest.raises(Unavailable, match="one; two"):
        await outcome(cascade, time)
    assert 0 < time.now < 60
    for client in clients:
        client.calls = 0
    with pytest.raises(Unavailable):
        await outcome(cascade, time)
    assert sum(client.calls for client in clients) == 2


async def test_what_stages_say_themselves_is_no_reason_to_ask_all_again(time: Time) -> None:
    cascade, clients = cascade_of(time, [Unavailable("no")], [Unavailable("no")])
    with pytest.raises(Unavailable):
        await outcome(cascade, time)
    assert [client.calls for client in clients] == [1, 1]
