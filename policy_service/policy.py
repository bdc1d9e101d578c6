"""Plans and decisions: predict, calibrate, look the optimal action up. Pure."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from policy_service.solver import View, solve_policy
from services.common.cost import is_above

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from policy_service.features import Draft, FeatureSpace, PromptText, Verification
    from policy_service.solver import Move, Solution

# Prompts whose features are kept from Plan to Decide, and the characters above which they are not.
_PROMPTS = 512
_LONGEST_KEPT_PROMPT = 4096

# Solutions kept, one per distinct objective and set of available stages. A solution takes about 10 kB.
_SOLUTIONS = 512


class Preference(Enum):
    """A wish for speed or for quality; each stands for a value of quality that was fitted."""

    FASTEST = "fastest"
    BALANCED = "balanced"
    BEST = "best"


class Reason(Enum):
    """What tipped a decision."""

    VALUE = "value"
    LAST_STAGE = "last_stage"
    MAX_COST = "max_cost"
    MAX_LATENCY = "max_latency"
    MIN_QUALITY = "min_quality"


class UnmeetableBudget(Exception):  # noqa: N818 - an error is named by its cause
    """No stage fits max_cost; the message says what would."""


@dataclass(frozen=True)
class Objective:
    """What to optimise. quality_value: the contract's `lambda`, cost units; None: the preference's."""

    quality_value: float | None = None
    max_cost: float = math.inf
    max_latency_ms: float = math.inf
    min_quality: float = 0.0
    preference: Preference = Preference.BALANCED


@dataclass(frozen=True)
class Condition:
    """What is known of a stage at the moment of the call."""

    is_available: bool = True
    expected_queue_ms: float = 0.0


@dataclass(frozen=True)
class Spent:
    """What a request took so far."""

    cost: float = 0.0
    latency_ms: float = 0.0


@dataclass(frozen=True)
class StageFacts:
    """A stage as it was when the policy was made. cost: of a whole answer. latency_ms: mean of one."""

    name: str
    cost: float
    latency_ms: float
    accuracy: float
    calibration_error: float


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of one head: p_correct = sigmoid(slope * score + offset). Platt 1999.

    edges: [bins - 1], upper edges of equally filled bins of p_correct. counts: [bins], calibration prompts.
    """

    slope: float
    offset: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def p_correct(self, score: float) -> float:
        """Return the calibrated probability for a predictor's score."""
        logit = self.slope * score + self.offset
        if logit >= 0:
            return 1.0 / (1.0 + math.exp(-logit))
        odds = math.exp(max(logit, -700.0))
        return odds / (1.0 + odds)

    def stderr(self, p_correct: float) -> float:
        """Return the standard error of a probability: a binomial share's over the prompts of its bin."""
        count = self.counts[bisect.bisect_left(self.edges, p_correct)]
        # One success and one failure more: a bin with no failure is not certain (Agresti and Coull 1998).
        share = (p_correct * count + 1) / (count + 2)
        return math.sqrt(share * (1 - share) / (count + 2))


@dataclass(frozen=True)
class CalibratedView:
    """A solver's view with what leads from a predictor's scores to its bins.

    heads: by stage, the calibration of that stage's head in this view.
    """

    view: View
    heads: Mapping[int, Calibration]

    @cached_property
    def centres(self) -> tuple[float, ...]:
        """Mean p_correct of each bin."""
        return tuple(self.view.p_correct.tolist())

    @cached_property
    def expected(self) -> dict[int, tuple[list[float], list[float]]]:
        """Cost and latency of asking each later stage, per bin."""
        return {move.stage: (move.cost.tolist(), move.latency_ms.tolist()) for move in self.view.moves}


class Predictor(Protocol):
    """Scores states. `scores(view, features)`: one score per head of the view, in the order of the stages."""

    def scores(self, view: int, features: npt.NDArray[np.float32]) -> Sequence[float]:
        """Return the scores, log-odds before calibration. features: float32 [size]."""


@dataclass(frozen=True)
class _Lookup:
    """A solution as plain lists, which cost less to read than arrays.

    onward: per view, by stage: per bin, the value of asking that stage. p_next: by first stage and the stage
    asked after it: per bin of the prompt's view, the probability of that. after_hopeless: by first stage, the
    one that is asked after its least promising answers, where one is.
    """

    onward: tuple[dict[int, list[float]], ...]
    p_next: dict[int, dict[int, list[float]]]
    after_hopeless: dict[int, int]


@dataclass(frozen=True)
class Estimate:
    """What is predicted of asking a stage. cost, latency_ms: of asking it next; 0 for the judged stage."""

    stage: int
    p_correct: float
    stderr: float
    cost: float
    latency_ms: float


@dataclass(frozen=True)
class AbandonRule:
    """A draft whose first tokens have a lower mean log-probability (nats) is almost never right."""

    tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Plan:
    """Where to start.

    p_escalate: probability of asking a later stage as well. likely_next: that stage; None: no later one is
    ever asked. abandon: when a draft of the first stage is hopeless, by ascending number of tokens.
    abandon_to: the stage that is best asked then; None: even a hopeless answer is the better value.
    """

    first_stage: int
    estimates: tuple[Estimate, ...]
    p_escalate: float
    likely_next: int | None
    abandon: tuple[AbandonRule, ...]
    abandon_to: int | None


