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
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from asd.client import AsyncClient
from asd.values import Objective as ClientObjective
from asd.values import Preference, Request
from benchmarks.processes import ROOT
from benchmarks.record import update_result, write_result
from policy_service.artifact import load_artifact
from policy_service.domain import PolicyObjective, Spent
from policy_service.features import Draft, PromptText
from policy_service.solver import solve_policy
from policy_service.train.compare import compare_predictors
from policy_service.train.costs import EMBEDDED, read_costs
from policy_service.train.dataset import read_dataset
from policy_service.train.evaluate import (
    evaluate_policy,
    served_states,
    unlike_prompts,
    with_unlike,
)
from policy_service.train.fit import InputFile, fit_policy
from policy_service.train.outcomes import read_rows
from policy_service.train.replay import Run, always, least_spent, replay
from policy_service.train.scores import area_under_roc, mean_interval, r_squared
from services.common.server import run_service
from services.common.stats import percentile
from suites import grade, split

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from policy_service.policy import Policy
    from policy_service.predictor import OnnxPredictor
    from policy_service.train.dataset import Dataset
    from policy_service.train.evaluate import Evaluation, Line

ARTIFACT = ROOT / "policy_service" / "policy.zip"
READY_TIMEOUT = 60.0
LATENCIES = ("measured", "modelled", "partly measured")
# Below this share of the largest stage's accuracy, a share of the oracle's saving says nothing: the oracle
# saves without losing any.
COMPARABLE = 0.99
# The operating point between FASTEST and BALANCED, and the values of quality that it is chosen from.
KEPT = 0.97
_VALUES = np.geomspace(0.5, 1000.0, 400)
_console = Console(stderr=True)


def headline(evaluation: Evaluation, train_prompts: int, latencies: str) -> dict[str, object]:
    """Return the figures that a policy is judged by: what BALANCED and FASTEST do beside always-largest.

    latencies: one of LATENCIES. Measured ones are of stages with one thread each that do nothing else, so
    their sum is what a way computes; the router's and the policy's time is not part of it.
    """
    lines = {line.name: line for line in evaluation.lines}
    views = {each.view: each for each in evaluation.predictions}
    largest = next(line for name, line in reversed(lines.items()) if name.startswith("always"))
    balanced, fastest = (
        next(line for name, line in lines.items() if name.startswith(preference.value))
        for preference in (Preference.BALANCED, Preference.FASTEST)
    )
    own = [each for name, each in views.items() if "prompt" not in name]
    shares = comparable_shares(evaluation)
    return {
        "train_prompts": train_prompts,
        "eval_prompts": evaluation.prompts,
        "r2_prompt_only": round(views["small, from the prompt alone"].r2, 4),
        "r2_after_draft": round(views["small"].r2, 4),
        "ece_max": round(max(each.calibration_error for each in own), 4),
        "early_stop_share": round(balanced.early_stop_share, 4),
        "accuracy_ratio": round(balanced.accuracy_ratio, 4),
        **_ratios(largest, balanced, latencies),
        "latencies": latencies,
        **({"oracle_share": round(shares[balanced.name], 4)} if balanced.name in shares else {}),
        "fastest": {
            "accuracy_ratio": round(fastest.accuracy_ratio, 4),
            **_ratios(largest, fastest, latencies),
        },
    }


def _ratios(largest: Line, line: Line, latencies: str) -> dict[str, float]:
    speedup = round(largest.latency_ms / line.latency_ms, 3)
    ratios = {"latency_speedup": speedup, "cost_ratio": round(largest.cost / line.cost, 3)}
    return {**ratios, "compute_ratio": speedup} if latencies == "measured" else ratios


def comparable_shares(evaluation: Evaluation) -> dict[str, float]:
    """Return the share of the oracle's saving that lines reach, of those that are about as accurate."""
    return {
        line.name: evaluation.oracle_share[line.name]
        for line in evaluation.lines
        if line.accuracy_ratio >= COMPARABLE
    }


