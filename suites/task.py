"""What a graded task is, and how an answer to it is graded."""

from __future__ import annotations

import re
from dataclasses import dataclass

LEVELS = range(1, 16)
"""Complexity levels of every suite, easiest first."""

# Up to the end of the line, or the next one of its kind.
_ANSWER = re.compile(r"Answer:[ \t]*((?:(?!Answer:)[^\n])*)")


@dataclass(frozen=True)
class Task:
    """One question with its reference answer.

    `kind` names the form of the question inside its suite. `solution` is a worked answer that ends with
    `Answer: X`; `answer` is X. `history` holds earlier turns as (question, reply) pairs, oldest first.
    """

    suite: str
    level: int
    kind: str
    prompt: str
    solution: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


def extract_answer(text: str) -> str | None:
    """Return what follows the last `Answer:` of a text, or None if there is none."""
    found = _ANSWER.findall(text)
    return _normalise(found[-1]) if found else None


def grade(task: Task, text: str) -> bool:
    """Say whether a text answers a task correctly: its last `Answer:` line equals the reference answer.

    Letter case, surrounding blanks and one closing full stop do not count. The worked steps are not graded.
    """
    return extract_answer(text) == _normalise(task.answer)


def _normalise(answer: str) -> str:
    return answer.strip().removesuffix(".").strip().lower()
