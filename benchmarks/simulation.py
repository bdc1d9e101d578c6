"""A drafter, a target and their routers in simulated time, for the router's rule about drafts. Pure.

A stage computes in steps, as engines that batch continuously do. Requests come in a closed loop: a fixed
number is under way, and one that has ended is replaced at once.
"""

from __future__ import annotations

import heapq
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from asd.values import FinishReason, StageAction
from services.router.domain import (
    PeerLoad,
    ScoredTokens,
    Stage,
    StageAnswer,
    StageResult,
    Timing,
    TokenUsage,
    Verification,
)
from services.router.planning.draft_selection import DraftChoice, DraftSelection, SkipReason
from services.router.planning.load import Load

if TYPE_CHECKING:
    from collections.abc import Callable

# Tokens of one step, as vLLM's chunked prefill has it.
_BUDGET = 2048
# Of a prompt, and those that a target computes once more where it goes on from a verified draft: the last
# block of its prefix cache.
PROMPT = 128
_AGAIN = 8
# Milliseconds of a pass, of a computed token, and of a sequence that writes. Measured on an H200 of their own
# (docs/engines.md).
SPEEDS = {"13b": (7.9, 0.045, 0.06), "34b": (17.6, 0.11, 0.08), "70b": (34.0, 0.22, 0.1)}
_TARGET = Stage("large", 2, 8.8, 1000.0)


class Clock:
    """Simulated milliseconds."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def seconds(self) -> float:
        """Return the time in seconds."""
        return self.now_ms / 1e3

    def after(self, ms: float, event: Callable[[], None]) -> None:
        """Have an event happen so much later."""
        self._count += 1
        heapq.heappush(self._events, (self.now_ms + ms, self._count, event))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let events happen until it is over."""
        while self._events and not is_over():
            self.now_ms, _, event = heapq.heappop(self._events)
            event()


@dataclass(eq=False, slots=True)
class _Work:
    prefill: int
    decode: int
    ended: Callable[[], None]


