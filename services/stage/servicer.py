"""StageService over gRPC: converts between messages and values."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from asd.convert import FINISH_REASONS, details_to, input_from, sampling_from
from asd.errors import InvalidRequest
from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from asd.values import FinishReason, Message, Role, Sampling
from services.common.errors import Draining
from services.common.validation import (
    check_acceptance,
    check_draft,
    check_finish_reason,
    check_input,
    check_sampling,
    check_session_id,
)
from services.common.version import VERSION
from services.stage.domain import DraftPiece, DraftText, Result, TokenChunk, VerificationResult
from services.stage.engines.engine import ModelState
from services.stage.process_memory import resident_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

    from services.stage.domain import Event
    from services.stage.engines.engine import EngineStatus
    from services.stage.instruments import StageInstruments
    from services.stage.model_pool import ModelPool

_STATES = {
    ModelState.UNLOADED: stage_pb2.MODEL_STATE_UNLOADED,
    ModelState.LOADING: stage_pb2.MODEL_STATE_LOADING,
    ModelState.READY: stage_pb2.MODEL_STATE_READY,
    ModelState.FAILED: stage_pb2.MODEL_STATE_FAILED,
}
_WithInput = TypeVar(
    "_WithInput",
    stage_pb2.StageServiceGenerateRequest,
    stage_pb2.VerifyRequest,
    stage_pb2.VerifyStreamStart,
    stage_pb2.PrefillRequest,
)


class StageServicer(stage_pb2_grpc.StageServiceServicer):
    """Serves the models of one process. instruments: of its calls; None: they are not measured."""

    def __init__(self, pool: ModelPool, instruments: StageInstruments | None = None) -> None:
        self._pool = pool
        self._instruments = instruments
        self._draining = False

    async def drain(self) -> None:
        """Refuse new calls from now on."""
        self._draining = True

    async def Generate(  # noqa: N802
        self,
        request: stage_pb2.StageServiceGenerateRequest,
        context: grpc.aio.ServicerContext[
            stage_pb2.StageServiceGenerateRequest, stage_pb2.StageServiceGenerateResponse
        ],
    ) -> AsyncIterator[stage_pb2.StageServiceGenerateResponse]:
        """Write an answer and stream its tokens."""
        turns = self._admit(request)
        sampling = _sampling(request.sampling)
        async with self._pool.use(request.model, request.caller) as (name, engine):
            status = engine.status()
            first = status.fingerprint
            async with aclosing(engine.generate(turns, sampling)) as events:
                async for event in events:
                    fields = self._fields(event, name, status, request.caller)
                    yield stage_pb2.StageServiceGenerateResponse(tokenizer_fingerprint=first, **fields)
                    first = ""

    async def Verify(  # noqa: N802
        self,
        request: stage_pb2.VerifyRequest,
        context: grpc.aio.ServicerContext[stage_pb2.VerifyRequest, stage_pb2.VerifyResponse],
    ) -> AsyncIterator[stage_pb2.VerifyResponse]:
        """Score a draft in one pass, accept a prefix of it, and continue the answer."""
        turns = self._admit(request)
        sampling = _sampling(request.sampling)
        check_draft(request.draft)
        threshold = _threshold(request)
        draft = DraftText(
            text=request.draft.text,
            ids=tuple(request.draft.token_ids),
            fingerprint=request.draft.tokenizer_fingerprint,
            finish=FINISH_REASONS.members[request.draft.finish_reason],
            is_prediction=request.is_prediction,
        )
        async with self._pool.use(request.model, request.caller) as (name, engine):
            status = engine.status()
            async with aclosing(
                engine.verify(turns, sampling, draft, threshold, seed_is_free=request.seed_is_free)
            ) as events:
                async for event in events:
                    yield stage_pb2.VerifyResponse(**self._fields(event, name, status, request.caller))

    async def VerifyStream(  # noqa: N802
        self,
        request_iterator: AsyncIterator[stage_pb2.VerifyStreamRequest],
        context: grpc.aio.ServicerContext[stage_pb2.VerifyStreamRequest, stage_pb2.VerifyStreamResponse],
    ) -> AsyncIterator[stage_pb2.VerifyStreamResponse]:
        """Verify a draft while it is being written."""
        steps = aiter(request_iterator)
        start = await _first_step(steps)
        turns = self._admit(start, "start.")
        sampling = _sampling(start.sampling, "start.sampling")
        threshold = _threshold(start, "start.acceptance")
        async with self._pool.use(start.model, start.caller) as (name, engine):
            status = engine.status()
            first = status.fingerprint
            async with aclosing(
                engine.verify_stream(
                    turns, sampling, _pieces(steps), threshold, seed_is_free=start.seed_is_free
                )
            ) as events:
                async for event in events:
                    fields = self._fields(event, name, status, start.caller)
                    yield stage_pb2.VerifyStreamResponse(tokenizer_fingerprint=first, **fields)
                    first = ""

    async def Prefill(  # noqa: N802
        self,
        request: stage_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[stage_pb2.PrefillRequest, stage_pb2.PrefillResponse],
    ) -> stage_pb2.PrefillResponse:
        """Put a prompt into the prefix cache."""
        turns = self._admit(request)
        async with self._pool.use(request.model, request.caller) as (_, engine):
            result = await engine.prefill(turns)
        return stage_pb2.PrefillResponse(
            prompt_tokens=result.prompt_tokens,
            cached_prompt_tokens=result.cached_prompt_tokens,
            total_ms=result.total_ms,
        )

    async def Load(  # noqa: N802
        self,
        request: stage_pb2.LoadRequest,
        context: grpc.aio.ServicerContext[stage_pb2.LoadRequest, stage_pb2.LoadResponse],
    ) -> stage_pb2.LoadResponse:
        """Load a model."""
        self._refuse_while_draining()
        loaded = await self._pool.load(request.model)
        return stage_pb2.LoadResponse(
            model=loaded.model,
            memory_bytes=loaded.memory_bytes,
            unloaded_models=loaded.unloaded,
            load_ms=loaded.load_ms,
        )

    async def Unload(  # noqa: N802
        self,
        request: stage_pb2.UnloadRequest,
        context: grpc.aio.ServicerContext[stage_pb2.UnloadRequest, stage_pb2.UnloadResponse],
    ) -> stage_pb2.UnloadResponse:
        """Unload a model."""
        model, freed = await self._pool.unload(request.model)
        return stage_pb2.UnloadResponse(model=model, freed_bytes=freed)

    async def Status(  # noqa: N802
        self,
        request: stage_pb2.StatusRequest,
        context: grpc.aio.ServicerContext[stage_pb2.StatusRequest, stage_pb2.StatusResponse],
    ) -> stage_pb2.StatusResponse:
        """Report which models are loaded, and how many calls wait and run."""
        return stage_pb2.StatusResponse(
            models=[
                _status(name, engine.kind, engine.status()) for name, engine in self._pool.engines.items()
            ],
            memory_budget_bytes=self._pool.budget_bytes,
            memory_used_bytes=self._pool.used_bytes(),
            draining=self._draining,
            version=VERSION,
            resident_bytes=resident_bytes(),
            idle_ms=self._pool.idle_ms(),
        )

    def _admit(self, request: _WithInput, path: str = "") -> tuple[Message, ...]:
        self._refuse_while_draining()
        check_input(request, path)
        check_session_id(request.session_id, f"{path}session_id")
        given = input_from(request)
        return (Message(Role.USER, given),) if isinstance(given, str) else given

    def _fields(self, event: Event, model: str, status: EngineStatus, caller: int) -> dict[str, Any]:
        """Return an event as the field of a response, by the field's name.

        Results and verifications of drafts are also measured.
        """
        if isinstance(event, TokenChunk):
            return {"tokens": _chunk(event)}
        if isinstance(event, VerificationResult):
            if self._instruments is not None and event.proposed:
                self._instruments.verified(model, event)
            return {"verification": _verification(event)}
        if self._instruments is not None:
            self._instruments.answered(model, event)
        return {"result": _result(event, model, status, self._pool.others_of(caller))}

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise Draining("this stage is shutting down: ask another replica")


async def _first_step(steps: AsyncIterator[stage_pb2.VerifyStreamRequest]) -> stage_pb2.VerifyStreamStart:
    step = await anext(steps, None)
    if step is None or step.WhichOneof("event") != "start":
        raise InvalidRequest("send start first", field="start")
    return step.start


async def _pieces(
    steps: AsyncIterator[stage_pb2.VerifyStreamRequest],
) -> AsyncIterator[DraftPiece | FinishReason]:
    """Yield a draft's pieces and its end. Raises InvalidRequest for a step out of order."""
    async for step in steps:
        kind = step.WhichOneof("event")
        if kind == "chunk":
            yield DraftPiece(tuple(step.chunk.token_ids), step.chunk.text, step.chunk.tokenizer_fingerprint)
        elif kind == "end":
            check_finish_reason(step.end.finish_reason, "end.finish_reason")
            yield FINISH_REASONS.members[step.end.finish_reason]
        else:
            raise InvalidRequest("send chunk or end after start", field=kind or "event")


