"""A stage whose model's next token is known, over weights that are otherwise dummies: for cascades of shapes.

Two models of random weights never agree, so that no draft would be accepted. Here the embedding and the head
are such that token t is followed by t + 1. With PREDICTABLE_JUMPS=1 there are exceptions, so that a prompt's
last token decides how much of another model's draft is accepted. The lower half of the vocabulary is in
blocks of 1,024 tokens. In every second one the model jumps away after one token, for good. In the others it
writes every eighth token as another one, from the upper half, and goes on as the draft does. All other
weights stay the library's dummies, and all of them are read and multiplied.

`PREDICTABLE_JUMPS=1 python -m benchmarks.gpu.predictable --config FILE`, as `python -m services.stage`.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.gpu.shapes import FIRST_WORD
from services.stage import __main__ as stage
from services.stage.engines.vllm import engine as vllm_engine
from services.stage.engines.vllm.proposer import WorkerExtension

JUMP_EVERY = 2048
JUMP_AFTER = 512
# Beyond any draft, so that after a jump nothing of it fits, even moved along.
_JUMP = 311
_BLOCK = 1024
# One token in so many is another one, in the blocks without a jump.
REPLACED_EVERY = 8
_REPLACED_AFTER = 4
# Logit of the next token beside others around 0: likely, and no log-probability near the lowest number.
_LOGIT = 20.0


def successor(token: int, vocabulary: int, *, jumps: bool) -> int:
    """Return the token that follows one; never the last of the vocabulary, which ends answers."""
    half = vocabulary // 2
    if jumps:
        if _is_replaced(token, half):
            return half + token + 1
        if token >= half and _is_replaced(token - half - 1, half):
            return token - half + 1
    step = _JUMP if jumps and token < half and token % JUMP_EVERY == JUMP_AFTER else 1
    words = vocabulary - 1 - FIRST_WORD
    return FIRST_WORD + (max(token, FIRST_WORD) - FIRST_WORD + step) % words


def _is_replaced(token: int, half: int) -> bool:
    """Return whether the token after one is another one than the draft's."""
    in_block = token // _BLOCK % 2 == 1 and (token + 1) // _BLOCK % 2 == 1
    return 0 <= token < half - _BLOCK and in_block and token % REPLACED_EVERY == _REPLACED_AFTER


def block_pairs(vocabulary: int) -> int:
    """Return how many blocks of each kind there are to choose a prompt's last token of."""
    return vocabulary // 2 // JUMP_EVERY - 1


def last_token(accepted: int | None, pair: int) -> int:
    """Return the prompt's last token for which that much of a draft is accepted; None: all, up to 400."""
    start = JUMP_EVERY * (1 + pair)
    return start + JUMP_AFTER + 1 if accepted is None else start + JUMP_AFTER - accepted


def last_token_of_replaced(pair: int) -> int:
    """Return the prompt's last token for which one token in eight of a draft is another one, up to 1,000."""
    return JUMP_EVERY * (1 + pair) + _BLOCK


class Weights(WorkerExtension):
    """Becomes part of vLLM's workers, with what verifies drafts inside."""

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
