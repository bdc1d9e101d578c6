"""From outcome files to an artifact: refusals, equality of training and serving, of replay and decisions."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest

from policy_service.artifact import load_artifact, read_artifact, read_document
from policy_service.document import UnfitArtifact
from policy_service.domain import PolicyObjective, Spent
from policy_service.family import Family
from policy_service.features import Draft, DraftVerification, PromptText
from policy_service.solver import solve_policy
from policy_service.train.costs import StageCosts
from policy_service.train.dataset import Dataset, read_dataset, view_keys
from policy_service.train.evaluate import (
    evaluate_policy,
    served_states,
    unlike_prompts,
)
from policy_service.train.family import fit_family
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.fit import InputFile, expected_calibration_error, fit_policy
from policy_service.train.outcome_table import HEADER_KEY, write_outcomes
from policy_service.train.outcomes import OutcomeRow, check_disjoint, read_rows
from policy_service.train.predictor import export_heads, fit_head
from policy_service.train.replay import always, oracle, replay, threshold
from policy_service.train.scores import area_under_roc, r_squared
from tests.unit.policy.tiny_policy import change_document, change_file, files_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from policy_service.policy import Policy

COSTS = (
    StageCosts(name="small", cost=1.0, prefill_ms=1.0, token_ms=0.1),
    StageCosts(name="large", cost=5.0, prefill_ms=5.0, score_token_ms=0.2, token_ms=1.0),
)


def record(rng: random.Random) -> dict[str, object]:
    """A prompt whose difficulty shows in its length, in the draft's certainty and in the verification."""
    difficulty = rng.random()
    count = rng.randint(3, 8)
    words = " ".join(rng.choice("red blue green big small".split()) for _ in range(1 + int(difficulty * 20)))
    stages: dict[str, object] = {}
    for name, skill in (("small", 0.8), ("large", 2.0)):
        right = rng.random() < 1 - difficulty / (skill * 1.1)
        sure = 0.01 if right and rng.random() < 0.9 else 1.0
        logprobs = [round(-rng.expovariate(1 / sure), 3) for _ in range(count)]
        stages[name] = {
            "text": f"It is {rng.randint(0, 99)}.",
            "finish_reason": "eos",
            "logprobs": logprobs,
            "entropies": [-x for x in logprobs],
            "top2_margins": [round(float(np.exp(x)), 3) for x in logprobs],
            "correct": right,
        }
    whole = bool(stages["small"]["correct"])  # type: ignore[index]
    accepted = count + 1 if whole else rng.randint(0, count)
    return {
        "prompt": f"{words} {rng.random()}?",
        "history": [],
        "suite": "made up",
        "level": 1,
        "kind": "",
        "split": "train",
        "stages": stages,
        "verifications": {
            "small>large": {
                "proposed": count + 1,
                "accepted": accepted,
                "ranks": [0] * accepted + [2] * (count + 1 - accepted),
                "forward_passes": 1 if whole else 2 + count - accepted,
                "proposed_again": 0,
            }
        },
    }


def write(path: Path, records: list[dict[str, object]], cascade: Sequence[str] = ("small", "large")) -> Path:
    write_outcomes(path, cascade, records)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset, list[OutcomeRow]]:
    """An artifact fitted to 600 prompts and calibrated on 400, with the data of 300 others."""
    folder = tmp_path_factory.mktemp("fit")
    rng = random.Random(0)
    paths = [
        write(folder / f"{i}.parquet", [record(rng) for _ in range(n)]) for i, n in enumerate((600, 400, 300))
    ]
    inputs = [InputFile(path, read_dataset(path, COSTS)) for path in paths]
    fit_policy(inputs[0], inputs[1], COSTS, folder / "artifact", 0, lambda _: None)
    return folder / "artifact", inputs[2].data, list(read_rows(paths[2]))


@pytest.fixture(scope="module")
def policy(made: tuple[Path, Dataset, list[OutcomeRow]]) -> Policy:
    return load_artifact(made[0]).policy


