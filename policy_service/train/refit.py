"""Refits a policy's calibration to reported outcomes.

A report names the stage that answered, but not whether it generated or verified the answer. Each stage
therefore has one correction, p_correct' = sigmoid(slope * logit(p_correct) + offset), for all views in which
it is judged: for their heads, and for their bins in the solver. The predictions of earlier views for the
stage stay, apart from the effect of the corrected bins. Escalated answers are not reported. Their scores are
the low ones, and the correction is extrapolated to them. Shares certified for min_quality are lowered if the
correction lowers them, and never raised: reports certify nothing. Preferences keep their value of quality.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from policy_service.artifact import Artifact, build_views
from policy_service.document import Lineage, PolicyDocument, StageLineage
from policy_service.drift import RunningCalibration, logit, sigmoid
from policy_service.reports import last_reports
from policy_service.store import UnfitStore
from policy_service.train.fit import tabulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from policy_service.document import HeadEntry, ViewEntry
    from policy_service.reports import OutcomeReport

    Floats = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]

# Fewest reports of a stage for a correction, and fewest right and wrong answers among them, so that each half
# has some of both. Chosen.
LEAST_REPORTS = 200
LEAST_OF_EACH = 10
# A gain in log loss counts if it is larger than this many of its standard errors: one-sided 95%.
_CONFIDENCE = 1.645
# Standard deviation of the prior of slope and offset around no correction. It dominates if there are few
# reports. Chosen: a correction by 1 changes the odds by a factor of e.
_PRIOR_DEVIATION = 1.0
_NEWTON_STEPS = 100
_LEAST_SLOPE = 0.05


class UnfitReports(UnfitStore):
    """The reports do not suffice for a correction; the message says why."""


@dataclass(frozen=True)
class Correction:
    """p_correct' = sigmoid(slope * logit(p_correct) + offset). Platt 1999, on log-odds instead of scores."""

    slope: float
    offset: float

    def apply(self, p_correct: float) -> float:
        """Return a corrected probability."""
        return sigmoid(self.slope * logit(p_correct) + self.offset)


@dataclass(frozen=True)
class StageRefit:
    """A stage's correction and its effect on reports that it was not fitted to.

    error, loss: expected calibration error and mean log loss (nats), before and after. reason: why there is
    no correction, or "".
    """

    stage: str
    reports: int
    correction: Correction | None
    error: tuple[float, float] | None
    loss: tuple[float, float] | None
    reason: str


def fit_corrections(
    reports: Iterable[OutcomeReport], version: str, stages: Sequence[str], seed: int
) -> list[StageRefit]:
    """Return the correction of each stage that its reports under a version support. Raises UnfitReports.

    Each half of a stage's reports tests the correction fitted to the other half. If that lowers the log loss
    significantly, the correction is fitted to both halves.
    """
    kept = last_reports(each for each in reports if each.policy_version == version)
    refits = []
    for stage in stages:
        of_stage = [each for each in kept if each.stage == stage]
        p_correct = np.array([each.p_correct for each in of_stage], float)
        correct = np.array([each.correct for each in of_stage], np.bool_)
        refits.append(_refit_stage(stage, p_correct, correct, seed))
    if not any(each.loss for each in refits):
        counted = ", ".join(f"{each.stage} {each.reports}" for each in refits)
        raise UnfitReports(
            f"too few reports of policy {version}: a stage needs {LEAST_REPORTS}, {LEAST_OF_EACH} right and "
            f"{LEAST_OF_EACH} wrong among them, but there are {counted}"
        )
    return refits


def refit_artifact(parent: Artifact, refits: Iterable[StageRefit]) -> Artifact:
    """Return a policy with corrections. Its lineage names the parent. Raises UnfitArtifact."""
    document = parent.document
    corrected = {each.stage: each for each in refits if each.correction is not None}
    lineage = Lineage(
        parent=document.policy_version,
        stages=tuple(
            StageLineage(
                stage=name,
                reports=each.reports,
                slope=each.correction.slope,
                offset=each.correction.offset,
            )
            for name, each in corrected.items()
            if each.correction is not None
        ),
    )
    refitted = correct_document(
        document,
        {stage.stage: Correction(stage.slope, stage.offset) for stage in lineage.stages},
        # The version names the content: the same reports make the same version.
        hashlib.sha256(lineage.model_dump_json().encode()).hexdigest()[:12],
    )
    views = build_views(refitted)
    curve = tabulate(tuple(each.view for each in views), views[0].prompt_shares)
    return Artifact(refitted.model_copy(update={"curve": curve, "lineage": lineage}), parent.models)


