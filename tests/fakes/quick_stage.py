"""A stage in a process of its own, whose answers take milliseconds: `python -m quick_stage --config FILE`.

All but the engine is what `services.stage` runs. It starts faster, since it loads no model.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from asd.v1 import stage_pb2_grpc
from asd.values import FinishReason
from services.common.server import ServiceRegistration, run_service, serve
from services.stage.domain import PrefillResult, Result, TokenChunk, VerificationResult
from services.stage.engines.engine import EngineStatus, ModelState
from services.stage.model_pool import ModelPool
from services.stage.servicer import StageServicer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from asd.values import Message, Sampling
    from services.stage.domain import DraftPiece, DraftText, Event

WORDS = ("The", " answer", " is", " 19.")
# Long enough that calls are under way whenever the process is asked to end.
_WORD_SECONDS = 0.004
_FINGERPRINT = "q" * 64


class QuickEngine:
    """Writes the same words always, one at a time."""

    kind = "onnx"

    def __init__(self) -> None:
        self._state = ModelState.UNLOADED
        self._running = 0

    async def load(self) -> None:
        """There is nothing to load."""
        self._state = ModelState.READY

    async def unload(self) -> None:
        """There is nothing to free."""
        self._state = ModelState.UNLOADED

    async def generate(self, turns: tuple[Message, ...], sampling: Sampling) -> AsyncGenerator[Event, None]:
        """Write the words."""
        for token, word in enumerate(WORDS):
            await asyncio.sleep(_WORD_SECONDS)
            yield _chunk(token, word)
        yield _result(0, 0)

    async def verify(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        draft: DraftText,
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Accept the whole draft, which another process wrote in the same words."""
        count = len(draft.ids) + 1
        await asyncio.sleep(_WORD_SECONDS)
        yield _verification(count)
        for token, word in enumerate(WORDS):
            yield _chunk(token, word)
        yield _result(count, count)

    async def verify_stream(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Accept what comes, and write the rest where the draft ended early."""
        proposed = 0
        async for piece in pieces:
            if isinstance(piece, FinishReason):
                proposed += piece is FinishReason.EOS
                break
            for token in piece.ids:
                proposed += 1
                yield _chunk(token, WORDS[token])
        for token in range(proposed, len(WORDS)):
            await asyncio.sleep(_WORD_SECONDS)
            yield _chunk(token, WORDS[token])
        yield _verification(proposed)
        yield _result(proposed, proposed)

    async def prefill(self, turns: tuple[Message, ...]) -> PrefillResult:
        """There is nothing to keep."""
        return PrefillResult(8, 0, 0.0)

    def status(self) -> EngineStatus:
        """Say whether it was loaded."""
        return EngineStatus(self._state, 7, 512, _FINGERPRINT, 0, 0, 0, 0, 0, 0, 0, "")


def _chunk(token: int, word: str) -> TokenChunk:
    nothing = np.zeros(1, np.float32)
    return TokenChunk((token,), word, nothing, nothing, nothing)


def _verification(count: int) -> VerificationResult:
    return VerificationResult(
        count, count, np.zeros(count, np.int64), np.zeros(count, np.float32), ids_used=True
    )


def _result(proposed: int, accepted: int) -> Result:
    ids = tuple(range(len(WORDS)))
    text = "".join(WORDS)
    return Result(text, ids, FinishReason.EOS, 8, 0, proposed, accepted, 5, (), 0.0, 1.0, 16.0, 17.0)


async def _run(listen: str, drain_seconds: float) -> None:
    pool = ModelPool({"quick": QuickEngine()}, "quick")
    await pool.load("quick")
    servicer = StageServicer(pool)
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
    )
    await serve("stage:quick", listen, [registration], drain_seconds=drain_seconds, on_drain=servicer.drain)


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    config = yaml.safe_load(parser.parse_args().config.read_text(encoding="utf-8"))
    run_service(_run(config["listen"], config["drain_seconds"]))


if __name__ == "__main__":
    main()
