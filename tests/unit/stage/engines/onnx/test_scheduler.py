"""The scheduler over generators that count up: which requests share one, and what becomes of each."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asd.errors import AsdError, PreconditionFailed, QueueFull
from asd.values import Sampling
from services.stage.domain import Result
from services.stage.engines.onnx.engine import OnnxOptions
from services.stage.engines.onnx.generators import CachedSequence
from services.stage.engines.onnx.scheduler import Scheduler
from services.stage.engines.onnx.slots import SlotRequest
from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.call import Call
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.verification import evidence_signals
from tests.limits import CALL_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

VOCABULARY = 50
CONTEXT = 4096


class Counting:
    """A generator whose next token is one more than the last; it picks the first from the prompt's pass."""

    def __init__(self, prompts: Sequence[list[int]] = ()) -> None:
        self.rows = [list(prompt) for prompt in prompts] or [[]]
        self._has_run = bool(prompts)
        self._output = self._logits(self.rows)

    def append_tokens(self, tokens: np.ndarray) -> None:
        self.rows[0] += tokens[0].tolist()
        self._output, self._has_run = self._logits([tokens[0].tolist()]), True

    def generate_next_token(self) -> None:
        if not self._has_run:
            self._output = self._logits([row[-1:] for row in self.rows])
        self._has_run = False
        for row in self.rows:
            row.append((row[-1] + 1) % VOCABULARY)

    def get_next_tokens(self) -> list[int]:
        return [row[-1] for row in self.rows]

    def get_output(self, _: str) -> np.ndarray:
        return self._output

    def rewind_to(self, length: int) -> None:
        del self.rows[0][length:]

    def _logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        logits = np.zeros((len(rows), max(map(len, rows)), VOCABULARY), np.float32)
        for index, row in enumerate(rows):
            for position, token in enumerate(row):
                logits[index, position, (token + 1) % VOCABULARY] = 9.0
        return logits


