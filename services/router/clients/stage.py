"""Calls to stages over gRPC. Every call's deadline is set here."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from asd.convert import FINISH_REASONS, acceptance_to, sampling_to, set_input
from asd.errors import (
    AsdError,
    Away,
    BrokenOff,
    InvalidRequest,
    ModelRefusal,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from asd.transport.channel import call_exchange, call_stream, call_unary
from asd.transport.patience import Patience
from asd.v1 import cascade_pb2, stage_pb2
from asd.values import FinishReason
from services.router import convert
from services.router.clients.abilities import Abilities, ModelAbilities
from services.router.clients.adapters import Adapters, tasks_of
from services.router.domain import PeerLoad, RoutedRequest, ScoredTokens, Stage, StageResult

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterable,
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
    )

    from asd.v1 import common_pb2
    from asd.v1.stage_pb2_grpc import StageServiceAsyncStub as Stub
    from services.router.clients.replicas import Replica, Replicas
    from services.router.interfaces import Take

Sent = TypeVar("Sent")
Received = TypeVar("Received")
Response = TypeVar(
    "Response",
    stage_pb2.StageServiceGenerateResponse,
    stage_pb2.VerifyResponse,
    stage_pb2.VerifyStreamResponse,
)
WithModel = stage_pb2.StageServiceGenerateRequest | stage_pb2.VerifyRequest | stage_pb2.VerifyStreamStart

# Timeout of the calls behind Describe, which asks every service. Chosen.
DESCRIBE_TIMEOUT_MS = 1000.0

# How long a retried verification holds its draft back. Chosen: refusals arrive within milliseconds.
_HOLD_SECONDS = 0.05

# Fields of a stage's request that the caller wrote. The router wrote all others, so a refusal of one of those
# is the router's error.
_CALLER_FIELDS = ("prompt", "conversation", "sampling", "acceptance", "session_id")


class GrpcStage:
    """Calls a stage service. Close it when done.

    Raises the AsdError of the stage's status, naming stage and target. caller: this router's random number.
    adapters: types of task that its model has adapters for; None: the stage is asked. patience: how long a
    request that names this stage waits while it is unavailable.
    """

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
        self._abilities = Abilities(self._list_abilities, clock)

    async def close(self) -> None:
        """Cancel its background work."""
        await self._adapters.close()

    @property
    def stage(self) -> Stage:
        """The stage that is called."""
        return self._stage

    async def generate(self, request: RoutedRequest, timeout_ms: float, emit: Take) -> StageResult:
        """Emit tokens as the stage writes them; return its result."""
        message = stage_pb2.StageServiceGenerateRequest(
            sampling=sampling_to(request.sampling),
            session_id=request.session_id,
        )
        set_input(message, request.input)

        def call(
            stub: Stub, left_ms: float, _: float
        ) -> AsyncGenerator[stage_pb2.StageServiceGenerateResponse, None]:
            return call_stream(stub.Generate, message, timeout_ms=left_ms, peer=self._peer)

        return await self._result_of(request, message, call, timeout_ms, emit)

    async def verify(
        self, request: RoutedRequest, draft: StageResult, timeout_ms: float, emit: Take
    ) -> StageResult:
        """Emit the verification of the draft, then tokens; return the result."""
        message = stage_pb2.VerifyRequest(
            draft=convert.draft_to(draft),
            sampling=sampling_to(request.sampling),
            acceptance=_acceptance_of(request),
            session_id=request.session_id,
            seed_is_free=request.seed_is_free,
            is_prediction=draft.is_prediction,
        )
        set_input(message, request.input)

        def call(stub: Stub, left_ms: float, _: float) -> AsyncGenerator[stage_pb2.VerifyResponse, None]:
            return call_stream(stub.Verify, message, timeout_ms=left_ms, peer=self._peer)

        return await self._result_of(request, message, call, timeout_ms, emit)

    async def verify_stream(
        self,
        request: RoutedRequest,
        drafts: AsyncIterable[ScoredTokens | FinishReason],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        """Verify a draft that is still being written; emit tokens and its verification; return the result."""
        start = stage_pb2.VerifyStreamStart(
            sampling=sampling_to(request.sampling),
            acceptance=_acceptance_of(request),
            session_id=request.session_id,
            seed_is_free=request.seed_is_free,
        )
        set_input(start, request.input)

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

    async def prefill(self, request: RoutedRequest, timeout_ms: float) -> int:
        """Put the prompt into the prefix cache; return its number of tokens."""
        until = self._clock() + timeout_ms / 1000.0
        model = await self._adapters.model_for(request.task, timeout_ms)
        await self._abilities.check(request, model)
        message = stage_pb2.PrefillRequest(model=model, session_id=request.session_id, caller=self._caller)
        set_input(message, request.input)

        def call(stub: Stub) -> Awaitable[stage_pb2.PrefillResponse]:
            left_ms = (until - self._clock()) * 1000.0
            return call_unary(stub.Prefill, message, timeout_ms=left_ms, peer=self._peer)

        return (await self._ask_any(_key(request), call)).prompt_tokens

    async def _result_of(
        self,
        request: RoutedRequest,
        message: WithModel,
        call: Callable[[Stub, float, float], AsyncGenerator[Response, None]],
        timeout_ms: float,
        emit: Take,
    ) -> StageResult:
        """Call a replica and return its result.

        If the replica is unavailable, another one is called. If all are, a request that names its stages
        waits for one, as long as Patience allows; any other request fails at once and goes to the next stage.
        If the replica breaks the call off before it has sent anything, its status was lost. The call is then
        repeated once there, with the draft held back for a moment. If the stage lacks the adapter, the plain
        model answers. message: receives the model's name. call: sends the message to a replica; it takes a
        timeout in milliseconds and the seconds to hold the draft back.
        """
        until = self._clock() + timeout_ms / 1000.0
        message.model = await self._adapters.model_for(request.task, timeout_ms)
        await self._abilities.check(request, message.model)
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
                found = self._result(result, replica, is_adapted=message.model != self._stage.model)
                if request.sampling.constraint is not None and not found.is_constrained:
                    # One replica says for all what they can do, and another version may not know constraints.
                    raise ModelRefusal(
                        f"{self._peer} did not keep the constraint", field="sampling.constraint"
                    )
                return found
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
                # A repeated call would emit the same tokens again.
                if heard.has_begun or message.model == self._stage.model:
                    raise self._blame(error) from error
                self._adapters.lacks(request.task, message.model)
                message.model = self._stage.model
                tried.pop()
            except InvalidRequest as error:
                self._patience.failed(error)
                is_prediction = isinstance(message, stage_pb2.VerifyRequest) and message.is_prediction
                raise self._blame(error, is_prediction=is_prediction) from error
            except AsdError as error:
                self._patience.failed(error)
                raise

    def _result(
        self, message: stage_pb2.StageResult | None, replica: Replica, *, is_adapted: bool
    ) -> StageResult:
        if message is None:
            raise AsdError(f"{self._stage}: the call ended without a result")
        others = PeerLoad(replica.address, message.others_under_way, self._replicas.addresses, self._clock())
        result = convert.result_from(message, self._peer)
        return replace(result, is_adapted=is_adapted, others=others)

    async def _list_models(self) -> list[str]:
        """Return the names of the stage's models, the default one first."""
        return [model.name for model in (await self._status()).models]

    async def _list_abilities(self) -> dict[str, ModelAbilities]:
        """Return what the stage's models can do, by name, the default one first."""
        return {
            model.name: ModelAbilities(model.constrains, model.takes_tools, model.most_top_logprobs)
            for model in (await self._status()).models
        }

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
        """Return the answer of the key's replica, or of another one if that is unavailable."""
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
        """Return the stage's description from the settings alone."""
        return cascade_pb2.StageDescription(
            stage=self._stage.name, stage_index=self._stage.index, cost=self._stage.cost
        )

    async def describe(self) -> cascade_pb2.StageDescription:
        """Return the stage's description; if it does not answer, from the settings alone."""
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
            description.constrains = model.constrains
            description.takes_tools = model.takes_tools
            description.most_top_logprobs = model.most_top_logprobs
            description.verifies_inside = model.verifies_inside
        description.adapters.extend(tasks_of(self._stage.model, [model.name for model in status.models]))
        description.available = bool(models) and not status.draining
        return description

    def _blame(self, error: InvalidRequest | NotFound, *, is_prediction: bool = False) -> AsdError:
        """Return the error as the router's caller should see it. is_prediction: it wrote the draft."""
        if isinstance(error, NotFound):
            return PreconditionFailed(error.message)
        # In a streamed verification, the caller's fields are part of the first message.
        field = error.field.removeprefix("start.")
        if is_prediction and field.split(".")[0] == "draft":
            return type(error)(error.message, field="prediction")
        if field and not field.startswith(_CALLER_FIELDS):
            return AsdError(f"{self._peer} refused {error.field}: {error.message}")
        return type(error)(error.message, field=field)