def latency_source(path: Path) -> str:
    """Return which of LATENCIES an outcome file holds; where there is none, costs stand in for it."""
    measured = calls = 0
    for batch in pq.ParquetFile(path).iter_batches(columns=["stages", "verifications"]):
        for column in (batch["stages"], batch["verifications"]):
            for index in range(column.type.num_fields):
                call = column.field(index)
                made = np.ones(len(call), np.bool_)
                if call.type.get_field_index("proposed") >= 0:
                    # An empty draft is not verified.
                    made = call.field("proposed").to_numpy(zero_copy_only=False) > 0
                has_latency = call.field("latency_ms").is_valid().to_numpy(zero_copy_only=False)
                calls += int(made.sum())
                measured += int((has_latency & made).sum())
    if measured == calls:
        return "measured"
    return "partly measured" if measured else "modelled"


class Replayer:
    """Replays a policy on one data set, for any value of quality."""

    def __init__(self, policy: Policy, predictor: OnnxPredictor, data: Dataset) -> None:
        self.data = data
        self._views = tuple(each.view for each in policy.views)
        self._policy = policy
        self._unlike = unlike_prompts(policy, data)
        self.p_correct, self._cells = served_states(policy, predictor, data)

    def run(self, quality_value: float) -> Run:
        """Return what the policy does."""
        solution = solve_policy(self._views, quality_value)
        run = replay(self.data, self._views, self.p_correct, solution, quality_value, self._cells)
        return with_unlike(run, self._policy, self.data, self._unlike)


def least_value(
    values: Iterable[float], accuracy_of: Callable[[float], float], accuracy: float
) -> float | None:
    """Return the least value of quality that keeps an accuracy, None where none does."""
    return next((value for value in sorted(values) if accuracy_of(value) >= accuracy), None)


def measure_kept(calibration: Replayer, held_out: Replayer, latencies: str) -> dict[str, object]:
    """Return what keeping 97% of the largest stage's accuracy costs.

    Lambda is chosen on the calibration file: the least that keeps it there.
    bound: what the best that knows the outcomes does at that accuracy, once in cost and once in latency.
    """
    largest = [always(each.data, len(each.data.cascade) - 1) for each in (calibration, held_out)]
    least = KEPT * float(largest[0].correct.mean())
    value = least_value(_VALUES, lambda value: float(calibration.run(value).correct.mean()), least)
    if value is None:
        raise SystemExit(
            f"no lambda keeps {KEPT:.0%} of the largest stage's accuracy on the calibration file"
        )
    run, data = held_out.run(value), held_out.data
    right = int(np.ceil(KEPT * largest[1].correct.sum()))
    speedup = round(float(largest[1].latency_ms.mean() / run.latency_ms.mean()), 3)
    return {
        "quality_value": round(value, 4),
        "accuracy_ratio": round(float(run.correct.mean() / largest[1].correct.mean()), 4),
        "cost_ratio": round(float(largest[1].cost.mean() / run.cost.mean()), 3),
        "latency_speedup": speedup,
        **({"compute_ratio": speedup} if latencies == "measured" else {}),
        "early_stop_share": round(run.early_stop_share(len(data.cascade)), 4),
        "bound": {
            "cost_ratio": round(
                float(largest[1].cost.mean()) / least_spent(data.correct, data.costs, right), 3
            ),
            "latency_speedup": round(
                float(largest[1].latency_ms.mean()) / least_spent(data.correct, data.latencies_ms, right), 3
            ),
        },
    }


