"""A stage whose model's next token is known, over weights that are otherwise dummies: for cascades of shapes.

Two models of random weights never agree, so that no draft would be accepted. Here the embedding and the head
are such that token t is followed by t + 1, and with PREDICTABLE_JUMPS=1 by another one after every token in
1,024. A prompt's last token so decides how much of a draft a jumping model accepts. All other weights stay
the library's dummies, and all of them are read and multiplied.

`PREDICTABLE_JUMPS=1 python -m benchmarks.gpu.predictable --config FILE`, as `python -m services.stage`.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.shapes import FIRST_WORD
from services.stage import __main__ as stage
from services.stage.engines.vllm import engine as vllm_engine

JUMP_EVERY = 1024
JUMP_AFTER = 512
# Beyond any draft, so that after a jump nothing of it fits, even moved along.
_JUMP = 311
# Logit of the next token beside others around 0: likely, and no log-probability near the lowest number.
_LOGIT = 20.0


def successor(token: int, vocabulary: int, *, jumps: bool) -> int:
    """Return the token that follows one; never the last of the vocabulary, which ends answers."""
    step = _JUMP if jumps and token % JUMP_EVERY == JUMP_AFTER else 1
    words = vocabulary - 1 - FIRST_WORD
    return FIRST_WORD + (max(token, FIRST_WORD) - FIRST_WORD + step) % words


def last_token(accepted: int | None, block: int) -> int:
    """Return the prompt's last token for which that much of a draft is accepted; None: all, up to 400."""
    start = JUMP_EVERY * (1 + block)
    return start + JUMP_AFTER + 1 if accepted is None else start + JUMP_AFTER - accepted


class Weights:
    """Becomes part of vLLM's workers."""

    def write_successors(self, jumps: bool) -> None:
        """Write embedding, last norm and head, each worker its part."""
        import torch
        from vllm.distributed import get_tensor_model_parallel_rank

        model: Any = self.get_model()  # type: ignore[attr-defined]
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        vocabulary, width = model.config.vocab_size, embedding.shape[1]
        generator = torch.Generator().manual_seed(13)
        # In main memory: the GPU's is taken.
        whole = torch.randn(vocabulary, width, generator=generator, dtype=torch.float32)
        following = [successor(token, vocabulary, jumps=jumps) for token in range(vocabulary)]
        heads = torch.zeros_like(whole).index_add_(0, torch.tensor(following), whole) * (_LOGIT / width)
        with torch.no_grad():
            for weight, values in ((embedding, whole), (head, heads)):
                first = get_tensor_model_parallel_rank() * weight.shape[0]
                part = values[first : first + weight.shape[0]]
                weight[: len(part)].copy_(part.to(weight.dtype))
            model.model.norm.weight.fill_(1.0)
        # Where a library keeps another form of the weights, such as on CPUs, it is to make it anew.
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class PredictableBackend(vllm_engine.VllmBackend):
    """vLLM with these weights."""

    async def start(self) -> None:
        """Load the dummies and write what makes them predictable."""
        await super().start()
        await self._llm.collective_rpc("write_successors", args=(os.environ.get("PREDICTABLE_JUMPS") == "1",))

    def arguments(self) -> dict[str, Any]:
        """Return what vLLM's engine is made with."""
        return super().arguments() | {"worker_extension_cls": "benchmarks.gpu.predictable.Weights"}


def main() -> None:
    """Serve a stage of such models."""
    # The stage's own program, with another backend behind its engine.
    vllm_engine.VllmBackend = PredictableBackend  # type: ignore[misc]
    stage.main()


if __name__ == "__main__":
    main()