def _threshold(
    request: stage_pb2.VerifyRequest | stage_pb2.VerifyStreamStart, path: str = "acceptance"
) -> float | None:
    """Return the threshold of a tolerant acceptance; None for an exact one."""
    if not request.HasField("acceptance"):
        return None
    check_acceptance(request.acceptance, path)
    is_tolerant = request.acceptance.mode == common_pb2.ACCEPTANCE_MODE_TOLERANT
    return request.acceptance.threshold if is_tolerant else None


def _sampling(sampling: common_pb2.Sampling, path: str = "sampling") -> Sampling:
    check_sampling(sampling, path)
    return sampling_from(sampling)


def _chunk(chunk: TokenChunk) -> common_pb2.TokenChunk:
    return common_pb2.TokenChunk(
        token_ids=chunk.ids,
        text=chunk.text,
        logprobs=chunk.logprobs.tolist(),
        entropies=chunk.entropies.tolist(),
        top2_margins=chunk.margins.tolist(),
        details=details_to(chunk.details),
    )


def _verification(result: VerificationResult) -> stage_pb2.Verification:
    return stage_pb2.Verification(
        proposed_tokens=result.proposed,
        accepted_tokens=result.accepted,
        ranks=result.ranks.tolist(),
        target_logprobs=result.target_logprobs.tolist(),
        ids_used=result.ids_used,
        resampled=result.resampled,
        while_writing=result.while_writing,
        allowed_tokens=result.allowed,
    )


