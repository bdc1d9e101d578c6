"""`python -m benchmarks.family --data DIR`: which prompts the shipped policy takes as unlike all that it
knows."""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.record import percentile, write_result
from policy_service.features import PromptText
from policy_service.store import load_artifact
from policy_service.train.family import suite_prompts
from tests.fakes.renamed_tasks import renamed_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_service.policy import Policy

_ROOT = Path(__file__).resolve().parents[1]
_OFF_TOPIC = _ROOT / "tests" / "data" / "off_topic.jsonl"


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
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    policy, document, _ = load_artifact(_ROOT / "policy_service" / "artifact")
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
        "renamed_suite_prompts": _rate(policy, renamed),
        "microseconds": _microseconds(policy, held_out),
        "microseconds_published": _microseconds(policy, [PromptText(prompt) for _, prompt in published]),
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    command = f"python -m benchmarks.family --data DIR --prompts {given.prompts} --seed {given.seed}"
    print(write_result("family", command, figures))


if __name__ == "__main__":
    main()