class BatchingStage:
    """Steps take the time of reading the weights, or of computing their tokens if that is longer.

    pass_ms: of the weights. token_ms: of a computed token. sequence_ms: of a sequence that writes a token, in
    a step that is bound by memory.
    """

    def __init__(self, clock: Clock, *, pass_ms: float, token_ms: float, sequence_ms: float) -> None:
        self._clock = clock
        self._pass_ms = pass_ms
        self._token_ms = token_ms
        self._sequence_ms = sequence_ms
        self._works: dict[int, _Work] = {}
        self._count = 0
        self._is_stepping = False

    @property
    def under_way(self) -> int:
        """How many calls there are."""
        return len(self._works)

    def submit(self, prefill: int, decode: int, ended: Callable[[], None]) -> Callable[[], None]:
        """Compute some tokens and write others after them: the first comes with the last computed one.

        Return what cancels that.
        """
        self._count += 1
        number = self._count
        self._works[number] = _Work(prefill, decode, ended)
        self._step()
        return lambda: self._works.pop(number, None) and None

    def _step(self) -> None:
        if self._is_stepping or not self._works:
            return
        writing = [number for number, work in self._works.items() if not work.prefill]
        left, reading = _BUDGET - len(writing), []
        for number, work in self._works.items():
            if work.prefill and left > 0:
                tokens = min(work.prefill, left)
                left -= tokens
                reading.append((number, tokens))
        bound_ms = (_BUDGET - left) * self._token_ms
        self._is_stepping = True
        self._clock.after(
            max(self._pass_ms + len(writing) * self._sequence_ms, bound_ms),
            lambda: self._end_step(writing, reading),
        )

    def _end_step(self, writing: list[int], reading: list[tuple[int, int]]) -> None:
        for number, tokens in reading:
            work = self._works.get(number)
            if work is not None:
                work.prefill -= tokens
                if work.prefill == 0:
                    writing.append(number)
        for number in writing:
            work = self._works.get(number)
            if work is None:
                continue
            work.decode -= 1
            if work.decode <= 0:
                del self._works[number]
                work.ended()
        self._is_stepping = False
        self._step()


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked. drafter: of SPEEDS. shares: of a draft that is kept, one drawn for each request.

    lengths: tokens of an answer with the one that ends it, drawn between the two. has_draft: the drafter has
    written before anything is chosen, as where a policy escalates. deadline_s: after which a request is given
    up.
    """

    drafter: str = "13b"
    shares: tuple[float, ...] = (1.0,)
    lengths: tuple[int, int] = (64, 64)
    has_draft: bool = False
    deadline_s: float | None = None


@dataclass(eq=False, slots=True)
class _Request:
    tokens: int
    kept: int
    router: int
    calls: ExitStack = field(default_factory=ExitStack)
    choice: DraftChoice | None = None
    cancel: Callable[[], None] | None = None
    is_over: bool = False
    asked_ms: float = 0.0


class ClosedLoop:
    """Routers before the same two stages. rule: makes what each of them decides by, from a clock in seconds.

    never: no draft is made. Each router has some of the requests, drawn by the seed, and hears of the others'
    with the answers.
    """

    def __init__(
        self,
        workload: Workload,
        rule: Callable[[Callable[[], float]], DraftSelection] = DraftSelection,
        *,
        never: bool = False,
        routers: int = 1,
        seed: int = 0,
    ) -> None:
        self.clock = Clock()
        self.workload = workload
        self._never = never
        self._chance = Random(seed)
        self._small, self._large = (
            BatchingStage(self.clock, pass_ms=speeds[0], token_ms=speeds[1], sequence_ms=speeds[2])
            for speeds in (SPEEDS[workload.drafter], SPEEDS["70b"])
        )
        self._routers = [(rule(self.clock.seconds), Load(1, self.clock.seconds)) for _ in range(routers)]
        # When answers came, what was chosen for them, and their tokens.
        self.ended: list[tuple[float, bool, int]] = []
        self._under_way = 0
        self._at_a_time = 0

    def answers(self, at_a_time: int, count: int) -> float:
        """Have so many more answers come, so many requests at a time; return their tokens per second."""
        self._at_a_time = at_a_time
        while self._under_way < at_a_time:
            self._request()
        before, started = len(self.ended), self.clock.seconds()
        self.clock.run(lambda: len(self.ended) >= before + count)
        return sum(tokens for *_, tokens in self.ended[before:]) / (self.clock.seconds() - started)

    def answers_within(self, at_a_time: int, seconds: float) -> int:
        """Return how many answers come within some time, with so many requests at a time."""
        self._at_a_time = at_a_time
        while self._under_way < at_a_time:
            self._request()
        before, until = len(self.ended), self.clock.seconds() + seconds
        self.clock.run(lambda: self.clock.seconds() >= until)
        return len(self.ended) - before

    def drain(self) -> None:
        """Let what is under way end, with nothing after it."""
        self._at_a_time = 0
        self.clock.run(lambda: not self._under_way)

    def _request(self) -> None:
        tokens = self._chance.randint(*self.workload.lengths)
        kept = round(self._chance.choice(self.workload.shares) * tokens)
        request = _Request(tokens, kept, self._chance.randrange(len(self._routers)))
        self._under_way += 1
        if not self.workload.has_draft:
            self._choose(request)
        if request.choice is not None and request.choice.reason is not None:
            self._ask_target(request)
        else:
            request.cancel = self._small.submit(PROMPT, tokens, lambda: self._ask_target(request))
        if self.workload.deadline_s is not None:
            self.clock.after(self.workload.deadline_s * 1e3, lambda: self._expire(request))

    def _choose(self, request: _Request) -> None:
        rule, load = self._routers[request.router]
        if self._never:
            request.choice = DraftChoice(SkipReason.WORTHLESS)
        else:
            request.choice = rule.choose(
                "small", "large", load.calls(0) + 1, has_draft=self.workload.has_draft
            )

    def _ask_target(self, request: _Request) -> None:
        if request.choice is None:
            self._choose(request)
        request.asked_ms = self.clock.now_ms
        request.calls.enter_context(self._routers[request.router][1].calling(0))
        tokens, left = request.tokens, request.tokens - 1 - request.kept
        if request.choice is not None and request.choice.reason is not None:
            request.cancel = self._large.submit(PROMPT, tokens, lambda: self._end(request, tokens))
        elif left <= 0:
            request.cancel = self._large.submit(PROMPT + tokens, 1, lambda: self._end(request, 1))
        else:
            request.cancel = self._large.submit(PROMPT + tokens, 1, lambda: self._go_on(request, left))

    def _go_on(self, request: _Request, left: int) -> None:
        request.cancel = self._large.submit(_AGAIN, left, lambda: self._end(request, 1 + left))

    def _end(self, request: _Request, passes: int) -> None:
        request.is_over = True
        rule, load = self._routers[request.router]
        others = self._large.under_way + 1 - load.own_calls(0)
        load.heard(0, PeerLoad("gpu", others, ("gpu",), self.clock.seconds()))
        request.calls.close()
        is_verified = request.choice is None or request.choice.reason is None
        took_ms = self.clock.now_ms - request.asked_ms
        rule.answered(answer(request.tokens, passes, took_ms, is_verified=is_verified), request.choice)
        self.ended.append((self.clock.now_ms, is_verified, request.tokens))
        self._replace()

    def _expire(self, request: _Request) -> None:
        if request.is_over:
            return
        request.is_over = True
        if request.cancel is not None:
            request.cancel()
        request.calls.close()
        if request.choice is not None:
            self._routers[request.router][0].ended(request.choice)
        self._replace()

    def _replace(self) -> None:
        self._under_way -= 1
        if self._under_way < self._at_a_time:
            self._request()


def answer(tokens: int, passes: int, took_ms: float = 0.0, *, is_verified: bool) -> StageAnswer:
    """Return a target's answer. tokens: with the one that ends it. passes: that it took."""
    proposed, accepted = (tokens, tokens - passes) if is_verified else (0, 0)
    usage = TokenUsage(PROMPT, 0, tokens - 1, proposed, accepted, passes)
    return StageAnswer(
        _TARGET,
        StageAction.VERIFY if is_verified else StageAction.GENERATE,
        StageResult("hi", (1,) * (tokens - 1), "", FinishReason.EOS, usage, Timing()),
        ScoredTokens((1,) * (tokens - 1), "hi"),
        Verification(tokens, 0) if is_verified else None,
        took_ms,
        _TARGET.cost,
        "small" if is_verified else "",
    )