def correct_document(
    document: PolicyDocument, corrections: Mapping[str, Correction], version: str
) -> PolicyDocument:
    """Return a policy whose judged stages have these corrections; its curve is the old one's."""
    views = [_correct_view(view, corrections.get(view.stage or "")) for view in document.views]
    changed = document.model_copy(update={"views": tuple(views), "policy_version": version})
    # A copy is not validated.
    return PolicyDocument.model_validate(changed.model_dump(by_alias=True))


def fit_correction(p_correct: Floats, correct: Bools) -> Correction:
    """Return the most likely correction of predictions. [n] each.

    Newton's method on the log loss with a normal prior around no correction, which makes it strictly convex.
    """
    log_odds = np.array([logit(p) for p in p_correct.tolist()])
    rows = np.stack([log_odds, np.ones_like(log_odds)], axis=1)
    centre = np.array([1.0, 0.0])
    prior = np.eye(2) / _PRIOR_DEVIATION**2
    at = centre.copy()

    def penalised_loss(where: Floats) -> float:
        off = where - centre
        return float(
            np.logaddexp(0.0, np.where(correct, -1.0, 1.0) * (rows @ where)).sum() + off @ prior @ off / 2
        )

    for _ in range(_NEWTON_STEPS):
        p = np.exp(-np.logaddexp(0.0, -rows @ at))
        gradient = rows.T @ (p - correct) + prior @ (at - centre)
        step = np.linalg.solve((rows * (p * (1.0 - p))[:, None]).T @ rows + prior, gradient)
        # Far from the minimum, a full step may overshoot.
        while penalised_loss(at - step) > penalised_loss(at) and np.abs(step).max() > 1e-9:
            step = step / 2
        at = at - step
        if np.abs(step).max() < 1e-9:
            break
    # A negative slope means that the predictions are useless; a small slope keeps their order.
    return Correction(max(round(float(at[0]), 6), _LEAST_SLOPE), round(float(at[1]), 6))


def log_losses(p_correct: Floats, correct: Bools) -> Floats:
    """Return the log loss of each prediction, in nats. [n] each."""
    log_odds = np.array([logit(p) for p in p_correct.tolist()])
    losses: Floats = np.logaddexp(0.0, np.where(correct, -log_odds, log_odds))
    return losses


def _refit_stage(stage: str, p_correct: Floats, correct: Bools, seed: int) -> StageRefit:
    count, right = len(correct), int(correct.sum())
    if count < LEAST_REPORTS or min(right, count - right) < LEAST_OF_EACH:
        reason = f"too few reports: {right} right and {count - right} wrong"
        return StageRefit(stage, count, None, None, None, reason)
    held_out = np.empty(count)
    first, second = np.array_split(np.random.default_rng(seed).permutation(count), 2)
    for fitted, rest in ((first, second), (second, first)):
        correction = fit_correction(p_correct[fitted], correct[fitted])
        held_out[rest] = [correction.apply(p) for p in p_correct[rest].tolist()]
    before, after = log_losses(p_correct, correct), log_losses(held_out, correct)
    error = (_error(p_correct, correct), _error(held_out, correct))
    loss = (float(before.mean()), float(after.mean()))
    gain = before - after
    if gain.mean() <= _CONFIDENCE * gain.std(ddof=1) / np.sqrt(count):
        return StageRefit(stage, count, None, error, loss, "no surer on reports that it was not fitted to")
    return StageRefit(stage, count, fit_correction(p_correct, correct), error, loss, "")


def _error(p_correct: Floats, correct: Bools) -> float:
    running = RunningCalibration()
    for p, is_right in zip(p_correct.tolist(), correct.tolist(), strict=True):
        running.add(p, correct=is_right)
    return running.error


def _correct_view(view: ViewEntry, correction: Correction | None) -> ViewEntry:
    if correction is None:
        return view
    return view.model_copy(
        update={
            "p_correct": tuple(correction.apply(p) for p in view.p_correct),
            "certified": tuple(min(share, correction.apply(share)) for share in view.certified),
            # The first head is the judged stage's.
            "heads": (_correct_head(view.heads[0], correction), *view.heads[1:]),
        }
    )


def _correct_head(head: HeadEntry, correction: Correction) -> HeadEntry:
    return head.model_copy(
        update={
            "slope": correction.slope * head.slope,
            "offset": correction.slope * head.offset + correction.offset,
            "edges": tuple(correction.apply(edge) for edge in head.edges),
        }
    )
