"""`python -m benchmarks.family --data DIR`: which prompts the shipped policy takes as unlike all that it
knows, and what its predictions are worth for known questions in forms that it was not fitted to."""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asd.values import Message, Sampling
from benchmarks.record import write_result
from policy_service.artifact import load_artifact
from policy_service.features import Draft, PromptText
from policy_service.train.family import suite_prompts
from services.common.stats import percentile
from services.stage.domain import Result, TokenChunk
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from suites import grade, split
from tests.fakes.renamed_tasks import renamed_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asd.values import FinishReason
    from policy_service.policy import Policy
    from services.stage.engines.engine import Engine
    from suites import Task

_ROOT = Path(__file__).resolve().parents[1]
_OFF_TOPIC = _ROOT / "tests" / "data" / "off_topic.jsonl"

# P(correct) above which a prediction is sure: what savings are made of, and what min_quality is certified by.
_SURE = 0.9


def _asked(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _after(other: Task, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return (*_asked(other.prompt), Message("assistant", other.solution), *turns)


# Forms of a question of the suites; the second task is another one. Chosen, none of them by these figures.
FORMS: dict[str, Callable[[Task, Task], tuple[Message, ...]]] = {
    "as it is": lambda task, _: _asked(task.prompt),
    "with a line break behind it": lambda task, _: _asked(f"{task.prompt}\n"),
    "after an empty system turn": lambda task, _: (Message("system", ""), *_asked(task.prompt)),
    "after a default system turn": lambda task, _: (
        Message("system", "You are a helpful assistant."),
        *_asked(task.prompt),
    ),
    "in lower case": lambda task, _: _asked(task.prompt.lower()),
    "with thanks behind it": lambda task, _: _asked(f"{task.prompt} Thanks!"),
    "with a polite opening": lambda task, _: _asked(f"Please answer: {task.prompt}"),
    "as a second turn": lambda task, other: _after(other, _asked(task.prompt)),
    "as a third turn": lambda task, other: _after(other, _after(other, _asked(task.prompt))),
}


def prompt_of(turns: Sequence[Message]) -> PromptText:
    """Return what the policy service reads of a conversation."""
    *history, question = (turn.content for turn in turns)
    return PromptText(question, tuple(history))


async def measure_forms(policy: Policy, count: int, answered: int, seed: int) -> dict[str, object]:
    """Return by form, of held-out questions: how many are marked, and what sure answers are worth.

    answered: of them, those that every stage answers. sure: by stage, answers of its own with a P(correct)
    above 0.9 by a policy that marks nothing, and the share that is right.
    """
    tasks = list(split("evaluation", count, seed))
    engines: dict[str, Engine] = {
        stage.name: OnnxEngine(stage.name, _ROOT / "models" / stage.name, OnnxOptions(max_lanes=1))
        for stage in policy.stages
    }
    for engine in engines.values():
        await engine.load()
    figures: dict[str, object] = {}
    for name, form in FORMS.items():
        # The neighbour stands before it.
        conversations = [form(task, tasks[place - 1]) for place, task in enumerate(tasks)]
        sure: dict[str, object] = {}
        for stage, (stage_name, engine) in enumerate(engines.items()):
            p_correct, right = [], []
            for task, turns in zip(tasks[:answered], conversations, strict=False):
                draft = await _answer(engine, turns)
                state = policy.answer_state(prompt_of(turns), stage, draft, None, None)
                if state.view == 0:
                    # It ended as no answer did that the policy was fitted to.
                    continue
                (scores,) = policy.score([state])
                p_correct.append(policy.views[state.view].heads[stage].p_correct(scores[0]))
                right.append(grade(task, draft.text))
            is_sure = np.array(p_correct) > _SURE
            sure[stage_name] = {
                "answers": int(is_sure.sum()),
                "p_correct": round(float(np.mean(np.array(p_correct)[is_sure])), 3),
                "right": round(float(np.mean(np.array(right)[is_sure])), 3),
            }
        figures[name] = {**_rate(policy, [*map(prompt_of, conversations)]), "sure": sure}
        print(name, json.dumps(figures[name]), flush=True)
    return figures


async def _answer(engine: Engine, turns: tuple[Message, ...]) -> Draft:
    pieces: list[TokenChunk] = []
    finish: FinishReason = "eos"
    async for event in engine.generate(turns, Sampling(max_new_tokens=160)):
        if isinstance(event, TokenChunk):
            pieces.append(event)
        elif isinstance(event, Result):
            finish = event.finish.value
    logprobs, entropies, margins = (
        np.concatenate([getattr(piece, name) for piece in pieces])
        for name in ("logprobs", "entropies", "margins")
    )
    return Draft("".join(piece.text for piece in pieces), logprobs, entropies, margins, finish)


def published_prompts(directory: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Return source and text of prompts drawn from tables of published outcomes (`*.csv.gz`), none twice."""
    csv.field_size_limit(2**24)
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.csv.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("prompt"):
                    found.setdefault(row["prompt"], path.name)
    drawn = random.Random(seed).sample(sorted(found), count)
    return [(found[prompt], prompt) for prompt in drawn]


def _rate(policy: Policy, prompts: Sequence[PromptText]) -> dict[str, object]:
    marked = sum(map(policy.is_unlike, prompts))
    return {"prompts": len(prompts), "marked": marked, "share": round(marked / len(prompts), 4)}


def _microseconds(policy: Policy, prompts: Sequence[PromptText]) -> dict[str, float]:
    assert policy.family is not None
    taken = []
    for prompt in prompts:
        # Processor time: what else runs on the machine does not count.
        started = time.process_time()
        policy.family.has(prompt)
        taken.append((time.process_time() - started) * 1e6)
    return {"p50": round(percentile(taken, 0.5), 1), "p99": round(percentile(taken, 0.99), 1)}


def main() -> None:
    """Measure, and write results/family.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="tables of published outcomes (*.csv.gz)")
    parser.add_argument("--prompts", type=int, default=1000, help="of them, and of each kind of suite prompt")
    parser.add_argument("--answered", type=int, default=100, help="prompts of each form that stages answer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    policy, document, _ = load_artifact(_ROOT / "policy_service" / "policy.zip")
    assert document.family is not None
    rows = [json.loads(line) for line in _OFF_TOPIC.read_text("utf-8").splitlines()]
    off_topic = {
        part: [
            PromptText(row["prompt"], tuple(row.get("history", ()))) for row in rows if row["part"] == part
        ]
        for part in ("open", "held_back")
    }
    published = published_prompts(given.data, given.prompts, given.seed)
    held_out = suite_prompts("evaluation", given.prompts, given.seed)
    renamed = [
        PromptText(question, history) for history, question in renamed_prompts(given.prompts, given.seed)
    ]
    figures = {
        "policy_version": document.policy_version,
        "threshold": document.family.threshold,
        "off_topic": {
            **{part: _rate(policy, prompts) for part, prompts in off_topic.items()},
            "all": _rate(policy, [*itertools.chain.from_iterable(off_topic.values())]),
            "not_marked": [
                prompt.question
                for prompt in itertools.chain.from_iterable(off_topic.values())
                if not policy.is_unlike(prompt)
            ],
        },
        "published": {
            **_rate(policy, [PromptText(prompt) for _, prompt in published]),
            "sources": dict(Counter(source for source, _ in published)),
        },
        "held_out_suite_prompts": _rate(policy, held_out),
        "held_out_questions_in_other_forms": asyncio.run(
            measure_forms(policy, given.prompts, given.answered, given.seed)
        ),
        "renamed_suite_prompts": _rate(policy, renamed),
        "microseconds": _microseconds(policy, held_out),
        "microseconds_published": _microseconds(policy, [PromptText(prompt) for _, prompt in published]),
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    counts = f"--prompts {given.prompts} --answered {given.answered} --seed {given.seed}"
    command = f"python -m benchmarks.family --data DIR {counts}"
    print(write_result("family", command, figures))


if __name__ == "__main__":
    main()
