"""Multi-step word problems with whole numbers, in the shape of GSM8K."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from suites.task import Task
from suites.wording import choose_kind, conclude

if TYPE_CHECKING:
    import random

NAME = "arithmetic"
# (kind, first level, weight); see wording.choose_kind.
KINDS = (
    ("plain", 1, 1.0),
    ("distractor", 4, 0.35),
    ("compare", 5, 0.35),
    ("backward", 6, 0.35),
    ("total", 8, 0.7),
)

PEOPLE = (
    "Ana Ben Cleo Dan Eva Finn Gus Hana Ivo Jana Kai Lena Max Nina Otto Pia Quin Rosa Sam Tara Udo Vera "
    "Will Yara"
).split()
THINGS = (
    "apples pens cards shells coins books stamps beads nuts cakes plums rings cups maps keys bells"
).split()
_LARGEST = 999


def generate(level: int, rng: random.Random) -> Task:
    """Return a word problem of a level (1 to 15). Higher levels take more steps and larger numbers."""
    kind = choose_kind(KINDS, level, rng)
    count = (level + 1) // 2
    return _MAKERS[kind](kind, level, count, rng)


def generate_follow_up(level: int, rng: random.Random) -> Task:
    """Return a second turn that goes on from the story and the result of a first one."""
    first = generate(max(1, level - 2), rng)
    while first.kind not in ("plain", "distractor"):
        first = generate(max(1, level - 2), rng)
    person = first.prompt.split(" ", 1)[0]
    thing = first.prompt.split("How many ", 1)[1].split(" ", 1)[0]
    story, steps, value = _walk(int(first.answer), 1 + level // 6, level, person, thing, rng)
    question = f"And then: {' '.join(story)} How many {thing} does {person} have now?"
    return Task(
        NAME,
        level,
        "follow_up",
        question,
        conclude(steps, str(value), rng),
        str(value),
        ((first.prompt, first.solution),),
    )


def _largest_operand(level: int) -> int:
    return min(9 + 5 * level, 80)


def _walk(
    value: int, count: int, level: int, person: str, thing: str, rng: random.Random
) -> tuple[list[str], list[str], int]:
    """Change a number of things `count` times; return the story, the worked steps and the final number."""
    story, steps = [], []
    for _ in range(count):
        operand = rng.randint(2, _largest_operand(level))
        roll = rng.random()
        factor = rng.choice((2, 3))
        if roll < 0.18 and value * factor <= _LARGEST:
            story.append(f"{person} makes it {'twice' if factor == 2 else 'three times'} as many.")
            steps.append(f"{value}*{factor}={value * factor}")
            value *= factor
        elif roll < 0.28 and value % 2 == 0 and value > 2:
            story.append(f"{person} loses half of them.")
            steps.append(f"{value}/2={value // 2}")
            value //= 2
        elif (roll < 0.64 and value + operand <= _LARGEST) or operand >= value:
            verb = rng.choice(("buys", "finds", "gets"))
            story.append(f"{person} {verb} {operand} more.")
            steps.append(f"{value}+{operand}={value + operand}")
            value += operand
        else:
            verb = rng.choice(("gives away", "sells", "loses"))
            story.append(f"{person} {verb} {operand}.")
            steps.append(f"{value}-{operand}={value - operand}")
            value -= operand
    return story, steps, value


def _plain(kind: str, level: int, count: int, rng: random.Random) -> Task:
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    start = rng.randint(2, _largest_operand(level))
    story, steps, value = _walk(start, count, level, person, thing, rng)
    prompt = f"{person} has {start} {thing}. {' '.join(story)} How many {thing} does {person} have now?"
    return Task(NAME, level, kind, prompt, conclude(steps, str(value), rng), str(value))


def _distractor(kind: str, level: int, count: int, rng: random.Random) -> Task:
    person, other = rng.sample(PEOPLE, 2)
    thing, wrong = rng.sample(THINGS, 2)
    start = rng.randint(2, _largest_operand(level))
    story, steps, value = _walk(start, count, level, person, thing, rng)
    for _ in range(1 + level // 6):
        noise = rng.choice(
            (
                f"{other} buys {rng.randint(2, _largest_operand(level))} {thing}.",
                f"{person} also has {rng.randint(2, _largest_operand(level))} {wrong}.",
                f"{other} loses {rng.randint(2, _largest_operand(level))} {wrong}.",
            )
        )
        story.insert(rng.randint(0, len(story)), noise)
    prompt = f"{person} has {start} {thing}. {' '.join(story)} How many {thing} does {person} have now?"
    return Task(NAME, level, kind, prompt, conclude(steps, str(value), rng), str(value))


def _compare(kind: str, level: int, count: int, rng: random.Random) -> Task:
    """Ask along a chain of comparisons that is told from its end."""
    people = rng.sample(PEOPLE, min(count, 7) + 1)
    thing = rng.choice(THINGS)
    value = start = rng.randint(3, _largest_operand(level))
    told, steps = [], []
    for known, asked in itertools.pairwise(people):
        operand = rng.randint(2, _largest_operand(level))
        if rng.random() < 0.2 and value * 2 <= _LARGEST:
            told.append(f"{asked} has twice as many {thing} as {known}.")
            steps.append(f"{asked}: {value}*2={value * 2}")
            value *= 2
        elif (rng.random() < 0.5 and value + operand <= _LARGEST) or operand >= value:
            told.append(f"{asked} has {operand} more {thing} than {known}.")
            steps.append(f"{asked}: {value}+{operand}={value + operand}")
            value += operand
        else:
            told.append(f"{asked} has {operand} fewer {thing} than {known}.")
            steps.append(f"{asked}: {value}-{operand}={value - operand}")
            value -= operand
    told.reverse()
    prompt = (
        f"{' '.join(told)} {people[0]} has {start} {thing}. How many {thing} does {people[len(steps)]} have?"
    )
    return Task(NAME, level, kind, prompt, conclude(steps, str(value), rng), str(value))


def _backward(kind: str, level: int, count: int, rng: random.Random) -> Task:
    """Give the end of a story and ask for its beginning."""
    person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    value = start = rng.randint(2, _largest_operand(level))
    story: list[str] = []
    undo: list[tuple[int, str, int]] = []
    for _ in range(count):
        operand = rng.randint(2, _largest_operand(level))
        if (rng.random() < 0.5 and value + operand <= _LARGEST) or operand >= value:
            story.append(f"{person} buys {operand} more.")
            value += operand
            undo.append((value, "-", operand))
        else:
            story.append(f"{person} sells {operand}.")
            value -= operand
            undo.append((value, "+", operand))
    steps = [
        f"{after}{sign}{operand}={after - operand if sign == '-' else after + operand}"
        for after, sign, operand in reversed(undo)
    ]
    prompt = (
        f"{person} has some {thing}. {' '.join(story)} Now {person} has {value} {thing}. "
        f"How many {thing} did {person} have at first?"
    )
    return Task(NAME, level, kind, prompt, conclude(steps, str(start), rng), str(start))


def _total(kind: str, level: int, count: int, rng: random.Random) -> Task:
    """Tell two stories and ask for the sum or the difference of their ends."""
    left, right = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    count = max(2, count - 1)
    starts = [rng.randint(2, _largest_operand(level)) for _ in range(2)]
    story_l, steps_l, value_l = _walk(starts[0], count // 2, level, left, thing, rng)
    story_r, steps_r, value_r = _walk(starts[1], count - count // 2, level, right, thing, rng)
    if rng.random() < 0.6 and value_l + value_r <= _LARGEST:
        question = f"How many {thing} do {left} and {right} have together?"
        last, value = f"{value_l}+{value_r}={value_l + value_r}", value_l + value_r
    else:
        question = f"What is the difference between the {thing} of {left} and {right}?"
        high, low = max(value_l, value_r), min(value_l, value_r)
        last, value = f"{high}-{low}={high - low}", high - low
    prompt = (
        f"{left} has {starts[0]} {thing}. {' '.join(story_l)} {right} has {starts[1]} {thing}. "
        f"{' '.join(story_r)} {question}"
    )
    return Task(NAME, level, kind, prompt, conclude([*steps_l, *steps_r, last], str(value), rng), str(value))


_MAKERS = {
    "plain": _plain,
    "distractor": _distractor,
    "compare": _compare,
    "backward": _backward,
    "total": _total,
}