class Library:
    """Makes generators, once the gate is open. made: how many rows each has."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.gate = threading.Event()
        self.is_broken = False

    def sequence(self, capacity: int) -> CachedSequence:
        self._make(1)
        return CachedSequence(Counting(), capacity)

    def batch(self, prompts: Sequence[list[int]], most_tokens: int) -> Counting:
        self._make(len(prompts))
        return Counting(prompts)

    def _make(self, rows: int) -> None:
        self.made.append(rows)
        assert self.gate.wait(CALL_S)
        if self.is_broken:
            raise RuntimeError("out of memory")


class Letters:
    lag = 0

    def push(self, ids: Sequence[int]) -> str:
        return "".join(chr(40 + token) for token in ids)

    def finish(self) -> str:
        return ""

    def mark(self, token_id: int) -> str:
        return ""


class Broken(Letters):
    def push(self, ids: Sequence[int]) -> str:
        raise ValueError("no text")


class Asked:
    """A request, and what is delivered of it."""

    def __init__(self, prompt: list[int], most_tokens: int = 3, **more: Any) -> None:
        call = Call(prompt, most_tokens, Sampling(), AnswerBuilder(Letters()), (0,), evidence_signals)
        self._events: queue.Queue[Any] = queue.Queue()
        self.request = SlotRequest(call, self._deliver, **more)

    def outcome(self) -> Result | AsdError:
        """Return its result, or its error."""
        while not isinstance(event := self._events.get(timeout=CALL_S), Result | AsdError):
            pass
        return event

    def ids(self) -> tuple[int, ...]:
        result = self.outcome()
        assert isinstance(result, Result)
        return result.ids

    def _deliver(self, events: Sequence[Any]) -> None:
        for event in events:
            self._events.put(event)


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
async def start(library: Library) -> AsyncIterator[Callable[..., Scheduler]]:
    started: list[Scheduler] = []

    def start(pass_tokens: int = 10_000, **options: int) -> Scheduler:
        scheduler = Scheduler("m", OnnxOptions(**options), CONTEXT, pass_tokens)
        scheduler.start(library)  # type: ignore[arg-type]
        started.append(scheduler)
        return scheduler

    yield start
    library.gate.set()
    for each in started:
        await each.stop()


def submit(scheduler: Scheduler, *asked: Asked) -> None:
    """Submit requests that wait together: the first is taken, and holds the thread."""
    for each in asked:
        scheduler.submit(each.request)
        while each is asked[0] and scheduler.usage().queued:
            pass


@pytest.mark.parametrize(
    ("options", "pass_tokens", "made"),
    [
        ({}, 10_000, [1, 4]),
        ({"max_batch": 3}, 10_000, [1, 3, 1]),
        # A pass over the prompts of three would be too wide.
        ({}, 14, [1, 2, 2]),
    ],
)
def test_requests_that_wait_together_share_a_slot(
    library: Library, start: Any, options: dict[str, int], pass_tokens: int, made: list[int]
) -> None:
    asked = [Asked([5, 6, 7, 8, 10 + index]) for index in range(5)]
    submit(start(pass_tokens, max_lanes=1, **options), *asked)
    library.gate.set()
    assert [each.ids() for each in asked] == [(11 + i, 12 + i, 13 + i) for i in range(5)]
    assert library.made == made


@pytest.mark.parametrize(
    ("long_prompt", "long_answer"),
    # Together they would take more than the context, or a much larger cache than the short one alone.
    [(4000, 4000), (1500, 3)],
)
def test_none_takes_far_more_than_it_needs(
    library: Library, start: Any, long_prompt: int, long_answer: int
) -> None:
    short = Asked([7], min(long_answer, CONTEXT - 2))
    asked = [Asked([9]), Asked([3] * long_prompt, 2), short]
    submit(start(max_lanes=1), *asked)
    library.gate.set()
    assert asked[1].ids() == (4, 5)
    assert short.ids()[:3] == (8, 9, 10)
    assert library.made == [1, 1, 1]


def test_what_needs_a_cache_of_its_own_goes_alone(library: Library, start: Any) -> None:
    draft = ReceivedDraft(3)
    draft.add([8, 9, 11])
    draft.finish(None)
    asked = [Asked([9]), Asked([5]), Asked([7], draft=draft), Asked([6])]
    submit(start(max_lanes=1), *asked)
    library.gate.set()
    # It is passed over for one that fits.
    assert [each.ids() for each in asked] == [(10, 11, 12), (6, 7, 8), (8, 9, 10), (7, 8, 9)]
    assert library.made == [1, 2, 1]
    assert (asked[2].request.call.proposed, asked[2].request.call.accepted) == (3, 2)


def test_a_full_queue_refuses_and_takes_requests_again_later(library: Library, start: Any) -> None:
    scheduler = start(max_lanes=1, max_queue=2)
    asked = [Asked([9]), Asked([5]), Asked([6])]
    submit(scheduler, *asked)
    with pytest.raises(QueueFull):
        scheduler.submit(Asked([8]).request)
    assert scheduler.usage().queued == 2
    library.gate.set()
    assert [each.ids()[0] for each in asked] == [10, 6, 7]
    submit(scheduler, later := Asked([8]))
    assert later.ids() == (9, 10, 11)
    assert scheduler.completed == 4


def test_a_request_that_its_caller_left_is_not_computed(library: Library, start: Any) -> None:
    scheduler = start(max_lanes=1)
    asked = [Asked([9]), Asked([5]), Asked([6])]
    submit(scheduler, *asked)
    asked[1].request.is_cancelled = True
    library.gate.set()
    assert asked[2].ids() == (7, 8, 9)
    assert library.made == [1, 1]
    assert asked[1].request.call.passes == 0
    assert (scheduler.completed, scheduler.cancelled) == (2, 1)


async def test_a_conversation_is_computed_once(library: Library, start: Any) -> None:
    library.gate.set()
    scheduler = start(cached_sequences=2)
    first = list(range(1, 21))
    submit(scheduler, asked := Asked(first))
    assert asked.ids() == (21, 22, 23)
    # The last token was never run, and the last one of a prompt is computed anew.
    for prompt, cached in (([*first, 21, 22, 23, 30], 22), (first, 19), ([7, 8], 0)):
        submit(scheduler, asked := Asked(prompt))
        result = asked.outcome()
        assert isinstance(result, Result)
        assert result.cached_prompt_tokens == cached
        assert result.ids[0] == prompt[-1] + 1
    assert library.made == [1, 1]
    assert scheduler.usage().kept_sequences == 2
    await scheduler.stop()
    assert scheduler.usage().kept_sequences == 0


def test_a_generator_that_fails_ends_its_requests_alone(library: Library, start: Any) -> None:
    library.is_broken = True
    scheduler = start(max_lanes=1)
    asked = [Asked([9]), Asked([5]), Asked([6])]
    submit(scheduler, *asked)
    library.gate.set()
    assert {type(each.outcome()) for each in asked} == {AsdError}
    library.is_broken = False
    submit(scheduler, later := Asked([8]))
    assert later.ids() == (9, 10, 11)


async def test_a_model_that_is_unloaded_ends_its_requests(library: Library, start: Any) -> None:
    scheduler = start(max_lanes=1)
    submit(scheduler, *(asked := [Asked([9], 4000), Asked([5])]))
    stopping = asyncio.create_task(scheduler.stop())
    await asyncio.sleep(0)
    library.gate.set()
    await stopping
    assert {type(each.outcome()) for each in asked} == {PreconditionFailed}
    usage = scheduler.usage()
    assert (usage.queued, usage.running, usage.used_capacity, usage.kept_sequences) == (0, 0, 0, 0)


def test_a_request_that_goes_wrong_in_a_batch_ends_alone(library: Library, start: Any) -> None:
    scheduler = start(max_lanes=1)
    submit(scheduler, *(asked := [Asked([9]), Asked([5]), Asked([6], 1), Asked([7])]))
    asked[2].request.call.answer = AnswerBuilder(Broken())
    library.gate.set()
    outcomes = [each.outcome() for each in asked]
    assert library.made == [1, 3]
    assert [type(each) for each in outcomes] == [Result, Result, AsdError, Result]
    assert scheduler.completed == 3


def test_slots_that_wait_for_drafts_leave_the_model_to_the_next_requests(
    library: Library, start: Any
) -> None:
    library.gate.set()
    scheduler = start(max_lanes=1)
    waiting = Asked([9], draft=ReceivedDraft(3), threshold=0.5)
    submit(scheduler, waiting, other := Asked([5]))
    assert other.ids() == (6, 7, 8)
    assert scheduler.usage().running == 1
    waiting.request.draft.add([10, 12])  # type: ignore[union-attr]
    waiting.request.draft.finish(None)  # type: ignore[union-attr]
    scheduler.wake()
    assert waiting.ids() == (10, 11, 12)
