"""Where answers end, in every engine: at special tokens too, and without harm to others."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asd.values import FinishReason, Message, Sampling
from services.stage.domain import DraftText, Result, TokenChunk
from services.stage.engines.backend import Piece, TokenRequest, TokenScores
from services.stage.engines.checkpoint import Checkpoint
from services.stage.engines.onnx.generators import CachedSequence
from services.stage.engines.onnx.slots import BatchSlot, GenerateSlot, SlotRequest, VerifySlot
from services.stage.engines.scoring import ScoringEngine, ScoringOptions
from services.stage.generation.answer import AnswerBuilder
from services.stage.generation.call import Call
from services.stage.generation.draft import ReceivedDraft
from services.stage.generation.logprobs import Row
from services.stage.generation.tokenizer import ChatTokenizer
from services.stage.generation.verification import evidence_signals
from tests.fakes.tiny_tokenizers import pieces, write

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

_SPECIAL = ("<unk>", "<s>", "</s>", "[end]")
_EOS = _SPECIAL.index("</s>")
_MARK = _SPECIAL.index("[end]")
_CONFIG = {"chat_template": "<s>{{ messages[-1].content }}", "bos_token": "<s>"}
_TURNS = (Message("user", "z"),)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), pieces(_SPECIAL, form="bare"), _CONFIG)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ChatTokenizer:
    return ChatTokenizer(directory)


class Chain:
    """A model that writes "xy", a newline, a special token that is no end token, "q", and its end."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        x, y, newline, q = tokenizer.encode_text("xy\nq")
        self.ids = [x, y, newline, _MARK, q, _EOS]
        self.vocabulary = tokenizer.vocabulary_size
        last = tokenizer.encode_chat(_TURNS)[-1]
        self._next = dict(zip([last, *self.ids[:-1]], self.ids, strict=True))

    def after(self, token: int) -> int:
        return self._next.get(token, _EOS)


class ChainGenerator:
    """What a slot uses of onnxruntime-genai's generator, for rows that all write the same."""

    def __init__(self, chain: Chain, rows: int = 1) -> None:
        self._chain = chain
        self._rows = rows
        self._tokens: list[int] = []
        self._output = np.zeros((rows, 0, chain.vocabulary), np.float32)

    def append_tokens(self, tokens: np.ndarray) -> None:
        self._tokens += tokens[0].tolist()
        logits = np.zeros((self._rows, tokens.shape[1], self._chain.vocabulary), np.float32)
        for index, token in enumerate(tokens[0].tolist()):
            logits[:, index, self._chain.after(token)] = 9.0
        self._output = logits

    def generate_next_token(self) -> None:
        if self._next is not None:
            self.append_tokens(np.array([[self._next]], np.int32))
        self._next = self._chain.after(self._tokens[-1])

    _next: int | None = None

    def get_next_tokens(self) -> np.ndarray:
        return np.full(self._rows, self._next, np.int32)

    def get_output(self, name: str) -> np.ndarray:
        return self._output

    def rewind_to(self, length: int) -> None:
        del self._tokens[length:]


