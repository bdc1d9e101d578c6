"""The conformance suite: what every engine must do. Run by the tests, and by `asd-engine check` on hardware.

An engine is compared with itself: with its own greedy answers and log-probabilities. It is compared with
another engine only if a reference is given. Arithmetic that depends on the rest of a batch, or on whether a
prefix was cached, may flip a near tie. Two answers therefore count as equal if they first differ at a
position whose two likeliest tokens are closer than a tolerance. Those positions are counted.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asd.errors import AsdError, InvalidRequest, ModelRefusal, PreconditionFailed, PromptTooLong
from asd.values import Constraint, FinishReason, Message, Sampling
from services.stage.domain import DraftPiece, DraftText, Result, TokenChunk, VerificationResult
from services.stage.engines.engine import ModelState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    import numpy.typing as npt

    from asd.values import TokenDetail
    from services.stage.domain import Event
    from services.stage.engines.engine import Engine

PROMPTS = (
    "True or false? 3 plus 22 is more than 24.",
    "Max has 9 beads. Max finds 10 more. How many beads does Max have now?",
    "What is Statnor known for? A) iron B) lamps C) grain",
    "Name three colours, and say of each what is often of that colour.",
    "Count from one to ten in words.",
    "Why is the sky blue?",
)
_LONGEST_S = 300.0
# Of the chi-square test, and the least expected of a token that is not counted with the others.
_DRAWS, _DRAWS_AT_A_TIME = 240, 8
_LEAST_EXPECTED = 5.0
# Of the normal distribution: one test in 100,000 fails by chance.
_QUANTILE = 4.265


class NotConforming(Exception):  # noqa: N818 - named by its cause
    """The engine breaks the contract; the message says how."""


class CheckOutcome(NamedTuple):
    """How a check went. error: "" if it passed. near_ties: positions that were tolerated."""

    check: str
    error: str
    near_ties: int
    seconds: float


class EngineAnswer(NamedTuple):
    """An answer with its signals, one entry per token."""

    result: Result
    logprobs: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float32]
    verification: VerificationResult | None
    details: tuple[TokenDetail, ...] = ()


@dataclass
class Suite:
    """An engine under test.

    references: ids of another engine's greedy answers to the prompts, cut to max_new_tokens; None: none.
    tie_margin: probability margin between the two likeliest tokens below which either may be chosen.
    signal_tolerance: between log-probabilities of the same token in two passes.
    """

    engine: Engine
    prompts: Sequence[str] = PROMPTS
    references: Sequence[Sequence[int]] | None = None
    max_new_tokens: int = 48
    tie_margin: float = 0.0
    signal_tolerance: float = 2e-3
    near_ties: int = 0
    _plain: dict[str, EngineAnswer] = field(default_factory=dict)

    @property
    def greedy(self) -> Sampling:
        """The options of most calls."""
        return Sampling(max_new_tokens=self.max_new_tokens)

    async def ask(self, prompt: str | tuple[Message, ...], sampling: Sampling | None = None) -> EngineAnswer:
        """Return a generated answer."""
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        return await collect(self.engine.generate(turns, sampling or self.greedy))

    async def plain(self, prompt: str) -> EngineAnswer:
        """Return the greedy answer to a prompt, generated once."""
        if prompt not in self._plain:
            self._plain[prompt] = await self.ask(prompt)
        return self._plain[prompt]

    async def verify(
        self,
        prompt: str,
        draft: DraftText,
        sampling: Sampling | None = None,
        threshold: float | None = None,
    ) -> EngineAnswer:
        """Return a verified answer; its evidence must come first."""
        turns = (Message("user", prompt),)
        call = self.engine.verify(turns, sampling or self.greedy, draft, threshold)
        return await collect(call, evidence="first")

    def draft(self, ids: Sequence[int], finish: FinishReason = FinishReason.EOS) -> DraftText:
        """Return a draft of the engine's own tokens."""
        return DraftText("", tuple(ids), self.engine.status().fingerprint, finish)

    def own_draft(self, answer: EngineAnswer) -> DraftText:
        """Return an answer as a draft."""
        return self.draft(answer.result.ids, answer.result.finish)

    def expect_same(self, found: EngineAnswer, wanted: EngineAnswer, what: str) -> bool:
        """Return whether two answers are equal. Raises NotConforming unless a near tie explains it."""
        left, right = found.result, wanted.result
        if left.ids == right.ids:
            if left.finish is not right.finish:
                raise NotConforming(f"{what}: ended by {left.finish.value}, not {right.finish.value}")
            return True
        position = _first_difference(left.ids, right.ids)
        # If one answer ended there, the margin is that of the longer one.
        margins = wanted.margins if position < len(right.ids) else found.margins
        if margins[position] < self.tie_margin:
            self.near_ties += 1
            return False
        raise NotConforming(
            f"{what}: token {position} is {_at(left.ids, position)}, not {_at(right.ids, position)}, "
            f"with a margin of {margins[position]:.4f} between the two likeliest"
        )


