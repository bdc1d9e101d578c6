"""Routing between real models: APGR of known routers, no leaks, tables as published, one-sentence errors."""

from __future__ import annotations

import csv
import gzip
import json
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.routing.__main__ import main
from benchmarks.routing.embeddings import embed_prompts
from benchmarks.routing.evaluate import (
    RoutingOptions,
    assignment_seeds,
    evaluate_file,
    evaluate_routing,
    split_folds,
)
from benchmarks.routing.ladder import Ladder
from benchmarks.routing.metrics import average_recovery, call_share, measure
from benchmarks.routing.router import CountedWords, smooth_targets
from benchmarks.routing.table import RoutingTable, read_sizes, read_table
from benchmarks.routing.text import describe_prompts
from policy_service.train.faults import UnfitOutcomes

if TYPE_CHECKING:
    from pathlib import Path

# Two gains, a loss and a prompt where both models do alike.
_GAINS = np.array([1.0, 1.0, -1.0, 0.0])


def test_apgr_of_a_perfect_a_random_and_an_inverted_router():
    perfect, inverted = np.array([3.0, 2.0, 0.0, 1.0]), np.array([0.0, 1.0, 3.0, 2.0])
    # PGR at 0, 1/4, ... of the calls: 0, 1, 2, 2, 1 and 0, -1, -1, 0, 1.
    assert average_recovery(perfect, _GAINS) == pytest.approx((0.5 + 1.5 + 2 + 1.5) / 4)
    assert average_recovery(inverted, _GAINS) == pytest.approx((-0.5 - 1 - 0.5 + 0.5) / 4)
    assert average_recovery(np.zeros(4), _GAINS) == pytest.approx(0.5)


def test_apgr_of_ties_is_the_mean_over_their_orders():
    scores = np.array([1.0, 0.0, 1.0, 0.0])
    orders = [(4, 1, 3, 2), (4, 2, 3, 1), (3, 1, 4, 2), (3, 2, 4, 1)]
    mean = np.mean([average_recovery(np.array(order, float), _GAINS) for order in orders])
    assert average_recovery(scores, _GAINS) == pytest.approx(mean)


def test_cpt_is_the_first_share_of_calls_that_recovers_so_much():
    perfect = np.array([3.0, 2.0, 0.0, 1.0])
    assert call_share(perfect, _GAINS, 0.5) == pytest.approx(0.125)
    assert call_share(perfect, _GAINS, 0.8) == pytest.approx(0.2)
    assert call_share(np.zeros(4), _GAINS, 0.8) == pytest.approx(0.8)
    assert call_share(np.array([0.0, 1.0, 3.0, 2.0]), _GAINS, 0.5) == pytest.approx(0.875)


def test_without_a_gap_there_is_no_apgr():
    with pytest.raises(ValueError, match="no gap"):
        average_recovery(np.arange(2.0), np.array([1.0, -1.0]))


def test_the_interval_holds_the_apgr_and_depends_on_the_seed_alone():
    rng = np.random.default_rng(0)
    gains = rng.choice([1.0, 0.0, -1.0], 500, p=[0.3, 0.6, 0.1])
    scores = gains + rng.normal(0, 2, 500)
    routed = measure(scores, gains, 1)
    assert routed.interval[0] < routed.apgr < routed.interval[1]
    assert 0.02 < routed.interval[1] - routed.interval[0] < 0.4
    assert routed == measure(scores, gains, 1)


