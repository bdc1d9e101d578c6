"""Choices of wording that the suites share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_CONNECTIVES = ("Then ", "Next ", "So ", "Now ")
_CONNECTIVE_WEIGHTS = (0.58, 0.22, 0.12, 0.08)


def choose_kind(kinds: Sequence[tuple[str, int, float]], level: int, rng: random.Random) -> str:
    """Draw a kind of question that exists at a level.

    kinds: (name, first level at which it is asked, weight at that level). The weight grows by a tenth of
    itself with each further level, so that harder kinds take over as levels rise.
    """
    open_kinds = [
        (name, weight * (1 + 0.1 * (level - first))) for name, first, weight in kinds if level >= first
    ]
    return rng.choices([name for name, _ in open_kinds], [weight for _, weight in open_kinds])[0]


def join_steps(steps: Sequence[str], rng: random.Random) -> str:
    """Join worked steps with connectives drawn at random, as people vary their wording.

    The variation keeps a model's mean log-probability from being a pure measure of its knowledge, as in
    natural text.
    """
    text = f"{steps[0]}."
    for step in steps[1:]:
        text += f" {rng.choices(_CONNECTIVES, _CONNECTIVE_WEIGHTS)[0]}{step}."
    return text


def conclude(steps: Sequence[str], answer: str, rng: random.Random) -> str:
    """Return a worked solution: the steps, then the answer line."""
    return f"{join_steps(steps, rng)} Answer: {answer}"
