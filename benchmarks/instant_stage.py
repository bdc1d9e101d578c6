"""A stage that answers at once with one fixed token, over real gRPC: it shows what everything else costs.

For benchmarks alone. `python -m benchmarks.instant_stage HOST:PORT`.
"""

# ruff: noqa: D102, N802 - methods have the protos' names and meanings

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from services.common.server import ServiceRegistration, run_service, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_TOKENS = stage_pb2.StageServiceGenerateResponse(
    tokens=common_pb2.TokenChunk(
        token_ids=[7], text="ok", logprobs=[-0.01], entropies=[0.05], top2_margins=[0.98]
    )
)
_RESULT = stage_pb2.StageServiceGenerateResponse(
    result=stage_pb2.StageResult(
        text="ok",
        token_ids=[7],
        tokenizer_fingerprint="0" * 64,
        finish_reason=common_pb2.FINISH_REASON_EOS,
        usage=common_pb2.Usage(prompt_tokens=8, completion_tokens=1, forward_passes=2),
        model="instant",
    )
)


class InstantStage(stage_pb2_grpc.StageServiceServicer):
    """Writes `ok`."""

    async def Generate(
        self, request: stage_pb2.StageServiceGenerateRequest, context: object
    ) -> AsyncIterator[stage_pb2.StageServiceGenerateResponse]:
        yield _TOKENS
        yield _RESULT

    async def Status(self, request: stage_pb2.StatusRequest, context: object) -> stage_pb2.StatusResponse:
        model = stage_pb2.ModelStatus(name="instant", state=stage_pb2.MODEL_STATE_READY, engine="instant")
        return stage_pb2.StatusResponse(models=[model])


def main() -> None:
    """Serve until SIGTERM."""
    stage: Any = InstantStage()
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(stage, server),
    )
    run_service(serve("instant", sys.argv[1], [registration], drain_seconds=0))


if __name__ == "__main__":
    main()