def test_the_exported_trees_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 6)).astype(np.float32)
    # Repeated values put thresholds next to data, where rounding would tell.
    features[:, 0] = np.round(features[:, 0] * 3) / 3
    correct = features[:, 0] + features[:, 1] * features[:, 2] > rng.normal(size=2000)
    heads = [fit_head(features, correct, 0), fit_head(features, ~correct, 0)]
    from policy_service.predictor import OnnxPredictor

    exported = OnnxPredictor([export_heads(heads, 6)]).score_rows(0, features)
    for index, head in enumerate(heads):
        # float32 sums of 150 leaves against float64.
        np.testing.assert_allclose(exported[:, index], head.scores(features), atol=1e-4)


def test_a_head_with_too_few_wrong_answers_is_a_constant() -> None:
    from policy_service.predictor import OnnxPredictor

    features = np.random.default_rng(0).normal(size=(98, 4)).astype(np.float32)
    head = fit_head(features, np.ones(98, np.bool_), 0)
    scores = OnnxPredictor([export_heads([head], 4)]).score_rows(0, features)
    np.testing.assert_allclose(scores, np.log(99), rtol=1e-6)


def test_served_decisions_equal_the_replay(
    made: tuple[Path, Dataset, list[OutcomeRow]], policy: Policy
) -> None:
    artifact, data, rows = made
    scores, cells = served_states(policy, load_artifact(artifact).predictor, data)
    views = tuple(each.view for each in policy.views)
    for quality_value in (2.0, 6.0, 20.0):
        run = replay(data, views, scores, solve_policy(views, quality_value), quality_value, cells)
        stages = [follow(policy, row, PolicyObjective(quality_value=quality_value)) for row in rows]
        assert stages == run.stage.tolist()
        assert len(set(stages)) > 1 or quality_value != 6.0


def test_prompts_unlike_others_are_evaluated_as_they_are_served(
    made: tuple[Path, Dataset, list[OutcomeRow]],
) -> None:
    artifact, data, rows = made
    policy, _, predictor = load_artifact(artifact)
    before = evaluate_policy(policy, predictor, data, [6.0])
    policy.use_family(fit_family(data.prompt_texts()[:2], []).family())
    family = policy.family
    assert family is not None
    policy.mark_above(float(np.median([*map(family.novelty, data.prompt_texts())])))
    unlike = unlike_prompts(policy, data)
    assert 0.1 < unlike.mean() < 0.9
    after = evaluate_policy(policy, predictor, data, [6.0])
    assert after.unlike_share == unlike.mean()
    stages = [follow(policy, row, PolicyObjective(quality_value=6.0)) for row in rows]
    line = next(line for line in after.lines if line.name == "lambda 6")
    assert line.accuracy == np.mean(data.correct[np.arange(len(data)), stages])
    assert line.mix == tuple(np.mean(np.array(stages) == stage) for stage in range(len(data.cascade)))
    old = next(line for line in before.lines if line.name == "lambda 6")
    assert (line.mix, line.cost) != (old.mix, old.cost)
    # What is asked whatever is known, and the bound, are the same.
    assert (after.lines[0], after.lines[-1]) == (before.lines[0], before.lines[-1])
    # Nothing is predicted for them.
    assert sum(each.prompts for each in after.groups if each.group.startswith("level")) == len(
        after.predictions
    ) * int((~unlike).sum())
    policy.use_family(Family(frozenset(), frozenset(), 0.0))
    assert (evaluate_policy(policy, predictor, data, []).predictions) == ()


def follow(policy: Policy, row: OutcomeRow, objective: PolicyObjective) -> int:
    """Return the stage whose answer stands, deciding as the policy service does."""
    prompt = PromptText(row.prompt)
    stage, origin = policy.plan(prompt, objective, {}).first_stage, None
    while True:
        name = policy.stages[stage].name
        outcome = row.stages[name]
        signals = [
            np.array(x, np.float32) for x in (outcome.logprobs, outcome.entropies, outcome.top2_margins)
        ]
        draft = Draft(outcome.text, signals[0], signals[1], signals[2], outcome.finish_reason)
        check = None
        if origin is not None:
            found = row.verifications[f"{policy.stages[origin].name}>{name}"]
            check = DraftVerification(found.accepted, np.array(found.ranks))
        decision = policy.decide(prompt, stage, draft, origin, check, objective, Spent(), {})
        if decision.next_stage is None:
            return stage
        stage, origin = decision.next_stage, stage


