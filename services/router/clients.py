"""gRPC behind the cascade's protocols. Every call's deadline is set here."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from asd.v1 import cascade_pb2, manager_pb2, manager_pb2_grpc, policy_pb2, policy_pb2_grpc, stage_pb2
from services.common.channel import call_exchange, call_stream, call_unary
from services.common.errors import (
    AsdError,
    Away,
    BrokenOff,
    BudgetSpent,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from services.common.patience import Patience
from services.common.version import VERSION
from services.router import convert
from services.router.adapters import Adapters, tasks_of
from services.router.call_limit import CallLimit
from services.router.domain import (
    Answer,
    Condition,
    Decision,
    DecisionAction,
    DecisionReason,
    FinishReason,
    Others,
    Plan,
    Request,
    Stage,
    StageResult,
    Tokens,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterator,
        Sequence,
    )

    import grpc

    from asd.v1 import common_pb2
    from asd.v1.stage_pb2_grpc import StageServiceAsyncStub as Stub
    from services.router.breaker import Breaker
    from services.router.health import Health
    from services.router.ports import Sleepers, Take
    from services.router.replicas import Replica, Replicas

Sent = TypeVar("Sent")
Received = TypeVar("Received")
Response = TypeVar(
    "Response",
    stage_pb2.StageServiceGenerateResponse,
    stage_pb2.VerifyResponse,
    stage_pb2.VerifyStreamResponse,
)
WithModel = stage_pb2.StageServiceGenerateRequest | stage_pb2.VerifyRequest | stage_pb2.VerifyStreamStart

# For Describe, which asks every service whether it is there. Chosen.
DESCRIBE_TIMEOUT_MS = 1000.0

# Calls of this router to the policy service that are under way at once; further ones wait in its line, where
# `timeout_ms` does not run yet. Four take some 4 ms of processor time there, and so end within the default
# 100 ms where stages leave it a tenth of a processor. At 32 requests at a time beside others, 1 of 720 had
# a late call with four, 5 with eight. At a millisecond each they are 4,000 a second, more than a router asks.
_POLICY_CALLS = 4
# Share of a call's time that it may spend in that line, and of what is left of the request's latency budget.
# Chosen: a request of half a second, which then follows the static plan, still has most of it for its stages.
_SHARE_IN_LINE = 0.25
# Timeouts of a call that it may spend there. Chosen: bursts of some hundreds are planned within, on two busy
# cores in 2 s or so. A policy service that is late with them is no longer waited for: see Breaker.
_TIMEOUTS_IN_LINE = 50.0

# For how long the draft is held of a verification that was broken off before. Chosen: refusals come within
# milliseconds.
_HOLD_SECONDS = 0.05

# Fields of a stage's request that the caller wrote. A stage that refuses another one refuses the router's
# work.
_CALLER_FIELDS = ("prompt", "conversation", "sampling", "acceptance", "session_id")


class GrpcStage:
    """Calls a stage service. Raises the AsdError that the stage's status stands for, naming stage and
    target. caller: this router's random number. adapters: types of task that its model has adapters for;
    None: the stage is asked. patience: how long requests wait that name this stage while it is away. Close it
    when done."""

    def __init__(
        self,
        stage: Stage,
        replicas: Replicas,
        clock: Callable[[], float],
        caller: int,
        adapters: Collection[str] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._patience = patience or Patience(clock)
        self._stage = stage
        self._caller = caller
        self._peer = str(stage)
        self._replicas = replicas
        self._clock = clock
        self._adapters = Adapters(stage.model, adapters, self._list_models, clock)

    async def close(self) -> None:
        """End what is under way for itself."""
        await self._adapters.close()

    @property
    def stage(self) -> Stage:
        """The stage that is called."""
        return self._stage

    async def generate(self, request: Request, timeout_ms: float, emit: Take) -> StageResult:
        """Emit tokens as the stage writes them; return its result."""
        message = stage_pb2.StageServiceGenerateRequest(
            sampling=convert.sampling_to(request.sampling),
            session_id=request.session_id,
        )
        convert.set_input(message, request.input)

        def call(
            stub: Stub, left_ms: float, _: float
        ) -> AsyncGenerator[stage_pb2.StageServiceGenerateResponse, None]:
            return call_stream(stub.Generate, message, timeout_ms=left_ms, peer=self._peer)

        return await self._result_of(request, message, call, timeout_ms, emit)

    async def verify(
        self, request: Request, draft: StageResult, timeout_ms: float, emit: Take
    ) -> StageResult:
        """Emit the verification of the draft, then tokens; return the result."""
        message = stage_pb2.VerifyRequest(
            draft=convert.draft_to(draft),
            sampling=convert.sampling_to(request.sampling),
            acceptance=convert.acceptance_to(request.acceptance),
            session_id=request.session_id,
        )
        convert.set_input(message, request.input)

        def call(stub: Stub, left_ms: float, _: float) -> AsyncGenerator[stage_pb2.VerifyResponse, None]:
            return call_stream(stub.Verify, message, timeout_ms=left_ms, peer=self._peer)

        return await self._result_of(request, message, call, timeout_ms, emit)

    async def verify_stream(
        self,
        request: Request,
        drafts: AsyncIterable[Tokens | FinishReason],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        """Verify a draft that is still being written; emit tokens and its verification; return the result."""
        start = stage_pb2.VerifyStreamStart(
            sampling=convert.sampling_to(request.sampling),
            acceptance=convert.acceptance_to(request.acceptance),
            session_id=request.session_id,
        )
        convert.set_input(start, request.input)

        def call(
            stub: Stub, left_ms: float, hold_s: float
        ) -> AsyncGenerator[stage_pb2.VerifyStreamResponse, None]:
            return call_exchange(
                stub.VerifyStream,
                _steps(start, drafts),
                is_last=lambda response: response.HasField("result"),
                timeout_ms=left_ms,
                peer=self._peer,
                hold_s=hold_s,
            )

        return await self._result_of(request, start, call, timeout_ms, emit)

    async def prefill(self, request: Request, timeout_ms: float) -> int:
        """Put the prompt into the prefix cache; return its number of tokens."""
        until = self._clock() + timeout_ms / 1000.0
        model = await self._adapters.model_for(request.task, timeout_ms)
        message = stage_pb2.PrefillRequest(model=model, session_id=request.session_id, caller=self._caller)
        convert.set_input(message, request.input)

        def call(stub: Stub) -> Awaitable[stage_pb2.PrefillResponse]:
            left_ms = (until - self._clock()) * 1000.0
            return call_unary(stub.Prefill, message, timeout_ms=left_ms, peer=self._peer)

        return (await self._ask_any(_key(request), call)).prompt_tokens

    async def _result_of(
        self,
        request: Request,
        message: WithModel,
        call: Callable[[Stub, float, float], AsyncGenerator[Response, None]],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        """Call the request's replica and return its result; another replica where it is away.

        Where all are away, a request that names its stages waits until one is back, within reason (Patience):
        it has nowhere else to go. Others fail at once: the next stage can have them.
        A call that the replica breaks off before it has sent anything is made once more, there and with the
        draft held for a moment, since why it did so was lost. Where the stage lacks the adapter that it is
        asked for, its model answers without. message: gets the model to ask for. call: sends the message to a
        replica, with so many milliseconds left, and holds a draft for so many seconds.
        """
        until = self._clock() + timeout_ms / 1000.0
        message.model = await self._adapters.model_for(request.task, timeout_ms)
        message.caller = self._caller
        is_fixed = bool(request.stage or request.chain)
        tried: list[str] = []
        hold_s = 0.0
        while True:
            heard = _Heard(emit, self._patience)
            try:
                replica = await self._replicas.choose(_key(request), tried)
                tried.append(replica.address)
                left_ms = (until - self._clock()) * 1000.0
                with self._replicas.calling(replica):
                    result = await heard.out(call(replica.stub, left_ms, hold_s))
                return self._result(result, replica, is_adapted=message.model != self._stage.model)
            except Unavailable as error:
                if heard.has_begun:
                    raise
                self._patience.failed(error)
                if isinstance(error, BrokenOff) and not hold_s:
                    hold_s = _HOLD_SECONDS
                    tried.pop()
                elif await self._replicas.find_other(tried):
                    continue
                elif is_fixed and isinstance(error, Away) and await self._patience.wait(until):
                    tried.clear()
                else:
                    raise
            except NotFound as error:
                self._patience.failed(error)
                # What the caller was sent would come once more.
                if heard.has_begun or message.model == self._stage.model:
                    raise self._blame(error) from error
                self._adapters.lacks(request.task, message.model)
                message.model = self._stage.model
                tried.pop()
            except InvalidRequest as error:
                self._patience.failed(error)
                raise self._blame(error) from error
            except AsdError as error:
                self._patience.failed(error)
                raise

    def _result(
        self, message: stage_pb2.StageResult | None, replica: Replica, *, is_adapted: bool
    ) -> StageResult:
        if message is None:
            raise AsdError(f"{self._stage}: the call ended without a result")
        others = Others(replica.address, message.others_under_way, self._replicas.addresses, self._clock())
        result = convert.result_from(message, self._peer)
        return replace(result, is_adapted=is_adapted, others=others)

    async def _list_models(self) -> list[str]:
        """Return the names of the stage's models, the default one first."""
        return [model.name for model in (await self._status()).models]

    async def _status(self) -> stage_pb2.StatusResponse:
        def call(stub: Stub) -> Awaitable[stage_pb2.StatusResponse]:
            return call_unary(
                stub.Status,
                stage_pb2.StatusRequest(),
                timeout_ms=DESCRIBE_TIMEOUT_MS,
                peer=self._peer,
            )

        return await self._ask_any("", call)

    async def _ask_any(self, key: str, call: Callable[[Stub], Awaitable[Received]]) -> Received:
        """Return the answer of the replica of a key, or of another one where it is away."""
        tried: list[str] = []
        while True:
            replica = await self._replicas.choose(key, tried)
            tried.append(replica.address)
            try:
                with self._replicas.calling(replica):
                    response = await call(replica.stub)
            except AsdError as error:
                self._patience.failed(error)
                if not isinstance(error, Unavailable) or not await self._replicas.find_other(tried):
                    raise
            else:
                self._patience.there()
                return response

    def describe_away(self) -> cascade_pb2.StageDescription:
        """Return what is configured of the stage."""
        return cascade_pb2.StageDescription(
            stage=self._stage.name, stage_index=self._stage.index, cost=self._stage.cost
        )

    async def describe(self) -> cascade_pb2.StageDescription:
        """Return what the stage says of itself; what is configured where it does not answer."""
        description = self.describe_away()
        try:
            status = await self._status()
        except AsdError:
            return description
        models = [model for model in status.models if self._stage.model in {"", model.name}][:1]
        for model in models:
            description.model = model.name
            description.engine = model.engine
            description.parameters = model.parameters
            description.context_length = model.context_length
            description.queue_depth = model.queued_requests + model.running_requests
        description.adapters.extend(tasks_of(self._stage.model, [model.name for model in status.models]))
        description.available = bool(models) and not status.draining
        return description

    def _blame(self, error: InvalidRequest | NotFound) -> AsdError:
        """Return the error as the router's caller should see it."""
        if isinstance(error, NotFound):
            return PreconditionFailed(error.message)
        # A streamed verification names the caller's fields below its first message.
        field = error.field.removeprefix("start.")
        if field and not field.startswith(_CALLER_FIELDS):
            return AsdError(f"{self._peer} refused {error.field}: {error.message}")
        return type(error)(error.message, field=field)


