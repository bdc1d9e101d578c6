"""The measurements of the policy: read off an evaluation, chosen on one file, counted of processes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import policy as measured
from benchmarks import record
from benchmarks.policy import (
    NEEDED,
    Answered,
    Replayer,
    check_files,
    comparable_shares,
    differently,
    draw_rows,
    headline,
    latency_source,
    least_value,
    measure_kept,
    settle,
    spent_ns,
    summarise_live,
)
from policy_service.train.dataset import Dataset, view_keys
from policy_service.train.evaluate import Evaluation, Line, Prediction
from policy_service.train.outcome_table import write_outcomes
from policy_service.train.replay import Run, least_spent

CASCADE = ("small", "medium", "large")
LINES = (
    Line("always small", 0.6, 0.6061, 1.6, 5.0, 1.0, (1.0, 0.0, 0.0)),
    Line("always large", 0.99, 1.0, 8.8, 100.0, 0.0, (0.0, 0.0, 1.0)),
    Line("lambda 5", 0.97, 0.9798, 2.2, 16.0, 0.9, (0.8, 0.1, 0.1)),
    Line("fastest (lambda 3)", 0.95, 0.9596, 2.0, 12.5, 0.95, (0.9, 0.05, 0.05)),
    Line("balanced (lambda 8)", 0.985, 0.9949, 2.75, 25.0, 0.8, (0.6, 0.2, 0.2)),
    Line("oracle", 1.0, 1.0101, 1.5, 10.0, 0.97, (0.8, 0.17, 0.03)),
)
PREDICTIONS = (
    Prediction("small, from the prompt alone", 0.6, 0.9, 0.04, 0.1),
    Prediction("small", 0.7, 0.95, 0.01, 0.08),
    Prediction("large, verified from small", 0.3, 0.9, 0.02, 0.02),
)
SHARES = dict(zip((line.name for line in LINES), (0.99, 0.0, 0.9, 0.93, 0.83, 1.0), strict=True))
EVALUATION = Evaluation("v1", 500, LINES, PREDICTIONS, (), (), SHARES)


def dataset(correct, *, cost=None, latency=None) -> Dataset:
    """Outcomes of a cascade whose calls cost 1, 2, ... by stage, verifications half of that."""
    correct = np.array(correct, bool)
    count, stages = correct.shape
    amounts = {}
    for stage, origin in view_keys(stages)[1:]:
        amounts[stage, origin] = np.full(count, (stage + 1) * (1.0 if origin is None else 0.5))
    return Dataset(
        CASCADE[:stages],
        {key: np.arange(count, dtype=np.float32)[:, None] for key in view_keys(stages)},
        correct,
        amounts if cost is None else cost,
        amounts if latency is None else latency,
        tuple(f"suite {row}" for row in range(count)),
        np.arange(count),
        np.arange(count * stages, dtype=float).reshape(count, stages, 1),
        tuple(f"prompt {row}" for row in range(count)),
    )


def test_the_headline_is_of_balanced_and_fastest_beside_the_largest_stage():
    assert headline(EVALUATION, 1000, "modelled") == {
        "train_prompts": 1000,
        "eval_prompts": 500,
        "r2_prompt_only": 0.6,
        "r2_after_draft": 0.7,
        # The error of a prediction from the prompt alone is no answer's.
        "ece_max": 0.02,
        "early_stop_share": 0.8,
        "accuracy_ratio": 0.9949,
        "latency_speedup": 4.0,
        "cost_ratio": 3.2,
        "latencies": "modelled",
        "oracle_share": 0.83,
        "fastest": {"accuracy_ratio": 0.9596, "latency_speedup": 8.0, "cost_ratio": 4.4},
    }


def test_compute_is_said_only_of_measured_latencies():
    figures = headline(EVALUATION, 1000, "measured")
    assert (figures["compute_ratio"], figures["fastest"]["compute_ratio"]) == (4.0, 8.0)
    assert "compute_ratio" not in headline(EVALUATION, 1000, "partly measured")


def test_a_share_of_the_oracles_saving_is_said_only_of_lines_about_as_accurate():
    assert comparable_shares(EVALUATION) == {"always large": 0.0, "balanced (lambda 8)": 0.83, "oracle": 1.0}
    worse = replace(LINES[4], accuracy_ratio=0.9899)
    lines = (*LINES[:4], worse, LINES[5])
    assert "oracle_share" not in headline(replace(EVALUATION, lines=lines), 1000, "modelled")


def test_drawn_rows_stay_together_and_in_order():
    data = dataset(np.eye(10, 3))
    drawn = draw_rows(data, 4, 0)
    rows = drawn.levels.tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == len(drawn) == 4
    assert drawn.prompts == tuple(f"prompt {row}" for row in rows)
    assert drawn.suites == tuple(f"suite {row}" for row in rows)
    assert drawn.features[2, 0][:, 0].tolist() == rows
    np.testing.assert_array_equal(drawn.correct, data.correct[rows])
    np.testing.assert_array_equal(drawn.prefixes, data.prefixes[rows])
    assert {len(each) for each in (*drawn.costs.values(), *drawn.latencies_ms.values())} == {4}
    assert draw_rows(data, 4, 0).prompts == drawn.prompts
    assert draw_rows(data, 4, 1).prompts != drawn.prompts
    assert len(draw_rows(data, 99, 0)) == 10


@pytest.mark.parametrize(
    ("measurements", "there", "missing"),
    [
        (["replay"], ["evaluation"], "calibration"),
        (["context"], [], "train, calibration, conversations"),
        (["predictors", "replay"], ["train"], "calibration, evaluation"),
        (list(NEEDED), [], "calibration, evaluation, train, conversations"),
    ],
)
def test_missing_files_are_those_that_the_measurements_read(measurements, there, missing, tmp_path):
    for name in there:
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(SystemExit, match=f" of {missing} in "):
        check_files(measurements, tmp_path)


@pytest.mark.parametrize(
    ("measurements", "there"),
    [(["live"], []), (["decisions"], ["evaluation"]), (["live", "decisions"], ["evaluation"])],
)
def test_a_measurement_asks_for_no_file_that_it_does_not_read(measurements, there, tmp_path):
    for name in there:
        (tmp_path / f"{name}.parquet").touch()
    check_files(measurements, tmp_path)


def test_the_least_value_that_keeps_an_accuracy_is_taken():
    accuracies = {1.0: 0.90, 2.0: 0.96, 3.0: 0.97, 4.0: 0.99}
    assert least_value([4.0, 3.0, 1.0, 2.0], accuracies.__getitem__, 0.97) == 3.0
    assert least_value(accuracies, accuracies.__getitem__, 0.995) is None


class FakeReplayer(Replayer):
    """Answers the first prompts with the largest stage, more of them the more quality is worth."""

    def __init__(self, data: Dataset, prompts_per_value: float) -> None:
        self.data = data
        self._per_value = prompts_per_value

    def run(self, quality_value: float) -> Run:
        count = len(self.data)
        stage = np.where(np.arange(count) < self._per_value * quality_value, 1, 0)
        return Run(
            stage,
            self.data.correct[np.arange(count), stage],
            np.where(stage == 1, 2.0, 1.0),
            np.where(stage == 1, 20.0, 10.0),
        )


def test_the_point_at_97_percent_is_chosen_on_calibration_and_measured_on_evaluation():
    # In calibration large is always right and small never; in the evaluation they are on 90 and 40 of 100.
    calibration = FakeReplayer(dataset([[0, 1]] * 100), 1.0)
    held_out = FakeReplayer(dataset([[0, 1]] * 50 + [[1, 1]] * 40 + [[0, 0]] * 10), 0.5)
    found = measure_kept(calibration, held_out, "measured")
    value = found["quality_value"]
    # 97 prompts of calibration need the largest stage. The grid of lambda is steps of 2%.
    assert 96.0 < value <= 98.0
    # On the evaluation, half as many prompts go to it at this lambda: 49, and 40 others are right anyway.
    assert found["accuracy_ratio"] == round(89 / 90, 4)
    # Always large costs 2 per prompt, 2 ms; this way 49 of 100 cost 2 and take 20 ms, others 1 and 10 ms.
    assert found["cost_ratio"] == round(2.0 / 1.49, 3)
    assert found["latency_speedup"] == found["compute_ratio"] == round(2.0 / 14.9, 3)
    # Who knows the outcomes needs 88 right answers: 48 of large, for 2 or for 1 of small and 1 of verifying.
    assert found["bound"]["cost_ratio"] == round(2.0 / 1.48, 3)
    assert "compute_ratio" not in measure_kept(calibration, held_out, "modelled")


def test_a_point_that_nothing_keeps_is_an_error():
    data = dataset([[0, 1]] * 100)
    with pytest.raises(SystemExit, match="no lambda keeps 97%"):
        measure_kept(FakeReplayer(data, 0.0), FakeReplayer(data, 0.0), "modelled")


def test_the_least_spent_takes_the_cheapest_right_answers_first():
    # Ways: small 1, large 2.5, small then large 1 + 1 = 2.
    amounts = {(0, None): np.ones(4), (1, None): np.full(4, 2.5), (1, 0): np.array([1.0, 2.0, 1.0, 1.0])}
    correct = np.array([[0, 1], [0, 1], [1, 0], [0, 0]], bool)
    # One is right at the least that any answer costs.
    assert least_spent(correct, amounts, 1) == 1.0
    assert least_spent(correct, amounts, 2) == (4 + 1.0) / 4
    assert least_spent(correct, amounts, 3) == (4 + 1.0 + 1.5) / 4
    # No more can be right.
    assert least_spent(correct, amounts, 4) == (4 + 1.0 + 1.5) / 4


def test_ways_differ_where_the_stage_or_what_was_spent_does():
    first = Run(np.array([0, 1, 1, 2]), np.ones(4, bool), np.array([1.0, 2.0, 2.0, 3.0]), np.ones(4))
    other = Run(np.array([0, 1, 1, 1]), np.ones(4, bool), np.array([1.0, 2.0, 2.5, 3.0]), np.ones(4))
    assert differently(first, other) == 0.5
    assert differently(first, first) == 0.0


def row(latency_ms, verify_ms, proposed=1):
    answer = {
        "text": "1",
        "finish_reason": "eos",
        "logprobs": [-0.1],
        "entropies": [0.1],
        "top2_margins": [0.9],
        "correct": True,
        "latency_ms": latency_ms,
    }
    check = {"proposed": proposed, "accepted": 0, "ranks": [1] * proposed, "forward_passes": 2}
    check |= {"proposed_again": 0, "latency_ms": verify_ms}
    common = {"prompt": "1", "history": [], "suite": "", "level": 0, "kind": "", "split": ""}
    return {**common, "stages": {"small": answer, "large": answer}, "verifications": {"small>large": check}}


@pytest.mark.parametrize(
    ("rows", "source"),
    [
        ([row(1.0, 2.0), row(0.0, 1.0)], "measured"),
        ([row(None, None), row(None, None)], "modelled"),
        ([row(1.0, 2.0), row(1.0, None)], "partly measured"),
        ([row(None, 1.0)], "partly measured"),
        # An empty draft is not verified, so that there is nothing to measure.
        ([row(1.0, None, proposed=0)], "measured"),
    ],
)
def test_a_file_says_whether_its_latencies_are_measured(rows, source, tmp_path):
    file = tmp_path / "o.parquet"
    write_outcomes(file, ("small", "large"), rows)
    assert latency_source(file) == source


def test_time_spent_is_of_all_threads_new_ones_too():
    before = {(1, 1): 100, (1, 2): 50, (2, 2): 7}
    # Thread 2 of process 1 ended, and its number went to a new one; thread 3 is new.
    assert spent_ns(before, {(1, 1): 150, (1, 2): 10, (1, 3): 5, (2, 2): 7}) == 55


async def test_a_reading_is_taken_when_the_stages_stand_still():
    millisecond = 1_000_000
    # A running thread's time moves only at the kernel's ticks.
    times = iter([0, 1, 1, 1, 5, 5, 5, 5, 5, 9, 9])
    pauses = []

    async def pause():
        pauses.append(1)

    found, is_still = await settle(lambda: {(1, 1): next(times) * millisecond}, pause)
    assert (found, is_still, len(pauses)) == ({(1, 1): 5 * millisecond}, True, 8)


async def test_waiting_for_stages_that_never_rest_has_an_end():
    readings = iter(range(10**6))

    async def pause():
        pass

    found, is_still = await settle(lambda: {(1, 1): next(readings) * 1_000_000}, pause)
    assert (found, is_still) == ({(1, 1): 500_000_000}, False)


def test_live_figures_are_beside_the_largest_stage():
    rows = {
        "always large": [Answered(100.0, 8.0, True, False, 90.0), Answered(60.0, 8.0, True, False, 70.0)],
        "balanced": [Answered(10.0, 2.0, True, True, 10.0), Answered(30.0, 6.0, False, False, 30.0)],
    }
    assert summarise_live(rows) == {
        "balanced": {
            "accuracy_ratio": 0.5,
            "latency_speedup": 4.0,
            "cost_ratio": 2.0,
            "compute_ratio": 4.0,
            "early_stop_share": 0.5,
            "latency_ms": {"mean": 20.0, "p50": 10.0, "p95": 30.0},
            "compute_ms": 20.0,
        }
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def read(folder):
    return json.loads((folder / "policy.json").read_text(encoding="utf-8"))


def test_a_first_update_has_the_shape_of_a_whole_result(results):
    record.update_result("policy", "first", {"a": 1})
    updated = read(results)
    record.write_result("policy", "first", {"a": 1})
    assert {**updated, "measured_at": ""} == {**read(results), "measured_at": ""}


def test_an_update_keeps_the_files_own_record_and_adds_its_figures(results):
    record.write_result("policy", "whole", {"a": 1, "b": 2})
    record.update_result("policy", "later", {"b": 3, "c": 4})
    found = read(results)
    assert (found["a"], found["b"], found["c"], found["command"]) == (1, 3, 4, "whole")
    assert {name: each["command"] for name, each in found["later_runs"].items()} == {
        "b": "later",
        "c": "later",
    }
    record.update_result("policy", "last", {"c": 5})
    commands = {name: each["command"] for name, each in read(results)["later_runs"].items()}
    assert commands == {"b": "later", "c": "last"}


def test_a_file_without_a_record_gets_one(results):
    (results / "policy.json").write_text(json.dumps({"a": 1, "later_runs": {"a": {"command": "old"}}}))
    record.update_result("policy", "new", {"b": 2})
    found = read(results)
    assert record.record("new").keys() <= found.keys()
    assert (found["command"], found["a"], found["b"]) == ("new", 1, 2)
    assert found["later_runs"]["a"] == {"command": "old"}
    assert found["later_runs"]["b"]["command"] == "new"


def test_every_measurement_says_which_files_it_reads():
    assert set(measured.NEEDED) == {"replay", "context", "decisions", "live", "predictors"}