async def collect(events: AsyncGenerator[Event, None], evidence: str = "") -> EngineAnswer:
    """Return what a call yields, after the checks that hold for every call.

    evidence: "first" or "any" if a VerificationResult must come. Raises NotConforming.
    """
    seen: list[Event] = []
    async with asyncio.timeout(_LONGEST_S):
        seen.extend([event async for event in events])
    result = seen[-1] if seen else None
    expect(isinstance(result, Result), "the last event is not a Result")
    assert isinstance(result, Result)
    chunks = [event for event in seen if isinstance(event, TokenChunk)]
    verifications = [event for event in seen if isinstance(event, VerificationResult)]
    expect(sum(isinstance(e, Result) for e in seen) == 1, "there is more than one Result")
    expect(len(verifications) == bool(evidence), f"{len(verifications)} verifications came")
    expect(evidence != "first" or seen[0] is verifications[0], "the verification does not come first")
    expect(tuple(i for c in chunks for i in c.ids) == result.ids, "the chunks' ids are not the result's")
    expect("".join(c.text for c in chunks) == result.text, "the chunks' text is not the result's")
    columns = [
        np.concatenate([np.zeros(0, np.float32), *(getattr(c, name) for c in chunks)])
        for name in ("logprobs", "entropies", "margins")
    ]
    logprobs, entropies, margins = columns
    expect(all(len(c) == len(result.ids) for c in columns), "a token has no signals")
    expect(bool((logprobs <= 0).all()), "a log-probability is above 0")
    expect(bool((entropies >= 0).all()), "an entropy is below 0")
    expect(bool(((margins >= 0) & (margins <= 1)).all()), "a margin is not in [0, 1]")
    times = (result.queue_ms, result.prefill_ms, result.decode_ms)
    expect(
        min(times) >= 0 and abs(sum(times) - result.total_ms) < 1, f"times {times} are not {result.total_ms}"
    )
    for found in verifications:
        sizes = {found.proposed, len(found.ranks), len(found.target_logprobs)}
        expect(len(sizes) == 1 and 0 <= found.accepted <= found.proposed, f"evidence does not fit: {found}")
    expect(0 <= result.accepted_tokens <= result.proposed_tokens, "more is accepted than proposed")
    details = tuple(each for chunk in chunks for each in chunk.details)
    expect(len(details) in {0, len(result.ids)}, "some tokens have details and others none")
    evidence_found = verifications[0] if verifications else None
    return EngineAnswer(result, logprobs, entropies, margins, evidence_found, details)


def expect(is_so: bool, otherwise: str) -> None:
    """Raise NotConforming unless a condition holds."""
    if not is_so:
        raise NotConforming(otherwise)


# The checks, in the order of the report.


async def greedy_answers_repeat(suite: Suite) -> None:
    """The same prompt has the same greedy answer: the reference's, if there is one."""
    for index, prompt in enumerate(suite.prompts):
        first = await suite.plain(prompt)
        suite.expect_same(await suite.ask(prompt), first, f"prompt {index} again")
        if suite.references is not None:
            wanted = tuple(suite.references[index][: suite.max_new_tokens])
            if first.result.ids != wanted:
                position = _first_difference(first.result.ids, wanted)
                margin = first.margins[position] if position < len(first.margins) else 1.0
                expect(margin < suite.tie_margin, f"prompt {index} leaves the reference at token {position}")
                suite.near_ties += 1


async def answers_end_where_they_should(suite: Suite) -> None:
    """A limit ends an answer at its length, and cuts the longer one."""
    for prompt in suite.prompts[:3]:
        whole = await suite.plain(prompt)
        for most in (1, 2, max(1, len(whole.result.ids))):
            short = await suite.ask(prompt, Sampling(max_new_tokens=most))
            expect(len(short.result.ids) <= most, f"{len(short.result.ids)} tokens where {most} are allowed")
            if len(whole.result.ids) >= most and short.result.ids == whole.result.ids[:most]:
                expect(short.result.finish is FinishReason.LENGTH, f"{most} tokens do not end by length")


