"""Statements to confirm or refute, some of them worded to mislead. In the shape of TruthfulQA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suites.task import Task
from suites.wording import choose_kind, conclude
from suites.world import COUNTRIES, CRAFTS, PROFESSIONS, RIVERS, draw_by_fame, world

if TYPE_CHECKING:
    import random

NAME = "claims"
# (kind, first level, weight); see wording.choose_kind.
KINDS = (
    ("plain", 1, 1.0),
    ("both", 3, 0.5),
    ("negated", 5, 0.4),
    ("either", 6, 0.35),
    ("every", 6, 0.35),
    ("double_negated", 9, 0.35),
    ("count", 10, 0.35),
)


def generate(level: int, rng: random.Random) -> Task:
    """Return a statement of a level (1 to 15). Higher levels join more claims and negate them."""
    kind = choose_kind(KINDS, level, rng)
    return _MAKERS[kind](kind, level, rng)


def generate_follow_up(level: int, rng: random.Random) -> Task:
    """Return a second turn that asks for the negation of the first one's statement."""
    first = _plain("plain", max(1, level - 2), rng)
    holds = first.answer == "false"
    answer = _word(holds)
    return Task(
        NAME,
        level,
        "follow_up",
        "And is the opposite true?",
        conclude([f"The claim was {first.answer}", f"the opposite is {answer}"], answer, rng),
        answer,
        ((first.prompt, first.solution),),
    )


def _word(holds: bool) -> str:
    return "true" if holds else "false"


def _ask(statement: str) -> str:
    return f"True or false? {statement[0].upper()}{statement[1:]}."


def _claim(level: int, rng: random.Random) -> tuple[str, str, bool]:
    """Draw an elementary claim: its wording, the step that checks it, and whether it holds."""
    w = world()
    holds = rng.random() < 0.5
    roll = rng.random()
    if roll < 0.3:
        left, right = rng.randint(2, 25 + 3 * level), rng.randint(2, 25 + 3 * level)
        total = left + right
        claimed = total if holds else total + rng.choice((-10, -2, -1, 1, 2, 10))
        return f"{left} plus {right} is {claimed}", f"{left}+{right}={total}", claimed == total
    if roll < 0.45:
        left, right = rng.randint(2, 25 + 3 * level), rng.randint(2, 25 + 3 * level)
        total = left + right
        bound = total + (-rng.randint(1, 9) if holds else rng.randint(0, 9))
        return f"{left} plus {right} is more than {bound}", f"{left}+{right}={total}", total > bound
    if roll < 0.75:
        town = draw_by_fame(w.towns, level, rng)
        table, pool, said, known = rng.choice(
            (
                (w.country_of, COUNTRIES, "{} is in {}", "{} is in {}"),
                (w.river_of, RIVERS, "{} lies on the {}", "{} lies on the {}"),
                (w.craft_of, CRAFTS, "{} is known for {}", "{} is known for {}"),
            )
        )
        value = table[town]
        claimed_value = value if holds else rng.choice([v for v in pool if v != value])
        return said.format(town, claimed_value), known.format(town, value), holds
    person = draw_by_fame(w.people, level, rng)
    if rng.random() < 0.5:
        value = w.profession_of[person]
        claimed_value = value if holds else rng.choice([v for v in PROFESSIONS if v != value])
        return f"{person} was a {claimed_value}", f"{person} was a {value}", holds
    value = w.birthplace_of[person]
    claimed_value = value if holds else rng.choice([t for t in w.towns if t != value])
    return f"{person} was born in {claimed_value}", f"{person} was born in {value}", holds


def _checked(step: str, holds: bool) -> str:
    return f"{step}: {_word(holds)}"


def _plain(kind: str, level: int, rng: random.Random) -> Task:
    said, step, holds = _claim(level, rng)
    answer = _word(holds)
    return Task(NAME, level, kind, _ask(said), conclude([_checked(step, holds)], answer, rng), answer)


def _joined(kind: str, level: int, rng: random.Random, word: str) -> Task:
    parts = [_claim(level, rng) for _ in range(2 + level // 8)]
    verdicts = [holds for _, _, holds in parts]
    result = all(verdicts) if word == "and" else any(verdicts)
    statement = f" {word} ".join(said for said, _, _ in parts)
    steps = [_checked(step, holds) for _, step, holds in parts]
    return Task(NAME, level, kind, _ask(statement), conclude(steps, _word(result), rng), _word(result))


def _both(kind: str, level: int, rng: random.Random) -> Task:
    return _joined(kind, level, rng, "and")


def _either(kind: str, level: int, rng: random.Random) -> Task:
    return _joined(kind, level, rng, "or")


def _negated(kind: str, level: int, rng: random.Random) -> Task:
    said, step, holds = _claim(level, rng)
    answer = _word(not holds)
    steps = [_checked(step, holds), f"not {_word(holds)} is {answer}"]
    return Task(NAME, level, kind, _ask(f"it is not true that {said}"), conclude(steps, answer, rng), answer)


def _double_negated(kind: str, level: int, rng: random.Random) -> Task:
    said, step, holds = _claim(level, rng)
    outer = rng.choice(
        (
            "it is not true that it is false that",
            "it is false that it is not true that",
            "it is not true that it is not false that",
            "it is false that it is true that",
        )
    )
    turns = outer.count("not") + outer.count("false")
    truth, steps = holds, [_checked(step, holds)]
    for _ in range(turns):
        steps.append(f"not {_word(truth)} is {_word(not truth)}")
        truth = not truth
    return Task(NAME, level, kind, _ask(f"{outer} {said}"), conclude(steps, _word(truth), rng), _word(truth))


def _every(kind: str, level: int, rng: random.Random) -> Task:
    """Claim something of every number in a list."""
    numbers = [rng.randint(10, 99) for _ in range(2 + level // 3)]
    even = rng.random() < 0.5
    if rng.random() < 0.5:
        numbers = [n - n % 2 + (0 if even else 1) for n in numbers]
    fits = [(n % 2 == 0) == even for n in numbers]
    word = "even" if even else "odd"
    statement = f"every number in {', '.join(map(str, numbers))} is {word}"
    steps = [f"{n} is {'even' if n % 2 == 0 else 'odd'}" for n in numbers]
    return Task(NAME, level, kind, _ask(statement), conclude(steps, _word(all(fits)), rng), _word(all(fits)))


def _count(kind: str, level: int, rng: random.Random) -> Task:
    """Claim how many of several claims hold."""
    parts = [_claim(level, rng) for _ in range(3)]
    number = sum(holds for _, _, holds in parts)
    claimed = number if rng.random() < 0.5 else rng.choice([n for n in range(4) if n != number])
    statement = f"exactly {claimed} of these hold: {'; '.join(said for said, _, _ in parts)}"
    steps = [*(_checked(step, holds) for _, step, holds in parts), f"{number} hold"]
    answer = _word(claimed == number)
    return Task(NAME, level, kind, _ask(statement), conclude(steps, answer, rng), answer)


_MAKERS = {
    "plain": _plain,
    "both": _both,
    "either": _either,
    "negated": _negated,
    "double_negated": _double_negated,
    "every": _every,
    "count": _count,
}
