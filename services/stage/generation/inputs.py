"""Turns requests into calls: prompts and drafts become ids of a model's vocabulary. For all engines."""

from __future__ import annotations

import asyncio
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from asd.errors import (
    AsdError,
    ConversationRefused,
    InvalidRequest,
    ModelRefusal,
    PreconditionFailed,
    PromptTooLong,
)
from asd.values import Candidate, FinishReason, TokenDetail, tools_of
from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.call import Call
from services.stage.generation.constraint import GrammarCompiler, compiler_for
from services.stage.generation.template_values import MUST_CALL, characters
from services.stage.generation.tokenizer import TooManyTokens
from services.stage.generation.tool_grammar import call_grammar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from asd.values import Constraint, Message, Sampling
    from services.stage.domain import DraftPiece, DraftText
    from services.stage.generation.answer import Signals
    from services.stage.generation.call import Evidence
    from services.stage.generation.constraint import Grammar
    from services.stage.generation.draft import ReceivedDraft
    from services.stage.generation.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)

# Characters above which a text is encoded in a thread, so that other requests continue. Chosen: about 5 ms
# of work.
_LONG_TEXT = 8_192
# Long texts that are encoded at a time. Measured: each takes about 180 bytes of memory per character.
_LONG_TEXTS = 2


class RequestReader:
    """Reads the requests of one model. context, vocabulary: in tokens. eos_ids: tokens that end an answer.

    constrains: whether constraints are compiled, unless llguidance cannot use the tokenizer.
    most_top_logprobs: largest `top_logprobs` that is served; None: no log-probabilities are reported.
    An invalid request raises InvalidRequest, which names the field. A request that another model may take
    raises ModelRefusal.
    """

    def __init__(
        self,
        name: str,
        tokenizer: ChatTokenizer,
        context: int,
        vocabulary: int,
        eos_ids: Sequence[int],
        default_max_new_tokens: int = 160,
        *,
        constrains: bool = False,
        most_top_logprobs: int | None = None,
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._context = context
        self._vocabulary = vocabulary
        self._eos_ids = tuple(eos_ids)
        self._default_max_new_tokens = default_max_new_tokens
        self._most_top_logprobs = most_top_logprobs
        self._grammars = self._compiler() if constrains else None
        # A cancelled request's thread runs to its end; only then does the next text start.
        self._long_texts = ThreadPoolExecutor(_LONG_TEXTS, thread_name_prefix="long-text")

    @property
    def constrains(self) -> bool:
        """Whether it takes constraints."""
        return self._grammars is not None

    def check_shortest_prompt(self) -> None:
        """Raise PreconditionFailed if a short conversation has no tokens, or leaves no room for an answer."""
        tokens = len(self._tokenizer.plain_prompt())
        if not tokens:
            raise PreconditionFailed(f"{self._name}: the chat template makes nothing of a conversation")
        if tokens >= self._context:
            raise PreconditionFailed(
                f"{self._name}: the chat template makes {tokens} tokens of a short conversation, and the "
                f"model takes at most {self._context} of prompt and answer: raise max_model_len"
            )

    async def open_call(
        self,
        turns: tuple[Message, ...],
        sampling: Sampling,
        signals: Callable[[Sequence[int], Sequence[Evidence]], Signals],
        likeliest: Callable[[Evidence, int], Iterable[tuple[int, float]]] | None = None,
    ) -> Call[Evidence]:
        """Return the call of a request, with a seed if it samples. signals: see Call.

        likeliest: returns so many of the likeliest tokens with their log-probabilities, likeliest first.
        """
        self._refuse_unsupported(turns, sampling)
        prompt = await self.read_prompt(turns)
        form, matcher = self._form(turns, sampling), None
        if form is not None and self._grammars is not None:
            matcher = await self._grammars.compile(form)
        details = None
        if sampling.top_logprobs is not None and likeliest is not None:
            details = partial(self._details, likeliest, sampling.top_logprobs)
        seed_is_free = sampling.temperature > 0 and sampling.seed is None
        if seed_is_free:
            sampling = replace(sampling, seed=secrets.randbits(63))
        wanted = sampling.max_new_tokens or self._default_max_new_tokens
        most_tokens = min(wanted, self._context - len(prompt))
        answer = AnswerBuilder(self._tokenizer.stream(), sampling.stop)
        return Call(
            prompt,
            most_tokens,
            sampling,
            answer,
            self._eos_ids,
            signals,
            seed_is_free=seed_is_free,
            details=details,
            matcher=matcher,
        )

    def _refuse_unsupported(self, turns: tuple[Message, ...], sampling: Sampling) -> None:
        if sampling.constraint is not None and not self.constrains:
            raise ModelRefusal(f"{self._name} cannot keep a constraint", field="sampling.constraint")
        if sampling.top_logprobs is not None:
            self._check_top_logprobs(sampling.top_logprobs)
        if not self._must_call(turns):
            return
        if sampling.constraint is not None:
            raise InvalidRequest(
                "the answer has to be a tool call, so it cannot keep a constraint: leave one of them out",
                field="sampling.constraint",
            )
        if not self.constrains or self._tokenizer.call_form is None:
            field = "conversation.tools.choice"
            raise ModelRefusal(f"{self._name} cannot be made to call a tool", field=field)

    def _must_call(self, turns: tuple[Message, ...]) -> bool:
        tools = tools_of(turns)
        # A template that knows no tools refuses them itself.
        return tools is not None and tools.choice in MUST_CALL and self._tokenizer.takes_tools

    def _form(self, turns: tuple[Message, ...], sampling: Sampling) -> Constraint | Grammar | None:
        """Return what the answer must be."""
        tools, form = tools_of(turns), self._tokenizer.call_form
        if tools is None or form is None or not self._must_call(turns):
            return sampling.constraint
        return call_grammar(form, tools)

    def _check_top_logprobs(self, wanted: int) -> None:
        most = self._most_top_logprobs
        if most is None or wanted > most:
            served = "no log-probabilities" if most is None else f"at most {most} likeliest tokens"
            raise ModelRefusal(f"{self._name} reports {served}", field="sampling.top_logprobs")

    async def read_prompt(self, turns: tuple[Message, ...]) -> list[int]:
        """Return a prompt's ids: fewer than the context, so that an answer has room."""
        size = characters(turns)
        if size > _LONG_TEXT:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._long_texts, self._encode_prompt, turns, size)
        return self._encode_prompt(turns, size)

    async def read_draft(self, sent: DraftText, draft: ReceivedDraft) -> None:
        """Read a complete draft: its ids if they are this tokenizer's, else its text.

        It reads no more than `draft` has room for. Raises InvalidRequest if the caller of the cascade wrote
        it, and it breaks the constraint.
        """
        await self._read_whole(sent, draft)
        if sent.is_prediction and draft.allowed is not None:
            kept = self._tokenizer.decode(draft.ids)[-40:]
            raise InvalidRequest(
                f"the prediction breaks the constraint after {kept!r}: change it, or leave it out (JSON has "
                "one blank after each comma and colon, and properties in the schema's order)",
                field="draft",
            )

    async def _read_whole(self, sent: DraftText, draft: ReceivedDraft) -> None:
        is_whole = True
        draft.ids_used = bool(sent.ids) and sent.fingerprint == self._tokenizer.fingerprint
        if draft.ids_used:
            if self._add_ids(draft, sent.ids[: draft.room], "draft.token_ids"):
                return
        elif sent.ids and not sent.text:
            raise InvalidRequest(
                f"the draft's ids are of another tokenizer than {self._name}'s, "
                f"{self._tokenizer.fingerprint}: send its text as well",
                field="draft.tokenizer_fingerprint",
            )
        else:
            text = sent.text[: self._tokenizer.most_characters(draft.room)]
            draft.add(await self._encode_text(text))
            is_whole = len(text) == len(sent.text)
        draft.finish(self._end_id(sent.finish) if is_whole else None)

    async def follow_draft(
        self,
        pieces: AsyncIterator[DraftPiece | FinishReason],
        draft: ReceivedDraft,
        notify: Callable[[AsdError | None], None],
    ) -> None:
        """Read a draft as it arrives. notify: called after each piece, and with the error that ends it."""
        text: str | None = None
        most = self._tokenizer.most_characters(draft.room)
        try:
            async for piece in pieces:
                if isinstance(piece, FinishReason):
                    is_whole = draft.ids_used or draft.reach(await self._encode_text(text or ""))
                    is_whole &= len(text or "") <= most
                    # If the ids stand for another text, the draft's end means nothing.
                    draft.finish(self._end_id(piece) if is_whole else None)
                    break
                own = piece.fingerprint == self._tokenizer.fingerprint
                draft.ids_used |= text is None and own and bool(piece.ids)
                if draft.ids_used:
                    if self._add_ids(draft, piece.ids[: draft.room], "chunk.token_ids"):
                        break
                elif not draft.is_full and len(text or "") <= most:
                    # One character too many shows that the draft is longer.
                    text = ((text or "") + piece.text)[: most + 1]
                    # The next piece may change the last token.
                    draft.reach((await self._encode_text(text))[:-1])
                notify(None)
            else:
                raise InvalidRequest("the draft's stream ended without its end", field="end")
            notify(None)
        except AsdError as error:
            notify(error)
        except Exception as error:
            logger.error("a draft for model %s cannot be read", self._name, exc_info=error)
            notify(AsdError(f"model {self._name} failed on this request"))

    def _encode_prompt(self, turns: tuple[Message, ...], size: int) -> list[int]:
        most = self._context - 1
        where = "prompt" if len(turns) == 1 else "conversation"
        text = self._tokenizer.render(turns)
        if self._tokenizer.least_tokens(text) > most:
            # This needs no encoding, which takes seconds for a few megabytes.
            raise PromptTooLong(
                f"{where} has {size} characters; {self._name} takes at most {most} tokens", field=where
            )
        try:
            prompt = self._tokenizer.encode_chat(turns, text, most)
        except TooManyTokens as error:
            raise PromptTooLong(
                f"{where} has {error.count} tokens; {self._name} takes at most {most}", field=where
            ) from error
        if not prompt:
            raise ConversationRefused(
                "the model's chat template makes nothing of the conversation", field=where
            )
        return prompt

    async def _encode_text(self, text: str) -> list[int]:
        if len(text) > _LONG_TEXT:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._long_texts, self._tokenizer.encode_text, text)
        return self._tokenizer.encode_text(text)

    def _add_ids(self, draft: ReceivedDraft, ids: Sequence[int], field: str) -> bool:
        """Add ids up to a token that ends this model's answers; return whether the draft is complete.

        A drafter with the same tokenizer may have other end tokens, and write past this model's. Whether the
        answer ends there is this model's choice, which the verification pass shows.
        """
        end = next((index for index, each in enumerate(ids) if each in self._eos_ids), None)
        ids = ids[:end]
        wrong = next((each for each in ids if each >= self._vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(f"id {wrong} is not a text token of {self._name}'s tokenizer", field=field)
        draft.add(ids)
        if end is not None:
            draft.finish(None)
        return draft.is_complete

    def _compiler(self) -> GrammarCompiler | None:
        try:
            return compiler_for(self._tokenizer, self._vocabulary, self._eos_ids)
        except ValueError as error:
            logger.warning("model %s takes no constraints: %s", self._name, error)
            return None

    def _details(
        self,
        likeliest: Callable[[Evidence, int], Iterable[tuple[int, float]]],
        most: int,
        ids: Sequence[int],
        evidence: Sequence[Evidence],
    ) -> list[TokenDetail]:
        """Return the text of tokens, and of the likeliest ones at the place of each."""
        text = self._tokenizer.token_bytes
        return [
            TokenDetail(
                text(token),
                tuple(Candidate(each, text(each), logprob) for each, logprob in likeliest(seen, most)),
            )
            for token, seen in zip(ids, evidence, strict=True)
        ]

    def _end_id(self, finish: FinishReason) -> int | None:
        return self._eos_ids[0] if finish is FinishReason.EOS else None