class GrpcPolicy:
    """Calls the policy service. stages: names in order. timeout_ms: the most that one call may take, the wait
    in this router's own line not counted. health: is told how calls end. clock: the breaker's.

    Raises Unavailable or BudgetSpent where the service is away or late; at once while the breaker is open.
    Raises AsdError where its answer makes no sense.
    """

    def __init__(
        self,
        target: str,
        channel: grpc.aio.Channel,
        stages: Sequence[str],
        timeout_ms: float,
        breaker: Breaker,
        health: Health,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._peer = f"the policy service at {target}"
        self._health = health
        self._stages = tuple(stages)
        self._places = {name: index for index, name in enumerate(stages)}
        self._timeout_ms = timeout_ms
        self._breaker = breaker
        self._limit = CallLimit(_POLICY_CALLS)
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        self._plan = stub.Plan
        self._decide = stub.Decide
        self._describe = stub.Describe

    async def plan(
        self,
        request: Request,
        conditions: Sequence[Condition],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> Plan:
        """Return the first stage."""

        def message(waited_ms: float) -> policy_pb2.PlanRequest:
            made = policy_pb2.PlanRequest(
                request_id=request.id,
                objective=convert.objective_to(request.objective),
                cascade=self._stages,
                conditions=convert.conditions_to(conditions),
                min_accuracy_share=min_accuracy_share,
            )
            if made.objective.HasField("max_latency_ms"):
                # A plan is not told what was spent. Who has waited longer than that has left the line.
                made.objective.max_latency_ms -= min(waited_ms, made.objective.max_latency_ms)
            convert.set_input(made, request.input)
            return made

        wait_ms = self._wait_ms(request, 0.0, timeout_ms)
        response = await self._ask(self._plan, message, timeout_ms, wait_ms)
        first = self._place(response.first_stage)
        likely = self._later(first, response.likely_next_stage)
        return convert.plan_from(response, first, likely, self._later(first, response.abandon_stage))

    def _later(self, first: int, name: str) -> int | None:
        """Return the place of a stage that may follow the first one; None for no name."""
        place = self._place(name) if name else None
        if place is not None and place <= first:
            raise AsdError(f"{self._peer} expects to escalate from {self._stages[first]} to an earlier stage")
        return place

    async def decide(
        self,
        request: Request,
        answer: Answer,
        spent_cost: float,
        spent_ms: float,
        conditions: Sequence[Condition],
        timeout_ms: float,
        *,
        min_accuracy_share: float | None,
    ) -> Decision:
        """Return what to do with an answer. spent_ms: up to now; the wait in line is added."""

        def message(waited_ms: float) -> policy_pb2.DecideRequest:
            made = policy_pb2.DecideRequest(
                request_id=request.id,
                objective=convert.objective_to(request.objective),
                cascade=self._stages,
                stage=answer.stage.name,
                draft=convert.evidence_to(answer),
                verification=convert.verification_to(answer),
                spent_cost=spent_cost,
                spent_ms=spent_ms + waited_ms,
                conditions=convert.conditions_to(conditions),
                min_accuracy_share=min_accuracy_share,
            )
            convert.set_input(made, request.input)
            return made

        wait_ms = self._wait_ms(request, spent_ms, timeout_ms)
        try:
            response = await self._ask(self._decide, message, timeout_ms, wait_ms)
        except InvalidRequest as error:
            if error.field.startswith(("draft", "verification")):
                # The caller did not write that: the stage did.
                raise AsdError(f"{answer.stage} showed what no model should: {error.message}") from error
            raise
        return self._decision(response, answer.stage.index)

    async def describe(self) -> policy_pb2.PolicyServiceDescribeResponse | None:
        """Return which policy is in force; None where the service does not answer."""
        try:
            return await call_unary(
                self._describe,
                policy_pb2.PolicyServiceDescribeRequest(),
                timeout_ms=DESCRIBE_TIMEOUT_MS,
                peer=self._peer,
            )
        except AsdError:
            return None

    def _wait_ms(self, request: Request, spent_ms: float, timeout_ms: float) -> float:
        """Return how long a request may stand in line, by its deadline and by its latency budget."""
        budget_ms = request.objective.max_latency_ms
        left_ms = timeout_ms if budget_ms is None else min(timeout_ms, max(budget_ms - spent_ms, 0.0))
        return min(left_ms * _SHARE_IN_LINE, self._timeout_ms * _TIMEOUTS_IN_LINE)

    async def _ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Sent, Received],
        message: Callable[[float], Sent],
        timeout_ms: float,
        wait_ms: float,
    ) -> Received:
        """Return the answer of a call; of a second one where a replica is away: another may be there.

        At once, and once: where none is, the static plan is the better answer. Who waits in line behind calls
        that fail does not wait for each of them: the breaker is asked again when the turn comes. message: is
        made then, and told the wait in line. wait_ms: of that, the most.
        """
        arrived = self._clock()
        if self._breaker.is_open and self._limit.is_full:
            # What is under way are probes, or calls that are about to fail.
            raise self._refusal()
        waits = self._limit.is_full
        async with self._limit.place(wait_ms, self._peer):
            began = self._clock()
            # What the caller asked for is passed on as it is where nothing was waited for.
            waited_ms = (began - arrived) * 1000.0 if waits else 0.0
            left_ms = timeout_ms - waited_ms
            first_ms = min(left_ms, self._timeout_ms)
            sent = message(waited_ms)
            with self._guarded(left_ms, began):
                try:
                    return await call_unary(method, sent, timeout_ms=first_ms, peer=self._peer)
                except Unavailable:
                    second_ms = first_ms - (self._clock() - began) * 1000.0
                    if second_ms <= 0:
                        raise
                    return await call_unary(method, sent, timeout_ms=second_ms, peer=self._peer)

    def _refusal(self) -> Unavailable:
        return Unavailable(f"{self._peer} failed repeatedly; it is tried again soon")

    @contextmanager
    def _guarded(self, timeout_ms: float, began: float) -> Iterator[None]:
        if not self._breaker.allows():
            raise self._refusal()
        try:
            yield
        except (BudgetSpent, Unavailable) as error:
            # A caller in a hurry says nothing of the service.
            if isinstance(error, Unavailable) or timeout_ms >= self._timeout_ms:
                self._breaker.failed(began)
                self._health.failed(error, "and the static plan stands in for it")
            raise
        except AsdError:
            # Whoever refuses a request is there.
            self._succeeded()
            raise
        self._succeeded()

    def _succeeded(self) -> None:
        self._breaker.succeeded()
        self._health.answered()

    def _decision(self, response: policy_pb2.DecideResponse, judged: int) -> Decision:
        action = convert.member(DecisionAction, response.action, self._peer)
        next_stage: int | None = None
        expected_ms: float | None = None
        if action is DecisionAction.ESCALATE:
            next_stage = self._place(response.next_stage)
            if next_stage <= judged:
                raise AsdError(
                    f"{self._peer} escalates from {self._stages[judged]} to {response.next_stage}, "
                    "which is not a later stage"
                )
            expected_ms = next(
                (each.latency_ms for each in response.estimates if each.stage == response.next_stage), None
            )
        has_p_correct = response.HasField("p_correct")
        if not (0.0 <= response.p_correct <= 1.0):
            raise AsdError(f"{self._peer} sent p_correct {response.p_correct:g}, which is no probability")
        return Decision(
            action,
            convert.member(DecisionReason, response.reason, self._peer),
            next_stage,
            response.p_correct if has_p_correct else None,
            response.p_correct_stderr if has_p_correct and math.isfinite(response.p_correct_stderr) else None,
            response.policy_version,
            expected_ms,
            response.predict_us,
            # A policy service of before did not send a 0, which no policy predicts.
            is_out_of_family=not has_p_correct,
        )

    def _place(self, stage: str) -> int:
        place = self._places.get(stage)
        if place is None:
            raise AsdError(f"{self._peer} chose stage {stage!r}, which the cascade does not have")
        return place


