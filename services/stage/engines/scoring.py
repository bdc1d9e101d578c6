"""The engine over a GPU library with batching of its own: `vllm` and `tensorrt_llm` are its backends.

Such a library takes token ids and gives the likeliest tokens of each position, never the logits.

Greedy verification. One pass scores prompt and draft. The agreed prefix is kept, and the same pass gives the
model's own next token. A further request then writes on, from the prefix cache that the pass filled. After a
correction the rest of the draft is scored again if it is long enough to be worth a pass.

Sampling. The library draws the tokens, so its draw cannot be known from a scoring pass. An exact answer at a
temperature above 0 is therefore written from the request's seed as if there were no draft, which saves no
time; the prefix that it shares with the draft is reported as accepted. A tolerant answer keeps the draft's
likely tokens and continues with draws.

Constraints. A scoring pass knows none: the model's choice is the likeliest allowed token of those that it
shows. Where it shows no allowed one, the answer departs from its draft, and the request that writes on
chooses. The library never verifies a draft under a constraint while it writes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from asd.errors import AsdError, PreconditionFailed, QueueFull, ResourceExhausted
from asd.values import FinishReason, Message, Sampling
from services.stage.domain import DraftPiece, DraftText, Event, PrefillResult, TokenChunk
from services.stage.engines.arriving_draft import ArrivingDraft
from services.stage.engines.backend import BackendDied, TokenRequest
from services.stage.engines.drafting import continue_inside, verify_inside
from services.stage.engines.engine import EngineStatus, ModelState
from services.stage.engines.probe import ANSWER_TOKENS, probe, probe_prompts
from services.stage.generation.inputs import RequestReader
from services.stage.generation.logprobs import likeliest_of, own_rows, row_signals, take_rows, verify_rows
from services.stage.generation.resync import PASS_PER_DRAFT, Resynchroniser, ResyncPayoff, common_prefix
from services.stage.generation.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from services.stage.engines.backend import Backend, DraftingBackend, TokenScores
    from services.stage.engines.checkpoint import Checkpoint
    from services.stage.generation.call import Call
    from services.stage.generation.logprobs import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoringOptions:
    """How a model is served.

    max_batch: requests in the library at a time; more wait here. max_queue: requests that may wait. context:
    tokens of prompt and answer at most. resync: whether the rest of a draft is proposed after a correction.
    kv_bytes: bytes of one number in the KV cache. cache_bytes: size of that cache, if it is known.
    constrains: whether the backend keeps a request's grammar. most_top_logprobs: largest `top_logprobs` of a
    request, for which each row has enough tokens.
    """

    max_batch: int
    max_queue: int
    context: int
    default_max_new_tokens: int = 160
    resync: bool = True
    kv_bytes: int = 2
    cache_bytes: int = 0
    constrains: bool = False
    most_top_logprobs: int = 1


class ScoringEngine:
    """Runs one model through a backend; see services.stage.engines.engine.Engine for the contract.

    queue_ms is the wait for a slot in the batch. prefill_ms includes a wait inside the library, and the wait
    for a draft to begin: the stage is not busy meanwhile.
    A draft that comes in pieces counts as one proposal in accept_lengths, however many passes score it.
    drafting: the backend, where it can verify drafts while it writes.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        directory: Path,
        checkpoint: Checkpoint,
        backend: Backend,
        options: ScoringOptions,
        drafting: DraftingBackend | None = None,
    ) -> None:
        self.kind = kind
        self._name = name
        self._checkpoint = checkpoint
        self._backend = backend
        self._drafting = drafting
        self._options = options
        self._tokenizer = ChatTokenizer(directory)
        self._reader = RequestReader(
            name,
            self._tokenizer,
            options.context,
            checkpoint.vocabulary,
            checkpoint.eos_ids,
            options.default_max_new_tokens,
            constrains=options.constrains,
            most_top_logprobs=options.most_top_logprobs,
        )
        self._reader.check_shortest_prompt()
        self._state = ModelState.UNLOADED
        self._error = ""
        self._loading = asyncio.Lock()
        self._slots = asyncio.Semaphore(options.max_batch)
        self._waiting = 0
        self._resync_payoff = ResyncPayoff()
        self._calls: set[Call[Row]] = set()
        # The calls that have a slot in the library's batch.
        self._running: set[Call[Row]] = set()
        self._completed = 0
        self._cancelled = 0

    async def load(self) -> None:
        """Load the model, or wake it; a loaded one stays as it is."""
        async with self._loading:
            if self._state is ModelState.READY:
                return
            has_failed = self._state is ModelState.FAILED
            self._state = ModelState.LOADING
            try:
                if has_failed:
                    await self._backend.close()
                await self._backend.start()
                await self._probe()
            except BaseException as error:
                self._state, self._error = ModelState.FAILED, str(error) or type(error).__name__
                if isinstance(error, AsdError) or not isinstance(error, Exception):
                    raise
                logger.error("model %s cannot be loaded", self._name, exc_info=error)
                raise PreconditionFailed(f"model {self._name} cannot be loaded: {error}") from error
            self._state, self._error = ModelState.READY, ""

    async def _probe(self) -> None:
        """Have the library answer and score before the model counts as loaded."""
        prompts = probe_prompts(self._tokenizer, self._checkpoint.vocabulary, self._options.context)
        try:
            await probe(self._name, prompts, self._answer_probe)
        except BaseException:
            # Otherwise it would keep the device's memory.
            await self._backend.close()
            raise

    async def _answer_probe(self, prompts: Sequence[list[int]]) -> npt.NDArray[np.floating]:
        """Return log-probabilities of the library's answers to prompts, computed together if slots allow."""

        async def write(ids: list[int]) -> list[float]:
            request = TokenRequest(ANSWER_TOKENS)
            async with self._slots, aclosing(self._backend.generate(ids, request)) as pieces:
                return [row.logprob async for piece in pieces for row in piece.rows]

        written = await asyncio.gather(*map(write, prompts))
        known = prompts[-1]
        scores = await self._backend.score([*known, known[0]], len(known), "")
        rows = [*scores.rows, scores.following]
        return np.array([*(value for each in written for value in each), *(row.logprob for row in rows)])

    async def unload(self) -> None:
        """Free the model. Raises ResourceExhausted while it or its adapters have calls in flight."""
        async with self._loading:
            if self._state is not ModelState.READY:
                return
            if self._calls:
                raise ResourceExhausted(
                    f"model {self._name} has {len(self._calls)} calls under way: try again later"
                )
            self._state = ModelState.UNLOADED
            await self._backend.stop()

    async def close(self) -> None:
        """End the library's engine and its processes, for good."""
        async with self._loading:
            self._state = ModelState.UNLOADED
            await self._backend.close()

    async def generate(
        self, turns: tuple[Message, ...], sampling: Sampling, adapter: str = ""
    ) -> AsyncGenerator[Event, None]:
        """Write an answer. adapter: by name; "" for the model itself."""
        call = await self._open(turns, sampling)
        async with self._under_way(call), aclosing(self._decode(call, adapter)) as events:
            async for event in events:
                yield event

    async def verify(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        draft: DraftText,
        threshold: float | None,
        adapter: str = "",
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of a draft and continue the answer."""
        call = await self._open(turns, sampling, seed_is_free=seed_is_free)
        arrived = ArrivingDraft(call.most_tokens, call.matcher)
        await self._reader.read_draft(draft, arrived)
        async with (
            self._under_way(call),
            aclosing(self._judge(call, arrived, threshold, adapter)) as events,
        ):
            async for event in events:
                yield event

    async def verify_stream(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        threshold: float | None,
        adapter: str = "",
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Verify a draft while it is being written, with a pass for every 16 tokens that arrive."""
        call = await self._open(turns, sampling, seed_is_free=seed_is_free)
        draft = ArrivingDraft(call.most_tokens, call.matcher)
        reader = asyncio.create_task(self._reader.follow_draft(pieces, draft, draft.notify))
        try:
            async with (
                self._under_way(call),
                aclosing(self._judge(call, draft, threshold, adapter)) as events,
            ):
                async for event in events:
                    yield event
        finally:
            reader.cancel()

    async def prefill(self, turns: tuple[Message, ...], adapter: str = "") -> PrefillResult:
        """Put a prompt into the prefix cache: the library has no such call, so a token is written."""
        call = await self._open(turns, Sampling(max_new_tokens=1))
        count = len(call.prompt)
        # Without the last token: a verification needs its logits, which a cache does not hold.
        call.prompt = call.prompt[:-1] or call.prompt
        async with self._under_way(call), aclosing(self._decode(call, adapter)) as events:
            async for _ in events:
                pass
        return PrefillResult(count, call.cached, (call.prefilled - call.arrived) * 1e3)

    def status(self) -> EngineStatus:
        """Return whether the model is loaded, and how many calls wait and run."""
        held = sum(len(call.prompt) + len(call.ids) for call in self._running)
        drafting = self._drafting
        return EngineStatus(
            state=self._state,
            parameters=self._checkpoint.parameters,
            context_length=self._options.context,
            fingerprint=self._tokenizer.fingerprint,
            memory_bytes=self.memory_bytes,
            kv_cache_bytes=held * self._checkpoint.kv_values_per_token * self._options.kv_bytes,
            queued=self._waiting,
            running=len(self._running),
            cached_sequences=0,
            completed=self._completed,
            cancelled=self._cancelled,
            error=self._error,
            verifies_inside=drafting is not None and drafting.takes_drafts,
            takes_tools=self._tokenizer.takes_tools,
            resamples=drafting is not None and drafting.draws_with_drafts,
            constrains=self._reader.constrains,
            most_top_logprobs=self._options.most_top_logprobs,
        )

    @property
    def memory_bytes(self) -> int:
        """Weights, and the KV cache if its size is set; the library's other memory is not included."""
        return self._checkpoint.weight_bytes + self._options.cache_bytes

    async def _open(
        self, turns: tuple[Message, ...], sampling: Sampling, *, seed_is_free: bool = False
    ) -> Call[Row]:
        call: Call[Row] = await self._reader.open_call(
            turns, sampling, lambda _, rows: row_signals(rows), likeliest_of
        )
        call.seed_is_free = call.seed_is_free or seed_is_free
        return call

    @asynccontextmanager
    async def _under_way(self, call: Call[Row]) -> AsyncIterator[None]:
        """Count a call, release its slot, and turn the library's errors into ours."""
        if self._state is not ModelState.READY:
            raise PreconditionFailed(f"model {self._name} is not loaded")
        if self._slots.locked() and self._waiting >= self._options.max_queue:
            raise QueueFull(f"{self._waiting} requests wait for {self._name} already: try again later")
        self._calls.add(call)
        try:
            yield
            self._completed += 1
        except (GeneratorExit, asyncio.CancelledError):
            self._cancelled += 1
            raise
        except BackendDied as error:
            self._state, self._error = ModelState.FAILED, str(error)
            logger.error("the engine of model %s is gone", self._name, exc_info=error)
            raise AsdError(f"model {self._name} failed on this request") from error
        except AsdError:
            raise
        except Exception as error:
            logger.error("model %s failed", self._name, exc_info=error)
            raise AsdError(f"model {self._name} failed on this request") from error
        finally:
            self._release(call)
            self._calls.discard(call)

    async def _acquire(self, call: Call[Row]) -> None:
        """Wait for a slot in the library's batch."""
        if call not in self._running:
            self._waiting += 1
            asked = time.monotonic()
            try:
                await self._slots.acquire()
            finally:
                self._waiting -= 1
            self._running.add(call)
            # A verification's wait for its draft is left out: routers read this as how busy the stage is.
            call.queued += time.monotonic() - asked

    def _release(self, call: Call[Row]) -> None:
        if call in self._running:
            self._running.remove(call)
            self._slots.release()

    async def _decode(self, call: Call[Row], adapter: str) -> AsyncGenerator[Event, None]:
        """Continue the answer to its end."""
        async with aclosing(self._tokens(call, adapter)) as chunks:
            async for chunk in chunks:
                if chunk is not None:
                    yield chunk
        for event in call.end():
            yield event

    async def _tokens(self, call: Call[Row], adapter: str) -> AsyncGenerator[TokenChunk | None, None]:
        """Continue the answer; after each piece, yield the chunk that may be sent, if any."""
        if call.is_over():
            return
        await self._acquire(call)
        sampling = call.sampling
        top_p = 1.0 if sampling.top_p is None else sampling.top_p
        request = TokenRequest(call.room, sampling.temperature, top_p, sampling.seed, adapter)
        if call.matcher is not None:
            request = replace(request, grammar=call.matcher.grammar.lark, written=tuple(call.ids))
        async with aclosing(self._backend.generate([*call.prompt, *call.ids], request)) as pieces:
            async for piece in pieces:
                call.mark_prefilled(piece.cached)
                call.passes += len(piece.rows)
                yield take_rows(call, piece.rows, has_ended=piece.has_ended)
                # Only a stop sequence ends an answer before the library does. Leaving the loop cancels it.
                if call.is_over() and not piece.is_last:
                    break
        if not call.is_over():
            raise RuntimeError(f"the library ended an answer after {len(call.ids)} tokens, without a reason")

    async def _judge(
        self, call: Call[Row], draft: ArrivingDraft, threshold: float | None, adapter: str
    ) -> AsyncGenerator[Event, None]:
        """Verify a draft and continue the answer to its end."""
        drafting = self._drafting_for(call, threshold, adapter)
        if drafting is not None:
            await draft.wait()
        # A request with a draft does not wait for the part that is still being written. A greedy answer has
        # such a draft scored as it comes, and takes the rest along once it has departed from it.
        if drafting is not None and (call.is_sampled or draft.is_complete):
            await self._acquire(call)
            async with aclosing(verify_inside(drafting, call, draft, resync=self._options.resync)) as events:
                async for event in events:
                    yield event
            return
        judge = self._compare if call.is_sampled and threshold is None else self._verify
        async with aclosing(judge(call, draft, threshold, adapter)) as events:
            async for event in events:
                yield event
        has_rest = draft.accepted + 1 < len(draft.ids) or not draft.is_complete
        if drafting is not None and self._options.resync and has_rest and not call.is_over():
            await self._acquire(call)
            async with aclosing(continue_inside(drafting, call, draft)) as events:
                async for event in events:
                    yield event
            return
        # Without a token of its own in the draft's place, there is nothing to go on from.
        has_own = len(call.ids) > draft.accepted
        if self._options.resync and has_own and not call.is_sampled:
            async with aclosing(self._resync(call, draft, adapter)) as events:
                async for event in events:
                    yield event
        async with aclosing(self._decode(call, adapter)) as events:
            async for event in events:
                yield event

    def _drafting_for(self, call: Call[Row], threshold: float | None, adapter: str) -> DraftingBackend | None:
        """Return the library where it can verify a call's draft while it writes; else None.

        It accepts what the model would choose itself, or by rejection sampling, which draws otherwise than a
        seed would; it knows no other rule, and no constraint.
        """
        drafting = self._drafting
        if drafting is None or not drafting.takes_drafts or threshold is not None or adapter:
            return None
        if call.matcher is not None:
            return None
        can_draw = call.seed_is_free and drafting.draws_with_drafts
        return drafting if can_draw or not call.is_sampled else None

    async def _verify(
        self, call: Call[Row], draft: ArrivingDraft, threshold: float | None, adapter: str
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of the draft, and add the model's own token."""
        chunk = None
        # The last pass's row for the next token: a pass whose prefix is cached would not give it again.
        following: Row | None = None
        while not call.is_over():
            if not draft.is_due:
                # Other calls may use the slot while this draft is being written.
                self._release(call)
            await draft.wait()
            # A pass writes a token too, which must fit the context.
            most = self._options.context - 1 - len(call.prompt) - len(call.ids)
            proposal = draft.ids[draft.accepted :][:most]
            if not proposal:
                break
            is_whole = draft.is_complete and draft.accepted + len(proposal) == len(draft.ids)
            scores = await self._score(call, proposal, adapter, following)
            own = own_rows(proposal, [*scores.rows, scores.following], call.matcher)
            verdict = verify_rows(proposal, scores.rows, threshold, own[:-1])
            accepted = verdict.accepted
            following = scores.following
            draft.judge(verdict)
            call.accepted += accepted
            kept = list(scores.rows[:accepted])
            is_over = accepted < len(proposal) or is_whole or len(proposal) == most
            following_own = own[accepted]
            if is_over and not call.is_sampled and following_own is not None:
                kept.append(following_own)
            chunk = take_rows(call, kept)
            if is_over:
                break
            if chunk is not None:
                yield chunk
                chunk = None
        evidence = draft.evidence()
        if evidence.proposed:
            # One proposal, however many passes it took: the answer holds nothing else so far.
            call.emitted.append(range(draft.accepted + 1))
        yield evidence
        if chunk is not None:
            yield chunk

    async def _resync(
        self, call: Call[Row], draft: ArrivingDraft, adapter: str
    ) -> AsyncGenerator[Event, None]:
        """Propose the rest of the draft after a correction, while the passes save time."""
        resync = Resynchroniser(draft.ids, draft.accepted, PASS_PER_DRAFT)
        is_first = True
        while not call.is_over():
            # A pass writes a token too, which must fit the context.
            most = min(call.room, self._options.context - 1 - len(call.prompt) - len(call.ids))
            proposal = resync.propose(call.ids, most)
            if call.matcher is not None:
                proposal = proposal[: call.matcher.allowed(proposal)]
            if not proposal or (is_first and not self._resync_payoff.is_worth(len(self._running))):
                return
            scores = await self._score(call, proposal, adapter)
            own = own_rows(proposal, [*scores.rows, scores.following], call.matcher)
            kept = verify_rows(proposal, scores.rows, own=own[:-1]).accepted
            resync.judged(len(proposal), kept)
            if is_first:
                self._resync_payoff.learn(len(proposal), kept)
                is_first = False
            call.accepted += kept
            call.emitted.append(range(len(call.ids), len(call.ids) + kept + 1))
            following = own[kept]
            chunk = take_rows(call, [*scores.rows[:kept], *([following] if following is not None else [])])
            if chunk is not None:
                yield chunk
            if following is None:
                return

    async def _compare(
        self, call: Call[Row], draft: ArrivingDraft, _threshold: float | None, adapter: str
    ) -> AsyncGenerator[Event, None]:
        """Write the sampled answer; report the prefix that it shares with the draft once that is known."""
        await draft.wait(is_whole=True)
        ids = draft.ids[: self._options.context - 1 - len(call.prompt)]
        if ids:
            rows = (await self._score(call, ids, adapter)).rows
            # How much is accepted is known only from the sampled answer.
            draft.judge(replace(verify_rows(ids, rows), accepted=0))
        held: list[TokenChunk] = []
        agrees = True
        async with aclosing(self._tokens(call, adapter)) as chunks:
            async for chunk in chunks:
                if chunk is not None:
                    held.append(chunk)
                written = len(call.ids)
                draft.accepted += common_prefix(ids[draft.accepted :], call.ids[draft.accepted :])
                if not call.is_over() and draft.accepted == written < len(ids):
                    continue
                if agrees:
                    agrees = False
                    is_end = draft.accepted == written < len(ids) and ids[written] in call.eos_ids
                    draft.accepted += call.finish is FinishReason.EOS and is_end
                    call.accepted += draft.accepted
                    yield draft.evidence()
                for each in held:
                    yield each
                held.clear()

    async def _score(
        self, call: Call[Row], proposal: list[int], adapter: str, following: Row | None = None
    ) -> TokenScores:
        """Score a proposal in one pass. following: row of its first token, if known."""
        await self._acquire(call)
        known = [*call.prompt, *call.ids]
        first = following.of(proposal[0]) if following else None
        scores = await self._backend.score([*known, *proposal], len(known) + bool(first), adapter)
        if first is not None:
            scores = replace(scores, rows=[first, *scores.rows])
        call.mark_prefilled(scores.cached)
        call.passes += 1
        call.proposed += len(proposal)
        return scores


class AdapterEngine:
    """An adapter of a model, served under its own name; it is loaded with the model."""

    def __init__(self, base: ScoringEngine, adapter: str) -> None:
        self.kind = base.kind
        self._base = base
        self._adapter = adapter

    async def load(self) -> None:
        """Load the model that it adapts."""
        await self._base.load()

    async def unload(self) -> None:
        """Do nothing: an adapter is part of its model's memory."""

    def generate(self, turns: tuple[Message, ...], sampling: Sampling) -> AsyncGenerator[Event, None]:
        """Write an answer."""
        return self._base.generate(turns, sampling, self._adapter)

    def verify(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        draft: DraftText,
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Accept a prefix of a draft and continue the answer."""
        return self._base.verify(turns, sampling, draft, threshold, self._adapter, seed_is_free=seed_is_free)

    def verify_stream(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        threshold: float | None,
        *,
        seed_is_free: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Verify a draft while it is being written."""
        return self._base.verify_stream(
            turns, sampling, pieces, threshold, self._adapter, seed_is_free=seed_is_free
        )

    async def prefill(self, turns: tuple[Message, ...]) -> PrefillResult:
        """Put a prompt into the prefix cache."""
        return await self._base.prefill(turns, self._adapter)

    def status(self) -> EngineStatus:
        """Return the status of its model, which counts the memory."""
        return replace(self._base.status(), memory_bytes=0, verifies_inside=False, resamples=False)
