"""Generators of onnxruntime-genai: each computes one sequence, or several side by side, in a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from services.stage.engines.onnx.binding import load_binding

if TYPE_CHECKING:
    from collections.abc import Sequence

    Logits = npt.NDArray[np.float32]


class CachedSequence:
    """A generator of one row and the tokens that its KV cache holds.

    capacity: of the cache, in tokens. pass_tokens: most tokens of one pass; None: any number.
    """

    def __init__(self, generator: Any, capacity: int = 0, pass_tokens: int | None = None) -> None:
        self.generator = generator
        self.capacity = capacity
        self._pass_tokens = pass_tokens
        self.tokens: list[int] = []
        self.used = 0.0

    def roll_back(self, length: int) -> None:
        """Forget the tokens from a position on."""
        if length < len(self.tokens):
            self.generator.rewind_to(length)
            del self.tokens[length:]

    def run(self, tokens: Sequence[int]) -> None:
        """Append tokens in as few passes as possible."""
        for piece in self._pieces(tokens):
            self._run(piece)

    def append(self, tokens: Sequence[int], first: int = 0) -> Logits:
        """Append tokens; return the logits after tokens[first:], float32 [tokens - first, V]."""
        rows: list[Logits] = []
        position = 0
        for piece in self._pieces(tokens):
            self._run(piece)
            if position + len(piece) > first:
                logits: Logits = self.generator.get_output("logits")[0]
                rows.append(logits[max(first - position, 0) - len(piece) :])
            position += len(piece)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _run(self, tokens: Sequence[int]) -> None:
        self.generator.append_tokens(np.array([tokens], np.int32))
        self.tokens += tokens

    def _pieces(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        step = self._pass_tokens or len(tokens)
        if len(tokens) <= step:
            return [tokens]
        return [tokens[start : start + step] for start in range(0, len(tokens), step)]


class Generators:
    """Makes the generators of a loaded model. pad_id: pads prompts. pass_tokens: most tokens of one pass."""

    def __init__(self, model: Any, pad_id: int, pass_tokens: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self._pass_tokens = pass_tokens

    def sequence(self, capacity: int) -> CachedSequence:
        """Return an empty sequence. capacity: of its cache, in tokens."""
        return CachedSequence(self._make(max_length=capacity), capacity, self._pass_tokens)

    def batch(self, prompts: Sequence[list[int]], most_tokens: int) -> Any:
        """Return a generator that has read a batch of prompts. most_tokens: of each answer."""
        longest = max(map(len, prompts))
        generator = self._make(max_length=longest + most_tokens, batch_size=len(prompts))
        padded = np.full((len(prompts), longest), self._pad_id, np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        generator.append_tokens(padded)
        return generator

    def _make(self, **search: int) -> Any:
        og = load_binding()
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, **search)
        return og.Generator(self._model, parameters)