class GrpcManager:
    """Calls the manager of stages that sleep. timeout_ms: of each call."""

    def __init__(self, target: str, channel: grpc.aio.Channel, timeout_ms: float) -> None:
        self._peer = f"the manager at {target}"
        self._timeout_ms = timeout_ms
        stub = manager_pb2_grpc.ManagerServiceStub(channel)
        self._status = stub.Status
        self._wake = stub.Wake

    async def awake(self) -> dict[str, bool]:
        """Return the names of the managed stages, and whether a replica of each is ready.

        A stage whose state is not known is left out.
        """
        status = await call_unary(
            self._status,
            manager_pb2.ManagerServiceStatusRequest(),
            timeout_ms=self._timeout_ms,
            peer=self._peer,
        )
        return {
            each.stage: each.state == manager_pb2.SLEEP_STATE_AWAKE
            for each in status.stages
            if each.state != manager_pb2.SLEEP_STATE_UNSPECIFIED
        }

    async def wake(self, stage: str) -> None:
        """Have a stage get replicas."""
        message = manager_pb2.WakeRequest(stage=stage)
        await call_unary(self._wake, message, timeout_ms=self._timeout_ms, peer=self._peer)


class Directory:
    """Describes the cascade by asking every service of it."""

    def __init__(
        self,
        stages: Sequence[GrpcStage],
        policy: GrpcPolicy | None,
        static_plan: Sequence[str],
        sleepers: Sleepers,
    ) -> None:
        self._sleepers = sleepers
        self._stages = tuple(stages)
        self._policy = policy
        self._static_plan = tuple(static_plan)

    async def describe(self) -> cascade_pb2.DescribeResponse:
        """Return the cascade's description."""
        stages, policy = await asyncio.gather(
            asyncio.gather(*(self._describe(stage) for stage in self._stages)),
            self._policy.describe() if self._policy else _nothing(),
        )
        return cascade_pb2.DescribeResponse(
            stages=stages, policy=policy, static_plan=self._static_plan, version=VERSION
        )

    async def _describe(self, stage: GrpcStage) -> cascade_pb2.StageDescription:
        if stage.stage.index in self._sleepers.asleep:
            description = stage.describe_away()
            description.asleep = True
            return description
        return await stage.describe()


