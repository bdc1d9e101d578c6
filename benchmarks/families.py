"""Checks exactness over stages that share no tokenizer: `python -m benchmarks.families`.

Eight tiny models, a scripted and a random one of each of four tokenizer families, behind real services. Every
chain of two of them, and some of three, must give the tokens, the text and the finish reason that its last
stage gives alone. Prompts hold what people send: special tokens' texts, code, emoji, control characters,
conversations. Writes benchmarks/results/families.json.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import random
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from asd.client import AsyncClient
from asd.errors import AsdError, InvalidRequest
from asd.values import Message, Request, Sampling
from benchmarks.processes import service
from benchmarks.record import write_result
from services.common.server import run_service
from tests.fakes.tiny_models import write_model

if TYPE_CHECKING:
    from collections.abc import Iterator


# Ids, text and finish reason; or that it was refused, and the field; None: the call failed.
Told = tuple[tuple[int, ...], str, str] | tuple[str, str] | None

PROMPTS = 400
CALL_MS = 60_000.0
# Families that differ in how they make tokens: of bytes, and of pieces with a space before every text, before
# its first word, or nowhere. The scripts agree in part, so that some of each draft is accepted.
SCRIPTS = {
    "chatml": "The answer is nineteen. 東京 is a city; naïve 🦊 foxes, too.",
    "llama 2": "The answer is twenty. 東京 is a city; naïve 🦊 foxes, too.",
    "mistral v0.3": "The answer is nineteen. 京都 is a city; naïve 🦊 foxes, too.",
    "gemma": "The answer is nineteen. 東京 is no city; naïve 🦊 wolves, too.",
}
PIECES = (
    "What is the colour of the sky?",
    "9 plus 10 =",
    "naïve café 東京 🦊👩‍👩‍👧",
    "<|im_end|><|im_start|>assistant\n",
    "</s><s>[INST] [/INST]",
    "<end_of_turn>\n<start_of_turn>model",
    "<0x0A>▁<unk>",
    "def add(a, b):\n\treturn a + b",
    " \n\n  ",
    "\x00\x1b[31m\r",
    "e\u0301\u200b\u202e",
    "{{ 7 * 7 }} {% raw %}",
)
STOPS = ("</s>", "<|im_end|>", " is", "東", "\n\n", "foxes, too.")


def requests(count: int) -> Iterator[Request]:
    """Yield as many requests, always the same."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join([*rng.choices(PIECES, k=rng.randint(1, 3)), str(rng.randint(0, 999))])

    for number in range(count):
        content = [Message("user", text())]
        for _ in range(rng.choice((0, 0, 1, 2))):
            content += [Message("assistant", text()), Message("user", text())]
        if rng.random() < 0.3:
            content.insert(0, Message("system", text()))
        temperature = rng.choice((0.0, 0.0, 0.5, 1.0))
        yield Request(
            tuple(content),
            Sampling(
                max_new_tokens=rng.choice((1, 8, 24, 32)),
                temperature=temperature,
                top_p=rng.choice((1.0, 0.9)) if temperature else 1.0,
                seed=number if temperature else None,
                stop=tuple(rng.sample(STOPS, rng.choice((0, 0, 1, 2)))),
            ),
        )


def _kind(told: Told) -> str:
    return "failed" if told is None else str(told[0] if told[0] == "refused" else told[-1])


async def measure(prompts: int, at_a_time: int) -> dict[str, object]:
    """Return how many answers differ from those of their last stage alone, by chain; and failed calls."""
    kinds = {
        f"{family.replace(' ', '-').replace('.', '-')}-{kind}": (family, kind)
        for kind in ("random", "scripted")
        for family in SCRIPTS
    }
    names = list(kinds)
    chains = [
        *itertools.combinations(names, 2),
        *itertools.islice(itertools.combinations(names, 3), 0, None, 7),
    ]
    differing: collections.Counter[str] = collections.Counter()
    failed: collections.Counter[str] = collections.Counter()
    answers: collections.Counter[str] = collections.Counter()
    # Of the stages alone: how their answers ended, or that they refused.
    kinds_of_answers: collections.Counter[str] = collections.Counter()
    accepted = proposed = 0
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets = {}
        for number, (name, (family, kind)) in enumerate(kinds.items()):
            script = SCRIPTS[family] if kind == "scripted" else ""
            write_model(folder / name, family, script=script, seed=number)
            # Alone in its batch: arithmetic that depends on the others may turn a near tie.
            model = {"name": name, "path": str(folder / name), "max_batch": 1}
            targets[name] = await stack.enter_async_context(service("services.stage", {"models": [model]}))
        clients = []
        for pipelined in (True, False):
            settings = {
                "stages": [{"name": name, "target": target, "cost": 1.0} for name, target in targets.items()],
                "static_plan": [names[-1]],
                "speculation": {"pipelined": pipelined, "adaptive": False},
            }
            router = await stack.enter_async_context(service("services.router", settings))
            clients.append(await stack.enter_async_context(AsyncClient(router, timeout_ms=CALL_MS)))

        async def ask(client: AsyncClient, request: Request, way: str, **fixed: Any) -> Told:
            nonlocal accepted, proposed
            try:
                answer = await client.ask(Request(request.input, request.sampling, **fixed))
            except InvalidRequest as refusal:
                # A stage that cannot take the conversation refuses it with or without a draft.
                return "refused", refusal.field
            except AsdError as error:
                sys.stderr.write(f"{way}: {type(error).__name__}: {error.message}\n")
                failed[way] += 1
                return None
            if "chain" in fixed:
                accepted += answer.stages[-1].accepted_tokens
                proposed += answer.stages[-1].proposed_tokens
            return answer.token_ids, answer.text, answer.finish_reason

        async def check(request: Request) -> None:
            alone = {name: await ask(clients[0], request, name, stage=name) for name in names}
            for told in alone.values():
                kinds_of_answers[_kind(told)] += 1
            for client, way in zip(clients, ("pipelined", "sequential"), strict=True):
                for chain in chains:
                    name = f"{way}: {' > '.join(chain)}"
                    told = await ask(client, request, name, chain=chain)
                    answers[name] += 1
                    differing[name] += told != alone[chain[-1]]

        todo = list(requests(prompts))
        bar = track(todo, "families", console=Console(stderr=True))

        async def work() -> None:
            for request in bar:
                await check(request)

        await asyncio.gather(*(work() for _ in range(at_a_time)))
    return {
        "prompts": prompts,
        "families": list(SCRIPTS),
        "chains": len(chains),
        "answers": answers.total(),
        "differing": differing.total(),
        "differing_by_chain": dict(+differing),
        "failed": dict(failed),
        "alone": dict(kinds_of_answers),
        "proposed_tokens": proposed,
        "accepted_tokens": accepted,
    }


def main() -> None:
    """Run the command; end with 1 where an answer differs or a call failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="below 400 nothing is kept")
    parser.add_argument("--at-a-time", type=int, default=4, help="prompts that are asked at the same time")
    options = parser.parse_args()
    figures = run_service(measure(options.prompts, options.at_a_time))
    if options.prompts >= PROMPTS:
        print(write_result("families", "python -m benchmarks.families", figures), file=sys.stderr)
    print(f"{figures['differing']} of {figures['answers']} answers differ; failed: {figures['failed']}")
    sys.exit(bool(figures["differing"] or figures["failed"]))


if __name__ == "__main__":
    main()
