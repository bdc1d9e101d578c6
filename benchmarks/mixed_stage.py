"""A stage that answers at once whatever it is asked, slowly or not at all where the prompt says so.

For benchmarks alone. `python -m benchmarks.mixed_stage HOST:PORT`.
"""

# ruff: noqa: D102, N802 - methods have the protos' names and meanings

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from asd.errors import AsdError, PromptTooLong, ResourceExhausted
from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from services.common.server import ServiceRegistration, run_service, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# First words of a prompt that change what comes of it.
SLOW = "slow:"
FULL = "full:"
LONG = "long:"
BROKEN = "broken:"
SLOW_SECONDS = 0.3
# The type of task that the stage has an adapter for.
TASK = "math"
_MODEL = "mixed"
_FINGERPRINT = "0" * 64
_WORDS = ("The", " answer", " is", " ok", ".")


class MixedStage(stage_pb2_grpc.StageServiceServicer):
    """Writes a sentence of five tokens; keeps what a draft has in common with it."""

    async def Generate(
        self, request: stage_pb2.StageServiceGenerateRequest, context: object
    ) -> AsyncIterator[stage_pb2.StageServiceGenerateResponse]:
        await _obey(request)
        for place in range(len(_WORDS)):
            yield stage_pb2.StageServiceGenerateResponse(
                tokens=_tokens(place, place + 1), tokenizer_fingerprint=_FINGERPRINT
            )
        yield stage_pb2.StageServiceGenerateResponse(result=_result(0, len(_WORDS)))

    async def Verify(
        self, request: stage_pb2.VerifyRequest, context: object
    ) -> AsyncIterator[stage_pb2.VerifyResponse]:
        await _obey(request)
        yield stage_pb2.VerifyResponse(verification=_verification(len(request.draft.token_ids)))
        yield stage_pb2.VerifyResponse(tokens=_tokens(0, len(_WORDS)))
        yield stage_pb2.VerifyResponse(result=_result(len(request.draft.token_ids), 1))

    async def VerifyStream(
        self, request_iterator: AsyncIterator[stage_pb2.VerifyStreamRequest], context: object
    ) -> AsyncIterator[stage_pb2.VerifyStreamResponse]:
        proposed = 0
        async for request in request_iterator:
            if request.HasField("start"):
                await _obey(request.start)
                yield stage_pb2.VerifyStreamResponse(tokens=_tokens(0, 1), tokenizer_fingerprint=_FINGERPRINT)
            proposed += len(request.chunk.token_ids)
            if request.HasField("end"):
                break
        yield stage_pb2.VerifyStreamResponse(tokens=_tokens(1, len(_WORDS)))
        yield stage_pb2.VerifyStreamResponse(verification=_verification(proposed))
        yield stage_pb2.VerifyStreamResponse(result=_result(proposed, 1))

    async def Prefill(self, request: stage_pb2.PrefillRequest, context: object) -> stage_pb2.PrefillResponse:
        return stage_pb2.PrefillResponse(prompt_tokens=8, total_ms=1.0)

    async def Status(self, request: stage_pb2.StatusRequest, context: object) -> stage_pb2.StatusResponse:
        return stage_pb2.StatusResponse(
            models=[
                stage_pb2.ModelStatus(name=name, state=stage_pb2.MODEL_STATE_READY, engine="mixed")
                for name in (_MODEL, f"{_MODEL}/{TASK}")
            ]
        )


async def _obey(request: Any) -> None:
    """Do what the prompt's first word says."""
    messages = request.conversation.messages
    prompt = messages[-1].content if messages else request.prompt
    if prompt.startswith(SLOW):
        await asyncio.sleep(SLOW_SECONDS)
    elif prompt.startswith(FULL):
        raise ResourceExhausted("the queue is full")
    elif prompt.startswith(LONG):
        raise PromptTooLong("the prompt leaves no room for an answer", field="prompt")
    elif prompt.startswith(BROKEN):
        raise AsdError("the model broke")


def _tokens(start: int, end: int) -> common_pb2.TokenChunk:
    count = end - start
    return common_pb2.TokenChunk(
        token_ids=range(start, end),
        text="".join(_WORDS[start:end]),
        # Unsure enough for the policy to go on with some of them.
        logprobs=[-0.4] * count,
        entropies=[0.7] * count,
        top2_margins=[0.4] * count,
    )


def _verification(proposed: int) -> stage_pb2.Verification:
    return stage_pb2.Verification(
        proposed_tokens=proposed,
        accepted_tokens=proposed,
        ranks=[0] * proposed,
        target_logprobs=[-0.1] * proposed,
        ids_used=True,
    )


def _result(proposed: int, passes: int) -> stage_pb2.StageResult:
    return stage_pb2.StageResult(
        text="".join(_WORDS),
        token_ids=range(len(_WORDS)),
        tokenizer_fingerprint=_FINGERPRINT,
        finish_reason=common_pb2.FINISH_REASON_EOS,
        usage=common_pb2.Usage(
            prompt_tokens=8,
            completion_tokens=len(_WORDS),
            proposed_tokens=proposed,
            accepted_tokens=proposed,
            forward_passes=passes,
        ),
        timing=common_pb2.StageTiming(prefill_ms=0.1, decode_ms=0.5, total_ms=0.6),
        model=_MODEL,
        context_length=4096,
    )


def main() -> None:
    """Serve until SIGTERM."""
    stage: Any = MixedStage()
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(stage, server),
    )
    run_service(serve("mixed", sys.argv[1], [registration], drain_seconds=0))


if __name__ == "__main__":
    main()
