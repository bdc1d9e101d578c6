"""The grid of experiments: what is in it, its runs, its checks and its page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments.grid import (
    GROUPS,
    QUALITY_VALUES,
    Experiment,
    ExperimentResult,
    Sample,
    TooFewPrompts,
    draw_runs,
    fixed_way,
    grid,
    policy_way,
    sample_runs,
    summarise,
)
from benchmarks.experiments.measure import Bin, CurveMark, Measured, Reliability
from benchmarks.experiments.plots import draw_plots
from benchmarks.experiments.report import render_report, verdicts
from benchmarks.experiments.response import check_response
from benchmarks.experiments.tables import figures, write_tables
from benchmarks.stats import interval
from policy_service.train.replay import Run

CASCADE = ("small", "medium", "large")
# Of four values of quality: dearer, better and later each time.
RISING = ((2.0, 0.90, (0.7, 0.2, 0.1)), (2.5, 0.95, (0.6, 0.2, 0.2)), (2.7, 0.97, (0.5, 0.2, 0.3)))
RISING = (*RISING, (3.0, 0.98, (0.4, 0.1, 0.5)))
RECORD = {
    "command": "python -m benchmarks.experiments <out>",
    "commit": "0123456789abcdef",
    "changed_files": [],
    "measured_at": "2026-01-01T00:00:00+00:00",
    "outcomes": {"file": "evaluation.parquet", "sha256": "ab"},
    "machine": {"processor": "a", "cores": 2, "memory_gib": 4.0, "system": "Linux", "python": "3.11"},
}


def runs_of(cost, accuracy, mix, noise=0.001):
    """Five runs around a mean, the same way off it at every value of quality."""
    offsets = noise * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    return [
        Sample(seed, 100, accuracy + offset, cost + offset, 10.0 * cost, sum(mix[:-1]), mix)
        for seed, offset in enumerate(offsets)
    ]


def response_of(rows):
    return check_response(QUALITY_VALUES, [runs_of(*row) for row in rows])


class TestGrid:
    def test_has_sixty_experiments_of_the_policy_and_nine_baselines(self):
        experiments = grid(CASCADE)
        assert len(experiments) == 69
        assert len({each.name for each in experiments}) == 69
        assert sum(each.way.startswith("lambda-") for each in experiments) == 60
        assert sum(each.way.startswith("always-") for each in experiments) == 9

    def test_names_say_who_answers_what(self):
        names = [each.name for each in grid(CASCADE)]
        assert names[0] == "lambda-0.5/level-01"
        assert names[59] == "lambda-5/level-15"
        assert names[60:] == [
            f"always-{stage}/{group}" for stage in CASCADE for group in ("simple", "medium", "complex")
        ]

    def test_groups_share_out_the_levels(self):
        assert sorted(level for levels in GROUPS.values() for level in levels) == list(range(1, 16))


class TestRuns:
    levels = np.repeat(np.arange(1, 16), 23)

    def test_take_every_prompt_once_in_equal_parts_of_each_level(self):
        taken_by = draw_runs(self.levels)
        for level in range(1, 16):
            counts = np.bincount(taken_by[self.levels == level], minlength=5)
            assert sorted(counts) == [4, 4, 5, 5, 5]

    def test_are_the_same_for_the_same_seeds_and_others_for_others(self):
        assert (draw_runs(self.levels) == draw_runs(self.levels)).all()
        first, other = draw_runs(self.levels, (0, 1)) == 0, draw_runs(self.levels, (7, 1)) == 7
        assert first.sum() == other.sum()
        assert (first != other).any()

    def test_need_prompts_of_every_level(self):
        with pytest.raises(TooFewPrompts, match="level 15 has 4 prompts"):
            draw_runs(self.levels[:-19])

    def test_measure_their_own_prompts_alone(self):
        run = Run(
            np.array([0, 0, 1, 2]),
            np.array([True, False, True, True]),
            np.array([1.0, 3.0, 5.0, 100.0]),
            np.array([10.0, 20.0, 30.0, 1000.0]),
        )
        rows, taken_by = np.array([True, True, True, False]), np.array([4, 4, 6, 4])
        first, second = sample_runs(run, rows, taken_by, 3, seeds=(4, 6))
        assert first == Sample(4, 2, 0.5, 2.0, 15.0, 1.0, (1.0, 0.0, 0.0))
        assert second == Sample(6, 1, 1.0, 5.0, 30.0, 1.0, (0.0, 1.0, 0.0))

    def test_interval_is_student_s(self):
        # t(0.975, 4) = 2.7764 of the tables; the deviation of 1..5 is sqrt(2.5).
        found = interval([1.0, 2.0, 3.0, 4.0, 5.0], [1, 1, 1, 1, 1])
        assert found.mean == 3.0
        assert found.high - 3.0 == pytest.approx(2.7764 * (2.5 / 5) ** 0.5, abs=1e-4)
        assert found.low + found.high == pytest.approx(6.0)

    def test_larger_runs_weigh_more_in_the_mean(self):
        assert interval([0.0, 1.0], [1, 3]).mean == 0.75

    def test_intervals_of_shares_end_at_one(self):
        samples = [Sample(seed, 10, 1.0 - 0.1 * (seed == 4), 2.0, 9.0, 1.0, (1.0, 0.0)) for seed in range(5)]
        summary = summarise(samples)
        # 0.98 and 2.7764 times 0.0447 over the root of 5 on either side.
        assert summary.accuracy.low == pytest.approx(0.9245, abs=1e-4)
        assert summary.accuracy.high == 1.0


class TestResponse:
    def test_a_rising_table_passes(self):
        response = response_of(RISING)
        assert response.is_non_decreasing("cost")
        assert response.is_non_decreasing("accuracy")
        assert response.is_distinct
        assert response.runs_that_fall == ()
        # From (0.7, 0.2, 0.1) to (0.6, 0.2, 0.2).
        assert response.smallest_distance == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("metric", "other", "row"),
        [("accuracy", "cost", (2.7, 0.94, RISING[2][2])), ("cost", "accuracy", (2.4, 0.97, RISING[2][2]))],
    )
    def test_a_fall_is_found_where_it_is(self, metric, other, row):
        response = response_of((*RISING[:2], row, RISING[3]))
        assert not response.is_non_decreasing(metric)
        assert response.is_non_decreasing(other)
        (fall,) = response.falls
        assert (fall.low_value, fall.high_value, fall.is_beyond_chance) == (1.0, 2.0, True)
        assert response.runs_that_fall == (0, 1, 2, 3, 4)

    def test_a_fall_that_runs_do_not_share_is_within_chance(self):
        samples = [runs_of(*row) for row in RISING]
        one_bad = replace(samples[3][0], accuracy=samples[2][0].accuracy - 0.2)
        samples[3] = [one_bad, *samples[3][1:]]
        response = check_response(QUALITY_VALUES, samples)
        assert not response.is_non_decreasing("accuracy")
        assert [fall.is_beyond_chance for fall in response.falls] == [False]
        assert response.runs_that_fall == (0,)

    def test_the_same_stages_at_every_value_are_not_distinct(self):
        response = response_of([(8.8, 0.99, (0.0, 0.0, 1.0))] * 4)
        assert response.is_non_decreasing("cost")
        assert not response.is_distinct
        assert len(response.alike) == 6

    def test_mixes_that_differ_by_chance_are_alike(self):
        # Student's t of the shift is 4: beyond 2.8, the 95% of one comparison, within 6.6, that of all 18.
        samples = [runs_of(*row) for row in RISING]
        samples[3] = [
            replace(each, mix=(0.5 + shift, 0.2, 0.3 - shift))
            for each, shift in zip(samples[3], (0.001, 0.003, 0.004, 0.005, 0.007), strict=True)
        ]
        assert check_response(QUALITY_VALUES, samples).alike == ((2.0, 5.0),)


def measured_of(rows=RISING):
    """A made-up measurement."""
    ways = {policy_way(value): runs_of(*row) for value, row in zip(QUALITY_VALUES, rows, strict=True)}
    ways |= {fixed_way(name): runs_of(2.0, 0.9, (1.0, 0.0, 0.0)) for name in CASCADE}

    def results_on(name, levels):
        return {
            way: ExperimentResult(Experiment(f"{way}/{name}", way, levels), tuple(samples))
            for way, samples in ways.items()
        }

    def points(*names):
        return tuple(
            CurveMark(name, 2.0 ** (place + 1), 0.9 + place / 100, 2.0 + place, 9.0, 0.8, (0.5, 0.3, 0.2))
            for place, name in enumerate(names)
        )

    bins = (Bin(10, 0.2, 0.0, 0.0, 0.3), Bin(10, 0.9, 1.0, 0.7, 1.0))
    response = response_of(rows)
    return Measured(
        "<v1>",
        CASCADE,
        8.8,
        500,
        ("arithmetic", "code"),
        tuple(ExperimentResult(each, tuple(ways[each.way])) for each in grid(CASCADE)),
        results_on("all", tuple(range(1, 16))),
        {group: results_on(group, levels) for group, levels in GROUPS.items()},
        response,
        dict.fromkeys(range(1, 16), response),
        points("policy", "policy", "policy"),
        points("lambda 2", "lambda 4"),
        points("fastest", "balanced", "best"),
        points("always small", "always medium", "always large"),
        points("threshold 0.5", "threshold 0.9"),
        points("oracle")[0],
        (Reliability("small, from its own answer", "small", 0.6, 0.9, 0.01, bins),),
    )


class References(HTMLParser):
    """What a page would load or lead to."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    measured = measured_of()
    return render_report(measured, draw_plots(measured, tmp_path_factory.mktemp("plots")), RECORD)


