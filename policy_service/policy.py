"""Plans and decisions: predict, calibrate, look the optimal action up. Pure."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from asd.values import DecisionReason, Preference
from policy_service.domain import (
    AbandonThreshold,
    Condition,
    CurvePoint,
    Estimate,
    Judgement,
    Plan,
    PolicyObjective,
    Predictor,
    Spent,
    StageFacts,
    State,
    UnmeetableBudget,
)
from policy_service.solver import View, expect, paths_from, solve_policy, unfold
from services.common.cost import is_above

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from policy_service.calibration import CalibratedView, Point
    from policy_service.family import Family
    from policy_service.features import Draft, DraftVerification, FeatureSpace, PromptText
    from policy_service.solver import Expectation, Move, Path, Solution

# Prompts whose features are kept from Plan to Decide, and the characters above which they are not.
_PROMPTS = 512
_LONGEST_KEPT_PROMPT = 4096

# Solutions kept, one per distinct objective, set of available stages and set of queues.
# One takes about 10 kB. Budgets add few: a solution depends on which paths still fit, not on the amounts.
_SOLUTIONS = 2048

# Waits are counted in answers of the stage and rounded to powers of two, so that there are few solutions.
# Chosen: a shorter wait than an eighth of an answer changes no plan, and beyond 1024 all are hopeless.
_SHORTEST_WAIT, _LONGEST_WAIT = 0.125, 1024.0

# Kept above a floor of accuracy, as a share of the largest stage's: what the views expect is not what comes.
# Chosen: replays of the shipped policy on held-out prompts are within 0.9 points of it, lambda from 2 to 50.
_FLOOR_MARGIN = 0.01
# Steps of bisection for the part of the waits that counts. Chosen: each halves what is left, and solutions
# differ at few values. A search takes a millisecond.
_WAIT_BISECTIONS = 5

# Steps of bisection for a value of quality: beyond, a hundredth of a per cent is left of the curve's spacing.
_BISECTIONS = 20


@dataclass(frozen=True)
class _Lookup:
    """A solution as plain lists, which cost less to read than arrays.

    onward: by view that it solves, by stage: per bin, the value of asking that stage. p_next: by first stage
    and the stage asked after it: per bin of the prompt's view, the probability of that. after_hopeless: by
    first stage, the one that is asked after its least promising answers, where one is.
    """

    onward: dict[int, dict[int, list[float]]]
    p_next: dict[int, dict[int, list[float]]]
    after_hopeless: dict[int, int]


@dataclass(frozen=True)
class _Way:
    """A way on from a view.

    cost: of its calls at their dearest, as whole answers. latency_ms: expected of its calls but the first.
    """

    path: Path
    cost: float
    latency_ms: float


@dataclass(frozen=True)
class _Problem:
    """What a solution depends on besides the budgets. waiting_cost: by stage, of those that have a queue."""

    quality_value: float
    available: frozenset[int]
    min_quality: float
    waiting_cost: tuple[tuple[int, float], ...]


class Policy:
    """Plans and decides for one cascade.

    views[0] is the prompt that nothing has answered. quality_values: by preference, cost units. curve: by
    ascending value of quality. abandon: by stage, rules by ascending number of tokens. family: what the
    prompts look like that it was fitted to; None: not known, so that no prompt counts as unlike them.
    """

    def __init__(
        self,
        version: str,
        stages: Sequence[StageFacts],
        views: Sequence[CalibratedView],
        quality_values: Mapping[Preference, float],
        space: FeatureSpace,
        predictor: Predictor,
        curve: Sequence[CurvePoint] = (),
        abandon: Mapping[int, tuple[AbandonThreshold, ...]] | None = None,
        family: Family | None = None,
    ) -> None:
        self.use_family(family)
        self._abandon = dict(abandon or {})
        self.version = version
        self.stages = tuple(stages)
        self.quality_values = dict(quality_values)
        self.views = tuple(views)
        self.curve = tuple(curve)
        self._indexes = {(each.view.stage, each.view.origin): i for i, each in enumerate(views)}
        self._solver_views = tuple(each.view for each in views)
        self._ways = [self._ways_from(index) for index in range(len(views))]
        self._certified = sorted({share for each in views for share in each.certified})
        self._space = space
        self._predictor = predictor
        self._solution = lru_cache(maxsize=_SOLUTIONS)(self._solve)
        self._above_floor = lru_cache(maxsize=_SOLUTIONS)(self._keep_above_floor)
        self._kept_features = lru_cache(maxsize=_PROMPTS)(space.prompt)

    @property
    def family(self) -> Family | None:
        """What the prompts look like that the policy was fitted to; None: not known."""
        return self._family

    def use_family(self, family: Family | None) -> None:
        """Have prompts count as unlike by another family, or none by None."""
        self._family = family
        self._kept_novelty = lru_cache(maxsize=_PROMPTS)(family.novelty if family else _not_new)

    def mark_above(self, novelty: float) -> None:
        """Have prompts above a novelty count as unlike all that the policy was fitted to; 1: none."""
        if self._family is not None:
            self.use_family(replace(self._family, threshold=novelty))

    def is_unlike(self, prompt: PromptText) -> bool:
        """Return whether a prompt is unlike all that the policy was fitted to."""
        if self._family is None:
            return False
        is_kept = _size(prompt) <= _LONGEST_KEPT_PROMPT
        return (self._kept_novelty if is_kept else self._family.novelty)(prompt) > self._family.threshold

    def prompt_state(self, prompt: PromptText) -> State:
        """Return what the predictor is asked for a plan."""
        return State(0, self._prompt_features(prompt))

    def answer_state(
        self,
        prompt: PromptText,
        stage: int,
        draft: Draft,
        origin: int | None,
        verification: DraftVerification | None,
    ) -> State:
        """Return what the predictor is asked for a decision: the prompt's state where it does not know such
        an answer (see `decide`)."""
        if not self._knows(stage, draft):
            return self.prompt_state(prompt)
        features = self._prompt_features(prompt)
        return State(
            self._view_of(stage, origin, verification),
            self._space.answer(features, prompt, stage, draft, origin, verification),
        )

    def score(self, states: Sequence[State]) -> list[list[float]]:
        """Return the scores of states of one view, which `plan` and `decide` take."""
        view = states[0].view
        if len(states) == 1:
            return [list(self._predictor.scores(view, states[0].features))]
        rows: list[list[float]] = self._predictor.score_rows(
            view, np.stack([each.features for each in states])
        ).tolist()
        return rows

    def plan(
        self,
        prompt: PromptText,
        objective: PolicyObjective,
        conditions: Mapping[int, Condition],
        scores: Sequence[float] | None = None,
    ) -> Plan:
        """Return the stage to start with. Raises UnmeetableBudget where no stage fits max_cost.

        What is predicted for a prompt that is unlike all that the policy was fitted to means nothing.
        Whatever the preference, it goes to the last stage that the budgets leave, by way of the draft that is
        expected to save most, if any does.

        scores: of `prompt_state`; None: they are made here.
        """
        if self.is_unlike(prompt):
            return self._plan_unlike(objective, conditions)
        if scores is None:
            (scores,) = self.score([self.prompt_state(prompt)])
        p_correct, stderr = self._calibrate(0, scores)
        view = self.views[0]
        point = view.locate(scores, p_correct[0])
        estimates = _estimates(view, point, p_correct, stderr)
        problem = self._problem(objective, conditions)
        # No stage is available: the router knows best what it can still try.
        stages = problem.available or frozenset(range(len(self.stages)))
        limits = self._limits(0, estimates, objective, Spent(), conditions)
        fitting = self._affordable(stages, limits, objective)
        timely = {stage for stage in fitting if (stage,) not in limits}
        if timely:
            lookup = self._solution_within(problem, 0, limits)
            values = {stage: point.of(onward) for stage, onward in lookup.onward[0].items()}
            values = values or {stage: -self.stages[stage].cost for stage in timely}
            first = max(values, key=values.__getitem__)
        else:
            # A latency budget is a wish: where no stage meets it, the fastest one comes closest, alone.
            first = _fastest(fitting, estimates, conditions)
            lookup = self._solution(problem, 0, frozenset([(first,)]))
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
        verification: DraftVerification | None,
        objective: PolicyObjective,
        spent: Spent,
        conditions: Mapping[int, Condition],
        scores: Sequence[float] | None = None,
    ) -> Judgement:
        """Return whether a stage's answer is good enough, or which later stage to ask.

        scores: of `answer_state`; None: they are made here.

        An answer that ended as hardly any did that the stage's predictor was fitted to, such as one that a
        limit of tokens cut, tells it nothing: among few tokens, few can be unsure. P(correct) of this stage
        and of later ones is then what the prompt alone foretells, and no min_quality is certified. A later
        stage is asked under the same rule, although it will be cut at the same place: what it writes up to
        there begins an answer that is right more often, and where it agrees, it reads the draft in one pass.

        The answer to a prompt that is unlike all that the policy was fitted to is not judged: the last stage
        that the budgets leave is asked, whatever the preference, and no min_quality is certified.
        """
        index = self._view_of(stage, origin, verification)
        if self.is_unlike(prompt):
            return self._decide_unlike(index, stage, objective, spent, conditions)
        if scores is None:
            (scores,) = self.score([self.answer_state(prompt, stage, draft, origin, verification)])
        view = self.views[index]
        is_known = self._knows(stage, draft)
        if is_known:
            p_correct, stderr = self._calibrate(index, scores)
        else:
            scores, p_correct, stderr = self._foretell(index, scores)
        problem = self._problem(objective, conditions)
        score = p_correct[stage]
        point = view.locate(scores, score)
        estimates = _estimates(view, point, p_correct, stderr)
        stop_value = problem.quality_value * score
        if is_known:
            is_certified = view.certified[point.bin] >= problem.min_quality
        else:
            is_certified = objective.min_quality <= 0.0
        onward = self._solution(problem).onward[index]
        values = {later: point.of(value) for later, value in onward.items()}
        chosen, reason = _choose(values, stop_value, is_certified)
        limits = self._limits(index, estimates, objective, spent, conditions)
        if limits:
            onward = self._solution_within(problem, index, limits).onward[index]
            values = {later: point.of(value) for later, value in onward.items()}
            wanted, (chosen, within) = chosen, _choose(values, stop_value, is_certified)
            if chosen is not None:
                reason = within
            elif wanted is not None:
                # What the budgets cut off made the difference.
                reason = next(limit for path, limit in limits.items() if path[0] == wanted)
        return Judgement(
            chosen,
            reason,
            score,
            stderr[stage],
            stop_value,
            # Finite below any stop: an infinity would say "unknown" on the wire.
            max(values.values(), default=stop_value - problem.quality_value - 1.0),
            estimates,
        )

    def expect(self, objective: PolicyObjective, conditions: Mapping[int, Condition]) -> Expectation:
        """Return what decisions under these conditions do on average over the calibration prompts.

        Budgets of single requests are left out.
        """
        return self._expect(self._problem(objective, conditions))

    def quality_value_for(
        self,
        *,
        mean_cost: float | None = None,
        mean_latency_ms: float | None = None,
        min_accuracy: float | None = None,
    ) -> float:
        """Return the value of quality whose policy keeps a mean over requests, at the best of the rest.

        Exactly one is given: the highest mean cost or latency, or the lowest share of right answers. The
        value is the multiplier of the Lagrangian of the problem with that constraint; the means are those
        that the views expect, without waits and budgets of single requests. A mixture of two policies would
        spend the budget to the last; this is the one that stays within. Raises UnmeetableBudget where no
        value of the curve keeps it, ValueError where not exactly one is given.
        Source: Everett 1963, Generalized Lagrange multiplier method; Altman 1999, Constrained Markov Decision
        Processes.
        """
        if [mean_cost, mean_latency_ms, min_accuracy].count(None) != 2:
            raise ValueError("give exactly one of mean_cost, mean_latency_ms and min_accuracy")

        def keeps(point: CurvePoint | Expectation) -> bool:
            if mean_cost is not None:
                return not is_above(point.cost, mean_cost)
            if mean_latency_ms is not None:
                return point.latency_ms <= mean_latency_ms
            return min_accuracy is not None and point.accuracy >= min_accuracy

        kept = [index for index, point in enumerate(self.curve) if keeps(point)]
        if not kept:
            raise UnmeetableBudget(self._extremes())
        # More value of quality costs more and is right more often: of a budget, as much as it pays for.
        step = -1 if min_accuracy is not None else 1
        best = kept[0] if step < 0 else kept[-1]
        good = self.curve[best].quality_value
        if not 0 <= best + step < len(self.curve):
            return good
        bad = self.curve[best + step].quality_value
        for _ in range(_BISECTIONS):
            middle = math.sqrt(good * bad)
            solution = solve_policy(self._solver_views, middle)
            if keeps(expect(self._solver_views, solution, self.views[0].prompt_shares)):
                good = middle
            else:
                bad = middle
        return good

    def _prompt_features(self, prompt: PromptText) -> npt.NDArray[np.float32]:
        is_kept = _size(prompt) <= _LONGEST_KEPT_PROMPT
        return self._kept_features(prompt) if is_kept else self._space.prompt(prompt)

    def _plan_unlike(self, objective: PolicyObjective, conditions: Mapping[int, Condition]) -> Plan:
        estimates = self._mean_estimates(0)
        every_stage = range(len(self.stages))
        stages = (
            frozenset(s for s in every_stage if conditions.get(s, Condition()).is_available) or every_stage
        )
        limits = self._limits(0, estimates, objective, Spent(), conditions)
        fitting = self._affordable(stages, limits, objective)
        timely = [stage for stage in fitting if (stage,) not in limits]
        last = max(timely) if timely else _fastest(fitting, estimates, conditions)
        drafters = [stage for stage in stages if stage < last and timely and (stage, last) not in limits]
        # By what it cost for prompts that the policy knows: the best guess for unknown ones.
        first = min((last, *drafters), key=lambda stage: self._mean_cost(stage, last))
        following = None if first == last else last
        return Plan(first, estimates, float(first != last), following, (), None, is_unlike=True)

    def _decide_unlike(
        self,
        index: int,
        stage: int,
        objective: PolicyObjective,
        spent: Spent,
        conditions: Mapping[int, Condition],
    ) -> Judgement:
        estimates = self._mean_estimates(index)
        limits = self._limits(index, estimates, objective, spent, conditions)
        later = [s for s in range(stage + 1, len(self.stages)) if conditions.get(s, Condition()).is_available]
        chosen = max((s for s in later if (s,) not in limits), default=None)
        if chosen is not None or stage == len(self.stages) - 1:
            reason = DecisionReason.OUT_OF_FAMILY
        else:
            reason = limits[max(later),] if later else DecisionReason.LAST_STAGE
        return Judgement(chosen, reason, None, None, 0.0, 0.0, estimates)

    def _mean_estimates(self, index: int) -> tuple[Estimate, ...]:
        """Return what asking the stages of a view takes on average, the judged one included."""
        view = self.views[index].view
        judged = [] if view.stage is None else [Estimate(view.stage, None, None, 0.0, 0.0)]
        moves = (
            Estimate(move.stage, None, None, float(move.cost.mean()), float(move.latency_ms.mean()))
            for move in view.moves
        )
        return (*judged, *moves)

    def _mean_cost(self, first: int, last: int) -> float:
        """Return what a stage's answer costs on average with a later stage's verification of it."""
        if first == last:
            return self.stages[last].cost
        moves = self.views[self._indexes[first, None]].view.moves
        verifying = next(move for move in moves if move.stage == last)
        return self.stages[first].cost + float(verifying.cost.mean())

    def _affordable(
        self, stages: Iterable[int], limits: Mapping[Path, DecisionReason], objective: PolicyObjective
    ) -> set[int]:
        """Return the stages that fit max_cost alone. Raises UnmeetableBudget where none does."""
        fitting = {stage for stage in stages if limits.get((stage,)) is not DecisionReason.MAX_COST}
        if not fitting:
            cheapest = min((self.stages[stage] for stage in stages), key=lambda stage: stage.cost)
            raise UnmeetableBudget(
                f"max_cost {objective.max_cost:g} is below the cheapest stage that is available "
                f"({cheapest.name}: {cheapest.cost:g}): raise it"
            )
        return fitting

    def _limits(
        self,
        index: int,
        estimates: Sequence[Estimate],
        objective: PolicyObjective,
        spent: Spent,
        conditions: Mapping[int, Condition],
    ) -> dict[Path, DecisionReason]:
        """Return the ways on from a view that a budget cuts off at their last call, and which one does.

        estimates: of the point in the view. Calls count at their dearest, a verification as a whole answer:
        max_cost is never exceeded, and what is planned is never cut off. Of latencies, what is expected
        counts. Measured on 5,000 held-out prompts at lambda 30: with max_cost 9, 97.5% are right, and 85.6%
        where only the next call is looked at; with max_cost 13, 98.8%, and 97.9% where earlier calls count as
        what they are expected to cost. At lambda 7.8 that would be worth 1% more.
        """
        if objective.max_cost == math.inf and objective.max_latency_ms == math.inf:
            return {}
        next_one = {each.stage: each for each in estimates}
        limits: dict[Path, DecisionReason] = {}
        for way in self._ways[index]:
            if len(way.path) > 1 and way.path[:-1] in limits:
                # A path that is cut off stays cut off further on.
                limits[way.path] = limits[way.path[:-1]]
                continue
            queues_ms = sum(conditions[stage].expected_queue_ms for stage in way.path if stage in conditions)
            latency_ms = next_one[way.path[0]].latency_ms + way.latency_ms + queues_ms
            if is_above(spent.cost + way.cost, objective.max_cost):
                limits[way.path] = DecisionReason.MAX_COST
            elif spent.latency_ms + latency_ms > objective.max_latency_ms:
                limits[way.path] = DecisionReason.MAX_LATENCY
        return limits

    def _problem(self, objective: PolicyObjective, conditions: Mapping[int, Condition]) -> _Problem:
        quality_value = objective.quality_value
        if quality_value is None:
            quality_value = self.quality_values[objective.preference]
        unavailable = {stage for stage, condition in conditions.items() if not condition.is_available}
        share = objective.min_accuracy_share
        waiting: Iterable[tuple[int, float]] = ()
        if share is None or share < 1.0:
            waiting = ((s, self._waiting_cost(s, each.expected_queue_ms)) for s, each in conditions.items())
        # All values of min_quality between two certified shares are one problem.
        index = bisect.bisect_left(self._certified, objective.min_quality)
        problem = _Problem(
            quality_value,
            frozenset(range(len(self.stages))) - unavailable,
            self._certified[index] if index < len(self._certified) else math.inf,
            tuple(sorted((stage, cost) for stage, cost in waiting if cost)),
        )
        return problem if share is None or not problem.waiting_cost else self._above_floor(problem, share)

    def _keep_above_floor(self, problem: _Problem, share: float) -> _Problem:
        """Return the problem with the largest part of its waits at which expected accuracy keeps a floor.

        The floor is a share of the largest stage's accuracy, with a margin, or what is expected without waits
        where that is less. Unavailable stages and min_quality count for both. Budgets of single requests do
        not: they take their own part.
        """

        def scaled(part: float) -> _Problem:
            waiting = tuple((stage, cost * part) for stage, cost in problem.waiting_cost) if part else ()
            return replace(problem, waiting_cost=waiting)

        def accuracy(part: float) -> float:
            return self._expect(scaled(part)).accuracy

        floor = min((share + _FLOOR_MARGIN) * self.stages[-1].accuracy, accuracy(0.0))
        if accuracy(1.0) >= floor:
            return problem
        kept, broken = 0.0, 1.0
        for _ in range(_WAIT_BISECTIONS):
            middle = (kept + broken) / 2.0
            if accuracy(middle) >= floor:
                kept = middle
            else:
                broken = middle
        return scaled(kept)

    def _expect(self, problem: _Problem) -> Expectation:
        """Return what the policy of a problem does on average over the calibration prompts."""
        return expect(self._solver_views, self._solved(problem), self.views[0].prompt_shares)

    def _waiting_cost(self, stage: int, queue_ms: float) -> float:
        """Return what a wait adds to the cost of a stage: its cost once more for each answer waited for.

        So a stage whose queue is n answers long costs 1 + n times as much: the price of a millisecond is the
        stage's own, cost / latency_ms. It lets those into a long queue to whom the answer is worth it, who
        have a high value of quality. Source of tolls for that: Naor 1969, The regulation of queue size by
        levying tolls; the amount is chosen.
        """
        facts = self.stages[stage]
        # A stage that takes no time has no queue to speak of.
        answers = min(queue_ms / facts.latency_ms, _LONGEST_WAIT) if facts.latency_ms else 0.0
        return facts.cost * 2.0 ** round(math.log2(answers)) if answers >= _SHORTEST_WAIT else 0.0

    def _solution_within(
        self, problem: _Problem, index: int, limits: Mapping[Path, DecisionReason]
    ) -> _Lookup:
        """Return the solution that keeps out of what the budgets cut off, from a view on."""
        if not limits:
            return self._solution(problem)
        fitting = frozenset(way.path for way in self._ways[index] if way.path not in limits)
        return self._solution(problem, index, fitting)

    def _solve(self, problem: _Problem, root: int = 0, fitting: frozenset[Path] | None = None) -> _Lookup:
        """Return the solution of every view, or of the root alone where only some ways on fit."""
        views = self._solver_views
        if fitting is not None:
            views = unfold(views, root, fitting.__contains__)
        solution = self._solved(problem, views)
        solved = solution.continuations if fitting is None else solution.continuations[:1]
        onward = {
            root + index: {stage: values.tolist() for stage, values in each.items()}
            for index, each in enumerate(solved)
        }
        starts = views[0].moves if root == 0 else ()
        return _Lookup(
            onward,
            {move.stage: _next_stages(move, solution) for move in starts},
            {
                move.stage: max(following, key=lambda stage: float(following[stage][0]))
                for move in starts
                if (following := solution.continuations[move.view]) and solution.escalates[move.view][0]
            },
        )

    def _solved(self, problem: _Problem, views: tuple[View, ...] | None = None) -> Solution:
        """Return the solution of a problem. views: a part of the policy's, None for all of them."""
        return solve_policy(
            self._solver_views if views is None else views,
            problem.quality_value,
            available=problem.available,
            min_quality=problem.min_quality,
            waiting_cost=dict(problem.waiting_cost),
        )

    def _ways_from(self, root: int) -> list[_Way]:
        return [
            _Way(
                path,
                sum(self.stages[stage].cost for stage in path),
                sum(float(move.latency_ms.mean()) for move in moves[1:]),
            )
            for path, moves in paths_from(self._solver_views, root)
        ]

    def _extremes(self) -> str:
        """Return what the curve reaches, for a message."""
        if not self.curve:
            return "this policy has no curve: make it anew with `asd-policy fit`"
        costs, latencies_ms, accuracies = zip(
            *((each.cost, each.latency_ms, each.accuracy) for each in self.curve), strict=True
        )
        return (
            f"the least mean cost is {min(costs):g} and the least mean latency {min(latencies_ms):g} ms; the "
            f"highest share of right answers is {max(accuracies):g}"
        )

    def _view_of(self, stage: int, origin: int | None, verification: DraftVerification | None) -> int:
        """Return the index of an answer's view."""
        return self._indexes[stage, origin if verification else None]

    def _knows(self, stage: int, draft: Draft) -> bool:
        """Return whether a stage's predictor was fitted to answers with this finish reason."""
        return draft.finish_reason in self.stages[stage].finish_reasons

    def _calibrate(self, index: int, scores: Sequence[float]) -> tuple[dict[int, float], dict[int, float]]:
        """Return P(correct) by stage, and its standard error. scores: of the view's heads."""
        heads = self.views[index].heads
        p_correct = {
            stage: head.p_correct(score) for (stage, head), score in zip(heads.items(), scores, strict=True)
        }
        return p_correct, {stage: heads[stage].stderr(p) for stage, p in p_correct.items()}

    def _foretell(
        self, index: int, scores: Sequence[float]
    ) -> tuple[Sequence[float], dict[int, float], dict[int, float]]:
        """Return scores, P(correct) and its standard error in a view, by the prompt alone.

        scores: of the prompt's heads. Those returned are what the view's own heads would give for the same
        probabilities, since its cells are cut by its own scores.
        """
        p_correct, stderr = self._calibrate(0, scores)
        heads, known = self.views[index].heads, self.views[0].heads
        log_odds = {
            stage: head.log_odds(score) for (stage, head), score in zip(known.items(), scores, strict=True)
        }
        return (
            [head.score_for(log_odds[stage]) for stage, head in heads.items()],
            {stage: p_correct[stage] for stage in heads},
            {stage: stderr[stage] for stage in heads},
        )