@dataclass(frozen=True)
class Decision:
    """What to do with an answer. next_stage: None to stop. Values are in cost units."""

    next_stage: int | None
    reason: Reason
    p_correct: float
    stderr: float
    stop_value: float
    escalate_value: float
    estimates: tuple[Estimate, ...]


class Policy:
    """Plans and decides for one cascade.

    views[0] is the prompt that nothing has answered. quality_values: by preference, cost units. abandon: by
    stage, rules by ascending number of tokens.
    """

    def __init__(
        self,
        version: str,
        stages: Sequence[StageFacts],
        views: Sequence[CalibratedView],
        quality_values: Mapping[Preference, float],
        space: FeatureSpace,
        predictor: Predictor,
        abandon: Mapping[int, tuple[AbandonRule, ...]] | None = None,
    ) -> None:
        self._abandon = dict(abandon or {})
        self.version = version
        self.stages = tuple(stages)
        self.quality_values = dict(quality_values)
        self.views = tuple(views)
        self._places = {(each.view.stage, each.view.origin): i for i, each in enumerate(views)}
        self._space = space
        self._predictor = predictor
        self._solution = lru_cache(maxsize=_SOLUTIONS)(self._solve)
        self._kept_features = lru_cache(maxsize=_PROMPTS)(space.prompt)

    def plan(self, prompt: PromptText, objective: Objective, conditions: Mapping[int, Condition]) -> Plan:
        """Return the stage to start with. Raises UnmeetableBudget where no stage fits max_cost."""
        p_correct, stderr = self._predict(0, self._prompt_features(prompt))
        lookup = self._solution(*self._key(objective, conditions))
        view = self.views[0]
        point = _locate(view.centres, p_correct[0])
        estimates = _estimates(view, point, p_correct, stderr)
        values = {stage: point.of(onward) for stage, onward in lookup.onward[0].items()}
        # Every stage is away: the router knows best what it can still try.
        values = values or {each.stage: -each.cost for each in estimates}
        fitting = {s: v for s, v in values.items() if self.stages[s].cost <= objective.max_cost}
        if not fitting:
            cheapest = min((self.stages[s] for s in values), key=lambda stage: stage.cost)
            raise UnmeetableBudget(
                f"max_cost {objective.max_cost:g} is below the cheapest stage that is available "
                f"({cheapest.name}: {cheapest.cost:g}): raise it"
            )
        arrival = {
            s: estimates[s].latency_ms + conditions.get(s, Condition()).expected_queue_ms for s in fitting
        }
        timely = {s: v for s, v in fitting.items() if arrival[s] <= objective.max_latency_ms}
        # A latency budget is a wish: where no stage meets it, the fastest one comes closest.
        first = max(timely, key=timely.__getitem__) if timely else min(arrival, key=arrival.__getitem__)
        p_next = {stage: point.of(p) for stage, p in lookup.p_next.get(first, {}).items()}
        likely = max(p_next, key=p_next.__getitem__, default=None)
        abandon_to = lookup.after_hopeless.get(first)
        abandon = self._abandon.get(first, ()) if abandon_to is not None else ()
        # Rows of a transition sum to 1 but for the rounding of the artifact.
        return Plan(first, estimates, min(sum(p_next.values()), 1.0), likely, abandon, abandon_to)

    def decide(
        self,
        prompt: PromptText,
        stage: int,
        draft: Draft,
        origin: int | None,
        verification: Verification | None,
        objective: Objective,
        spent: Spent,
        conditions: Mapping[int, Condition],
    ) -> Decision:
        """Return whether a stage's answer is good enough, or which later stage to ask."""
        index = self._places[stage, origin if verification else None]
        view = self.views[index]
        features = self._space.answer(
            self._prompt_features(prompt), prompt, stage, draft, origin, verification
        )
        p_correct, stderr = self._predict(index, features)
        quality_value, available, min_quality = self._key(objective, conditions)
        lookup = self._solution(quality_value, available, min_quality)
        score = p_correct[stage]
        point = _locate(view.centres, score)
        estimates = _estimates(view, point, p_correct, stderr)
        stop_value = quality_value * score
        values = {later: point.of(onward) for later, onward in lookup.onward[index].items()}
        chosen, reason = self._choose(values, stop_value, score, min_quality)
        limits = self._limits(values, estimates, objective, spent, conditions)
        if chosen in limits:
            limit = limits[chosen]
            allowed = {later: value for later, value in values.items() if later not in limits}
            chosen, reason = self._choose(allowed, stop_value, score, min_quality)
            reason = limit if chosen is None else reason
        return Decision(
            chosen,
            reason,
            score,
            stderr[stage],
            stop_value,
            # Finite below any stop: an infinity would say "unknown" on the wire.
            max(values.values(), default=stop_value - quality_value - 1.0),
            estimates,
        )

    def _prompt_features(self, prompt: PromptText) -> npt.NDArray[np.float32]:
        size = len(prompt.question) + sum(map(len, prompt.history))
        return self._kept_features(prompt) if size <= _LONGEST_KEPT_PROMPT else self._space.prompt(prompt)

    def _choose(
        self, values: Mapping[int, float], stop_value: float, score: float, min_quality: float
    ) -> tuple[int | None, Reason]:
        if not values:
            return None, Reason.LAST_STAGE
        best = max(values, key=values.__getitem__)
        if values[best] > stop_value:
            return best, Reason.VALUE
        if score < min_quality:
            return best, Reason.MIN_QUALITY
        return None, Reason.VALUE

    def _limits(
        self,
        values: Mapping[int, float],
        estimates: Sequence[Estimate],
        objective: Objective,
        spent: Spent,
        conditions: Mapping[int, Condition],
    ) -> dict[int | None, Reason]:
        """Return the stages that a budget rules out, and which one."""
        latency_ms = {each.stage: each.latency_ms for each in estimates}
        limits: dict[int | None, Reason] = {}
        for stage in values:
            queue_ms = conditions.get(stage, Condition()).expected_queue_ms
            # At its dearest, a verification costs as much as a whole answer: max_cost is never exceeded.
            if is_above(spent.cost + self.stages[stage].cost, objective.max_cost):
                limits[stage] = Reason.MAX_COST
            elif spent.latency_ms + latency_ms[stage] + queue_ms > objective.max_latency_ms:
                limits[stage] = Reason.MAX_LATENCY
        return limits

    def _key(
        self, objective: Objective, conditions: Mapping[int, Condition]
    ) -> tuple[float, frozenset[int], float]:
        quality_value = objective.quality_value
        if quality_value is None:
            quality_value = self.quality_values[objective.preference]
        away = {stage for stage, condition in conditions.items() if not condition.is_available}
        return quality_value, frozenset(range(len(self.stages))) - away, objective.min_quality

    def _solve(self, quality_value: float, available: frozenset[int], min_quality: float) -> _Lookup:
        views = tuple(each.view for each in self.views)
        solution = solve_policy(views, quality_value, available=available, min_quality=min_quality)
        return _Lookup(
            tuple({s: values.tolist() for s, values in each.items()} for each in solution.continuations),
            {move.stage: _next_stages(move, solution) for move in views[0].moves},
            {
                move.stage: max(onward, key=lambda stage: float(onward[stage][0]))
                for move in views[0].moves
                if (onward := solution.continuations[move.view]) and solution.escalates[move.view][0]
            },
        )

    def _predict(
        self, index: int, features: npt.NDArray[np.float32]
    ) -> tuple[dict[int, float], dict[int, float]]:
        heads = self.views[index].heads
        scores = self._predictor.scores(index, features)
        p_correct = {
            stage: head.p_correct(score) for (stage, head), score in zip(heads.items(), scores, strict=True)
        }
        return p_correct, {stage: heads[stage].stderr(p) for stage, p in p_correct.items()}


