"""Measures the shipped policy on held-out outcomes, and live: `python -m benchmarks.policy`.

Writes benchmarks/results/policy.json. Needs the outcome files of `python -m models.train outcomes` (a GPU)
or of `asd-policy collect` in build/outcomes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.processes import ROOT
from benchmarks.record import percentile, update_result, write_result
from policy_service.artifact import load_policy, load_predictor
from policy_service.features import Draft, PromptText
from policy_service.policy import Objective, Preference, Spent
from policy_service.solver import solve_policy
from policy_service.train.compare import compare_predictors
from policy_service.train.costs import EMBEDDED, read_costs
from policy_service.train.dataset import read_dataset
from policy_service.train.evaluate import area_under_roc, evaluate_policy, r_squared, served_states
from policy_service.train.outcomes import read_rows
from policy_service.train.replay import replay
from services.client.client import CascadeClient
from services.client.values import Objective as ClientObjective
from services.client.values import Request
from services.common.server import run_service
from suites import grade, split

if TYPE_CHECKING:
    from policy_service.policy import Policy
    from policy_service.predictor import OnnxPredictor
    from policy_service.train.dataset import Dataset
    from policy_service.train.evaluate import Evaluation

ARTIFACT = ROOT / "policy_service" / "artifact"
READY_TIMEOUT = 60.0
_console = Console(stderr=True)


def headline(evaluation: Evaluation, train_prompts: int) -> dict[str, object]:
    """Return the figures that a policy is judged by: what BALANCED and FASTEST do beside always-largest."""
    lines = {line.name: line for line in evaluation.lines}
    views = {each.view: each for each in evaluation.predictions}
    largest = next(line for name, line in reversed(lines.items()) if name.startswith("always"))
    balanced, fastest = (
        next(line for name, line in lines.items() if name.startswith(preference.value))
        for preference in (Preference.BALANCED, Preference.FASTEST)
    )
    own = [each for name, each in views.items() if "prompt" not in name]
    return {
        "train_prompts": train_prompts,
        "eval_prompts": evaluation.prompts,
        "r2_prompt_only": round(views["small, from the prompt alone"].r2, 4),
        "r2_after_draft": round(views["small"].r2, 4),
        "ece_max": round(max(each.calibration_error for each in own), 4),
        "early_stop_share": round(balanced.early_stop_share, 4),
        "accuracy_ratio": round(balanced.accuracy_ratio, 4),
        "latency_speedup": round(largest.latency_ms / balanced.latency_ms, 3),
        "cost_ratio": round(largest.cost / balanced.cost, 3),
        "oracle_share": round(evaluation.oracle_share[balanced.name], 4),
        "fastest": {
            "accuracy_ratio": round(fastest.accuracy_ratio, 4),
            "latency_speedup": round(largest.latency_ms / fastest.latency_ms, 3),
            "cost_ratio": round(largest.cost / fastest.cost, 3),
        },
    }


def measure_context(policy: Policy, predictor: OnnxPredictor, path: Path) -> dict[str, object]:
    """Return what history is worth: decisions with it, and on the last message alone."""
    costs = read_costs(EMBEDDED)
    value = policy.quality_values[Preference.BALANCED]
    views = tuple(each.view for each in policy.views)
    solution = solve_policy(views, value)
    figures: dict[str, object] = {}
    values = {}
    for name, with_history in (("with history", True), ("last message alone", False)):
        data = read_dataset(path, costs, with_history=with_history)
        p_correct, cells = served_states(policy, predictor, data)
        run = replay(data, views, p_correct, solution, value, cells)
        values[name] = value * run.correct - run.cost
        prompt, right = p_correct[None, None], data.correct[:, 0]
        figures[name] = {
            "r2_prompt_only": round(r_squared(prompt, right), 4),
            "auroc_prompt_only": round(area_under_roc(prompt, right), 4),
            "r2_after_draft": round(r_squared(p_correct[0, None], right), 4),
            "accuracy": round(float(run.correct.mean()), 4),
            "cost": round(float(run.cost.mean()), 4),
            "value": round(float(values[name].mean()), 4),
        }
    lost = values["with history"] - values["last message alone"]
    margin = 1.96 * float(lost.std(ddof=1)) / len(lost) ** 0.5
    return {
        "context": {
            **figures,
            "conversations": len(lost),
            "value_lost_without_history": round(float(lost.mean()), 4),
            "value_lost_low": round(float(lost.mean()) - margin, 4),
            "value_lost_high": round(float(lost.mean()) + margin, 4),
        }
    }


def measure_decisions(policy: Policy, path: Path, count: int) -> dict[str, object]:
    """Return the time of one decision in this process: features, predictor, calibration, look-up."""
    cases = []
    for row in read_rows(path):
        outcome = row.stages[policy.stages[0].name]
        signals = (
            np.array(values, np.float32)
            for values in (outcome.logprobs, outcome.entropies, outcome.top2_margins)
        )
        cases.append(
            (PromptText(row.prompt, row.history), Draft(outcome.text, *signals, outcome.finish_reason))
        )
        if len(cases) == count:
            break
    times_us = []
    for prompt, draft in cases:
        # As it happens: the plan comes first and leaves the prompt's features.
        policy.plan(prompt, Objective(), {})
        started = time.perf_counter()
        policy.decide(prompt, 0, draft, None, None, Objective(), Spent(), {})
        times_us.append((time.perf_counter() - started) * 1e6)
    return {
        "decision_p50_us": round(percentile(times_us, 0.5), 1),
        "decision_p95_us": round(percentile(times_us, 0.95), 1),
        "decision_samples": len(times_us),
    }


async def measure_live(prompts: int) -> dict[str, object]:
    """Measure a running cascade at each preference beside always the largest stage, taking turns."""
    command = [sys.executable, "-m", "services.client.cli", "up", "--json", "--port-base", "21060"]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    ways: dict[str, dict[str, object]] = {
        "always large": {"stage": "large"},
        **{each.value: {"objective": ClientObjective(preference=each.value)} for each in Preference},
    }
    rows: dict[str, list[tuple[float, float, bool, bool]]] = {name: [] for name in ways}
    try:
        assert child.stdout is not None
        await asyncio.wait_for(child.stdout.readuntil(b"\n"), READY_TIMEOUT)
        async with CascadeClient("127.0.0.1:21060") as client:
            tasks = list(split("evaluation", prompts))
            for number, task in enumerate(track(tasks, "live", console=_console)):
                names = list(ways)
                # Every way comes first, second, ... equally often.
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    request = Request(task.prompt, **ways[name])  # type: ignore[arg-type]
                    started = time.perf_counter()
                    answer = await client.answer(request)
                    ms = (time.perf_counter() - started) * 1000.0
                    rows[name].append((ms, answer.cost, grade(task, answer.text), answer.stage != "large"))
    finally:
        child.terminate()
        await child.wait()
    means = {
        name: [statistics.mean(column) for column in zip(*each, strict=True)] for name, each in rows.items()
    }
    largest_ms, largest_cost, largest_right, _ = means.pop("always large")
    return {
        "live_prompts": prompts,
        "live": {
            name: {
                "accuracy_ratio": round(right / largest_right, 4),
                "latency_speedup": round(largest_ms / ms, 3),
                "cost_ratio": round(largest_cost / cost, 3),
                "early_stop_share": round(early, 4),
                "latency_ms": {
                    "mean": round(ms, 2),
                    "p50": round(percentile([row[0] for row in rows[name]], 0.5), 2),
                    "p95": round(percentile([row[0] for row in rows[name]], 0.95), 2),
                },
            }
            for name, (ms, cost, right, early) in means.items()
        },
    }


def draw_rows(data: Dataset, count: int, seed: int) -> Dataset:
    """Return prompts of a data set, drawn at random, for what need not see all."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(data))[:count])
    return replace(
        data,
        features={key: each[rows] for key, each in data.features.items()},
        correct=data.correct[rows],
        costs={key: each[rows] for key, each in data.costs.items()},
        latencies_ms={key: each[rows] for key, each in data.latencies_ms.items()},
        suites=tuple(data.suites[row] for row in rows),
        levels=data.levels[rows],
        prefixes=data.prefixes[rows],
        prompts=tuple(data.prompts[row] for row in rows),
    )