def _size(prompt: PromptText) -> int:
    return len(prompt.question) + sum(map(len, prompt.history))


def _not_new(_: PromptText) -> float:
    return 0.0


def _fastest(
    stages: Iterable[int], estimates: Sequence[Estimate], conditions: Mapping[int, Condition]
) -> int:
    return min(
        stages,
        key=lambda stage: estimates[stage].latency_ms + conditions.get(stage, Condition()).expected_queue_ms,
    )


def _choose(
    values: Mapping[int, float], stop_value: float, is_certified: bool
) -> tuple[int | None, DecisionReason]:
    """Return the stage to ask of those that may be, None to stop. is_certified: the answer may stand."""
    if not values:
        return None, DecisionReason.LAST_STAGE
    best = max(values, key=values.__getitem__)
    if values[best] > stop_value:
        return best, DecisionReason.VALUE
    return (None, DecisionReason.VALUE) if is_certified else (best, DecisionReason.MIN_QUALITY)


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


def _estimates(
    view: CalibratedView, point: Point, p_correct: Mapping[int, float], stderr: Mapping[int, float]
) -> tuple[Estimate, ...]:
    estimates = []
    for stage, p in p_correct.items():
        costs, latencies_ms = view.expected.get(stage, (None, None))
        cost = point.of(costs) if costs else 0.0
        latency_ms = point.of(latencies_ms) if latencies_ms else 0.0
        estimates.append(Estimate(stage, p, stderr[stage], cost, latency_ms))
    return tuple(estimates)
