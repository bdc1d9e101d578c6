"""The embedded models' logits, for stand-ins that need a real model under them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime_genai as og

from services.stage.engines.onnx.export import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    Logprobs = npt.NDArray[np.float32]


class ReferenceModel:
    """A model of a Hugging Face directory. adapter: a number that its logits depend on; 0: none."""

    def __init__(self, directory: str | Path) -> None:
        from pathlib import Path

        folder = Path(directory)
        self.context = int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
        self.vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
        self._model = og.Model(og.Config(str(prepare(folder))))

    def sequence(self, adapter: int = 0) -> ReferenceSequence:
        """Return an empty sequence."""
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self.context, do_sample=False)
        return ReferenceSequence(og.Generator(self._model, parameters), adapter)


class ReferenceSequence:
    """Tokens in a KV cache."""

    def __init__(self, generator: Any, adapter: int) -> None:
        self._generator = generator
        self._adapter = adapter

    def append(self, tokens: Sequence[int]) -> Logprobs:
        """Append tokens; return the log-probabilities after each, float32 [tokens, V]."""
        self._generator.append_tokens(np.array([tokens], np.int32))
        logits = np.array(self._generator.get_output("logits")[0][-len(tokens) :], np.float32)
        if self._adapter:
            # Its own word, always.
            logits[:, 20 + self._adapter] = logits.max(axis=1) + 1.0
        logits -= logits.max(axis=1, keepdims=True)
        logprobs: Logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logprobs


def draw(logprobs: Logprobs, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """Return a token drawn from log-probabilities, float32 [V]; the likeliest one at temperature 0."""
    if temperature == 0:
        return int(logprobs.argmax())
    scaled = logprobs / temperature + rng.gumbel(size=logprobs.size)
    if top_p < 1:
        order = np.argsort(-logprobs)
        mass = np.cumsum(np.exp(logprobs[order]))
        scaled[order[int(np.searchsorted(mass, top_p)) + 1 :]] = -np.inf
    return int(scaled.argmax())


def likeliest(logprobs: Logprobs, token: int, most: int) -> list[tuple[int, float, int]]:
    """Return (token, log-probability, rank from 1): the asked token first, then the likeliest, as in vLLM."""
    order = np.argsort(-logprobs, kind="stable")[:most]
    rank = int((logprobs >= logprobs[token]).sum())
    ranked = zip(order.tolist(), logprobs[order].tolist(), range(1, len(order) + 1), strict=True)
    return [(token, float(logprobs[token]), rank), *ranked]
