"""What a prompt looks like: numbers, options, negations, symbols. It holds for unseen subjects too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

_OPTION = re.compile(r"^([A-J])[.)] ?(.*)$", re.MULTILINE)
_NUMBER = re.compile(r"\d[\d,]*\.?\d*")
_WORD = re.compile(r"[A-Za-z']+")
_NUMERIC_OPTION = re.compile(r"[-−$]?[\d.,/ %$]+.{0,12}")
# Counted in the question, without its options.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i)\b(not|except|never|no|false|incorrect|least|without|cannot)\b",
        r"\b(NOT|EXCEPT|LEAST|BEST|MOST)\b",
        r"\b(I|II|III|IV|i|ii|iii|iv)\b[.,) ]",
        r"(?i)\b(if|each|every|per|twice|half|times|than|remaining|left|total|more|less)\b",
        r"(?i)\b(all of|none of|both|neither|true|false|statement)\b",
        r"[.!?](\s|$)",
        r"\\",
        r"\$",
        r"%",
        r"\^|\*\*",
        r"=",
        r"\(",
        r"/",
        r"_",
        r"[\"“]",
        r"\?",
        r"\n",
        r",",
        r"[^\x00-\x7f]",
        r"(?i)^\W*(which|what|who|where|when|how|why)\b",
        r"\?\s*$",
        r":\s*$",
        r"____",
    )
)


def describe_prompts(prompts: Sequence[str]) -> Floats:
    """Return features of prompts, on scales of logarithms: [n, features]."""
    rows = np.array([_describe(prompt) for prompt in prompts])
    scaled: Floats = np.sign(rows) * np.log1p(np.abs(rows))
    return scaled


def _describe(prompt: str) -> list[float]:
    options = [text for _, text in _OPTION.findall(prompt)]
    first = _OPTION.search(prompt)
    question = prompt[: first.start()] if first else prompt
    lengths = [len(option) for option in options] or [0]
    numbers = _NUMBER.findall(question)
    values = [float(number.replace(",", "")) for number in numbers]
    words = _WORD.findall(question)
    return [
        np.log1p(len(prompt)),
        np.log1p(len(question)),
        np.log1p(len(words)),
        np.log1p(np.mean(lengths)),
        np.log1p(max(lengths)),
        float(np.std(lengths)) / (1 + float(np.mean(lengths))),
        len(options),
        sum(bool(_NUMERIC_OPTION.fullmatch(option)) for option in options) / (1 + len(options)),
        sum(character.isdigit() for option in options for character in option) / (1 + sum(lengths)),
        np.log1p(len(numbers)),
        np.log1p(len(set(numbers))),
        np.log1p(max(values, default=0.0)),
        sum("." in number.rstrip(".") for number in numbers),
        float(np.mean([len(word) for word in words])) if words else 0.0,
        len({word.lower() for word in words}) / (1 + len(words)),
        sum(word[0].isupper() for word in words) / (1 + len(words)),
        sum(len(word) > 9 for word in words) / (1 + len(words)),
        *(len(pattern.findall(question)) for pattern in _PATTERNS),
    ]