class _Heard:
    """What one call of a stage sends. emit: is handed its tokens and verification."""

    def __init__(self, emit: Take, patience: Patience) -> None:
        self._emit = emit
        self._patience = patience
        self._fingerprint = ""
        self.has_begun = False

    async def out(self, responses: AsyncGenerator[Response, None]) -> stage_pb2.StageResult | None:
        """Emit what comes, to the end of the call; return its result; None where it sent none."""
        result = None
        async with aclosing(responses):
            async for response in responses:
                if not self.has_begun:
                    self._patience.there()
                    self.has_begun = True
                if not isinstance(response, stage_pb2.VerifyResponse):
                    # It comes with the first message, whatever that is.
                    self._fingerprint = self._fingerprint or response.tokenizer_fingerprint
                kind = response.WhichOneof("event")
                if kind == "tokens":
                    await self._emit(convert.tokens_from(response.tokens, self._fingerprint))
                elif kind == "result":
                    result = response.result
                elif kind == "verification" and not isinstance(
                    response, stage_pb2.StageServiceGenerateResponse
                ):
                    await self._emit(convert.verification_from(response.verification))
        return result


def _key(request: Request) -> str:
    """Return what decides on a replica: a conversation's prefix, or this request's alone, is there."""
    return request.session_id or request.id


async def _steps(
    start: stage_pb2.VerifyStreamStart, drafts: AsyncIterable[Tokens | FinishReason]
) -> AsyncIterator[stage_pb2.VerifyStreamRequest]:
    """Yield a draft as the steps of a VerifyStream call."""
    yield stage_pb2.VerifyStreamRequest(start=start)
    async for piece in drafts:
        if isinstance(piece, FinishReason):
            reason = cast("common_pb2.FinishReason.ValueType", piece)
            yield stage_pb2.VerifyStreamRequest(end=stage_pb2.DraftEnd(finish_reason=reason))
        else:
            chunk = stage_pb2.DraftChunk(
                token_ids=piece.ids, text=piece.text, tokenizer_fingerprint=piece.fingerprint
            )
            yield stage_pb2.VerifyStreamRequest(chunk=chunk)


async def _nothing() -> None:
    return None
