"""Refitting: it finds a known miscalibration, refuses what reports do not bear out, and says what it did."""

from __future__ import annotations

import math
import random
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pytest

from policy_service.artifact import load_usable, read_artifact, read_document
from policy_service.domain import PolicyObjective, Spent
from policy_service.features import Draft, DraftVerification, PromptText
from policy_service.reports import OutcomeReport
from policy_service.store import write_artifact
from policy_service.train.refit import (
    LEAST_REPORTS,
    Correction,
    UnfitReports,
    correct_document,
    fit_correction,
    fit_corrections,
    log_losses,
    refit_artifact,
)
from tests.unit.policy.tiny_policy import make_artifact

if TYPE_CHECKING:
    from pathlib import Path

    from policy_service.policy import Policy


def reports(
    count: int,
    *,
    slope: float = 1.0,
    offset: float = 0.0,
    stage: str = "small",
    version: str = "v1",
    seed: int = 0,
) -> list[OutcomeReport]:
    """Reports of answers that are right as a correction of their p_correct says."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        p_correct = rng.uniform(0.05, 0.95)
        truth = 1 / (1 + math.exp(-slope * math.log(p_correct / (1 - p_correct)) - offset))
        made.append(
            OutcomeReport(f"{stage}-{index}", stage, p_correct, version, rng.random() < truth, float(index))
        )
    return made


def test_a_known_miscalibration_is_found():
    made = reports(20_000, slope=0.6, offset=-0.8)
    found = fit_correction(
        np.array([each.p_correct for each in made]), np.array([each.correct for each in made])
    )
    # Standard errors at 20,000 reports: about 0.013 and 0.018.
    assert found.slope == pytest.approx(0.6, abs=0.05)
    assert found.offset == pytest.approx(-0.8, abs=0.07)


def test_the_correction_is_the_minimum_that_a_grid_finds():
    made = reports(300, slope=0.5, offset=0.5)
    p_correct, correct = np.array([e.p_correct for e in made]), np.array([e.correct for e in made])
    log_odds = np.log(p_correct / (1 - p_correct))
    slopes, offsets = np.linspace(0.3, 0.9, 61), np.linspace(0.0, 1.2, 121)
    logits = slopes[:, None, None] * log_odds + offsets[None, :, None]
    loss = np.logaddexp(0.0, np.where(correct, -logits, logits)).sum(axis=2)
    loss += ((slopes - 1) ** 2 / 2)[:, None] + offsets**2 / 2
    best = np.unravel_index(np.argmin(loss), loss.shape)
    found = fit_correction(p_correct, correct)
    # Half a step of the grid, and its rounding.
    assert found.slope == pytest.approx(slopes[best[0]], abs=0.006)
    assert found.offset == pytest.approx(offsets[best[1]], abs=0.006)


@pytest.mark.parametrize("correct", [True, False])
def test_reports_of_one_kind_do_not_run_away(correct):
    found = fit_correction(np.full(1000, 1.0 - 1e-9), np.full(1000, correct))
    assert 0 < found.slope < 3
    assert abs(found.offset) < 3


def test_log_loss_by_hand():
    losses = log_losses(np.array([0.5, 0.9, 0.9]), np.array([True, True, False]))
    assert losses == pytest.approx([math.log(2), -math.log(0.9), -math.log(0.1)])


def test_a_stage_that_drifted_is_corrected_and_the_others_stay():
    made = reports(1500, offset=-1.0) + reports(1500, stage="large", seed=1)
    small, large, silent = fit_corrections(made, "v1", ["small", "large", "silent"], seed=0)
    assert small.correction is not None
    assert small.correction.offset == pytest.approx(-1.0, abs=0.25)
    assert small.loss is not None
    assert small.loss[1] < small.loss[0] - 0.03
    assert small.error is not None
    assert small.error[1] < small.error[0] / 2
    assert large.correction is None
    assert silent.correction is None
    # Why each was left alone.
    assert large.reason
    assert "0 right and 0 wrong" in silent.reason


def test_a_calibrated_policy_is_left_alone():
    """Of 40 sets of reports, a one-sided 95% bound lets 2 through on average, and rarely more than 5."""
    refits = [fit_corrections(reports(400, seed=seed), "v1", ["small"], seed)[0] for seed in range(40)]
    assert sum(each.correction is not None for each in refits) <= 5
    # Two parameters of 200 reports cost 2 / (2 * 200) nats on others; on the same ones they would gain.
    lost = [each.loss[1] - each.loss[0] for each in refits if each.loss]
    assert fmean(lost) == pytest.approx(0.005, abs=0.003)


@pytest.mark.parametrize(
    ("made", "counted"),
    [
        (reports(LEAST_REPORTS - 1), f"small {LEAST_REPORTS - 1}"),
        (reports(5000, version="v0"), "small 0"),
        ([OutcomeReport("same", "small", 0.5, "v1", True, float(n)) for n in range(5000)], "small 1"),
        ([OutcomeReport(f"{n}", "small", 0.9, "v1", True, 0.0) for n in range(5000)], "small 5000"),
    ],
)
def test_too_few_reports_are_refused_with_their_number(made, counted):
    with pytest.raises(UnfitReports, match=counted):
        fit_corrections(made, "v1", ["small"], seed=0)


def test_the_last_report_of_a_request_counts():
    made = reports(1000, offset=-1.5)
    revised = [
        OutcomeReport(e.request_id, e.stage, e.p_correct, "v1", not e.correct, e.reported_at + 10_000)
        for e in made
    ]
    (before,) = fit_corrections(made, "v1", ["small"], seed=0)
    (after,) = fit_corrections(revised + made, "v1", ["small"], seed=0)
    assert before.correction is not None
    assert after.correction is not None
    assert before.correction.offset < -1
    assert after.correction.offset > 0.5


def p_correct(policy: Policy, stage: int, origin: int | None, logprob: float) -> float:
    signals = np.full(2, logprob, np.float32)
    check = None if origin is None else DraftVerification(1, np.zeros(2, np.int64))
    draft = Draft("x", signals, signals, signals, "eos")
    return policy.decide(
        PromptText("?"), stage, draft, origin, check, PolicyObjective(), Spent(), {}
    ).p_correct


@pytest.fixture
def refitted(tmp_path: Path) -> tuple[Path, Path]:
    """An artifact of three stages and what became of it by a correction of medium."""
    parent = make_artifact(tmp_path / "parent", "v1", stages=("small", "medium", "large"), offset=0.5)
    made = reports(2000, stage="medium", slope=0.7, offset=-1.0)
    refits = fit_corrections(made, "v1", ["small", "medium", "large"], 0)
    write_artifact(refit_artifact(read_artifact(parent), refits), tmp_path / "made")
    return parent, tmp_path / "made"


def test_the_refitted_policy_says_what_the_correction_says(refitted: tuple[Path, Path]):
    parent, made = refitted
    lineage = read_document(made).lineage
    assert lineage is not None
    assert lineage.parent == "v1"
    (stage,) = lineage.stages
    assert (stage.stage, stage.reports) == ("medium", 2000)
    before, after = load_usable(parent).policy, load_usable(made).policy
    assert after.version not in {"v1", ""}
    for logprob in (0.0, -0.3, -1.5):
        for origin in (None, 0):
            p = p_correct(before, 1, origin, logprob)
            wanted = 1 / (1 + math.exp(-stage.slope * math.log(p / (1 - p)) - stage.offset))
            assert p_correct(after, 1, origin, logprob) == pytest.approx(wanted, abs=1e-6)
        for other, origin in ((0, None), (2, 0), (2, 1)):
            p = p_correct(before, other, origin, logprob)
            assert p_correct(after, other, origin, logprob) == p


def test_bins_follow_and_certificates_never_rise(refitted: tuple[Path, Path]):
    parent, made = map(read_document, refitted)
    for old, new in zip(parent.views, made.views, strict=True):
        if old.stage != "medium":
            assert new == old
            continue
        assert all(a > b for a, b in zip(old.p_correct, new.p_correct, strict=True))
        assert all(a >= b for a, b in zip(old.certified, new.certified, strict=True))
        assert new.certified[-1] < old.certified[-1]
        assert new.heads[1:] == old.heads[1:]
        assert new.heads[0].counts == old.heads[0].counts
    better = correct_document(parent, {"medium": Correction(1.0, 2.0)}, "v2")
    views = [view for view in better.views if view.stage == "medium"]
    assert all(view.certified == (0.0, 0.4, 0.7) for view in views)
    assert all(view.p_correct[0] == pytest.approx(1 / (1 + 4 * math.exp(-2))) for view in views)


def test_a_worse_medium_is_asked_less(refitted: tuple[Path, Path]):
    """The curve is the refitted policy's own, and the solver knows the corrected bins."""
    parent, made = map(load_usable, refitted)

    def value_of_medium(policy: Policy) -> float:
        signals = np.full(2, -1.0, np.float32)
        draft = Draft("x", signals, signals, signals, "eos")
        return policy.decide(
            PromptText("?"), 0, draft, None, None, PolicyObjective(quality_value=5.0), Spent(), {2: _away()}
        ).escalate_value

    def _away() -> object:
        from policy_service.domain import Condition

        return Condition(is_available=False)

    # Bins 0.2, 0.5, 0.8 with shares 0.1, 0.1, 0.8 give 5 * 0.71 - 2.
    assert value_of_medium(parent.policy) == pytest.approx(1.55)
    assert value_of_medium(made.policy) < 1.0
    assert made.document.curve != parent.document.curve


def test_the_same_reports_make_the_same_version(tmp_path: Path):
    parent = read_artifact(make_artifact(tmp_path / "parent", "v1"))
    versions = []
    for seed in (0, 0, 1):
        refits = fit_corrections(reports(1000, offset=-1.0, seed=seed), "v1", ["small", "large"], 0)
        versions.append(refit_artifact(parent, refits).document.policy_version)
    assert versions[0] == versions[1] != versions[2]
