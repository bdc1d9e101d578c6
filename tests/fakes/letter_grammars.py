"""Constraints over the letters of tiny vocabularies."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import TYPE_CHECKING

from asd.values import Constraint
from services.stage.generation.constraint import GrammarCompiler

if TYPE_CHECKING:
    from services.stage.generation.constraint import Matcher

END = 0


@cache
def letters_compiler(first: str, size: int) -> GrammarCompiler:
    """Return a compiler for a vocabulary of letters; token 0 ends an answer. first: the letter of token 0."""
    vocabulary = {chr(ord(first) + token): token for token in range(size)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return GrammarCompiler(json.dumps({"added_tokens": [], "decoder": step, "model": model}), size, (END,))


def letters_matcher(regex: str, first: str = "`", size: int = 10) -> Matcher:
    """Return a matcher of a regular expression. first: the letter of token 0, which ends an answer."""
    return asyncio.run(letters_compiler(first, size).compile(Constraint(regex=regex)))
