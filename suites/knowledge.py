"""Multiple-choice questions over the closed world, in the shape of MMLU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suites.task import Task
from suites.wording import choose_kind, conclude
from suites.world import COUNTRIES, CRAFTS, CURRENCIES, PROFESSIONS, RIVERS, draw_by_fame, world

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

NAME = "knowledge"
# (kind, first level, weight); see wording.choose_kind.
KINDS = (
    ("direct", 1, 1.0),
    ("two_hops", 4, 0.5),
    ("negated", 5, 0.4),
    ("three_hops", 8, 0.9),
    ("same", 7, 0.3),
)
_LETTERS = "ABCDE"


def generate(level: int, rng: random.Random) -> Task:
    """Return a question of a level (1 to 15). Higher levels reach rarer entities over more hops."""
    kind = choose_kind(KINDS, level, rng)
    return _MAKERS[kind](kind, level, rng)


def generate_follow_up(level: int, rng: random.Random) -> Task:
    """Return a second turn that asks on about the entity that the first one ended with."""
    w = world()
    person = draw_by_fame(w.people, level, rng)
    town = w.birthplace_of[person]
    first = _choice_task("direct", level, f"Where was {person} born?", [_born(person)], town, w.towns, rng)
    _, steps, value, pool = _town_fact(town, rng)
    question = {"river": "And on which river does it lie?", "craft": "And what is it known for?"}.get(
        pool[0], "And in which country is it?"
    )
    second = _choice_task("follow_up", level, question, steps, value, pool[1], rng)
    return Task(
        NAME,
        level,
        "follow_up",
        second.prompt,
        second.solution,
        second.answer,
        ((first.prompt, first.solution),),
    )


def _option_count(level: int) -> int:
    return 3 if level <= 5 else 4 if level <= 10 else 5


def _choice_task(
    kind: str,
    level: int,
    question: str,
    steps: Sequence[str],
    value: str,
    pool: Sequence[str],
    rng: random.Random,
) -> Task:
    others = [other for other in pool if other != value]
    options = [value, *rng.sample(others, _option_count(level) - 1)]
    rng.shuffle(options)
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
    answer = _LETTERS[options.index(value)]
    return Task(NAME, level, kind, f"{question} {listed}", conclude(steps, answer, rng), answer)


def _born(person: str) -> str:
    return f"{person} was born in {world().birthplace_of[person]}"


def _town_fact(town: str, rng: random.Random) -> tuple[str, list[str], str, tuple[str, Sequence[str]]]:
    """Draw a fact of a town: how to ask for it, the step that states it, its value, and (topic, values)."""
    w = world()
    topic = rng.choice(("country", "river", "craft"))
    if topic == "country":
        value = w.country_of[town]
        return "In which country is {}?", [f"{town} is in {value}"], value, (topic, COUNTRIES)
    if topic == "river":
        value = w.river_of[town]
        return "On which river does {} lie?", [f"{town} lies on the {value}"], value, (topic, RIVERS)
    value = w.craft_of[town]
    return "What is {} known for?", [f"{town} is known for {value}"], value, (topic, CRAFTS)


def _direct(kind: str, level: int, rng: random.Random) -> Task:
    w = world()
    if rng.random() < 0.5:
        town = draw_by_fame(w.towns, level, rng)
        ask, steps, value, (_, pool) = _town_fact(town, rng)
        return _choice_task(kind, level, ask.format(town), steps, value, pool, rng)
    person = draw_by_fame(w.people, level, rng)
    if rng.random() < 0.5:
        value = w.profession_of[person]
        steps = [f"{person} was a {value}"]
        return _choice_task(kind, level, f"What was {person}?", steps, value, PROFESSIONS, rng)
    value = w.birthplace_of[person]
    return _choice_task(kind, level, f"Where was {person} born?", [_born(person)], value, w.towns, rng)


def _two_hops(kind: str, level: int, rng: random.Random) -> Task:
    w = world()
    person = draw_by_fame(w.people, level, rng)
    ask, steps, value, (_, pool) = _town_fact(w.birthplace_of[person], rng)
    question = ask.format(f"the birthplace of {person}")
    return _choice_task(kind, level, question, [_born(person), *steps], value, pool, rng)


def _three_hops(kind: str, level: int, rng: random.Random) -> Task:
    w = world()
    person = draw_by_fame(w.people, level, rng)
    town = w.birthplace_of[person]
    country = w.country_of[town]
    steps = [_born(person), f"{town} is in {country}"]
    if rng.random() < 0.5:
        value = w.currency_of[country]
        steps.append(f"{country} pays in {value}")
        question = f"What does one pay with in the country where {person} was born?"
        return _choice_task(kind, level, question, steps, value, CURRENCIES, rng)
    value = w.capital_of[country]
    steps.append(f"The capital of {country} is {value}")
    question = f"What is the capital of the country where {person} was born?"
    return _choice_task(kind, level, question, steps, value, w.towns[:40], rng)


def _negated(kind: str, level: int, rng: random.Random) -> Task:
    """Ask for the one option that does not fit: every option has to be looked up."""
    w = world()
    odd = draw_by_fame(w.towns, level, rng)
    country = rng.choice([c for c in COUNTRIES if c != w.country_of[odd]])
    inside = [town for town in w.towns if w.country_of[town] == country]
    count = _option_count(level) - 1
    reach = max(count, round(len(inside) * (0.125 + 0.875 * (level - 1) / 14)))
    options = [odd, *rng.sample(inside[:reach], count)]
    rng.shuffle(options)
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
    steps = [f"{option} is in {w.country_of[option]}" for option in options]
    answer = _LETTERS[options.index(odd)]
    prompt = f"Which of these towns is NOT in {country}? {listed}"
    return Task(NAME, level, kind, prompt, conclude(steps, answer, rng), answer)


def _same(kind: str, level: int, rng: random.Random) -> Task:
    """Ask for the option that shares a property with a given town."""
    w = world()
    town = draw_by_fame(w.towns, level, rng)
    river = w.river_of[town]
    fitting = [other for other in w.towns if w.river_of[other] == river and other != town]
    others = [other for other in w.towns if w.river_of[other] != river]
    match = rng.choice(fitting)
    options = [match, *rng.sample(others, _option_count(level) - 1)]
    rng.shuffle(options)
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
    steps = [f"{name} lies on the {w.river_of[name]}" for name in (town, *options)]
    answer = _LETTERS[options.index(match)]
    prompt = f"Which of these towns lies on the same river as {town}? {listed}"
    return Task(NAME, level, kind, prompt, conclude(steps, answer, rng), answer)


_MAKERS = {
    "direct": _direct,
    "two_hops": _two_hops,
    "three_hops": _three_hops,
    "negated": _negated,
    "same": _same,
}
