"""OpenAI's /v1/completions, and what it has in common with chat completions. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.values import Sampling
from services.gateway.answers import fingerprint, finish_reason, told, usage_of
from services.gateway.errors import Problem, openai_body
from services.gateway.objective import open_body
from services.gateway.parameters import COMPLETIONS, Body
from services.gateway.request import MOST_CHOICES, Call, SseEvent, choices, invalid
from services.gateway.streaming import DONE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asd.values import Answer
    from services.gateway.models import Models

# What a uint32 of the contract holds.
MOST_TOKENS = 2**32 - 1
# Seeds of SDKs are whole numbers of 64 bits, with or without sign. The contract's have none.
_LEAST_SEED, _MOST_SEED = -(2**63), 2**64 - 1
# Most choices of a body with several prompts. Chosen: far more than evaluation harnesses send in one.
_MOST_ANSWERS = 64


class OpenAiBase:
    """What both older APIs of OpenAI answer alike; see request.Api."""

    name: str
    prefix: str
    kind: str

    def answer(self, call: Call, answers: tuple[Answer, ...], created: int) -> dict[str, Any]:
        """Return the body of an answer."""
        return {
            "id": self.prefix + answers[0].request_id,
            "object": self.kind,
            "created": created,
            "model": call.model,
            "choices": [self.choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage_of(answers, call.prompts).openai(),
            "system_fingerprint": fingerprint(answers),
            "asd": told(answers),
        }

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return an answer as a choice."""
        raise NotImplementedError

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the body of an error."""
        return openai_body(problem)


class OpenAiCompletions(OpenAiBase):
    """Translates completions; see request.Api."""

    name = COMPLETIONS
    prefix = "cmpl-"
    kind = "text_completion"

    def parse(self, body: Mapping[str, Any], headers: Mapping[str, str], models: Models) -> Call:
        """Return the request in a body."""
        fields, model, route, options = open_body(COMPLETIONS, body, headers, models)
        prompts = _prompts(fields.get("prompt"))
        sampling, names, count = sampling_of(fields)
        if len(prompts) * count > _MOST_ANSWERS:
            raise invalid(
                "prompt", f"prompts and n ask for {len(prompts) * count} answers, over {_MOST_ANSWERS}"
            )
        requests = [route.request(prompt, sampling, options) for prompt in prompts]
        return Call(
            model,
            tuple(each for request in requests for each in choices(request, count)),
            {"prompt": "prompt", **names, **options.fields},
            fields.flag("stream"),
            fields.includes_usage(),
            len(prompts),
        )

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return an answer as a choice."""
        return {
            "index": index,
            "text": answer.text,
            "logprobs": None,
            "finish_reason": finish_reason(answer),
        }

    def writer(self, call: Call, stream_id: str, created: int) -> CompletionsWriter:
        """Return what writes the answer as a stream."""
        return CompletionsWriter(self, call, stream_id, created)


class CompletionsWriter:
    """Writes text_completion objects as chunks; see request.StreamWriter."""

    kind = "text_completion"

    def __init__(self, api: OpenAiBase, call: Call, stream_id: str, created: int) -> None:
        self._api = api
        self._call = call
        self._head = {
            "id": api.prefix + stream_id,
            "object": self.kind,
            "created": created,
            "model": call.model,
        }
        self._answers: dict[int, Answer] = {}

    def begin(self) -> list[SseEvent]:
        """Return the chunks that open the choices, if there are such."""
        firsts = [self.first(index) for index in range(len(self._call.requests))]
        return [self._chunk([each]) for each in firsts if each is not None]

    def text(self, index: int, text: str) -> list[SseEvent]:
        """Return the chunk of a text."""
        return [self._chunk([self.piece(index, text)])]

    def finish(self, index: int, answer: Answer) -> list[SseEvent]:
        """Return the chunk of a choice's end. The last one says how the answers came about."""
        self._answers[index] = answer
        more: dict[str, Any] = {}
        is_last = len(self._answers) == len(self._call.requests)
        if is_last and not self._call.has_usage:
            more = self._whole()
        return [self._chunk([self.last(index, finish_reason(answer))], **more)]

    def end(self) -> list[SseEvent]:
        """Return the usage, if it is wanted, and the end."""
        events = [SseEvent(DONE)]
        if self._call.has_usage:
            usage = usage_of(self._in_order(), self._call.prompts).openai()
            events.insert(0, self._chunk([], **self._whole(), usage=usage))
        return events

    def keep_alive(self) -> list[SseEvent]:
        """Return a chunk without text, of a choice that has not ended."""
        running = next(index for index in range(len(self._call.requests)) if index not in self._answers)
        return [self._chunk([self.piece(running, "")])]

    def failed(self, problem: Problem) -> list[SseEvent]:
        """Return the error, and the end."""
        return [SseEvent(openai_body(problem)), SseEvent(DONE)]

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the choice that begins an answer; None for none."""
        return None

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Return the choice of a text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Return the choice that ends an answer."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _whole(self) -> dict[str, Any]:
        answers = self._in_order()
        return {"system_fingerprint": fingerprint(answers), "asd": told(answers)}

    def _in_order(self) -> list[Answer]:
        return [self._answers[index] for index in sorted(self._answers)]

    def _chunk(self, parts: list[dict[str, Any]], **more: Any) -> SseEvent:
        usage = {"usage": None} if self._call.has_usage else {}
        return SseEvent({**self._head, "choices": parts, **usage, **more})


def sampling_of(fields: Body) -> tuple[Sampling, dict[str, str], int]:
    """Return sampling, the API's names of its fields, and the number of choices."""
    seed = fields.whole("seed", _LEAST_SEED, _MOST_SEED)
    sampling = Sampling(
        fields.whole("max_tokens", 1, MOST_TOKENS),
        fields.number("temperature", 2.0) or 0.0,
        fields.number("top_p", 1.0, is_positive=True),
        None if seed is None else seed % 2**64,
        fields.stops("stop", may_be_text=True),
    )
    names = {
        "sampling.max_new_tokens": "max_tokens",
        "sampling.temperature": "temperature",
        "sampling.top_p": "top_p",
        "sampling.seed": "seed",
        "sampling.stop": "stop",
        "stage": "model",
        "chain": "model",
    }
    return sampling, names, fields.whole("n", 1, MOST_CHOICES) or 1


def _prompts(value: object) -> list[str]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts:
        raise invalid("prompt", "must be a text, or a list of texts")
    for index, each in enumerate(prompts):
        where = "prompt" if isinstance(value, str) else f"prompt[{index}]"
        if not isinstance(each, str):
            raise invalid(where, "must be a text: token ids are another model's in a cascade")
        if not each:
            raise invalid(where, "is empty: send at least one character")
    return prompts