def _next_stages(first: Move, solution: Solution) -> dict[int, list[float]]:
    """Return the probability of asking each later stage after a first one, per bin of the prompt's view."""
    onward = solution.continuations[first.view]
    if not onward:
        return {}
    best = np.argmax(np.stack(list(onward.values())), axis=0)
    goes_on = solution.escalates[first.view]
    return {
        stage: probs.tolist()
        for index, stage in enumerate(onward)
        if (probs := first.transition @ (goes_on & (best == index))).any()
    }


@dataclass(frozen=True, slots=True)
class _Point:
    """A place between the centres of two bins: `share` of the way from `low` to `low + 1`."""

    low: int
    share: float

    def of(self, values: Sequence[float]) -> float:
        """Return the value here of a quantity known at the centres, linearly."""
        if self.share == 0.0:
            return values[self.low]
        return values[self.low] * (1.0 - self.share) + values[self.low + 1] * self.share


def _locate(centres: Sequence[float], at: float) -> _Point:
    """Return where a value lies between centres, which increase; beyond them, the nearest one."""
    above = bisect.bisect_left(centres, at)
    if above == 0:
        return _Point(0, 0.0)
    if above == len(centres):
        return _Point(above - 1, 0.0)
    low, high = centres[above - 1], centres[above]
    return _Point(above - 1, (at - low) / (high - low))


def _estimates(
    view: CalibratedView, point: _Point, p_correct: Mapping[int, float], stderr: Mapping[int, float]
) -> tuple[Estimate, ...]:
    estimates = []
    for stage, p in p_correct.items():
        costs, latencies_ms = view.expected.get(stage, (None, None))
        cost = point.of(costs) if costs else 0.0
        latency_ms = point.of(latencies_ms) if latencies_ms else 0.0
        estimates.append(Estimate(stage, p, stderr[stage], cost, latency_ms))
    return tuple(estimates)
