"""What runs inside vLLM's workers, so that vLLM verifies drafts while it decodes.

vLLM 0.25.1 asks a class of its user for the tokens to verify in the next step (`speculative_config`, method
`custom_class`), and tells it no request ids. A worker extension therefore gives that class the model runner,
which knows each row's request. A request brings its draft in `SamplingParams.extra_args`, under a key that
the stage made for it alone; what is still being written follows by `asd_grow`. All of it goes with the
request.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from services.stage.generation.proposals import AverageDraft, DraftFollower, StepTimes, share_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Seconds, from any moment.
clock = time.perf_counter

# Where a request's draft is in its extra_args.
KEY, IDS = "asd_draft_key", "asd_draft_ids"

# What waits for its request, or to be asked for, of so many requests. Chosen: many more than run at a time; a
# request that is never run leaves what waited for it.
_MOST_KEPT = 1024

# Rank (0: the likeliest) and log-probability of a draft token.
Judged = tuple[int, float]
# A step that had a proposal: the position of what it wrote in the answer, tokens written, tokens proposed.
Pass = tuple[int, int, int]

# Of a draft that the answer departed from: its tokens from that one on as the model judged them, where they
# were proposed; the steps of the request; those with a proposal.
Evidence = tuple[list[Judged], int, list[Pass]]


@dataclass(slots=True)
class _Tracked:
    """A request with a draft. judged: what the last step showed of its tokens from judged_from on."""

    key: str
    follower: DraftFollower
    written: int = 0
    proposed: int = 0
    steps: int = 0
    passes: list[Pass] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    judged_from: int = 0

    def took(self, tokens: Sequence[int]) -> None:
        """Take what a step wrote."""
        self.steps += 1
        if self.proposed:
            self.passes.append((self.written, len(tokens), self.proposed))
        self.written += len(tokens)
        self.follower.took(tokens)

    def evidence(self) -> Evidence:
        """Return how the draft fared so far."""
        first = self.follower.prefix - self.judged_from
        # A draft that was behind its answer departs at a token of an earlier step, which was not kept.
        judged = self.judged[first:] if self.follower.has_departed and first >= 0 else []
        return judged, self.steps, list(self.passes)


class DraftProposer:
    """Proposes what remains of each request's draft, as far as that pays. vLLM makes one in each worker.

    vllm_config: vLLM's configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        # A step of more tokens is no CUDA graph.
        self._most_tokens = vllm_config.compilation_config.max_cudagraph_capture_size or None
        self._runner: Any = None
        # By vLLM's request id; None: the request has no draft.
        self._tracked: dict[str, _Tracked | None] = {}
        self._grown: OrderedDict[str, list[int]] = OrderedDict()
        self._evidence: OrderedDict[str, Evidence] = OrderedDict()
        self._average = AverageDraft()
        self._times = StepTimes()
        # When the last step ended, and its rows: how many tokens the next step has of each.
        self._ended = 0.0
        self._scheduled: dict[str, int] = {}

    def load_model(self, *_: Any, **__: Any) -> None:
        """Do nothing: vLLM calls it for proposers that are models."""

    def attach(self, runner: Any) -> None:
        """Take the model runner. Without it nothing is proposed."""
        self._runner = runner
        # vLLM has no hook, and gives no log-probabilities of tokens that it rejects, nor of those after them.
        # Where these methods are gone, ranks of rejected tokens are bounds.
        for owner, method, watched in (
            (runner.rejection_sampler, "_get_logprobs_tensors", self._watching_proposals),
            (runner.sampler, "forward", self._watching_steps),
        ):
            if hasattr(owner, method):
                setattr(owner, method, watched(getattr(owner, method)))

    def grow(self, key: str, ids: Sequence[int]) -> None:
        """More of a request's draft has been written."""
        for tracked in self._tracked.values():
            if tracked is not None and tracked.key == key:
                tracked.follower.ids.extend(ids)
                return
        self._grown.setdefault(key, []).extend(ids)
        _shorten(self._grown)

    def evidence(self, key: str) -> Evidence:
        """Return how a request's draft fared, once the answer has departed from it; it is kept for one call
        after the request's end."""
        for tracked in self._tracked.values():
            if tracked is not None and tracked.key == key:
                return tracked.evidence()
        return self._evidence.pop(key, ([], 0, []))

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
        ids = list(self._runner.input_batch.req_ids[: len(sampled_token_ids)])
        self._learn_time(ids, sampled_token_ids)
        self._forget_gone()
        rows: list[tuple[int, _Tracked]] = []
        for row, (request, sampled) in enumerate(zip(ids, sampled_token_ids, strict=True)):
            tracked = self._track(request)
            if tracked is not None and sampled:
                tracked.took(sampled)
                rows.append((row, tracked))
        for tracked in self._tracked.values():
            # vLLM drops what was proposed for a request that a step leaves out.
            if tracked is not None:
                tracked.proposed = 0
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
                tracked.proposed = len(found[row])
        self._scheduled = {request: 1 + len(each) for request, each in zip(ids, found, strict=True)}
        self._ended = clock()
        return found

    def _learn_time(self, ids: Sequence[str], sampled: Sequence[Sequence[int]]) -> None:
        # A step that read a prompt says nothing of those that decode.
        if all(sampled) and all(request in self._scheduled for request in ids):
            tokens = sum(self._scheduled[request] for request in ids)
            self._times.observe(tokens, clock() - self._ended)

    def _forget_gone(self) -> None:
        for request in self._tracked.keys() - self._runner.requests.keys():
            tracked = self._tracked.pop(request)
            if tracked is not None:
                tracked.follower.close()
                if tracked.follower.has_departed:
                    self._evidence[tracked.key] = tracked.evidence()
                    _shorten(self._evidence)

    def _track(self, request: str) -> _Tracked | None:
        if request not in self._tracked:
            params = self._runner.requests[request].sampling_params
            extra = (params.extra_args if params is not None else None) or {}
            key = extra.get(KEY)
            if key is None:
                self._tracked[request] = None
            else:
                ids = [*extra[IDS], *self._grown.pop(key, [])]
                self._tracked[request] = _Tracked(key, DraftFollower(self._average, ids))
        return self._tracked[request]

    def _watching_proposals(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return the rejection sampler's method, watched: a step in which some requests have a proposal."""

        def made(
            most: int, metadata: Any, logits: Any, target_logits: Any, bonus_logits: Any, sampled: Any
        ) -> Any:
            self._judge(metadata.num_draft_tokens, target_logits, bonus_logits)
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
                self._judge([0] * len(logits), None, logits)
            return sample(logits, sampling_metadata, predict_bonus_token=predict_bonus_token, **named)

        return sampled

    def _judge(self, counts: Sequence[int], proposed: Any, following: Any) -> None:
        """Keep ranks and log-probabilities of drafts that the answer has not departed from.

        counts: of proposed tokens, by row. proposed: logits or log-probabilities, float [sum of counts,
        vocabulary], at the proposed tokens. following: the same at the token after them, [rows, vocabulary].
        """
        start = 0
        places: list[int] = []
        tokens: list[int] = []
        rows: list[int] = []
        after: list[int] = []
        found: list[tuple[_Tracked, int, int]] = []
        for row, (request, count) in enumerate(zip(self._runner.input_batch.req_ids, counts, strict=False)):
            tracked = self._track(request)
            if tracked is not None and not tracked.follower.has_departed:
                # vLLM may put placeholders where nothing was proposed, to fill a step up.
                is_own = count <= tracked.proposed
                rest = tracked.follower.rest(count + 1 if is_own else 1)
                scored = rest[:count]
                places += range(start, start + len(scored))
                tokens += scored
                rows += [row] * (len(rest) - len(scored))
                after += rest[len(scored) :]
                found.append((tracked, len(scored), len(rest) - len(scored)))
            start += count
        judged, last = _ranked(proposed, places, tokens), _ranked(following, rows, after)
        for tracked, scored_count, next_count in found:
            tracked.judged = [*judged[:scored_count], *last[:next_count]]
            tracked.judged_from = tracked.written
            judged, last = judged[scored_count:], last[next_count:]


class WorkerExtension:
    """Methods that vLLM's workers get (`worker_extension_cls`); the stage calls them by `collective_rpc`."""

    model_runner: Any

    def asd_attach(self) -> None:
        """Let the proposer see requests."""
        self._proposer().attach(self.model_runner)

    def asd_grow(self, key: str, ids: list[int]) -> None:
        """More of a draft has been written."""
        self._proposer().grow(key, ids)

    def asd_evidence(self, key: str) -> Evidence:
        """Return how a draft fared."""
        return self._proposer().evidence(key)

    def _proposer(self) -> DraftProposer:
        proposer: DraftProposer = self.model_runner.drafter
        return proposer


def _ranked(logits: Any, rows: list[int], tokens: list[int]) -> list[Judged]:
    """Return rank and log-probability of a token in each of some rows."""
    if not rows:
        return []
    wanted = logits[rows]
    own = wanted[list(range(len(rows))), tokens]
    ranks = (wanted > own.unsqueeze(1)).sum(1).tolist()
    return list(zip(ranks, (own - wanted.logsumexp(1)).tolist(), strict=True))


def _shorten(kept: OrderedDict[str, Any]) -> None:
    while len(kept) > _MOST_KEPT:
        kept.popitem(last=False)
