"""What the family can do: accuracy by suite and level, and how far draft features tell right from wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from policy_service.train.scores import area_under_roc
from suites import LEVELS, SUITES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.train.outcomes import GradedAnswer
    from suites import Task


def summarise(tasks: Sequence[Task], answers: Sequence[GradedAnswer]) -> dict[str, object]:
    """Return accuracies (shares of right answers) and the AUROC of single draft features of one model."""
    right = np.array([answer.is_correct for answer in answers])
    suites = np.array([task.suite for task in tasks])
    levels = np.array([task.level for task in tasks])
    kinds = np.array([f"{task.suite}/{task.kind}" for task in tasks])
    features = {
        name: round(area_under_roc(values, right), 4) for name, values in draft_features(answers).items()
    }
    best = max(features, key=lambda name: features[name])
    return {
        "prompts": len(tasks),
        "accuracy": _share(right),
        "accuracy_by_suite": {suite: _share(right[suites == suite]) for suite in SUITES},
        "accuracy_by_level": {str(level): _share(right[levels == level]) for level in LEVELS},
        "accuracy_by_kind": {str(kind): _share(right[kinds == kind]) for kind in sorted(set(kinds))},
        "accuracy_by_suite_and_level": {
            suite: [_share(right[(suites == suite) & (levels == level)]) for level in LEVELS]
            for suite in SUITES
        },
        "mean_tokens": round(float(np.mean([len(answer.ids) for answer in answers])), 1),
        "draft_feature_auroc": features,
        "best_draft_feature": best,
        "best_draft_feature_auroc": features[best],
    }


def draft_features(answers: Sequence[GradedAnswer]) -> dict[str, npt.NDArray[np.float64]]:
    """Return single features of drafts, each signed so that higher should mean right; float64 [answers]."""

    def column(place: int, reduce: str) -> npt.NDArray[np.float64]:
        return np.array([float(getattr(np, reduce)(a.signals[:, place])) if a.ids else 0.0 for a in answers])

    return {
        "mean_logprob": column(0, "mean"),
        "min_logprob": column(0, "min"),
        "sum_logprob": column(0, "sum"),
        "last_logprob": np.array([float(a.signals[-1, 0]) if a.ids else 0.0 for a in answers]),
        "mean_entropy": -column(1, "mean"),
        "max_entropy": -column(1, "max"),
        "mean_margin": column(2, "mean"),
        "min_margin": column(2, "min"),
        "length": -np.array([float(len(a.ids)) for a in answers]),
    }


def _share(right: npt.NDArray[np.bool_]) -> float:
    return round(float(right.mean()), 4)
