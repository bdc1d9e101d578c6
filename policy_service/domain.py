"""Questions to the policy and its answers, as values. No gRPC, no protobuf."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from asd.values import DecisionReason, FinishReason, Preference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt


class UnmeetableBudget(Exception):  # noqa: N818 - an error is named by its cause
    """No stage fits the budget; the message says which budget would be enough."""


@dataclass(frozen=True)
class PolicyObjective:
    """What to optimise. quality_value: the contract's `lambda`, cost units; None: the preference's.

    min_quality: an answer is returned early only if answers like it are certified to be right that often
    (View.certified). min_accuracy_share: limits how far waits count. The expected accuracy must stay at or
    above this share of the largest stage's, or its accuracy without waits if that is lower. None: waits count
    in full; 1 or more: they count only against max_latency_ms.
    """

    quality_value: float | None = None
    max_cost: float = math.inf
    max_latency_ms: float = math.inf
    min_quality: float = 0.0
    preference: Preference = Preference.BALANCED
    min_accuracy_share: float | None = None


@dataclass(frozen=True)
class Condition:
    """State of a stage at the time of the call."""

    is_available: bool = True
    expected_queue_ms: float = 0.0


@dataclass(frozen=True)
class Spent:
    """Cost and time that a request has taken so far."""

    cost: float = 0.0
    latency_ms: float = 0.0


@dataclass(frozen=True)
class StageFacts:
    """A stage's figures when the policy was made. cost: of a whole answer. latency_ms: mean of an answer.

    finish_reasons: those of the answers that the predictor was fitted to. It cannot predict for other ones.
    """

    name: str
    cost: float
    latency_ms: float
    accuracy: float
    calibration_error: float
    finish_reasons: tuple[FinishReason, ...] = (FinishReason.EOS,)


class Predictor(Protocol):
    """Scores states: one score per head of a view, in the order of the stages, log-odds before calibration.

    Both methods give the same scores, bit for bit.
    """

    def scores(self, view: int, features: npt.NDArray[np.float32]) -> Sequence[float]:
        """Return the scores of one state. features: float32 [size]."""

    def score_rows(self, view: int, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the scores of several states of a view: float32 [n, heads]. features: float32 [n, size]."""


@dataclass(frozen=True)
class State:
    """The predictor's input for a request. view: index of the view that scores it."""

    view: int
    features: npt.NDArray[np.float32]


@dataclass(frozen=True)
class CurvePoint:
    """Mean results of the optimal policy for a value of quality, by the views and without waits."""

    quality_value: float
    cost: float
    latency_ms: float
    accuracy: float


@dataclass(frozen=True)
class Estimate:
    """Predictions for a stage. cost, latency_ms: of calling it next; 0 for the judged stage.

    p_correct, stderr: None for a prompt that is unlike all that the policy was fitted to.
    """

    stage: int
    p_correct: float | None
    stderr: float | None
    cost: float
    latency_ms: float


@dataclass(frozen=True)
class AbandonThreshold:
    """A draft whose first tokens have a lower mean log-probability (nats) is almost never right."""

    tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Plan:
    """Where to start.

    p_escalate: probability of an escalation. likely_next: its stage; None: there is never one. abandon:
    thresholds of hopeless drafts of the first stage, by ascending number of tokens. abandon_to: the best
    stage to call then; None: even a hopeless answer is worth more. is_unlike: whether the prompt is unlike
    all that the policy was fitted to.
    """

    first_stage: int
    estimates: tuple[Estimate, ...]
    p_escalate: float
    likely_next: int | None
    abandon: tuple[AbandonThreshold, ...]
    abandon_to: int | None
    is_unlike: bool = False


@dataclass(frozen=True)
class Judgement:
    """What to do with an answer. next_stage: None to stop. Values are in cost units, including waits.

    escalate_value: of the best stage within the budgets; below stop_value if there is none.
    p_correct, stderr: None for a prompt that is unlike all that the policy was fitted to; values are 0 then.
    """

    next_stage: int | None
    reason: DecisionReason
    p_correct: float | None
    stderr: float | None
    stop_value: float
    escalate_value: float
    estimates: tuple[Estimate, ...]
