"""Whether drafts are worth verifying, by the passes and the time that they save. Pure.

There are two rules. By passes: if verifying takes about as many passes as generating, drafts save nothing
at any load. By time: a bandit (see bandit.py) chooses between verifying drafts and generating. A verified
draft also forecasts how long generating would take.

The forecast. A step of a batching engine takes the time of reading the weights, one pass, and more for each
token that it computes. This is the roofline (Williams, Waterman and Patterson 2009), as in the goodput that
SmartSpec maximises (Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using
Goodput"). A call of p passes, beside N calls of w tokens each at its stage, takes the time of p + TOKEN x N x
w passes. So a verification shows how long a pass is, and what writing the whole answer would take with all
requests at the target. Unlike SmartSpec, the router sees calls and no steps. Its forecast is only a bound
until the other arm was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from asd.values import StageAction
from services.common.cost import verify_cost
from services.router.planning.bandit import Paces, Start, Took

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.router.domain import StageAnswer

# Drafts are not verified if a verification takes at least this share of generating. Chosen: below 1, since
# drafting takes time too.
WORTHLESS = 0.9
# The newest verification's weight in the mean share, and the number of verifications before the mean counts.
# Chosen: the last forty carry nine tenths, so that a few bad drafts in a row do not turn it. While drafts are
# worthless few are verified, and the last seven carry as much.
_NEWEST = 0.05
_NEWEST_WORTHLESS = 0.3
_LEAST_VERIFIED = 4
# While drafts are worthless, one in this many is verified as a probe. Each probe that fails doubles the
# interval, up to the maximum. Chosen: at ten per cent more time per probe, they cost one per cent at first.
PROBE_EVERY = 16
PROBE_EVERY_AT_MOST = 128
# Time of a computed token, in passes. Measured with vLLM on an H200: a token takes 0.22 ms and a pass 34 ms
# for a 70B, 0.045 ms and 7.9 ms for a 13B. The ratio, bandwidth over arithmetic, depends on the number format
# alone.
_TOKEN = 0.0065


class SkipReason(Enum):
    """Why a draft is left out."""

    # Verifying it would take as many passes as generating.
    WORTHLESS = "worthless"
    # Verifying drafts takes longer than generating, under a load like the present one.
    LOAD = "load"
    # To see how long writing takes under the present load.
    PROBE = "probe"


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """Which kinds of speculative work are on.

    pipelined: the stages of a chain work at the same time. prefill_ahead: a likely target's prefix cache is
    filled while the first stage drafts. early_abandon: a hopeless draft is not finished. adaptive: drafts
    that saved nothing recently, or that save nothing under the present load, are not verified.
    """

    pipelined: bool = True
    prefill_ahead: bool = True
    early_abandon: bool = True
    adaptive: bool = True


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """Whether a target verifies a draft. To be given back, once, when its request ends.

    reason: why the draft is left out; None: it is verified. paces, start: the bandit and its choice. counts:
    whether the request's time is a measurement.
    """

    reason: SkipReason | None = None
    paces: Paces | None = None
    start: Start | None = None
    counts: bool = True


class DraftSelection:
    """Chooses which drafts are verified. enabled: if False, every draft is. clock: monotonic seconds.

    Each pair of drafter and target has a bandit for chains, which include the drafting, and one for
    escalations, which begin with a finished draft. A target that verifies while it writes, and proposes no
    more than pays, is given every finished draft: there the choice is only whether one is made.
    """

    def __init__(self, clock: Callable[[], float], *, enabled: bool = True) -> None:
        self._clock = clock
        self._enabled = enabled
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._paces: dict[tuple[str, str, bool], Paces] = {}
        # Targets that have verified a draft without a pass of its own. They nevertheless make such passes for
        # some requests: of pipelines, with a seed, tolerant, of adapters.
        self._while_writing: set[str] = set()

    def choose(
        self, drafter: str, target: str, calls: int, replicas: int = 1, *, has_draft: bool = False
    ) -> DraftChoice:
        """Choose whether a target verifies a drafter's draft or writes its next answer without.

        calls: in flight at the target over its replicas, including the next one and other routers' calls.
        replicas: how many it has. has_draft: whether the draft is written already.
        """
        if not self._enabled or (has_draft and target in self._while_writing):
            return DraftChoice()
        pair = self._pairs.get((drafter, target))
        if pair is not None and pair.is_worthless:
            return DraftChoice(SkipReason.WORTHLESS if pair.leaves_out() else None)
        paces = self._paces.setdefault((drafter, target, has_draft), Paces())
        start = paces.choose(calls, replicas, self._clock())
        reason = None if start.is_first else SkipReason.PROBE if paces.is_trial else SkipReason.LOAD
        return DraftChoice(reason, paces, start)

    def answered(self, answer: StageAnswer, choice: DraftChoice | None = None) -> None:
        """Learn from an answer, whose request has ended. choice: its draft choice, if there was one."""
        usage = answer.result.usage
        if answer.verification is not None:
            if answer.verification.while_writing:
                self._while_writing.add(answer.stage.name)
            share = verify_cost(1.0, usage.proposed_tokens, usage.forward_passes, usage.completion_tokens)
            self._learn(answer.draft_stage, answer.stage.name, share)
        if choice is None or choice.start is None:
            return
        if not answer.is_whole or (choice.reason is None) != (answer.action is StageAction.VERIFY):
            self.ended(replace(choice, counts=False))
            return
        # The stages of a pipeline start together, and the router learns of an earlier answer only at the end.
        seconds = answer.latency_ms / 1000.0 if answer.is_pipelined else self._clock() - choice.start.started
        otherwise_s = _written_s(answer, choice.start.load, seconds) if choice.reason is None else 0.0
        # Count the end token as well. An answer that was cut has none.
        self._end(choice, Took(seconds, usage.completion_tokens + 1, otherwise_s))

    def ended(self, choice: DraftChoice) -> None:
        """Count a request that has ended without an answer of the target: it took time and gave no tokens."""
        if choice.start is not None:
            self._end(choice, Took(self._clock() - choice.start.started, 0))

    def _learn(self, drafter: str, target: str, share: float) -> None:
        """Learn from a verification. share: its passes over those of generating."""
        pair = self._pairs.setdefault((drafter, target), _Pair())
        was_worthless = pair.is_worthless
        pair.learn(share)
        if was_worthless and not pair.is_worthless:
            # The times of worthless drafts say nothing about the present ones.
            for has_draft in (False, True):
                self._paces.pop((drafter, target, has_draft), None)

    def _end(self, choice: DraftChoice, took: Took) -> None:
        if choice.paces is not None and choice.start is not None:
            choice.paces.ended(choice.start, self._clock(), took, counts=choice.counts)


def _written_s(answer: StageAnswer, load: float, seconds: float) -> float:
    """Return how long a verified answer would have taken without its draft, in seconds; 0: unknown.

    load: requests in flight. seconds: of this one, the drafting included.
    """
    usage, target_s = answer.result.usage, answer.latency_ms / 1000.0
    if seconds <= 0.0:
        return 0.0
    # By Little's law, the share of requests at the target is the target's share of their time.
    at_target = max(load * min(target_s / seconds, 1.0), 1.0)
    read = usage.prompt_tokens - usage.cached_prompt_tokens
    tokens = usage.completion_tokens + 1
    verified = usage.proposed_tokens + tokens - usage.accepted_tokens
    passes = usage.forward_passes + _TOKEN * at_target * (read + verified)
    return target_s / passes * (tokens + _TOKEN * load * (read + tokens))


class _Pair:
    """The worth of one stage's drafts to another stage."""

    def __init__(self) -> None:
        # Mean passes of a verification, as a share of generating.
        self._share = 0.0
        self._verified = 0
        self.is_worthless = False
        self._left_out = 0
        self._every = PROBE_EVERY

    def learn(self, share: float) -> None:
        """Learn from a verification."""
        # A larger share tells nothing more, and would take longer to forget.
        share = min(share, 1.0)
        if share < WORTHLESS:
            self._every = PROBE_EVERY
        self._verified += 1
        weight = max(_NEWEST_WORTHLESS if self.is_worthless else _NEWEST, 1.0 / self._verified)
        self._share += weight * (share - self._share)
        self.is_worthless = self._share >= WORTHLESS and self._verified >= _LEAST_VERIFIED

    def leaves_out(self) -> bool:
        """Return whether to leave out the next worthless draft; if not, it is a probe."""
        self._left_out += 1
        if self._left_out < self._every:
            return True
        self._left_out = 0
        self._every = min(2 * self._every, PROBE_EVERY_AT_MOST)
        return False
