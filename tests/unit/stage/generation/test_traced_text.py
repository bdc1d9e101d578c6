"""Traced text is a string in all that it does, and its characters stay with who wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from services.stage.generation.traced_text import MESSAGE, TEMPLATE, UNKNOWN, TracedText, join_texts

if TYPE_CHECKING:
    from collections.abc import Callable

# Origins show in the letters: capitals are a message's.
_TEXT = st.text(alphabet="ab \nAB", max_size=12)


def _traced(text: str) -> TracedText:
    return TracedText(text, "".join(MESSAGE if letter.isupper() else TEMPLATE for letter in text))


def _pieces(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


_METHODS: dict[str, Callable[[str, str], object]] = {
    "strip": lambda text, other: text.strip(other or None),
    "lstrip": lambda text, other: text.lstrip(other or None),
    "rstrip": lambda text, other: text.rstrip(other or None),
    "removeprefix": lambda text, other: text.removeprefix(other),
    "removesuffix": lambda text, other: text.removesuffix(other),
    "split": lambda text, other: text.split(other or None),
    "split once": lambda text, other: text.split(other or None, 1),
    "rsplit once": lambda text, other: text.rsplit(other or None, 1),
    "splitlines": lambda text, other: text.splitlines(),
    "lines with ends": lambda text, other: text.splitlines(keepends=True),
    "partition": lambda text, other: text.partition(other or " "),
    "rpartition": lambda text, other: text.rpartition(other or " "),
    "replace": lambda text, other: text.replace(other or " ", "bA"),
    "replace once": lambda text, other: text.replace(other or " ", other + other, 1),
    "add": lambda text, other: text + other,
    "add before": lambda text, other: other + text,
    "repeat": lambda text, other: text * len(other),
    "repeat before": lambda text, other: len(other) * text,
    "slice": lambda text, other: text[len(other) : -1],
    "step": lambda text, other: text[::-1],
    "iterate": lambda text, other: list(text),
    "join": lambda text, other: text.join([other, other, text]),
    "center": lambda text, other: text.center(14),
    "ljust": lambda text, other: text.ljust(14, "b"),
    "rjust": lambda text, other: text.rjust(14),
    "str": lambda text, other: str(text),
}


@given(st.sampled_from(sorted(_METHODS)), _TEXT, _TEXT)
def test_a_result_is_the_strings_and_knows_its_letters(name: str, text: str, other: str) -> None:
    method = _METHODS[name]
    expected = _pieces(method(text, other))
    found = _pieces(method(_traced(text), _traced(other)))
    assert found == expected
    for piece in found:
        assert isinstance(piece, TracedText)
        known = [origin for origin in zip(piece, piece.origins, strict=True) if origin[1] != UNKNOWN]
        assert all((origin == MESSAGE) == letter.isupper() for letter, origin in known)
        # Only what replace puts in is a plain string here.
        assert len(known) == len(piece) or name == "replace"


@given(_TEXT, st.sampled_from(["upper", "lower", "swapcase", "capitalize", "title", "casefold"]))
def test_letters_of_another_case_keep_their_origin(text: str, method: str) -> None:
    changed = getattr(_traced(text), method)()
    assert changed == getattr(text, method)()
    assert changed.origins == _traced(text).origins


def test_what_is_not_followed_is_unknown() -> None:
    text = TracedText("ab", TEMPLATE * 2)
    assert join_texts("", [text, text.zfill(4), "ß"]).origins == "tt" + UNKNOWN * 5
    assert TracedText("aß", TEMPLATE + MESSAGE).upper().origins == UNKNOWN * 3
    assert TracedText("ß", MESSAGE).upper().origins == MESSAGE * 2