MEASUREMENTS = ("replay", "context", "decisions", "live", "predictors")


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the figures of one measurement."""
    policy, document = load_policy(ARTIFACT)
    predictor = load_predictor(ARTIFACT, document)
    costs = read_costs(EMBEDDED)
    held_out = options.outcomes / "evaluation.parquet"
    if name == "replay":
        with _console.status("replaying"):
            values = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
            evaluation = evaluate_policy(policy, predictor, read_dataset(held_out, costs), values)
        return {**headline(evaluation, document.train.prompts), "evaluation": _rounded(asdict(evaluation))}
    if name == "context":
        return measure_context(policy, predictor, options.outcomes / "conversations.parquet")
    if name == "decisions":
        return measure_decisions(policy, held_out, 5_000)
    if name == "live":
        return run_service(measure_live(options.live))
    with _console.status("comparing predictors") as status:
        train = draw_rows(read_dataset(options.outcomes / "train.parquet", costs), options.compare, 0)
        others = read_dataset(options.outcomes / "calibration.parquet", costs)
        scores = compare_predictors(train, others, 0, status.update)
    return {
        "predictors": [_rounded(asdict(score)) for score in scores],
        "predictors_fitted_to": len(train),
        "predictors_held_out": len(others),
    }


def main() -> None:
    """Measure what was asked for, and keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=[*MEASUREMENTS, []], help="measure these, in the place of older figures"
    )
    parser.add_argument("--outcomes", type=Path, default=ROOT / "build" / "outcomes")
    parser.add_argument("--live", type=int, default=1000, help="prompts sent to a running cascade")
    parser.add_argument("--compare", type=int, default=50_000, help="training prompts that predictors share")
    options = parser.parse_args()
    missing = [
        name
        for name in ("train", "calibration", "evaluation", "conversations")
        if not (options.outcomes / f"{name}.parquet").exists()
    ]
    if missing:
        raise SystemExit(
            f"no outcomes of {', '.join(missing)} in {options.outcomes}: make them with `asd-policy "
            "collect`, or with `python -m models.train outcomes` on a GPU"
        )
    figures: dict[str, object] = {}
    for name in options.only or MEASUREMENTS:
        figures |= measure(name, options)
    print(json.dumps(figures, indent=2))
    if options.only:
        command = f"python -m benchmarks.policy {' '.join(options.only)}"
        print(update_result("policy", command, figures), file=sys.stderr)
    else:
        print(write_result("policy", "make bench-policy", figures), file=sys.stderr)


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
