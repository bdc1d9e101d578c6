"""Measurements of one model in one engine, by token ids: what passes cost, and what speculation gains."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.device import used_bytes
from services.stage.engines.backend import TokenRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.stage.engines.backend import Backend


@dataclass(frozen=True)
class MeasurePlan:
    """What is measured. Sizes in tokens; batches: requests at a time; acceptances: shares of a draft."""

    batches: tuple[int, ...] = (1, 8, 64)
    decode: int = 128
    prompt: int = 256
    answer: int = 64
    prefills: tuple[int, ...] = (64, 256, 512, 1024)
    drafts: tuple[int, ...] = (32, 64, 128, 256)
    acceptances: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    speculation_batches: tuple[int, ...] = (1, 8, 64)
    repeats: int = 3
    highest_id: int = 31_000


# Smaller than the embedded model's context of 512.
TINY = MeasurePlan((1, 2), 16, 64, 16, (32, 64), (8, 16), (0.0, 0.5, 1.0), (1, 2), 1, 500)


class Prompts:
    """Random prompts that share no beginning: no prefix cache helps but where one is meant to."""

    def __init__(self, plan: MeasurePlan, seed: int = 13) -> None:
        self._rng = random.Random(seed)
        self._highest = plan.highest_id

    def __call__(self, size: int) -> list[int]:
        """Return a prompt of these many tokens."""
        return [self._rng.randrange(5, self._highest) for _ in range(size)]


async def write(backend: Backend, prompt: Sequence[int], tokens: int) -> list[int]:
    """Return a greedy continuation of exactly these many tokens."""
    ids: list[int] = []
    async with aclosing(backend.generate(list(prompt), TokenRequest(tokens))) as pieces:
        async for piece in pieces:
            ids += [row.token for row in piece.rows]
    if len(ids) != tokens:
        raise RuntimeError(f"{len(ids)} tokens came, not {tokens}: the model ended its answer")
    return ids


async def timed(*calls: Any) -> tuple[float, list[Any]]:
    """Return the milliseconds until all of some calls have ended, and their results."""
    started = time.perf_counter()
    found = await asyncio.gather(*calls)
    return (time.perf_counter() - started) * 1e3, list(found)


async def best_of(repeats: int, make: Callable[[], Sequence[Any]]) -> float:
    """Return the least milliseconds that newly made calls took: what disturbs only adds."""
    return min([(await timed(*make()))[0] for _ in range(repeats)])


async def passes(backend: Backend, plan: MeasurePlan) -> dict[str, Any]:
    """Measure decoding at each batch size, prefill, and scoring."""
    prompt = Prompts(plan)
    await write(backend, prompt(plan.prompt), 8)
    found: dict[str, Any] = {}
    for batch in plan.batches:
        first = await best_of(plan.repeats, lambda n=batch: [write(backend, prompt(64), 1) for _ in range(n)])
        whole = await best_of(
            plan.repeats, lambda n=batch: [write(backend, prompt(64), plan.decode + 1) for _ in range(n)]
        )
        found[f"decode_ms_b{batch}"] = (whole - first) / plan.decode
    for size in plan.prefills:
        found[f"prefill{size}_ms"] = await best_of(
            plan.repeats, lambda n=size: [write(backend, prompt(n), 1)]
        )
        found[f"score{size}_ms"] = await best_of(
            plan.repeats, lambda n=size: [backend.score(prompt(n), n // 2, "")]
        )
    question = prompt(plan.prompt - 16)

    def fresh() -> list[int]:
        # A new beginning: what an earlier pass left in the prefix cache must not help.
        return [*prompt(16), *question]

    found[f"generate{plan.answer}_ms"], (own,) = await timed(write(backend, fresh(), plan.answer))
    found[f"verify{plan.answer}_ms"] = await best_of(
        plan.repeats, lambda: [backend.score([*fresh(), *own], plan.prompt, "")]
    )
    own = await write(backend, question, plan.answer)
    scores = await backend.score([*question, *own], len(question), "")
    agreed = [token == row.top_ids[0] for token, row in zip(own, scores.rows, strict=True)]
    # Of random weights the likeliest tokens are close: a pass of another shape may turn one.
    found["accepted_of_own"] = agreed.index(False) if False in agreed else len(agreed)
    return found


async def prefilled(backend: Backend, plan: MeasurePlan) -> dict[str, Any]:
    """Measure verifying a draft whose prompt is in the prefix cache, as after prefilling ahead."""
    prompt = Prompts(plan, seed=14)
    own = await write(backend, prompt(plan.prompt), plan.answer)
    times = []
    for _ in range(plan.repeats + 1):
        known = prompt(plan.prompt)
        # All but the last token, as services.stage.engines.scoring prefills.
        await write(backend, known[:-1], 1)
        times.append((await timed(backend.score([*known, *own], plan.prompt, "")))[0])
    # The first warms up.
    return {f"verify{plan.answer}_prefilled_ms": min(times[1:])}


async def speculation(backend: Backend, plan: MeasurePlan) -> list[dict[str, Any]]:
    """Measure verifying a draft and going on after it, against plain decoding, at each acceptance.

    A draft is the model's own greedy continuation, with another token in the place that ends the accepted
    part. That part is taken as accepted whatever the pass says of it, so that a near tie of random weights
    moves no figure; `agreed` tells what the pass said.
    """
    prompt = Prompts(plan)
    rows = []
    for batch in plan.speculation_batches:
        # What is compiled on its first use is no part of a figure.
        await timed(*(write(backend, prompt(plan.prompt), 8) for _ in range(batch)))
        await timed(*(backend.score(prompt(plan.prompt), 16, "") for _ in range(batch)))
        for size in plan.drafts:
            questions = [prompt(plan.prompt) for _ in range(batch)]
            plain, owns = await timed(*(write(backend, each, size) for each in questions))
            for acceptance in plan.acceptances:
                accepted = round(acceptance * size)
                drafts = [_corrupt(own, accepted) for own in owns]
                # New prompts for each figure: what the last one left in the prefix cache must not help.
                fresh = [[*prompt(16), *question] for question in questions]
                taken, agreed = await timed(
                    *(
                        _verify(backend, question, draft, own, accepted)
                        for question, draft, own in zip(fresh, drafts, owns, strict=True)
                    )
                )
                rows.append(
                    {
                        "batch": batch,
                        "draft_tokens": size,
                        "acceptance": acceptance,
                        "plain_ms": plain,
                        "verified_ms": taken,
                        "speedup": plain / taken,
                        "agreed": statistics.mean(agreed),
                    }
                )
    return rows


def _corrupt(own: Sequence[int], accepted: int) -> list[int]:
    draft = list(own)
    if accepted < len(draft):
        draft[accepted] = draft[accepted] % 400 + 7
    return draft


async def _verify(
    backend: Backend, question: list[int], draft: list[int], own: Sequence[int], accepted: int
) -> int:
    """Score a draft, then write what is missing of as many tokens; return how many agreed."""
    scores = await backend.score([*question, *draft], len(question), "")
    left = len(draft) - accepted - 1
    if left > 0:
        await write(backend, [*question, *own[: accepted + 1]], left)
    pairs = zip(draft, scores.rows, strict=True)
    return next((place for place, (token, row) in enumerate(pairs) if token != row.top_ids[0]), len(draft))


async def residency(
    make: Callable[[int], Backend], levels: Sequence[int], plan: MeasurePlan
) -> dict[str, Any]:
    """Measure loading, sleeping and waking, and the memory given back, at each sleep level."""
    found: dict[str, Any] = {}
    prompt = Prompts(plan)
    for level in levels:
        backend = make(level)
        entry: dict[str, Any] = {}
        try:
            entry["load_s"] = await _seconds(backend.start())
            entry["first_tokens_s"] = await _seconds(write(backend, prompt(64), 8))
            before = used_bytes()
            entry["sleep_s"] = await _seconds(backend.stop())
            entry["bytes_before"], entry["bytes_asleep"] = before, used_bytes()
            entry["wake_s"] = await _seconds(backend.start())
            entry["first_tokens_after_waking_s"] = await _seconds(write(backend, prompt(64), 8))
        except Exception as error:
            # Reported in its place: another level may well work.
            entry["error"] = f"{type(error).__name__}: {error}"
        finally:
            await backend.close()
        found[f"sleep_level_{level}"] = entry
    return found


async def _seconds(call: Any) -> float:
    return (await timed(call))[0] / 1e3