def _result(result: Result, model: str, status: EngineStatus, others: int) -> stage_pb2.StageResult:
    return stage_pb2.StageResult(
        text=result.text,
        token_ids=result.ids,
        tokenizer_fingerprint=status.fingerprint,
        finish_reason=FINISH_REASONS.numbers[result.finish],
        usage=common_pb2.Usage(
            prompt_tokens=result.prompt_tokens,
            cached_prompt_tokens=result.cached_prompt_tokens,
            completion_tokens=len(result.ids),
            proposed_tokens=result.proposed_tokens,
            accepted_tokens=result.accepted_tokens,
            forward_passes=result.forward_passes,
        ),
        timing=common_pb2.StageTiming(
            queue_ms=result.queue_ms,
            prefill_ms=result.prefill_ms,
            decode_ms=result.decode_ms,
            total_ms=result.total_ms,
        ),
        model=model,
        accept_lengths=result.accept_lengths,
        others_under_way=others,
        context_length=status.context_length,
        constrained=result.constrained,
    )


def _status(name: str, kind: str, status: EngineStatus) -> stage_pb2.ModelStatus:
    return stage_pb2.ModelStatus(
        name=name,
        state=_STATES[status.state],
        engine=kind,
        parameters=status.parameters,
        context_length=status.context_length,
        tokenizer_fingerprint=status.fingerprint,
        memory_bytes=status.memory_bytes,
        kv_cache_bytes=status.kv_cache_bytes,
        queued_requests=status.queued,
        running_requests=status.running,
        cached_sequences=status.cached_sequences,
        completed_requests=status.completed,
        cancelled_requests=status.cancelled,
        error=status.error,
        verifies_inside=status.verifies_inside,
        constrains=status.constrains,
        takes_tools=status.takes_tools,
        most_top_logprobs=status.most_top_logprobs,
    )