def _rows(count: int, seed: int = 0, *, shuffled: bool = False) -> list[dict[str, str]]:
    """Return prompts about chess, where the large model gains, and about tea, where both are right."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        topic = rng.choice(["chess", "tea"])
        words = " ".join(rng.choice("how many cups boards moves leaves now then".split()) for _ in range(6))
        is_hard = (rng.random() < 0.5) if shuffled else (topic == "chess")
        rows.append(
            {
                "prompt_id": f"p{number}",
                "benchmark": "made_up",
                "subject": f"{topic} {number % 4}",
                "prompt": f"{topic}: {words} {rng.randint(0, 99)}?",
                "tiny": str(int(not is_hard or rng.random() < 0.1)),
                "middle": str(int(not is_hard or rng.random() < 0.5)),
                "huge": str(int(rng.random() < 0.95)),
            }
        )
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _evaluate(path: Path, ladder: str = "tiny,huge", **options):
    return evaluate_file(path, ladder.split(","), RoutingOptions(**options), (), None, lambda _: None)


def test_a_topic_that_decides_is_learned_and_beats_length(tmp_path):
    evaluation = _evaluate(_write(tmp_path / "o.csv.gz", _rows(200)), folds=3)
    assert evaluation.routers["ours"].apgr > 0.7
    assert evaluation.routers["TF-IDF, logistic regression"].apgr > 0.7
    assert evaluation.routers["ours"].cpt50 < 0.35
    assert evaluation.published is None
    assert evaluation.ladder_lines == ()


@pytest.mark.parametrize("by_subject", [False, True])
def test_labels_that_prompts_do_not_tell_leave_apgr_at_a_half(by_subject, tmp_path):
    """The third model is right where the small one is: used on test prompts, it would give the gain away."""
    rows = _rows(400, shuffled=True)
    path = _write(tmp_path / "o.csv.gz", rows)
    areas = [
        _evaluate(path, folds=4, seed=seed, by_subject=by_subject).routers["ours"].apgr for seed in range(2)
    ]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.08)


def test_labels_of_test_prompts_change_no_score(tmp_path, monkeypatch):
    from benchmarks.routing import evaluate

    table = read_table(_write(tmp_path / "o.csv.gz", _rows(120)), ["tiny", "huge"])
    options = RoutingOptions(folds=3)
    train, test = split_folds(table, options, 0)[0]
    monkeypatch.setattr(evaluate, "split_folds", lambda *_: [(train, test)])
    seen = []

    def note(scores, *_):
        seen.append(scores[0, test].copy())

    monkeypatch.setattr(evaluate, "measure", note)
    for flipped in (False, True):
        outcomes = table.outcomes.copy()
        if flipped:
            outcomes[test] = 1 - outcomes[test]
        each = RoutingTable(
            table.benchmark, table.ids, table.prompts, table.subjects, table.ladder, outcomes, 0
        )
        evaluate_routing(each, options, None, None, lambda _: None)
    assert len(seen) == 6
    for before, after in zip(seen[:3], seen[3:], strict=True):
        np.testing.assert_array_equal(before, after)


def test_folds_by_subject_share_no_subject_and_test_every_prompt_once(tmp_path):
    table = read_table(_write(tmp_path / "o.csv.gz", _rows(120)), ["tiny", "huge"])
    folds = split_folds(table, RoutingOptions(by_subject=True, folds=3), 0)
    for train, test in folds:
        assert not {table.subjects[row] for row in train} & {table.subjects[row] for row in test}
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(120))


@pytest.mark.parametrize("by_subject", [False, True])
def test_the_seed_draws_the_folds(by_subject, tmp_path):
    """Subjects that differ in their outcomes too: a splitter that balances them would leave no choice."""
    rows = _rows(240)
    for number, row in enumerate(rows):
        row["subject"] = f"subject {number * number % 17}"
    table = read_table(_write(tmp_path / "o.csv.gz", rows), ["tiny", "huge"])
    options = RoutingOptions(by_subject=by_subject, folds=3)

    def parts(seed: int) -> set[tuple[int, ...]]:
        return {tuple(test) for _, test in split_folds(table, options, seed)}

    assert parts(1) == parts(1)
    assert len({frozenset(parts(seed)) for seed in range(10)}) == 10


def test_assignments_are_drawn_by_the_seed_and_begin_with_it():
    drawn = assignment_seeds(RoutingOptions(seed=7, repeats=20))
    assert drawn == assignment_seeds(RoutingOptions(seed=7, repeats=20))
    assert drawn[:1] == assignment_seeds(RoutingOptions(seed=7)) == [7]
    others = assignment_seeds(RoutingOptions(seed=8, repeats=20))
    assert len({*drawn, *others}) == 40


def test_every_assignment_is_tested_and_the_mean_is_over_them(tmp_path):
    path = _write(tmp_path / "o.csv.gz", _rows(120))
    both = _evaluate(path, by_subject=True, folds=2, repeats=2)
    seeds = assignment_seeds(RoutingOptions(repeats=2))
    alone = [_evaluate(path, by_subject=True, folds=2, seed=seed) for seed in seeds]
    for name, routed in both.routers.items():
        areas = [each.routers[name].apgr for each in alone]
        assert areas[0] != areas[1]
        assert routed.apgr == pytest.approx(np.mean(areas))
        assert min(areas) <= routed.assignments[0] < routed.assignments[1] <= max(areas)
        assert routed.cpt50 == pytest.approx(np.mean([each.routers[name].cpt50 for each in alone]))
    assert "2 random assignments" in both.folds


def test_an_interval_holds_what_assignments_differ_in():
    rng = np.random.default_rng(0)
    gains = rng.choice([1.0, 0.0], 2000, p=[0.3, 0.7])
    # A good and a useless one.
    scores = np.stack([gains + rng.normal(0, 0.5, 2000), rng.normal(size=2000)])
    good, useless, both = (measure(each, gains, 0) for each in (scores[0], scores[1], scores))
    assert both.apgr == pytest.approx((good.apgr + useless.apgr) / 2)
    assert both.interval[0] < useless.apgr < good.apgr < both.interval[1]
    assert both.assignments == pytest.approx((useless.apgr, good.apgr), abs=0.02)


def test_what_is_gained_over_length_is_measured_on_the_same_resamples():
    rng = np.random.default_rng(0)
    gains = rng.choice([1.0, 0.0, -1.0], 500, p=[0.3, 0.6, 0.1])
    lengths = gains + rng.normal(0, 2, 500)
    # The same order: the same area in every resample.
    assert measure(3 * lengths, gains, 0, None, lengths).over_length == (0.0, 0.0, 0.0)
    better = measure(lengths + gains, gains, 0, None, lengths)
    assert better.over_length is not None
    above, low, high = better.over_length
    assert above == pytest.approx(better.apgr - average_recovery(lengths, gains))
    assert 0 < low < above < high


def test_single_folds_are_rankings_of_their_own():
    """By hand: a fold that the score ranks right, and one that it ranks wrong."""
    gains = np.array([1.0, 0.0, 1.0, 0.0])
    scores = np.array([1.0, 0.0, 0.0, 1.0])
    routed = measure(scores, gains, 0, None, None, np.array([0, 0, 1, 1]))
    assert routed.folds == pytest.approx((0.25 + 0.5 * 0.025, 0.75 - 0.5 * 0.025))
    assert measure(scores, gains, 0).folds is None


def test_words_weigh_what_the_training_prompts_alone_make_of_them():
    prompts = [row["prompt"] for row in _rows(60)]
    train, test = np.arange(45), np.arange(45, 60)
    # A word of test prompts alone, and one of a single training prompt.
    prompts[50] += " unseen unseen"
    prompts[3] += " once"
    reference = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    fitted = reference.fit_transform([prompts[row] for row in train])
    asked = reference.transform([prompts[row] for row in test])
    found = CountedWords(prompts).weigh(train, test, np.float64)
    np.testing.assert_allclose(found[0].toarray(), fitted.toarray(), rtol=1e-12)
    np.testing.assert_allclose(found[1].toarray(), asked.toarray(), rtol=1e-12)


def test_other_models_take_the_noise_out_of_targets():
    rng = np.random.default_rng(0)
    p_gain = rng.random(2000)
    target = (rng.random(2000) < p_gain).astype(float)[:, None]
    others = (rng.random((2000, 20)) < p_gain[:, None]).astype(float)
    smoothed = smooth_targets(target, others, 0)
    assert np.mean((smoothed[:, 0] - p_gain) ** 2) < np.mean((target[:, 0] - p_gain) ** 2) / 2
    assert smooth_targets(target, others[:, :0], 0) is target


def test_a_ladder_is_replayed_between_its_bounds(tmp_path):
    path = _write(tmp_path / "o.csv.gz", _rows(1500))
    table = read_table(path, ["tiny", "middle", "huge"])
    evaluation = evaluate_routing(
        table, RoutingOptions(folds=2), None, Ladder((1.0, 3.0, 10.0), None), lambda _: None
    )
    lines = {line.name: line for line in evaluation.ladder_lines}
    assert lines["always huge"].cost == pytest.approx(1.0)
    assert lines["always tiny"].cost == pytest.approx(0.1)
    oracle, policy = lines["oracle"], lines["policy, lambda 4"]
    assert oracle.accuracy >= max(line.accuracy for line in lines.values())
    # Tea goes to the tiny model, chess to the huge one.
    assert policy.cost < 0.8
    assert policy.accuracy_ratio > 0.97
    assert policy.mix[0] > 0.3
    for line in lines.values():
        assert sum(line.mix) == pytest.approx(1.0)


def test_rows_without_an_outcome_of_the_ladder_are_left_out_and_counted(tmp_path):
    rows = _rows(80)
    rows[3]["tiny"] = rows[5]["huge"] = ""
    rows[7]["middle"] = ""
    table = read_table(_write(tmp_path / "o.csv.gz", rows), ["tiny", "huge"])
    assert table.dropped == 2
    assert len(table.prompts) == 78
    assert not np.isnan(table.outcomes).any()


def test_further_models_join_by_prompt_and_the_ladder_itself_does_not(tmp_path):
    path = _write(tmp_path / "o.csv.gz", _rows(60))
    more = [{"prompt_id": f"p{n}", "prompt": "x", "tiny": "1", "new": str(n % 2)} for n in range(59, 9, -1)]
    table = read_table(path, ["tiny", "huge"], [_write(tmp_path / "more.csv.gz", more)])
    assert table.others.shape == (60, 2)
    assert table.others[11:15, 1].tolist() == [1.0, 0.0, 1.0, 0.0]
    # Not in that file: the mean.
    assert table.others[0, 1] == pytest.approx(0.5)


def test_sizes_are_those_of_models_csv_or_none(tmp_path):
    assert read_sizes(tmp_path / "o.csv.gz", ["a"]) is None
    (tmp_path / "models.csv").write_text("model,params_total_b,params_active_b\na,47,13\nb,,\n")
    assert read_sizes(tmp_path / "o.csv.gz", ["a"]) == (13.0,)
    assert read_sizes(tmp_path / "o.csv.gz", ["a", "b"]) is None
    assert read_sizes(tmp_path / "o.csv.gz", ["a", "c"]) is None


def test_what_a_prompt_looks_like_is_finite_and_sees_numbers_and_options():
    plain, asked, empty = describe_prompts(["Why?", "Is 3 + 1,000.5 NOT more?\nA. 4\nB. 1003.5\nAnswer:", ""])
    assert np.isfinite([plain, asked, empty]).all()
    assert plain.shape == asked.shape
    assert (plain != asked).sum() > 10


def _fail(capsys, *arguments: str, code: int = 1) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr().err.splitlines()
    if code != 1:
        assert ended.value.code == code
        return said[-1]
    line = str(ended.value.code)
    assert line.count("\n") == 0
    return line.removeprefix("benchmarks.routing: ")


@pytest.mark.parametrize(
    ("ladder", "error"),
    [
        ("tiny,gigantic", "no model gigantic; it has tiny, middle, huge"),
        ("tiny", "--ladder needs two or more different models, smallest first"),
        (",", "--ladder needs two or more different models, smallest first"),
        ("tiny,tiny", "--ladder needs two or more different models, smallest first"),
        ("huge,tiny", "tiny is no better than huge: give the smallest first"),
    ],
)
def test_ladders_that_cannot_be_are_refused(ladder, error, tmp_path, capsys):
    path = _write(tmp_path / "o.csv.gz", _rows(60))
    assert error in _fail(capsys, str(path), "--ladder", ladder, code=2)


def _zipped(content: bytes) -> bytes:
    """Return the same at every time: names of tests hold it."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "no such file"),
        (b"prompt_id,prompt", "not a gzip-compressed CSV file"),
        (_zipped(b"id,a,b\n1,0,1\n"), "needs rows and the columns prompt, prompt_id"),
        (_zipped(b"prompt_id,prompt,tiny,huge\n1,x,0,1,1\n"), "a row has more or fewer cells"),
        (_zipped(b"prompt_id,prompt,tiny,huge\n1,x,no,1\n"), "an outcome is no number"),
        (_zipped(b"prompt_id,prompt,tiny,huge\n1,x,0,1\n"), "1 prompts have an outcome of every model"),
    ],
)
def test_files_that_cannot_be_are_refused(content, error, tmp_path, capsys):
    path = tmp_path / "o.csv.gz"
    if content is not None:
        path.write_bytes(content)
    line = _fail(capsys, str(path), "--ladder", "tiny,huge")
    assert line.startswith(f"{path}: {error}")