class _Heard:
    """Reads the messages of one call. emit: receives tokens and verification."""

    def __init__(self, emit: Take, patience: Patience) -> None:
        self._emit = emit
        self._patience = patience
        self._fingerprint = ""
        self.has_begun = False

    async def out(self, responses: AsyncGenerator[Response, None]) -> stage_pb2.StageResult | None:
        """Emit tokens and verification to the end of the call; return its result, or None if it sent none."""
        result = None
        async with aclosing(responses):
            async for response in responses:
                if not self.has_begun:
                    self._patience.there()
                    self.has_begun = True
                if not isinstance(response, stage_pb2.VerifyResponse):
                    # The fingerprint comes with the first message, of whatever kind.
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


def _acceptance_of(request: RoutedRequest) -> common_pb2.Acceptance | None:
    return None if request.acceptance is None else acceptance_to(request.acceptance)


def _key(request: RoutedRequest) -> str:
    """Return the key that chooses the replica: the session's, or the request's own."""
    return request.session_id or request.id


async def _steps(
    start: stage_pb2.VerifyStreamStart, drafts: AsyncIterable[ScoredTokens | FinishReason]
) -> AsyncIterator[stage_pb2.VerifyStreamRequest]:
    """Yield a draft as the messages of a VerifyStream call."""
    yield stage_pb2.VerifyStreamRequest(start=start)
    async for piece in drafts:
        if isinstance(piece, FinishReason):
            reason = FINISH_REASONS.numbers[piece]
            yield stage_pb2.VerifyStreamRequest(end=stage_pb2.DraftEnd(finish_reason=reason))
        else:
            chunk = stage_pb2.DraftChunk(
                token_ids=piece.ids, text=piece.text, tokenizer_fingerprint=piece.fingerprint
            )
            yield stage_pb2.VerifyStreamRequest(chunk=chunk)
