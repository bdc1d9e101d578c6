"""Disjoint sets of tasks: a prompt belongs to one split, decided by a hash of its words."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from suites import arithmetic, claims, code, knowledge
from suites.task import LEVELS, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

Split = Literal["models", "train", "calibration", "evaluation", "demo"]
"""`models` teaches the family; `train` and `calibration` the policy; `evaluation` and `demo` only measure."""

SUITES: tuple[str, ...] = (arithmetic.NAME, knowledge.NAME, code.NAME, claims.NAME)
_Generator = Callable[[int, random.Random], Task]
_GENERATORS: dict[str, _Generator] = dict(
    zip(SUITES, (arithmetic.generate, knowledge.generate, code.generate, claims.generate), strict=True)
)
_FOLLOW_UPS: dict[str, _Generator] = dict(
    zip(
        SUITES,
        (
            arithmetic.generate_follow_up,
            knowledge.generate_follow_up,
            code.generate_follow_up,
            claims.generate_follow_up,
        ),
        strict=True,
    )
)
# Of 1,000 hash values, those below each bound (and not below an earlier one) belong to the split.
_BOUNDS: tuple[tuple[Split, int], ...] = (
    ("demo", 10),
    ("evaluation", 60),
    ("calibration", 100),
    ("train", 200),
    ("models", 1000),
)

# Draws without a new task of the split after which a suite counts as exhausted at a level.
_MOST_DRAWS = 100_000


def generate(suite: str, level: int, rng: random.Random) -> Task:
    """Return a task of a suite and a level, of any split.

    Raises ValueError for an unknown suite or a level that is not in LEVELS.
    """
    _check(suite, level)
    return _GENERATORS[suite](level, rng)


def generate_follow_up(suite: str, level: int, rng: random.Random) -> Task:
    """Return a task whose question is the second turn of a conversation (see Task.history).

    Raises ValueError as `generate` does.
    """
    _check(suite, level)
    return _FOLLOW_UPS[suite](level, rng)


def _check(suite: str, level: int) -> None:
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    if level not in LEVELS:
        raise ValueError(f"level {level} is not in {LEVELS.start}..{LEVELS.stop - 1}")


def split_of(task: Task) -> Split:
    """Return the split that a task belongs to, by its question and history alone."""
    turns = [*itertools.chain.from_iterable(task.history), task.prompt]
    words = " ".join(" ".join(turns).lower().split())
    value = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest(), "big") % 1000
    return next(name for name, bound in _BOUNDS if value < bound)


def split(name: Split, count: int, seed: int = 0, *, follow_ups: bool = False) -> Iterator[Task]:
    """Yield `count` tasks of a split, none twice; suites and levels take turns.

    follow_ups: the question is the second turn of a conversation. The same arguments give the same tasks. Two
    splits never share a question with its history; a conversation may open with another split's question.
    Raises ValueError for an unknown split, or if a suite has no further task of a level.
    """
    if name not in get_args(Split):
        raise ValueError(f"unknown split {name!r}: choose one of {', '.join(get_args(Split))}")
    # A string seed is hashed with SHA-512 by random.Random, so it is stable between processes.
    rng = random.Random(f"{name}/{seed}/follow-ups" if follow_ups else f"{name}/{seed}")
    make = generate_follow_up if follow_ups else generate
    places = itertools.cycle(itertools.product(LEVELS, SUITES))
    seen: set[tuple[object, str]] = set()
    while len(seen) < count:
        level, suite = next(places)
        draws = (make(suite, level, rng) for _ in range(_MOST_DRAWS))
        new = (task for task in draws if (task.history, task.prompt) not in seen)
        task = next((task for task in new if split_of(task) == name), None)
        if task is None:
            raise ValueError(f"{suite} has no further task of level {level} in split {name!r}: ask for fewer")
        seen.add((task.history, task.prompt))
        yield task