def test_more_folds_than_subjects_are_refused(tmp_path):
    path = _write(tmp_path / "o.csv.gz", _rows(60))
    with pytest.raises(UnfitOutcomes, match=r"8 subjects .*9 folds"):
        _evaluate(path, by_subject=True, folds=9)


def test_folds_are_some(tmp_path, capsys):
    path = _write(tmp_path / "o.csv.gz", _rows(60))
    for folds in ("1", "1000"):
        said = _fail(capsys, str(path), "--ladder", "tiny,huge", "--folds", folds, code=2)
        assert f"--folds: '{folds}' " in said


def test_an_encoder_that_is_none_is_refused(tmp_path):
    model = tmp_path / "model.jar"
    model.write_bytes(b"hello")
    with pytest.raises(UnfitOutcomes, match=r"holds no \.onnx"):
        embed_prompts(["a"], model, lambda _: None)


def test_the_command_prints_tables_and_json(tmp_path, capsys):
    path = _write(tmp_path / "o.csv.gz", _rows(100))
    arguments = [str(path), "--ladder", "tiny, huge", "--folds", "2"]
    main(arguments)
    printed = capsys.readouterr().out
    for wanted in ("prompt length", "TF-IDF, logistic regression", "ours", "CPT(50%)", "2 folds by question"):
        assert wanted in printed
    main([*arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["ladder"] == ["tiny", "huge"]
    assert document["routers"]["ours"]["apgr"] > 0.6


def test_scores_are_no_outcomes(tmp_path):
    rows = _rows(60)
    rows[3]["huge"] = "8.5"
    path = _write(tmp_path / "o.csv.gz", rows)
    with pytest.raises(UnfitOutcomes, match=r"row 4: huge is 8\.5"):
        read_table(path, ["tiny", "huge"])


def test_whole_groups_are_resampled_where_folds_are_by_group():
    """Groups that gain or lose as one: resampling prompts would take their number for evidence."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 50)
    gains = np.where(rng.random(10) < 0.7, 1.0, 0.0)[groups] + 0.1
    scores = rng.normal(size=10)[groups] + 0.01 * rng.normal(size=500)
    by_prompt, by_group = measure(scores, gains, 0), measure(scores, gains, 0, groups)
    assert by_group.apgr == by_prompt.apgr
    widths = [each.interval[1] - each.interval[0] for each in (by_prompt, by_group)]
    # Fifty prompts that say the same: seven times the width, less what is not of the groups.
    assert widths[1] > 3 * widths[0]
    # By hand: one prompt a group is the bootstrap of prompts.
    alone = measure(scores[::50], gains[::50], 0, np.arange(10))
    assert alone == measure(scores[::50], gains[::50], 0)


def test_only_figures_by_subject_have_intervals_by_subject(tmp_path, monkeypatch):
    from benchmarks.routing import evaluate

    table = read_table(_write(tmp_path / "o.csv.gz", _rows(120)), ["tiny", "huge"])
    seen = []
    monkeypatch.setattr(evaluate, "measure", lambda *given: seen.append(given[3]))
    for by_subject in (False, True):
        evaluate_routing(table, RoutingOptions(by_subject, folds=3), None, None, lambda _: None)
    assert seen[:3] == [None] * 3
    subjects = np.array(table.subjects)
    for groups in seen[3:]:
        for each in range(8):
            assert len(set(subjects[groups == each])) == 1
        assert len(set(groups.tolist())) == len(set(table.subjects)) == 8
