"""What the gRPC service adds: the same requests to vLLM itself, to a backend, and to a stage process."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from benchmarks.gpu.measure import MeasurePlan, Prompts, timed, write
from benchmarks.processes import service
from services.common.channel import open_channel
from services.stage.engines.vllm.engine import VllmBackend

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

CALL_S = 600.0
LOAD_S = 900.0


class BareBackend(VllmBackend):
    """A backend whose vLLM can be asked directly."""

    async def write_without_logprobs(self, ids: Sequence[int], tokens: int) -> None:
        """Have vLLM write so many tokens, and nothing beside them."""
        params = self._vllm.SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._output_kind.DELTA,
        )
        written = 0
        async with aclosing(self._ask(list(ids), params, "")) as outputs:
            async for output in outputs:
                written += len(output.outputs[0].token_ids)
        if written != tokens:
            raise RuntimeError(f"{written} tokens came, not {tokens}")


async def bare(backend: BareBackend, plan: MeasurePlan) -> dict[int, tuple[float, float]]:
    """Return the milliseconds for a round of answers by batch, the median of the repeats: of vLLM itself
    without log-probabilities, and of the backend."""
    prompt = Prompts(plan)

    async def median(batch: int, ask: Callable[[Sequence[int]], Awaitable[object]]) -> float:
        await timed(*(ask(prompt(plan.prompt)) for _ in range(batch)))
        rounds = [
            (await timed(*(ask(prompt(plan.prompt)) for _ in range(batch))))[0] for _ in range(plan.repeats)
        ]
        return sorted(rounds)[len(rounds) // 2]

    return {
        batch: (
            await median(batch, lambda ids: backend.write_without_logprobs(ids, plan.decode)),
            await median(batch, lambda ids: write(backend, ids, plan.decode)),
        )
        for batch in (plan.batches[0], plan.batches[-1])
    }


async def served(model: Path, options: dict[str, Any], max_batch: int, plan: MeasurePlan) -> dict[int, float]:
    """Return the same through a stage process of its own and gRPC."""
    prompt = Prompts(plan)
    sampling = common_pb2.Sampling(max_new_tokens=plan.decode)

    async def ask(stub: Any) -> None:
        text = " ".join(f"w{token}" for token in prompt(plan.prompt))
        request = stage_pb2.StageServiceGenerateRequest(prompt=text, sampling=sampling)
        last = None
        async for response in stub.Generate(request, timeout=CALL_S):
            last = response
        if last is None or len(last.result.token_ids) != plan.decode:
            raise RuntimeError("an answer has another length")

    found = {}
    entry = {"name": "m", "path": str(model), "engine": "vllm", "max_batch": max_batch, "vllm": options}
    async with (
        service("services.stage", {"models": [entry | {"preload": False}]}) as address,
        open_channel(address, retry=False) as channel,
    ):
        await load_model(address)
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        for batch in (plan.batches[0], plan.batches[-1]):
            await asyncio.gather(*(ask(stub) for _ in range(batch)))
            rounds = [(await timed(*(ask(stub) for _ in range(batch))))[0] for _ in range(plan.repeats)]
            found[batch] = sorted(rounds)[len(rounds) // 2]
    return found


async def load_model(address: str) -> None:
    """Have a stage load its model: a large one takes longer than a process may take to start."""
    async with open_channel(address, retry=False) as channel:
        stub: Any = stage_pb2_grpc.StageServiceStub(channel)
        await stub.Load(stage_pb2.LoadRequest(), timeout=LOAD_S)
