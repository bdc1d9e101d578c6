"""Measures what `asd-policy fit` costs on a busy machine: `python -m benchmarks.fitting`.

The command fits a policy to made-up outcomes, by turns alone and beside busy processes. The system says how
much processor time it took: threads that spin while they wait for a core would show there. Writes
benchmarks/results/fitting.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from benchmarks.arguments import count
from benchmarks.record import write_result
from policy_service.train.outcome_table import write_outcomes

if TYPE_CHECKING:
    from collections.abc import Iterator

BUSY = 8
TURNS = 3
TRAIN, CALIBRATION = 8_000, 4_000
COSTS = {
    "stages": [
        {"name": "small", "cost": 1.0, "prefill_ms": 1.0, "score_token_ms": 0.1, "token_ms": 0.1},
        {"name": "large", "cost": 5.0, "prefill_ms": 5.0, "score_token_ms": 0.2, "token_ms": 1.0},
    ]
}


def outcome(rng: random.Random) -> dict[str, object]:
    """Return a prompt's outcome: its difficulty shows in its length and in how certain the draft was."""
    difficulty, tokens = rng.random(), rng.randint(3, 8)
    words = " ".join(rng.choice("red blue green big small".split()) for _ in range(1 + int(difficulty * 20)))
    stages: dict[str, object] = {}
    for name, skill in (("small", 0.9), ("large", 2.2)):
        is_right = rng.random() < 1 - difficulty / skill
        logprobs = [-rng.expovariate(100 if is_right and rng.random() < 0.9 else 1) for _ in range(tokens)]
        stages[name] = {
            "text": f"It is {rng.randint(0, 99)}.",
            "finish_reason": "eos",
            "logprobs": logprobs,
            "entropies": [-each for each in logprobs],
            "top2_margins": [0.5] * tokens,
            "correct": is_right,
        }
    accepted = rng.randint(0, tokens + 1)
    verification = {
        "proposed": tokens + 1,
        "accepted": accepted,
        "ranks": [0] * accepted + [2] * (tokens + 1 - accepted),
        "forward_passes": 1 + tokens + 1 - accepted,
        "proposed_again": 0,
    }
    return {
        "prompt": f"{words} {rng.random()}?",
        "history": [],
        "suite": "made up",
        "level": 1,
        "kind": "",
        "split": "train",
        "stages": stages,
        "verifications": {"small>large": verification},
    }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes busy for the block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def processor_seconds(command: list[str]) -> float:
    """Run a command to its end; return the processor time of all its threads."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fitting", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--turns", type=count, default=TURNS)
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.parquet") for name in ("train", "calibration")]
        for file, prompts in zip(files, (TRAIN, CALIBRATION), strict=True):
            write_outcomes(file, ("small", "large"), [outcome(rng) for _ in range(prompts)])
        costs = Path(folder, "costs.yaml")
        costs.write_text(yaml.safe_dump(COSTS), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("asd-policy")), "fit", *map(str, files)]
        command += ["--costs", str(costs), "--output", str(Path(folder, "policy.zip"))]
        rows = []
        for turn in range(options.turns):
            row = {}
            for name, processes in (("alone_s", 0), ("busy_s", BUSY)):
                with busy(processes):
                    row[name] = round(processor_seconds(command), 2)
            rows.append(row)
            sys.stderr.write(f"turn {turn + 1} of {options.turns}: {row}\n")
    ratios = sorted(row["busy_s"] / row["alone_s"] for row in rows)
    figures = {
        "processor_ratio": round(statistics.median(ratios), 3),
        "worst_ratio": round(ratios[-1], 3),
        "busy_processes": BUSY,
        "prompts": [TRAIN, CALIBRATION],
        "rows": rows,
    }
    sys.stderr.write(f"{write_result('fitting', 'python -m benchmarks.fitting', figures)}\n")


if __name__ == "__main__":
    main()