class ChainBackend:
    """A library that keeps its logits to itself, over the same model."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    async def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def _row(self, token: int, before: int) -> Row:
        likeliest = self._chain.after(before)
        return Row(token, -0.1, 0 if token == likeliest else 1, (likeliest, 0), (-0.1, -3.0))

    async def generate(self, ids: list[int], request: TokenRequest) -> AsyncGenerator[Piece, None]:
        token = ids[-1]
        for index in range(request.max_tokens):
            before, token = token, self._chain.after(token)
            is_last = token == _EOS or index == request.max_tokens - 1
            yield Piece([self._row(token, before)], is_last=is_last, has_ended=token == _EOS)
            if is_last:
                return

    async def score(self, ids: list[int], start: int, adapter: str) -> TokenScores:
        rows = [self._row(ids[index], ids[index - 1]) for index in range(start, len(ids))]
        own = self._chain.after(ids[-1])
        return TokenScores(rows, self._row(own, ids[-1]))


# A stop sequence, and what the answer is then.
_ENDS = [
    (("[end]",), "xy\n", FinishReason.STOP, 3),
    (("\n[end]",), "xy", FinishReason.STOP, 2),
    (("[end]q",), "xy\n", FinishReason.STOP, 3),
    (("y",), "x", FinishReason.STOP, 1),
    # The answer's text leaves the special token out, and a user sees these two side by side.
    (("\nq",), "xy", FinishReason.STOP, 2),
    # The model's own end is no stop.
    (("</s>",), "xy\nq", FinishReason.EOS, 5),
    (("[end]x",), "xy\nq", FinishReason.EOS, 5),
]


def _request(
    tokenizer: ChatTokenizer, stop: tuple[str, ...], draft: ReceivedDraft | None = None
) -> SlotRequest:
    events: list[Any] = []
    answer = AnswerBuilder(tokenizer.stream(), stop)
    prompt = tokenizer.encode_chat(_TURNS)
    call = Call(prompt, 20, Sampling(stop=stop), answer, (_EOS,), evidence_signals)
    return SlotRequest(call, events.extend, draft)


def _events(request: SlotRequest) -> list[Any]:
    request.send()
    return request.deliver.__self__  # type: ignore[attr-defined, no-any-return]


def _check(events: Sequence[Any], text: str, finish: FinishReason, count: int) -> None:
    result = events[-1]
    assert isinstance(result, Result)
    assert (result.text, result.finish, len(result.ids)) == (text, finish, count)
    assert "".join(event.text for event in events if isinstance(event, TokenChunk)) == text


@pytest.mark.parametrize(("stop", "text", "finish", "count"), _ENDS)
@pytest.mark.parametrize("kind", ["alone", "draft", "batch"])
def test_a_stop_sequence_may_be_a_special_token_in_the_onnx_engine(
    tokenizer: ChatTokenizer, kind: str, stop: tuple[str, ...], text: str, finish: FinishReason, count: int
) -> None:
    chain = Chain(tokenizer)
    draft = None
    if kind == "draft":
        draft = ReceivedDraft(20)
        draft.add(chain.ids[:-1])
        draft.finish(_EOS)
    requests = [_request(tokenizer, stop, draft) for _ in range(3 if kind == "batch" else 1)]
    if kind == "batch":
        generator = ChainGenerator(chain, 3)
        generator.append_tokens(np.array([requests[0].call.prompt] * 3, np.int32))
        slot: Any = BatchSlot(requests, generator)
    else:
        slot = (GenerateSlot if draft is None else VerifySlot)(
            requests[0], CachedSequence(ChainGenerator(chain))
        )
    for _ in range(100):
        for request in requests:
            request.is_taken = True
        for request in slot.step():
            slot.requests.remove(request)
        if not slot.requests:
            break
    for request in requests:
        _check(_events(request), text, finish, count)


@pytest.mark.parametrize(("stop", "text", "finish", "count"), _ENDS)
@pytest.mark.parametrize("has_draft", [False, True])
async def test_a_stop_sequence_may_be_a_special_token_in_engines_over_a_library(
    directory: Path, *, has_draft: bool, stop: tuple[str, ...], text: str, finish: FinishReason, count: int
) -> None:
    tokenizer = ChatTokenizer(directory)
    chain = Chain(tokenizer)
    checkpoint = Checkpoint("LlamaForCausalLM", chain.vocabulary, 64, (_EOS,), 1, 1, 1)
    engine = ScoringEngine("vllm", "m", directory, checkpoint, ChainBackend(chain), ScoringOptions(2, 2, 64))
    await engine.load()
    sampling = Sampling(stop=stop)
    events = engine.generate(_TURNS, sampling)
    if has_draft:
        draft = DraftText("", tuple(chain.ids[:-1]), tokenizer.fingerprint, FinishReason.EOS)
        events = engine.verify(_TURNS, sampling, draft, None)
    async with aclosing(events):
        _check([event async for event in events], text, finish, count)


class _BrokenStream:
    """Text that cannot be decoded."""

    lag = 0

    def push(self, ids: Sequence[int]) -> str:
        raise ValueError("no text")

    def finish(self) -> str:
        raise ValueError("no text")

    def mark(self, token_id: int) -> str:
        return ""


def test_a_request_that_goes_wrong_leaves_its_batch_and_the_others_go_on(tokenizer: ChatTokenizer) -> None:
    chain = Chain(tokenizer)
    requests = [_request(tokenizer, ()) for _ in range(3)]
    requests[1].call.answer = AnswerBuilder(_BrokenStream())
    generator = ChainGenerator(chain, 3)
    generator.append_tokens(np.array([requests[0].call.prompt] * 3, np.int32))
    slot = BatchSlot(requests, generator)
    failed = []
    for _ in range(10):
        for request in slot.step():
            slot.requests.remove(request)
        for request, error in slot.failed:
            assert isinstance(error, ValueError)
            slot.requests.remove(request)
            failed.append(request)
    assert failed == [requests[1]]
    for request in (requests[0], requests[2]):
        _check(_events(request), "xy\nq", FinishReason.EOS, 5)