def measure_context(
    options: argparse.Namespace, shipped: Policy, predictor: OnnxPredictor, progress: Callable[[str], None]
) -> dict[str, object]:
    """Return what history is worth on conversations, and how decisions on them follow the preference.

    A policy that is fitted with it is compared with one that is fitted on the last message alone, to the same
    prompts. history_hidden: the shipped policy, fitted with history, with it and without.
    """
    costs = read_costs(EMBEDDED)
    value = shipped.quality_values[Preference.BALANCED]
    path = options.outcomes / "conversations.parquet"
    fitted, hidden = {}, {}
    for name, with_history in (("with history", True), ("last message alone", False)):
        data = read_dataset(path, costs, with_history=with_history)
        hidden[name] = Replayer(shipped, predictor, data)
        with tempfile.TemporaryDirectory() as folder:
            inputs = []
            for part in ("train", "calibration"):
                progress(f"{name}: reading {part}")
                file = options.outcomes / f"{part}.parquet"
                whole = read_dataset(file, costs, with_history=with_history)
                inputs.append(InputFile(file, draw_rows(whole, options.context, 0)))
            artifact = Path(folder, "policy.zip")
            fit_policy(inputs[0], inputs[1], costs, artifact, 0, progress)
            policy, _, own_predictor = load_artifact(artifact)
            fitted[name] = Replayer(policy, own_predictor, data)
    shipped_runs = {each: hidden["with history"].run(shipped.quality_values[each]) for each in Preference}
    return {
        "context": {
            **compare_history(fitted, value),
            "fitted_to": len(inputs[0].data),
            "calibrated_on": len(inputs[1].data),
            "history_hidden": compare_history(hidden, value),
        },
        "preferences": {
            each.value: {
                "quality_value": round(shipped.quality_values[each], 3),
                **_rounded_run(run, hidden["with history"].data),
                "decided_differently_from": {
                    other.value: round(differently(run, shipped_runs[other]), 4)
                    for other in Preference
                    if other is not each
                },
            }
            for each, run in shipped_runs.items()
        },
    }


def compare_history(replayers: Mapping[str, Replayer], value: float) -> dict[str, object]:
    """Return what two replayers do at a value of quality, and what the second loses beside the first."""
    figures: dict[str, object] = {}
    values = []
    for name, replayer in replayers.items():
        run = replayer.run(value)
        values.append(value * run.correct - run.cost)
        prompt, right = replayer.p_correct[None, None], replayer.data.correct[:, 0]
        figures[name] = {
            "r2_prompt_only": round(r_squared(prompt, right), 4),
            "auroc_prompt_only": round(area_under_roc(prompt, right), 4),
            "r2_after_draft": round(r_squared(replayer.p_correct[0, None], right), 4),
            "accuracy": round(float(run.correct.mean()), 4),
            "cost": round(float(run.cost.mean()), 4),
            "value": round(float(values[-1].mean()), 4),
        }
    lost, low, high = mean_interval(values[0] - values[1])
    return {
        **figures,
        "conversations": len(values[0]),
        "value_lost_without_history": round(lost, 4),
        "value_lost_low": round(low, 4),
        "value_lost_high": round(high, 4),
    }


def differently(run: Run, other: Run) -> float:
    """Return the share of prompts that two policies answer in different ways."""
    # The answering stage and what was spent tell the way.
    return float(np.mean((run.stage != other.stage) | (run.cost != other.cost)))