async def together_is_as_alone(suite: Suite) -> None:
    """Requests at the same time get the answers that they get alone."""
    alone = [await suite.plain(prompt) for prompt in suite.prompts]
    together = await asyncio.gather(*(suite.ask(prompt) for prompt in suite.prompts for _ in range(2)))
    for index, answer in enumerate(together):
        suite.expect_same(answer, alone[index // 2], f"prompt {index // 2} among {len(together)}")


async def own_answers_are_accepted_whole(suite: Suite) -> None:
    """Scoring an own greedy answer gives rank 0 throughout, and the log-probabilities that it had."""
    for index, prompt in enumerate(suite.prompts):
        plain = await suite.plain(prompt)
        again = await suite.verify(prompt, suite.own_draft(plain))
        is_same = suite.expect_same(again, plain, f"prompt {index} verified")
        evidence = again.verification
        assert evidence is not None
        wanted = len(plain.result.ids) + (plain.result.finish is FinishReason.EOS)
        expect(evidence.proposed == wanted, f"{evidence.proposed} of {wanted} tokens are proposed")
        if not is_same or evidence.accepted < evidence.proposed:
            refused = plain.margins[evidence.accepted :][:1]
            close = refused.size > 0 and refused[0] < suite.tie_margin
            expect(close, f"token {evidence.accepted} of an own answer is refused")
            suite.near_ties += is_same
            continue
        expect(not evidence.ranks[: evidence.accepted].any(), "an accepted token is not the likeliest")
        size = len(plain.logprobs)
        apart = np.abs(evidence.target_logprobs[:size] - plain.logprobs).max(initial=0.0)
        expect(apart <= suite.signal_tolerance, f"log-probabilities differ by {apart:.5f} between passes")
        expect(
            np.abs(again.margins - plain.margins).max(initial=0.0) <= suite.signal_tolerance, "margins differ"
        )
        expect(again.result.forward_passes < max(2, wanted), "verification took as many passes as decoding")


async def random_drafts_change_no_token(suite: Suite) -> None:
    """Whatever the draft, the verified answer is the generated one."""
    rng = random.Random(7)  # noqa: S311 - not for secrets
    known = [(await suite.plain(prompt)).result.ids for prompt in suite.prompts]
    pool = sorted({token for ids in known for token in ids})
    for index, prompt in enumerate([*suite.prompts] * 3):
        plain = await suite.plain(prompt)
        ids = [rng.choice(pool) if rng.random() < 0.08 else token for token in plain.result.ids]
        ids = ids[: rng.randint(0, len(ids))] + [rng.choice(pool) for _ in range(rng.randint(0, 24))]
        draft = suite.draft(ids, rng.choice(list(FinishReason)))
        verified = await suite.verify(prompt, draft)
        if suite.expect_same(verified, plain, f"draft {index}"):
            evidence = verified.verification
            assert evidence is not None
            common = _first_difference(ids, plain.result.ids)
            expect(evidence.accepted in {common, common + 1}, f"{evidence.accepted} accepted, {common} agree")
            lengths = verified.result.accept_lengths
            expect(all(length >= 0 for length in lengths), f"accept lengths {lengths}")
            written = len(verified.result.ids) + (verified.result.finish is FinishReason.EOS)
            expect(sum(lengths) <= written, f"accept lengths {lengths} in an answer of {written} tokens")


async def verified_answers_are_as_long_as_generated_ones(suite: Suite) -> None:
    """A limit ends a verified answer where it ends a generated one."""
    for prompt in suite.prompts[:3]:
        draft = suite.own_draft(await suite.plain(prompt))
        for most in (1, 3, max(1, len(draft.ids))):
            sampling = Sampling(max_new_tokens=most)
            plain = await suite.ask(prompt, sampling)
            suite.expect_same(await suite.verify(prompt, draft, sampling), plain, f"at {most} tokens")


async def drafts_are_verified_while_they_are_written(suite: Suite) -> None:
    """A draft in pieces gives the same answer as a whole one."""
    rng = random.Random(11)  # noqa: S311 - not for secrets
    for index, prompt in enumerate(suite.prompts):
        plain = await suite.plain(prompt)
        ids = list(plain.result.ids)
        if ids and index % 2:
            ids[rng.randrange(len(ids))] = ids[0]
        turns = (Message("user", prompt),)
        call = suite.engine.verify_stream(turns, suite.greedy, _pieces(suite, ids, plain.result.finish), None)
        suite.expect_same(await collect(call, evidence="any"), plain, f"prompt {index} in pieces")


async def tolerance_accepts_more(suite: Suite) -> None:
    """A lower threshold accepts no less, 1 what an exact target does, and one next to 0 everything."""
    counts = {None: 0, 1.0: 0, 0.3: 0, 1e-30: 0}
    proposed = 0
    answers = [await suite.plain(prompt) for prompt in suite.prompts]
    for prompt, other in zip(suite.prompts, [*answers[1:], answers[0]], strict=True):
        ids = other.result.ids[:12]
        proposed += len(ids)
        for threshold in counts:
            draft = suite.draft(ids, FinishReason.LENGTH)
            found = (await suite.verify(prompt, draft, threshold=threshold)).verification
            assert found is not None
            counts[threshold] += found.accepted
    expect(counts[None] == counts[1.0] <= counts[0.3] <= counts[1e-30], f"accepted by threshold: {counts}")
    expect(counts[1e-30] == proposed, f"of {proposed} tokens, {counts[1e-30]} have a chance at all")


async def other_tokenizers_drafts_are_encoded_anew(suite: Suite) -> None:
    """A draft of another tokenizer is used by its text."""
    for prompt in suite.prompts[:3]:
        plain = await suite.plain(prompt)
        draft = DraftText(plain.result.text, (9, 9, 9), "0" * 64, plain.result.finish)
        verified = await suite.verify(prompt, draft)
        suite.expect_same(verified, plain, "a draft as text")
        expect(verified.verification is not None and not verified.verification.ids_used, "its ids are used")


async def unusable_drafts_are_refused(suite: Suite) -> None:
    """Ids beyond the vocabulary, and ids of another tokenizer without text, are the caller's mistake."""
    own = suite.engine.status().fingerprint
    cases = (
        (DraftText("", (2**31,), own, FinishReason.EOS), "draft.token_ids"),
        (DraftText("", (9,), "f" * 64, FinishReason.EOS), "draft.tokenizer_fingerprint"),
    )
    for draft, name in cases:
        try:
            await suite.verify(suite.prompts[0], draft)
        except InvalidRequest as error:
            expect(error.field == name, f"the error names {error.field}, not {name}")
        else:
            raise NotConforming(f"a draft with a wrong {name} is taken")


async def constraints_are_kept(suite: Suite) -> None:
    """An answer keeps its constraint, written or drawn; an engine that cannot keep one refuses it."""
    for constraint, keeps in _CONSTRAINTS:
        if not suite.engine.status().constrains:
            await _expect_refusal(suite, Sampling(constraint=constraint), "sampling.constraint")
            continue
        for prompt in suite.prompts[:4]:
            for sampling in (_bound(suite, constraint), _bound(suite, constraint, seed=5)):
                answer = (await suite.ask(prompt, sampling)).result
                expect(answer.constrained, "the result does not say that a constraint was kept")
                expect(keeps(answer.text), f"{answer.text!r} breaks its constraint")
                expect(answer.finish is FinishReason.EOS, f"{answer.text!r} ended by {answer.finish.value}")
    if suite.engine.status().constrains:
        broken = Sampling(constraint=Constraint(json_schema={"type": "of no kind"}))
        try:
            await suite.ask(suite.prompts[0], broken)
        except InvalidRequest as error:
            expect(error.field.startswith("sampling.constraint"), f"the error names {error.field}")
        else:
            raise NotConforming("a schema that is none is taken")


async def drafts_do_not_break_a_constraint(suite: Suite) -> None:
    """Whatever the draft, a constrained answer is the one that is written without it."""
    if not suite.engine.status().constrains:
        return
    for constraint, _ in _CONSTRAINTS:
        for prompt in suite.prompts[:4]:
            free = (await suite.plain(prompt)).result.ids
            for sampling in (_bound(suite, constraint), _bound(suite, constraint, seed=5)):
                wanted = await suite.ask(prompt, sampling)
                own = wanted.result.ids
                drafts = (suite.own_draft(wanted), suite.draft(free), suite.draft([*own[:3], *free, *own]))
                for draft in drafts:
                    found = await suite.verify(prompt, draft, sampling)
                    suite.expect_same(found, wanted, "a constrained answer with a draft")
                    evidence = found.verification
                    assert evidence is not None
                    leaves = draft is not drafts[0]
                    expect((evidence.allowed is not None) == leaves, f"of a draft, {evidence} is said")
                turns = (Message("user", prompt),)
                pieces = _pieces(suite, drafts[2].ids, FinishReason.EOS)
                call = suite.engine.verify_stream(turns, sampling, pieces, None)
                suite.expect_same(
                    await collect(call, evidence="any"), wanted, "a constrained draft in pieces"
                )


async def predictions_that_break_a_constraint_are_refused(suite: Suite) -> None:
    """A caller's draft outside the constraint is the caller's mistake; one inside it is a draft."""
    if not suite.engine.status().constrains:
        return
    sampling = _bound(suite, Constraint(choice=("yes", "no")))
    inside = DraftText("yes", (), "", FinishReason.EOS, is_prediction=True)
    expect((await suite.verify(suite.prompts[0], inside, sampling)).result.text in {"yes", "no"}, "it breaks")
    try:
        await suite.verify(suite.prompts[0], replace(inside, text="perhaps"), sampling)
    except InvalidRequest as error:
        expect(error.field == "draft", f"the error names {error.field}, not draft")
    else:
        raise NotConforming("a prediction outside the constraint is taken")


async def log_probabilities_come_with_the_likeliest_tokens(suite: Suite) -> None:
    """On request, each token comes with its bytes and the likeliest ones at its place, verified or not."""
    most = suite.engine.status().most_top_logprobs
    if not most:
        await _expect_refusal(suite, Sampling(top_logprobs=0), "sampling.top_logprobs")
    for count in sorted({0, min(most, 2), most}) if most else ():
        sampling = replace(suite.greedy, top_logprobs=count)
        for prompt in suite.prompts[:3]:
            plain = await suite.plain(prompt)
            written = await suite.ask(prompt, sampling)
            suite.expect_same(written, plain, "an answer with log-probabilities")
            verified = await suite.verify(prompt, suite.own_draft(plain), sampling)
            for answer in (written, verified):
                expect(len(answer.details) == len(answer.result.ids), "a token has no details")
                _expect_details(suite, answer, count)


async def prompts_beyond_the_context_are_refused(suite: Suite) -> None:
    """A prompt that does not fit is refused as too long for this model."""
    context = suite.engine.status().context_length
    for text in ("word " * (context + 1), "a" * 4_000_000):
        try:
            await suite.ask(text)
        except PromptTooLong as error:
            expect(error.field == "prompt", f"the error names {error.field}, not prompt")
        else:
            raise NotConforming(
                f"a prompt of {len(text)} characters is taken, with a context of {context} tokens"
            )


async def stop_sequences_end_before_themselves(suite: Suite) -> None:
    """An answer ends before a stop sequence, generated or verified."""
    for prompt in suite.prompts:
        plain = await suite.plain(prompt)
        text = plain.result.text
        stop = text[len(text) // 2 :][:3]
        if not stop:
            continue
        sampling = Sampling(max_new_tokens=suite.max_new_tokens, stop=(stop,))
        cut = await suite.ask(prompt, sampling)
        expect(stop not in cut.result.text, "the stop sequence is part of the answer")
        if plain.result.ids[: len(cut.result.ids)] == cut.result.ids:
            expect(cut.result.finish is FinishReason.STOP, f"ended by {cut.result.finish.value}, not stop")
            expect(cut.result.text == text[: text.index(stop)], "the answer is not cut where it begins")
        verified = await suite.verify(prompt, suite.own_draft(plain), sampling)
        suite.expect_same(verified, cut, "a verified answer with a stop sequence")


async def sampling_repeats_with_its_seed(suite: Suite) -> None:
    """A seed repeats its answer, other seeds give others, and a draft changes nothing."""
    prompt, most = suite.prompts[3], suite.max_new_tokens
    drawn = [
        await suite.ask(prompt, Sampling(max_new_tokens=most, temperature=1.0, seed=seed))
        for seed in (1, 1, 2, 3)
    ]
    suite.expect_same(drawn[1], drawn[0], "the same seed")
    expect(len({answer.result.ids for answer in drawn}) > 1, "three seeds give one answer")
    sampling = Sampling(max_new_tokens=most, temperature=1.0, seed=1)
    for draft in (suite.own_draft(drawn[0]), suite.own_draft(drawn[2]), suite.draft(())):
        verified = await suite.verify(prompt, draft, sampling)
        is_same = suite.expect_same(verified, drawn[0], "a sampled answer with a draft")
        evidence = verified.verification
        assert evidence is not None
        if is_same and draft.ids == drawn[0].result.ids:
            expect(evidence.accepted == evidence.proposed, "its own draw is not accepted")


async def draws_with_a_draft_follow_the_model(suite: Suite) -> None:
    """A draft does not change how likely each token is: by a chi-square test of the first two."""
    answers = [await suite.plain(prompt) for prompt in suite.prompts]
    doubtful = max(range(len(answers)), key=lambda index: float(answers[index].entropies[:1].sum()))
    prompt = suite.prompts[doubtful]
    resamples = suite.engine.status().resamples

    async def draw(draft: DraftText | None, seed: int) -> EngineAnswer:
        # With a seed, a draft changes no draw at all.
        sampling = Sampling(
            max_new_tokens=2, temperature=1.0, seed=None if resamples and draft is not None else seed
        )
        return await (suite.verify(prompt, draft, sampling) if draft else suite.ask(prompt, sampling))

    async def draw_all(draft: DraftText | None, count: int) -> list[EngineAnswer]:
        return [
            answer
            for start in range(0, count, _DRAWS_AT_A_TIME)
            for answer in await asyncio.gather(
                *(draw(draft, seed) for seed in range(start, start + _DRAWS_AT_A_TIME))
            )
        ]

    free = await draw_all(None, _DRAWS // 4)
    whole = [answer for answer in free if len(answer.result.ids) == 2]
    expect(bool(whole), "no drawn answer has two tokens")
    example = max(whole, key=lambda answer: _both_ways(np.exp(answer.logprobs)))
    draft = suite.draft(example.result.ids, FinishReason.LENGTH)
    drawn = await draw_all(draft, _DRAWS)
    for answer in drawn:
        evidence = answer.verification
        is_so = evidence is not None and evidence.resampled == resamples
        expect(is_so, f"draws {'without' if resamples else 'with'} a seed were {'not ' * resamples}resampled")
    likely: dict[tuple[int, ...], float] = {}
    for answer in [*free, *drawn]:
        likely |= {answer.result.ids[: end + 1]: float(p) for end, p in enumerate(np.exp(answer.logprobs))}
    for position, prefix in enumerate(((), draft.ids[:1])):
        following = [
            answer.result.ids[: position + 1]
            for answer in drawn
            if len(answer.result.ids) > position and answer.result.ids[:position] == prefix
        ]
        known = {ids: p for ids, p in likely.items() if len(ids) == position + 1 and ids[:-1] == prefix}
        # An answer that ended before it counts, as none of these.
        total = sum(answer.result.ids[:position] == prefix for answer in drawn)
        found, most = _chi_square(following, known, total)
        expect(
            found <= most, f"token {position}: chi-square {found:.1f}, {most:.1f} at most, of {total} draws"
        )


async def a_longer_conversation_changes_no_token(suite: Suite) -> None:
    """A cached beginning of a conversation does not change its next answer."""
    for prompt, following in zip(suite.prompts[:3], suite.prompts[1:], strict=False):
        first = await suite.plain(prompt)
        turns = (Message("user", prompt), Message("assistant", first.result.text), Message("user", following))
        warm = await suite.ask(turns)
        suite.expect_same(await suite.ask(turns), warm, "a conversation again")
        cached = warm.result.cached_prompt_tokens
        expect(0 <= cached < warm.result.prompt_tokens, f"{cached} tokens are cached of the prompt")


async def prefill_changes_no_token(suite: Suite) -> None:
    """A prefill does not change the answer."""
    prompt = suite.prompts[4]
    warmed = await suite.engine.prefill((Message("user", prompt),))
    answer = await suite.ask(prompt)
    expect(warmed.prompt_tokens == answer.result.prompt_tokens, "prefill counts another prompt")
    expect(warmed.total_ms >= 0, "prefill took less than no time")
    suite.expect_same(answer, await suite.plain(prompt), "a warmed prompt")


async def cancelled_calls_stop(suite: Suite) -> None:
    """Calls cancelled at any moment leave nothing running, and the next call is served."""
    rng = random.Random(3)  # noqa: S311 - not for secrets
    before = suite.engine.status().cancelled
    known = {prompt: await suite.plain(prompt) for prompt in suite.prompts}

    async def start_and_leave(index: int) -> None:
        prompt = suite.prompts[index % len(suite.prompts)]
        turns, ids = (Message("user", prompt),), known[prompt].result.ids
        calls = (
            lambda: suite.engine.generate(turns, suite.greedy),
            lambda: suite.engine.verify(turns, suite.greedy, suite.draft(ids[::-1]), None),
            lambda: suite.engine.verify_stream(turns, suite.greedy, _never(suite, ids), None),
        )
        events = calls[index % 3]()
        step = asyncio.ensure_future(anext(events, None))
        for _ in range(rng.choice((0, 1, 30))):
            await asyncio.sleep(0)
        if not step.done():
            step.cancel()
        await asyncio.gather(step, return_exceptions=True)
        await events.aclose()

    await asyncio.gather(*(start_and_leave(index) for index in range(30)))
    deadline = time.monotonic() + 30
    while (status := suite.engine.status()).running or status.queued:
        expect(time.monotonic() < deadline, f"{status.running} calls run on, {status.queued} wait")
        await asyncio.sleep(0.01)
    expect(status.cancelled > before, "no cancelled call is counted")
    expect(status.kv_cache_bytes == 0, f"{status.kv_cache_bytes} bytes of cache are held by nobody")
    prompt = suite.prompts[0]
    suite.expect_same(await suite.ask(prompt), known[prompt], "after cancelled calls")


async def status_tells_what_is(suite: Suite) -> None:
    """A loaded model says so, with its size."""
    await suite.plain(suite.prompts[0])
    status = suite.engine.status()
    expect(status.state is ModelState.READY, f"the state is {status.state.value}")
    for name in ("parameters", "context_length", "memory_bytes", "completed"):
        expect(getattr(status, name) > 0, f"{name} is {getattr(status, name)}")
    expect(not status.error, f"there is an error: {status.error}")


async def a_model_can_be_unloaded_and_loaded_again(suite: Suite) -> None:
    """An unloaded model refuses calls; loaded again, it answers as before."""
    prompt = suite.prompts[0]
    before = await suite.plain(prompt)
    await suite.engine.unload()
    expect(suite.engine.status().state is ModelState.UNLOADED, "it is not unloaded")
    try:
        await suite.ask(prompt)
    except PreconditionFailed:
        pass
    else:
        raise NotConforming("an unloaded model answers")
    finally:
        await suite.engine.load()
    await suite.engine.load()
    expect(suite.engine.status().state is ModelState.READY, "it is not loaded again")
    suite.expect_same(await suite.ask(prompt), before, "after loading again")


Check = Callable[[Suite], Awaitable[None]]
CHECKS: tuple[Check, ...] = (
    greedy_answers_repeat,
    answers_end_where_they_should,
    together_is_as_alone,
    own_answers_are_accepted_whole,
    random_drafts_change_no_token,
    verified_answers_are_as_long_as_generated_ones,
    drafts_are_verified_while_they_are_written,
    tolerance_accepts_more,
    other_tokenizers_drafts_are_encoded_anew,
    unusable_drafts_are_refused,
    constraints_are_kept,
    drafts_do_not_break_a_constraint,
    predictions_that_break_a_constraint_are_refused,
    log_probabilities_come_with_the_likeliest_tokens,
    prompts_beyond_the_context_are_refused,
    stop_sequences_end_before_themselves,
    sampling_repeats_with_its_seed,
    draws_with_a_draft_follow_the_model,
    a_longer_conversation_changes_no_token,
    prefill_changes_no_token,
    cancelled_calls_stop,
    status_tells_what_is,
    a_model_can_be_unloaded_and_loaded_again,
)


async def run_check(suite: Suite, check: Check) -> CheckOutcome:
    """Run a check and return its outcome, an unexpected error included."""
    before, started = suite.near_ties, time.monotonic()
    error = ""
    try:
        await check(suite)
    except NotConforming as failure:
        error = str(failure)
    except AsdError as failure:
        error = f"{type(failure).__name__}: {failure.message}"
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    name = getattr(check, "__name__", "check").replace("_", " ")
    return CheckOutcome(name, error, suite.near_ties - before, time.monotonic() - started)


def _is_small_object(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["kind", "count", "sure"]
        and value["kind"] in {"iron", "grain"}
        and value["count"] in range(100)
        and value["sure"] in {True, False, None}
    )


# Constraints whose answers are short, whatever a model writes, and whether a text keeps each.
_CONSTRAINTS: tuple[tuple[Constraint, Callable[[str], bool]], ...] = (
    (
        Constraint(
            json_schema={
                "type": "object",
                "properties": {
                    "kind": {"enum": ["iron", "grain"]},
                    "count": {"type": "integer", "minimum": 0, "maximum": 99},
                    "sure": {"type": ["boolean", "null"]},
                },
                "required": ["kind", "count", "sure"],
                "additionalProperties": False,
            }
        ),
        _is_small_object,
    ),
    (Constraint(regex="[a-z]{2,9}, [0-9]{2}"), lambda text: bool(re.fullmatch("[a-z]{2,9}, [0-9]{2}", text))),
    (Constraint(choice=("yes", "no", "maybe not")), lambda text: text in {"yes", "no", "maybe not"}),
)


def _bound(suite: Suite, constraint: Constraint, seed: int | None = None) -> Sampling:
    """Return the options of a constrained call, which draws if it has a seed."""
    sampling = Sampling(max_new_tokens=2 * suite.max_new_tokens, constraint=constraint)
    return sampling if seed is None else replace(sampling, temperature=1.0, seed=seed)


async def _expect_refusal(suite: Suite, sampling: Sampling, field: str) -> None:
    try:
        await suite.ask(suite.prompts[0], sampling)
    except ModelRefusal as error:
        expect(error.field == field, f"the error names {error.field}, not {field}")
    else:
        raise NotConforming(f"{field} is taken by an engine that says it cannot serve it")


def _expect_details(suite: Suite, answer: EngineAnswer, count: int) -> None:
    """Check what is told of each token beside its log-probability."""
    for token, logprob, detail in zip(answer.result.ids, answer.logprobs, answer.details, strict=True):
        found = [each.logprob for each in detail.likeliest]
        expect(len(found) == count, f"{len(found)} of {count} tokens are told")
        expect(found == sorted(found, reverse=True), "the likeliest tokens are not in order")
        if found:
            expect(found[0] >= logprob - suite.signal_tolerance, "a token is likelier than the likeliest")
        for each in detail.likeliest:
            if each.token_id == token:
                expect(abs(each.logprob - logprob) <= suite.signal_tolerance, "a token has two probabilities")
                expect(each.text == detail.text, "a token has two texts")
    text = b"".join(each.text for each in answer.details).decode(errors="ignore")
    wanted = answer.result.text.replace("\ufffd", "")
    expect(text.strip() == wanted.strip(), f"the tokens' bytes are {text!r}, and the text {wanted!r}")


async def _pieces(
    suite: Suite, ids: Sequence[int], finish: FinishReason
) -> AsyncIterator[DraftPiece | FinishReason]:
    fingerprint = suite.engine.status().fingerprint
    for start in range(0, len(ids), 5):
        yield DraftPiece(tuple(ids[start : start + 5]), "", fingerprint)
        await asyncio.sleep(0)
    yield finish


async def _never(suite: Suite, ids: Sequence[int]) -> AsyncIterator[DraftPiece | FinishReason]:
    """Yield a draft that never ends."""
    yield DraftPiece(tuple(ids), "", suite.engine.status().fingerprint)
    await asyncio.Event().wait()
    yield FinishReason.EOS


def _both_ways(likely: npt.NDArray[np.float32]) -> float:
    """Return how likely a draw begins with the first of two tokens, and may have another second one."""
    return float(likely[0] * min(likely[1], 1.0 - likely[1]))


def _chi_square(
    drawn: Sequence[tuple[int, ...]], likely: dict[tuple[int, ...], float], total: int
) -> tuple[float, float]:
    """Return the statistic of draws beside the probabilities of what may be drawn, and its bound.

    total: draws, with those that are none of `likely`; they count as one outcome, with rare ones.
    The bound is Wilson's and Hilferty's (1931).
    """
    common = {ids: p for ids, p in likely.items() if p * total >= _LEAST_EXPECTED}
    counts = [drawn.count(ids) for ids in common]
    expected = [p * total for p in common.values()]
    counts.append(total - sum(counts))
    expected.append(max(total - sum(expected), 0.0))
    if expected[-1] < _LEAST_EXPECTED and len(expected) > 1:
        counts[-2:] = [sum(counts[-2:])]
        expected[-2:] = [sum(expected[-2:])]
    freedom = len(counts) - 1
    if not freedom:
        return 0.0, 0.0
    statistic = sum((count - each) ** 2 / each for count, each in zip(counts, expected, strict=True))
    part = 2 / (9 * freedom)
    return statistic, freedom * (1 - part + _QUANTILE * part**0.5) ** 3


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(left), len(right)))


def _at(ids: Sequence[int], position: int) -> str:
    return str(ids[position]) if position < len(ids) else "the end"