def test_transitions_are_probabilities_and_costs_are_means(
    made: tuple[Path, Dataset, list[OutcomeRow]], policy: Policy
) -> None:
    for each in policy.views:
        assert (np.diff(each.view.p_correct) > 0).all()
        for move in each.view.moves:
            np.testing.assert_allclose(move.transition.sum(axis=1), 1.0, atol=1e-4)
            assert (move.cost > 0).all()
            assert (move.cost <= COSTS[move.stage].cost).all()


def test_the_same_inputs_make_the_same_policy(tmp_path: Path) -> None:
    rng = random.Random(1)
    paths = [write(tmp_path / f"{i}.parquet", [record(rng) for _ in range(200)]) for i in range(2)]
    inputs = [InputFile(path, read_dataset(path, COSTS)) for path in paths]
    documents = [
        fit_policy(inputs[0], inputs[1], COSTS, tmp_path / name, 0, lambda _: None) for name in ("a", "b")
    ]
    assert documents[0] == documents[1]


def test_a_policy_knows_the_ways_to_end_that_one_answer_in_a_hundred_had(tmp_path: Path) -> None:
    rng = random.Random(4)
    records = [record(rng) for _ in range(400)]
    for index, each in enumerate(records):
        stages: dict[str, dict[str, object]] = each["stages"]  # type: ignore[assignment]
        if index < 7:
            stages["small"]["finish_reason"] = "length" if index < 4 else "stop"
    train, calibration = (
        InputFile(path, read_dataset(path, COSTS))
        for path in (
            write(tmp_path / "train.parquet", records),
            write(tmp_path / "calibration.parquet", [record(rng) for _ in range(200)]),
        )
    )
    fit_policy(train, calibration, COSTS, tmp_path / "artifact", 0, lambda _: None)
    small, large = load_artifact(tmp_path / "artifact").policy.stages
    assert (small.finish_reasons, large.finish_reasons) == (("eos", "length"), ("eos",))


def test_bounds_of_a_policy_by_hand(tmp_path: Path) -> None:
    rng = random.Random(2)
    records = [record(rng) for _ in range(4)]
    for each, (small, large) in zip(records, [(1, 1), (0, 1), (0, 0), (1, 0)], strict=True):
        each["stages"]["small"]["correct"] = bool(small)  # type: ignore[index]
        each["stages"]["large"]["correct"] = bool(large)  # type: ignore[index]
    data = read_dataset(write(tmp_path / "o.parquet", list(records)), COSTS)
    assert always(data, 1).cost.tolist() == [5.0] * 4
    best = oracle(data)
    assert best.stage.tolist() == [0, 1, 0, 0]
    assert best.correct.tolist() == [True, True, False, True]
    # Large verifies small's draft: that is cheaper than asking it alone.
    assert best.cost.tolist() == pytest.approx([1.0, 1.0 + data.costs[1, 0][1], 1.0, 1.0])
    assert data.costs[1, 0][1] < 4.0
    scores = {key: np.array([0.9, 0.1, 0.2, 0.8]) for key in view_keys(2)}
    assert threshold(data, scores, 0.5).stage.tolist() == [0, 1, 1, 0]


def test_measures_against_hand_calculation() -> None:
    p_correct, correct = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    # Pairs right against wrong: 0.4>0.1, 0.4=0.4 (half), 0.9>0.1, 0.9>0.4.
    assert area_under_roc(p_correct, correct) == pytest.approx(3.5 / 4)
    assert r_squared(p_correct, correct) == pytest.approx(1 - (0.01 + 0.16 + 0.36 + 0.01) / 1.0)
    certain = np.repeat([0.2, 0.8], 15)
    outcomes = np.concatenate([np.arange(15) < 3, np.arange(15) < 12])
    assert expected_calibration_error(np.full(30, 0.5), np.arange(30) % 2 == 0) == pytest.approx(0.0)
    assert expected_calibration_error(certain, np.ones(30, np.bool_)) == pytest.approx(0.5)
    assert outcomes.sum() == 15