def _rounded_run(run: Run, data: Dataset) -> dict[str, object]:
    stages = len(data.cascade)
    return {
        "accuracy": round(float(run.correct.mean()), 4),
        "accuracy_ratio": round(float(run.correct.mean() / data.correct[:, -1].mean()), 4),
        "cost": round(float(run.cost.mean()), 4),
        "latency_ms": round(float(run.latency_ms.mean()), 3),
        "mix": [round(float(np.mean(run.stage == stage)), 4) for stage in range(stages)],
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
        policy.plan(prompt, PolicyObjective(), {})
        started = time.perf_counter()
        policy.decide(prompt, 0, draft, None, None, PolicyObjective(), Spent(), {})
        times_us.append((time.perf_counter() - started) * 1e6)
    return {
        "decision_p50_us": round(percentile(times_us, 0.5), 1),
        "decision_p95_us": round(percentile(times_us, 0.95), 1),
        "decision_samples": len(times_us),
    }


@dataclass(frozen=True)
class Answered:
    """One request to the running cascade. compute_ms: CPU time of the stages until they stood still."""

    latency_ms: float
    cost: float
    is_right: bool
    is_early: bool
    compute_ms: float


def thread_times(pids: Iterable[int]) -> dict[tuple[int, int], int]:
    """Return the CPU time of every thread of some processes, in ns, by process and thread.

    /proc/<pid>/schedstat itself has the time of a process's first thread only.
    """
    times = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            # A thread may end in between.
            with suppress(FileNotFoundError, ProcessLookupError):
                times[pid, int(task.name)] = int((task / "schedstat").read_text("ascii").split()[0])
    return times


def spent_ns(before: Mapping[tuple[int, int], int], after: Mapping[tuple[int, int], int]) -> int:
    """Return the CPU time between two readings."""
    # A thread's number may be given to another one, whose time starts at 0.
    return sum(max(time_ns - before.get(thread, 0), 0) for thread, time_ns in after.items())


# The kernel counts a running thread's time at its ticks, at most 10 ms apart: what does not move for longer
# is at rest. Less than _NOISE_NS is what an idle server's threads spend in _PAUSE_S.
_PAUSE_S = 0.004
_STILL_PAUSES = 4
_NOISE_NS = 100_000
_MOST_PAUSES = 500


async def settle(
    read: Callable[[], dict[tuple[int, int], int]], pause: Callable[[], Awaitable[None]]
) -> tuple[dict[tuple[int, int], int], bool]:
    """Return a reading of thread times once they stand still, and whether they do: some 2 s are the most.

    Work that a request leaves behind, on drafts given up and prompts read ahead, is so counted as its own.
    """
    last, still = read(), 0
    for _ in range(_MOST_PAUSES):
        await pause()
        now = read()
        still = still + 1 if spent_ns(last, now) < _NOISE_NS else 0
        last = now
        if still == _STILL_PAUSES:
            return last, True
    return last, False


async def measure_live(prompts: int) -> dict[str, object]:
    """Measure a running cascade at each preference beside always the largest stage, taking turns.

    Each request starts when the stages have come to rest after the one before.
    """
    command = [sys.executable, "-m", "services.cli", "up", "--json", "--no-gateway", "--port-base", "21060"]
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    ways: dict[str, dict[str, object]] = {
        "always large": {"stage": "large"},
        **{each.value: {"objective": ClientObjective(preference=each.value)} for each in Preference},
    }
    rows: dict[str, list[Answered]] = {name: [] for name in ways}
    unsettled = 0
    try:
        assert child.stdout is not None
        await asyncio.wait_for(child.stdout.readuntil(b"\n"), READY_TIMEOUT)
        stages = stage_pids(child.pid)

        async def rest() -> dict[tuple[int, int], int]:
            nonlocal unsettled
            times, is_still = await settle(lambda: thread_times(stages), lambda: asyncio.sleep(_PAUSE_S))
            unsettled += not is_still
            return times

        async with AsyncClient("127.0.0.1:21060") as client:
            before = await rest()
            tasks = list(split("evaluation", prompts))
            for number, task in enumerate(track(tasks, "live", console=_console)):
                names = list(ways)
                # Every way comes first, second, ... equally often.
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    request = Request(task.prompt, **ways[name])  # type: ignore[arg-type]
                    started = time.perf_counter()
                    answer = await client.ask(request)
                    ms = (time.perf_counter() - started) * 1000.0
                    after = await rest()
                    right, early = grade(task, answer.text), answer.stage != "large"
                    rows[name].append(Answered(ms, answer.cost, right, early, spent_ns(before, after) / 1e6))
                    before = after
    finally:
        child.terminate()
        await child.wait()
    return {"live_prompts": prompts, "live_unsettled": unsettled, "live": summarise_live(rows)}


def stage_pids(launcher: int) -> list[int]:
    """Return the stage processes of a running `asd up`."""
    children = psutil.Process(launcher).children(recursive=True)
    pids = [child.pid for child in children if "services.stage" in child.cmdline()]
    if not pids:
        raise SystemExit(f"asd up (process {launcher}) has no stage processes")
    return pids


def summarise_live(rows: Mapping[str, Sequence[Answered]]) -> dict[str, object]:
    """Return what each way does beside `always large`, from its requests."""
    means = {
        name: Answered(*(statistics.mean(column) for column in zip(*map(astuple, each), strict=True)))
        for name, each in rows.items()
    }
    largest = means.pop("always large")
    return {
        name: {
            "accuracy_ratio": round(float(mean.is_right / largest.is_right), 4),
            "latency_speedup": round(largest.latency_ms / mean.latency_ms, 3),
            "cost_ratio": round(largest.cost / mean.cost, 3),
            "compute_ratio": round(largest.compute_ms / mean.compute_ms, 3),
            "early_stop_share": round(float(mean.is_early), 4),
            "latency_ms": {
                "mean": round(mean.latency_ms, 2),
                "p50": round(percentile([row.latency_ms for row in rows[name]], 0.5), 2),
                "p95": round(percentile([row.latency_ms for row in rows[name]], 0.95), 2),
            },
            "compute_ms": round(mean.compute_ms, 2),
        }
        for name, mean in means.items()
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


NEEDED = {
    "replay": ("calibration", "evaluation"),
    "context": ("train", "calibration", "conversations"),
    "decisions": ("evaluation",),
    "live": (),
    "predictors": ("train", "calibration"),
}
"""The outcome files that each measurement reads."""


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the figures of one measurement."""
    if name == "live":
        return run_service(measure_live(options.live))
    policy, document, predictor = load_artifact(ARTIFACT)
    costs = read_costs(EMBEDDED)
    held_out = options.outcomes / "evaluation.parquet"
    if name == "replay":
        with _console.status("replaying"):
            values = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
            latencies = latency_source(held_out)
            data = read_dataset(held_out, costs)
            evaluation = evaluate_policy(policy, predictor, data, values)
            calibration = read_dataset(options.outcomes / "calibration.parquet", costs)
            replayers = [Replayer(policy, predictor, each) for each in (calibration, data)]
        return {
            **headline(evaluation, document.train.prompts, latencies),
            "at_97_percent": measure_kept(replayers[0], replayers[1], latencies),
            "evaluation": _rounded({**asdict(evaluation), "oracle_share": comparable_shares(evaluation)}),
        }
    if name == "context":
        with _console.status("fitting with and without history") as status:
            return measure_context(options, policy, predictor, status.update)
    if name == "decisions":
        return measure_decisions(policy, held_out, 5_000)
    with _console.status("comparing predictors") as status:
        train = draw_rows(read_dataset(options.outcomes / "train.parquet", costs), options.compare, 0)
        others = read_dataset(options.outcomes / "calibration.parquet", costs)
        scores = compare_predictors(train, others, 0, status.update)
    return {
        "predictors": [_rounded(asdict(score)) for score in scores],
        "predictors_fitted_to": len(train),
        "predictors_held_out": len(others),
    }


def check_files(measurements: Iterable[str], folder: Path) -> None:
    """Check that the outcome files of some measurements are there. Raises SystemExit, naming the others."""
    needed = dict.fromkeys(name for each in measurements for name in NEEDED[each])
    missing = [name for name in needed if not (folder / f"{name}.parquet").exists()]
    if missing:
        raise SystemExit(
            f"no outcomes of {', '.join(missing)} in {folder}: make them with `asd-policy "
            "collect`, or with `python -m models.train outcomes` on a GPU"
        )


def main() -> None:
    """Measure what was asked for, and keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=[*NEEDED, []], help="measure these, in the place of older figures"
    )
    parser.add_argument("--outcomes", type=Path, default=ROOT / "build" / "outcomes")
    parser.add_argument("--live", type=int, default=1000, help="prompts sent to a running cascade")
    parser.add_argument("--compare", type=int, default=50_000, help="training prompts that predictors share")
    parser.add_argument(
        "--context",
        type=int,
        default=30_000,
        help="prompts, at most, to fit to, and to calibrate on, for context",
    )
    options = parser.parse_args()
    measurements = options.only or list(NEEDED)
    check_files(measurements, options.outcomes)
    figures: dict[str, object] = {}
    for name in measurements:
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
