"""What runs inside vLLM's workers, so that vLLM verifies drafts while it decodes.

vLLM 0.25.1 asks a class of its user for the tokens to verify in the next step (`speculative_config`, method
`custom_class`), and tells it no request ids. A worker extension therefore gives that class the model runner,
which knows each row's request. A request brings its draft in `SamplingParams.extra_args`, under a key that
the stage made for it alone; what is still being written follows by `asd_grow`. `asd_outcome` says how the
draft fared, and `asd_forget` removes all of it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from services.stage.generation.proposals import AverageDraft, DraftFollower, StepTimes, share_out
from services.stage.generation.resync import common_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Seconds, from any moment.
clock = time.perf_counter

# A request's draft in its extra_args: its key, its ids, and whether it is proposed after a wrong token, too.
KEY, IDS, RESYNC = "asd_draft_key", "asd_draft_ids", "asd_draft_resync"
# A request's grammar there, and the tokens of the answer that its prompt ends with.
GRAMMAR, WRITTEN = "asd_grammar", "asd_written"

# Most drafts that are kept for requests that have not started, and most outcomes of those that have ended.
# Chosen: many more than run at a time. The stage removes them; whatever it leaves makes room for newer ones.
_MOST_KEPT = 1024
# vLLM's own default. Where it makes no CUDA graphs, its configuration has 0.
_MOST_TOKENS = 512
# Rows of logits that are copied at a time. Chosen: 64 rows of 128,000 float32 are 33 MB.
_ROWS_AT_A_TIME = 64

# Rank (0: the likeliest) and log-probability of a draft token.
TokenScore = tuple[int, float]
# A step that had a proposal: the position of what it wrote in the answer, tokens written, tokens proposed.
VerifyStep = tuple[int, int, int]
# How a draft fared: its tokens from the one on that the answer departed from, as the model scored them where
# they were proposed; the steps of the request; those with a proposal.
Outcome = tuple[list[TokenScore], int, list[VerifyStep]]


@dataclass(slots=True)
class _Tracked:
    """A request with a draft. scores: what the last step showed of its tokens from scored_from on."""

    key: str
    follower: DraftFollower
    resync: bool
    written: int = 0
    steps: int = 0
    verify_steps: list[VerifyStep] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    scored_from: int = 0

    @property
    def may_be_proposed(self) -> bool:
        """Whether the rest of the draft may be proposed."""
        return self.resync or not self.follower.has_departed

    def proposed_of(self, tokens: Sequence[int]) -> int:
        """Return how many of a step's tokens to verify are the draft's.

        vLLM proposes fewer than it was given where they do not fit, and fills steps with tokens of its own.
        """
        return common_prefix(tokens, self.follower.rest(len(tokens))) if self.may_be_proposed else 0

    def took(self, tokens: Sequence[int], proposed: int) -> None:
        """Take what a step wrote."""
        self.steps += 1
        if proposed:
            self.verify_steps.append((self.written, len(tokens), proposed))
        self.written += len(tokens)
        self.follower.took(tokens)

    def outcome(self) -> Outcome:
        """Return how the draft fared so far."""
        first = self.follower.prefix - self.scored_from
        # A draft that was behind its answer departs at a token of an earlier step, which was not kept.
        scores = self.scores[first:] if self.follower.has_departed and first >= 0 else []
        return scores, self.steps, list(self.verify_steps)


class DraftProposer:
    """Proposes what remains of each request's draft, as far as that pays. vLLM makes one in each worker.

    vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        scheduler = vllm_config.scheduler_config
        # A step of more tokens is no CUDA graph, and vLLM cuts off what its token budget does not hold.
        self._most_tokens = min(
            vllm_config.compilation_config.max_cudagraph_capture_size or _MOST_TOKENS,
            scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
        )
        self._runner: Any = None
        # By vLLM's request id; None: the request has no draft.
        self._tracked: dict[str, _Tracked | None] = {}
        self._grown: OrderedDict[str, list[int]] = OrderedDict()
        self._ended: OrderedDict[str, Outcome] = OrderedDict()
        self._average = AverageDraft()
        self._times = StepTimes()
        # When the last step ended, and the requests that it wrote tokens of.
        self._step_ended = 0.0
        self._wrote: set[str] = set()

    def load_model(self, *_: Any, **__: Any) -> None:
        """Do nothing: vLLM calls it for proposers that are models."""

    def attach(self, runner: Any) -> list[str]:
        """Take the model runner, and return what it lacks. Without a runner nothing is proposed."""
        self._runner = runner
        lacking = []
        # vLLM asks for no proposal near the end of the context, and verifies zeros in every row instead. Its
        # scheduler cuts proposals off there by itself.
        if hasattr(runner, "effective_drafter_max_model_len"):
            runner.effective_drafter_max_model_len = runner.max_model_len + self._most
        else:
            lacking.append("effective_drafter_max_model_len")
        # vLLM has no hook, and gives no log-probabilities of tokens that it rejects, nor of those after them.
        # Where these methods are gone, ranks of rejected tokens are bounds.
        for owner, method, watched in (
            (runner.rejection_sampler, "_get_logprobs_tensors", self._watching_proposals),
            (runner.sampler, "forward", self._watching_steps),
        ):
            if hasattr(owner, method):
                setattr(owner, method, watched(getattr(owner, method)))
            else:
                lacking.append(method)
        return lacking

    def grow(self, key: str, ids: Sequence[int]) -> None:
        """More of a request's draft has been written."""
        tracked = self._with_key(key)
        if tracked is not None:
            tracked.follower.ids.extend(ids)
        elif self._runner is not None and key not in self._ended:
            self._grown.setdefault(key, []).extend(ids)
            _shorten(self._grown)

    def outcome(self, key: str) -> Outcome:
        """Return how a request's draft fared, so far or to its end."""
        tracked = self._with_key(key)
        return self._ended.get(key, ([], 0, [])) if tracked is None else tracked.outcome()

    def forget(self, key: str) -> None:
        """Remove all of a request's draft."""
        for request, tracked in self._tracked.items():
            if tracked is not None and tracked.key == key:
                tracked.follower.close()
                self._tracked[request] = None
        self._grown.pop(key, None)
        self._ended.pop(key, None)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return the tokens to verify in the next step, by row.

        sampled_token_ids: by row, what the last step wrote; empty while a prompt is not read.
        """
        if self._runner is None:
            return [[] for _ in sampled_token_ids]
        batch = self._runner.input_batch
        ids = list(batch.req_ids[: len(sampled_token_ids)])
        self._learn_time(ids)
        self._forget_gone()
        rows: list[tuple[int, _Tracked]] = []
        for row, (request, sampled) in enumerate(zip(ids, sampled_token_ids, strict=True)):
            tracked = self._track(request)
            if tracked is not None and sampled:
                written = self._runner.requests[request].output_token_ids[tracked.written :]
                tracked.took(written, tracked.proposed_of(batch.spec_token_ids[row]))
                if tracked.may_be_proposed:
                    rows.append((row, tracked))
        found: list[list[int]] = [[] for _ in sampled_token_ids]
        if rows:
            followers = [tracked.follower for _, tracked in rows]
            counts = share_out(
                np.array([each.likely for each in followers]),
                np.array([each.agreement for each in followers]),
                np.array([len(each.rest(self._most)) for each in followers]),
                len(ids),
                self._times,
                self._most_tokens,
            )
            for (row, tracked), count in zip(rows, counts, strict=True):
                found[row] = list(tracked.follower.rest(int(count)))
        self._wrote = {request for request, sampled in zip(ids, sampled_token_ids, strict=True) if sampled}
        self._step_ended = clock()
        return found

    def _learn_time(self, ids: Sequence[str]) -> None:
        # A step that read a part of a prompt, also its last one, says nothing of those that decode.
        if self._wrote.issuperset(ids):
            proposed = self._runner.input_batch.spec_token_ids
            tokens = sum(1 + len(proposed[row]) for row in range(len(ids)))
            self._times.observe(tokens, clock() - self._step_ended)

    def _is_followed(self, request: str, tracked: _Tracked) -> bool:
        """Return whether the answer is the beginning of the draft, as far as both go."""
        written = len(self._runner.requests[request].output_token_ids)
        return tracked.written == written and not tracked.follower.has_departed

    def _with_key(self, key: str) -> _Tracked | None:
        drafted = (tracked for tracked in self._tracked.values() if tracked is not None)
        return next((tracked for tracked in drafted if tracked.key == key), None)

    def _forget_gone(self) -> None:
        for request in self._tracked.keys() - self._runner.requests.keys():
            tracked = self._tracked.pop(request)
            if tracked is not None:
                tracked.follower.close()
                self._ended[tracked.key] = tracked.outcome()
                _shorten(self._ended)

    def _track(self, request: str) -> _Tracked | None:
        if request not in self._tracked:
            params = self._runner.requests[request].sampling_params
            extra = (params.extra_args if params is not None else None) or {}
            key = extra.get(KEY)
            if key is None:
                self._tracked[request] = None
            else:
                ids = [*extra[IDS], *self._grown.pop(key, [])]
                self._tracked[request] = _Tracked(key, DraftFollower(self._average, ids), extra[RESYNC])
        return self._tracked[request]

    def _watching_proposals(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return the rejection sampler's method, watched: a step in which some requests have a proposal."""

        def made(
            most: int, metadata: Any, logits: Any, target_logits: Any, bonus_logits: Any, sampled: Any
        ) -> Any:
            self._score(metadata.num_draft_tokens, target_logits, bonus_logits)
            return make(most, metadata, logits, target_logits, bonus_logits, sampled)

        return made

    def _watching_steps(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """Return the sampler's method, watched: a step in which no request has a proposal."""

        def sampled(
            logits: Any, sampling_metadata: Any, predict_bonus_token: bool = False, **named: Any
        ) -> Any:
            # The rejection sampler has it sample the token after each proposal.
            if not predict_bonus_token:
                # Before it changes them.
                self._score([0] * len(logits), None, logits)
            return sample(logits, sampling_metadata, predict_bonus_token=predict_bonus_token, **named)

        return sampled

    def _score(self, counts: Sequence[int], proposed: Any, following: Any) -> None:
        """Keep ranks and log-probabilities of drafts that the answer has not departed from.

        counts: of tokens to verify, by row. proposed: logits, [sum of counts, vocabulary], at these tokens.
        following: logits at the token after them, [rows, vocabulary].
        """
        start = 0
        places: list[int] = []
        tokens: list[int] = []
        rows: list[int] = []
        after: list[int] = []
        found: list[tuple[_Tracked, int, int]] = []
        batch = self._runner.input_batch
        for row, (request, count) in enumerate(zip(batch.req_ids, counts, strict=False)):
            tracked = self._track(request)
            if tracked is not None and self._is_followed(request, tracked):
                own = tracked.proposed_of(batch.spec_token_ids[row])
                # At a place that vLLM has filled, the draft's next token is scored, and none after it.
                scored = tracked.follower.rest(own + (own < count))
                last = tracked.follower.rest(count + 1)[count:] if own == count else []
                places += range(start, start + len(scored))
                tokens += scored
                rows += [row] * len(last)
                after += last
                found.append((tracked, len(scored), len(last)))
            start += count
        scores, next_scores = _ranked(proposed, places, tokens), _ranked(following, rows, after)
        for tracked, scored_count, next_count in found:
            tracked.scores = [*scores[:scored_count], *next_scores[:next_count]]
            tracked.scored_from = tracked.written
            scores, next_scores = scores[scored_count:], next_scores[next_count:]


class WorkerExtension:
    """Methods that vLLM's workers get (`worker_extension_cls`); the stage calls them by `collective_rpc`."""

    model_runner: Any
    rank: int

    def asd_attach(self) -> list[str]:
        """Let the proposer see requests, and return what the model runner lacks for that.

        vLLM proposes what its first worker says, and that one's outcomes are read. The others do nothing.
        """
        return self._proposer().attach(self.model_runner) if self.rank == 0 else []

    def asd_constrain(self) -> None:
        """Keep constraints: vLLM takes no logits processor from its user where something proposes."""
        from services.stage.engines.vllm.constraint import ConstraintProcessor

        runner = self.model_runner
        processor = ConstraintProcessor(runner.vllm_config, runner.device, is_pin_memory=False)
        runner.input_batch.logitsprocs.non_argmax_invariant.append(processor)

    def asd_grow(self, key: str, ids: list[int]) -> None:
        """More of a draft has been written."""
        self._proposer().grow(key, ids)

    def asd_outcome(self, key: str) -> Outcome:
        """Return how a draft fared."""
        return self._proposer().outcome(key)

    def asd_forget(self, key: str) -> None:
        """Remove all of a draft."""
        self._proposer().forget(key)

    def _proposer(self) -> DraftProposer:
        proposer: DraftProposer = self.model_runner.drafter
        return proposer


def _ranked(logits: Any, rows: list[int], tokens: list[int]) -> list[TokenScore]:
    """Return rank and log-probability of a token in each of some rows."""
    found: list[TokenScore] = []
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        end = start + _ROWS_AT_A_TIME
        # The sampler gets them in the model's own precision.
        wanted = logits[rows[start:end]].float()
        own = wanted[list(range(len(wanted))), tokens[start:end]]
        ranks = (wanted > own.unsqueeze(1)).sum(1).tolist()
        found += zip(ranks, (own - wanted.logsumexp(1)).tolist(), strict=True)
    return found


def _shorten(kept: OrderedDict[str, Any]) -> None:
    while len(kept) > _MOST_KEPT:
        kept.popitem(last=False)