BAD: dict[str, tuple[tuple[str, object], str]] = {
    "NaN": (("logprob", float("nan")), r"row 2: stages\.small\.logprobs\.0"),
    "no log-probability": (("logprob", None), r"row 2: stages\.small\.logprobs\.0"),
    "no answer": (("stage", None), r"row 2: stages\.small"),
    "signals of different lengths": (("entropies", []), r"row 2: stages\.small: token signals"),
    "ranks that do not fit": (("ranks", [1]), r"row 2: verifications\.small>large: proposed"),
    "no verification": (("verifications", {}), r"row 2: verifications\.small>large"),
}


@pytest.mark.parametrize("case", BAD)
def test_unfit_outcomes_are_refused_with_their_row(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    rng = random.Random(3)
    records = [record(rng) for _ in range(3)]
    stages, checks = records[1]["stages"], records[1]["verifications"]
    assert isinstance(stages, dict)
    assert isinstance(checks, dict)
    match change:
        case ("logprob", value):
            stages["small"]["logprobs"][0] = value
        case ("stage", value):
            stages["small"] = value
        case ("entropies", value):
            stages["small"]["entropies"] = value
        case ("ranks", value):
            checks["small>large"]["ranks"] = value
        case ("verifications", value):
            records[1]["verifications"] = value
    path = write(tmp_path / "o.parquet", list(records))
    with pytest.raises(UnfitOutcomes, match=message):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 1}, "header: version: Input should be 2"),
        ({"schema": "other"}, "header: schema"),
        ({"cascade": ["small", "large", "huge"]}, "column stages is .*; outcomes of small, large, huge have"),
        (None, "not a file of outcomes"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, header: dict[str, object] | None, message: str
) -> None:
    path = write(tmp_path / "o.parquet", [record(random.Random(3))])
    table = pq.read_table(path)
    known = json.loads(table.schema.metadata[HEADER_KEY])
    metadata = {} if header is None else {HEADER_KEY: json.dumps({**known, **header})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(UnfitOutcomes, match=message):
        list(read_rows(path))


def test_a_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "o.parquet", [record(random.Random(3))])
    pq.write_table(pq.read_table(path).drop_columns(["prompt"]), path)
    with pytest.raises(UnfitOutcomes, match="prompt"):
        list(read_rows(path))


@pytest.mark.parametrize("cut", [40, 5_000])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    rng = random.Random(4)
    path = write(tmp_path / "o.parquet", [record(rng) for _ in range(50)])
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UnfitOutcomes, match="truncated"):
        list(read_rows(path))


def test_costs_of_another_cascade_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "o.parquet", [record(random.Random(5))])
    with pytest.raises(UnfitOutcomes, match=r"small, large.* large, small"):
        read_dataset(path, COSTS[::-1])


def test_shared_prompts_are_refused(tmp_path: Path) -> None:
    rng = random.Random(6)
    one, two, three = (record(rng) for _ in range(3))
    first = write(tmp_path / "a.parquet", [one, two])
    second = write(tmp_path / "b.parquet", [three, one])
    with pytest.raises(UnfitOutcomes, match=r"b\.parquet: row 2: .*a\.parquet"):
        check_disjoint(first, second)


def test_an_artifact_with_a_foreign_model_is_refused(
    made: tuple[Path, Dataset, list[OutcomeRow]], tmp_path: Path
) -> None:
    artifact = Path(shutil.copy(made[0], tmp_path))
    change_file(artifact, "stage-0.onnx", files_of(artifact)["stage-1.onnx"])
    with pytest.raises(UnfitArtifact, match=r"artifact: stage-0\.onnx"):
        read_artifact(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_version": 0}, "features 0"),
        ({"features": 3}, "features"),
        ({"schema_version": 1}, "schema_version 1.* `asd-policy fit`"),
        ({"schema_version": 3}, "schema_version 3"),
        (
            {"curve": [{"quality_value": 1, "cost": 1, "latency_ms": 1, "accuracy": 1}] * 2},
            "curve: .* increase",
        ),
        ({"schema": "other"}, "schema"),
        ({"views": []}, "views"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_unfit_document_is_refused(
    made: tuple[Path, Dataset, list[OutcomeRow]], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    artifact = Path(shutil.copy(made[0], tmp_path))
    change_document(artifact, lambda document: {**document, **change})
    with pytest.raises(UnfitArtifact, match=message):
        read_document(artifact)


def test_no_artifact_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UnfitArtifact, match="asd-policy fit"):
        load_artifact(tmp_path)
