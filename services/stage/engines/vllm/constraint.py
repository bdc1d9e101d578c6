"""What runs inside vLLM's workers, so that an answer keeps its constraint: a logits processor of vLLM's.

vLLM's own structured outputs start a grammar anew in each request. An answer that goes on after a verified
draft is in the middle of its grammar. They also know one end token, and report log-probabilities of what the
grammar leaves. This processor keeps the stage's grammar from where the answer is, after vLLM has computed the
log-probabilities.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from asd.errors import AsdError
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.vllm.proposer import GRAMMAR, WRITTEN
from services.stage.generation.constraint import Grammar, compiler_for
from services.stage.generation.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from services.stage.generation.constraint import GrammarCompiler, Matcher


class ConstraintProcessor(AdapterLogitsProcessor):  # type: ignore[misc]
    """Keeps each request's grammar. vLLM makes one in each worker."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        directory = Path(vllm_config.model_config.model)
        checkpoint = read_checkpoint(directory)
        self._grammars: GrammarCompiler | None = None
        # The stage says what llguidance cannot use, and sends no constraint.
        with suppress(ValueError):
            self._grammars = compiler_for(ChatTokenizer(directory), checkpoint.vocabulary, checkpoint.eos_ids)

    def is_argmax_invariant(self) -> bool:
        """Return False: the likeliest token may not be allowed."""
        return False

    def new_req_logits_processor(self, params: Any) -> _RequestConstraint | None:
        """Return the constraint of a request; None: it has none."""
        extra = params.extra_args or {}
        if GRAMMAR not in extra or self._grammars is None:
            return None
        # An error here would end vLLM's engine. The stage's own matcher refuses what comes unconstrained.
        with suppress(AsdError):
            matcher = self._grammars.compile_now(Grammar(extra[GRAMMAR], "sampling.constraint"))
            matcher.take(extra[WRITTEN])
            return _RequestConstraint(matcher, is_greedy=params.temperature == 0)
        return None


class _RequestConstraint:
    """The constraint of one request."""

    def __init__(self, matcher: Matcher, *, is_greedy: bool) -> None:
        self._matcher = matcher
        self._is_greedy = is_greedy
        self._taken = 0

    def __call__(self, output_ids: list[int], logits: Any) -> Any:
        """Return the logits of the next token, with -inf for those that may not follow.

        output_ids: what the request has written. vLLM steps a request once more after its end.
        """
        fresh = output_ids[self._taken :]
        self._taken += len(fresh)
        with suppress(AsdError):
            # An error here would end vLLM's engine. The stage's own matcher meets it, too, and refuses.
            if self._matcher.take(fresh) == len(fresh) and not self._matcher.is_over:
                self._mask(logits)
        return logits

    def _mask(self, logits: Any) -> None:
        # Computing the mask takes many times as long.
        if not (self._is_greedy and self._matcher.allowed([int(logits.argmax())])):
            logits[np.flatnonzero(~self._matcher.mask()[: len(logits)])] = -np.inf