class TestReport:
    def test_holds_all_that_it_shows(self, page):
        found = References(page)
        assert len(found.links) == 5
        assert all(link.startswith("data:image/png;base64,") for link in found.links)
        assert not found.tags & {"script", "link", "iframe", "object"}
        assert not re.search(r"url\(|@import|https?://", page)

    def test_lists_every_experiment(self, page):
        assert all(each.name in page for each in grid(CASCADE))

    def test_escapes_what_others_wrote(self, page):
        assert "&lt;v1&gt;" in page
        assert "<out>" not in page

    def test_says_no_where_a_check_fails(self):
        measured = measured_of(((2.0, 0.9, (0.7, 0.2, 0.1)),) * 3 + ((1.5, 0.9, (0.7, 0.2, 0.1)),))
        assert [holds for _, holds, _ in verdicts(measured)] == [False, True, False]
        assert figures(measured)["distinct_mixes"] is False

    def test_tables_have_every_experiment_and_run(self, tmp_path):
        write_tables(measured_of(), tmp_path)
        lines = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
        assert len(lines["experiments.csv"]) == 1 + 69
        assert len(lines["runs.csv"]) == 1 + 69 * 5
        assert lines["runs.csv"][1] == "lambda-0.5/level-01,0,100,0.898,1.998,20.0,0.9,0.7,0.2,0.1"


