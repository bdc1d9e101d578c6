"""Failures inside the tokenizers library, as our errors.

Its patterns may backtrack without end. The library gives up after about ten million steps at a position, with
a panic: an exception that is not a subclass of Python's `Exception`.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asd.errors import AsdError, InputFailed, PreconditionFailed
from services.stage.generation.tokenizer_description import patterns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tokenizers import Tokenizer

# Processor time for a text of _LONGEST characters. Chosen: a thousand times what tokenizers need.
_MOST_SECONDS = 0.5
_SHORTEST, _LONGEST = 16, 2048
# Texts are runs of these before a character that ends the run, and runs of a pattern's own letters.
_LETTERS = ("a", "A", "1", " ", "\n", "-", "é", "漢")
_MOST_LETTERS = 32


@contextmanager
def explained(what: str, kind: type[AsdError] = PreconditionFailed) -> Iterator[None]:
    """Raise the given kind of error for any exception of the library, panics included."""
    try:
        yield
    except AsdError:
        raise
    except BaseException as error:
        raise said(what, error, kind) from error


def said(what: str, error: BaseException, kind: type[AsdError] = InputFailed) -> BaseException:
    """Return the given kind of error for one of the library, panics included; other errors unchanged."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return kind(f"{what}: {error}")
    return error


def check_patterns(
    tokenizer: Tokenizer,
    description: dict[str, Any],
    path: Path,
    clock: Callable[[], float] = time.thread_time,
) -> None:
    """Raise PreconditionFailed if a pattern takes for ever on a plain text.

    The texts grow, so that a pattern of polynomial time is found before it takes minutes.
    """
    found = list(patterns(description))
    if not found:
        return
    own = {letter for pattern in found for letter in pattern if letter.isalnum()}
    for letter in (*_LETTERS, *sorted(own - set(_LETTERS))[:_MOST_LETTERS]):
        count = _SHORTEST
        while count <= _LONGEST:
            begin = clock()
            with explained(f"{path}: a pattern fails on {count} times {letter!r}"):
                tokenizer.encode(letter * count + "!", add_special_tokens=False)
            if clock() - begin > _MOST_SECONDS:
                raise PreconditionFailed(
                    f"{path}: a pattern takes more than {_MOST_SECONDS} s for {count} times {letter!r}: "
                    "it would take for ever on a long text"
                )
            count *= 2
