"""A stage that drafts random text at once, over real gRPC: the worst that can be proposed to a target.

For benchmarks alone. `python -m benchmarks.random_stage HOST:PORT`.
"""

# ruff: noqa: D102, N802 - methods have the protos' names and meanings

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from services.common.server import ServiceRegistration, run_service, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# About as many tokens of the family's vocabulary as an answer has, 38 on average.
CHARACTERS = 45
_LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789=+.:"


def random_text(rng: random.Random) -> str:
    """Return text that no model of the family would write."""
    return "".join(rng.choices(_LETTERS, k=CHARACTERS))


class RandomStage(stage_pb2_grpc.StageServiceServicer):
    """Writes random letters."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    async def Generate(
        self, request: stage_pb2.StageServiceGenerateRequest, context: object
    ) -> AsyncIterator[stage_pb2.StageServiceGenerateResponse]:
        text = random_text(self._rng)
        yield stage_pb2.StageServiceGenerateResponse(tokens=common_pb2.TokenChunk(text=text))
        yield stage_pb2.StageServiceGenerateResponse(
            result=stage_pb2.StageResult(
                text=text, finish_reason=common_pb2.FINISH_REASON_EOS, model="random"
            )
        )


def main() -> None:
    """Serve until SIGTERM."""
    stage: Any = RandomStage()
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(stage, server),
    )
    run_service(serve("random", sys.argv[1], [registration], drain_seconds=0))


if __name__ == "__main__":
    main()