class TestCommand:
    def test_missing_outcomes_are_one_sentence_with_what_makes_them(self, tmp_path, capsys):
        missing = tmp_path / "evaluation.parquet"
        assert experiments.main(["--outcomes", str(missing), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert f"{missing}: no such file" in said
        assert "python -m models.train outcomes" in said
        assert "asd-policy collect" in said
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (OSError("disk full"), 1)])
    def test_nothing_is_left_of_a_run_that_stops(self, tmp_path, monkeypatch, error, status):
        def stop(*_):
            raise error

        (tmp_path / "outcomes").write_bytes(b"")
        monkeypatch.setattr(experiments, "load_artifact", lambda _: (Policy, Policy, None))
        monkeypatch.setattr(experiments, "read_dataset", lambda *_: Policy)
        monkeypatch.setattr(experiments, "measure", lambda *_: measured_of())
        monkeypatch.setattr(experiments, "draw_plots", stop)
        arguments = ["--outcomes", str(tmp_path / "outcomes"), "--out", str(tmp_path / "out")]
        assert experiments.main(arguments) == status
        assert [path.name for path in tmp_path.rglob("*")] == ["outcomes"]


class Policy:
    """Stands in for policy, document and dataset of a cascade of no stages."""

    version = "v1"
    stages = ()
    cascade = ()

    class train:  # noqa: N801 - a field of the document
        sha256 = ""

    calibration = train
