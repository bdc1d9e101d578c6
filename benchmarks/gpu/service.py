"""What the gRPC service adds to the bare engine: the same requests to a backend and to a stage process."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.measure import Plan, Prompts, timed, write

if TYPE_CHECKING:
    from services.stage.backend import Backend

CALL_S = 600.0


async def bare(backend: Backend, plan: Plan) -> dict[int, float]:
    """Return the milliseconds for a round of answers by batch, the median of the repeats."""
    prompt = Prompts(plan)
    found = {}
    for batch in (plan.batches[0], plan.batches[-1]):
        await timed(*(write(backend, prompt(plan.prompt), plan.decode) for _ in range(batch)))
        rounds = [
            (await timed(*(write(backend, prompt(plan.prompt), plan.decode) for _ in range(batch))))[0]
            for _ in range(plan.repeats)
        ]
        found[batch] = sorted(rounds)[len(rounds) // 2]
    return found


async def served(model: Path, options: dict[str, Any], max_batch: int, plan: Plan) -> dict[int, float]:
    """Return the same through a stage process of its own and gRPC."""
    import grpc
    import yaml

    from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
    from benchmarks.processes import process

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
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "stage.yaml")
        entry = {"name": "m", "path": str(model), "engine": "vllm", "max_batch": max_batch, "vllm": options}
        # Loaded by a call: a large model takes longer than a process may take to start.
        entry["preload"] = False
        config.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "models": [entry]}))
        async with (
            process("services.stage", "--config", str(config)) as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub: Any = stage_pb2_grpc.StageServiceStub(channel)
            await stub.Load(stage_pb2.LoadRequest(), timeout=CALL_S)
            for batch in (plan.batches[0], plan.batches[-1]):
                await asyncio.gather(*(ask(stub) for _ in range(batch)))
                rounds = [(await timed(*(ask(stub) for _ in range(batch))))[0] for _ in range(plan.repeats)]
                found[batch] = sorted(rounds)[len(rounds) // 2]
    return found
