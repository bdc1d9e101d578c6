"""A model's tokenizer with its chat template, and text that grows token by token."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from services.common.errors import ConversationRefused, PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.stage.engine import Turn

# Stands for a message's content while a template renders; no user text can hold it by accident.
_PLACEHOLDER = "\ue000asd-content-{}\ue001"


class ChatTokenizer:
    """Turns conversations into ids and ids into text, as a Hugging Face directory says.

    Raises PreconditionFailed where tokenizer.json or the chat template is missing or broken.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        try:
            description = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(description)
            self._literal = Tokenizer.from_str(description)
        except FileNotFoundError as error:
            raise PreconditionFailed(f"{path} is missing: a model directory needs its tokenizer") from error
        except Exception as error:
            raise PreconditionFailed(f"{path} is not a tokenizer: {error}") from error
        # Special tokens that stand in a user's text are that text's letters, not marks of the conversation.
        self._literal.encode_special_tokens = True
        canonical = json.dumps(json.loads(description), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.vocabulary_size = self._tokenizer.get_vocab_size()
        # In characters; of a byte-level vocabulary, in bytes. No token stands for more text.
        self.longest_token = max(map(len, self._tokenizer.get_vocab()))
        self._special = tuple(
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        )
        self._config = _read_json(directory / "tokenizer_config.json")
        template_file = directory / "chat_template.jinja"
        template: object = self._config.get("chat_template")
        if template_file.exists():
            template = template_file.read_text(encoding="utf-8")
        if not isinstance(template, str):
            raise PreconditionFailed(f"{directory}: no chat_template in tokenizer_config.json")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._template = environment.from_string(template)

    def encode_chat(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids of a conversation, ready for the model's answer.

        Raises ConversationRefused where the template refuses the conversation.
        """
        if not any(mark in turn.content for turn in turns for mark in self._special):
            return list(
                self._tokenizer.encode(
                    self._render([t.content for t in turns], turns), add_special_tokens=False
                ).ids
            )
        places = [_PLACEHOLDER.format(index) for index in range(len(turns))]
        rest = self._render(places, turns)
        ids: list[int] = []
        for place, turn in zip(places, turns, strict=True):
            before, _, rest = rest.partition(place)
            ids += self._tokenizer.encode(before, add_special_tokens=False).ids
            ids += self._literal.encode(turn.content, add_special_tokens=False).ids
        return ids + list(self._tokenizer.encode(rest, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text; special tokens in it are ordinary letters."""
        return list(self._literal.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """Return an empty growing text."""
        return TextStream(self)

    def decode_step(self, stream: DecodeStream, token_id: int) -> str:
        """Return what a token adds to a stream; "" while a character is incomplete."""
        return stream.step(self._tokenizer, token_id) or ""

    def _render(self, contents: Sequence[str], turns: Sequence[Turn]) -> str:
        messages = [{"role": t.role, "content": c} for t, c in zip(turns, contents, strict=True)]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=_content(self._config.get("bos_token")),
                eos_token=_content(self._config.get("eos_token")),
            )
        except TemplateError as error:
            raise ConversationRefused(
                f"the model's chat template refuses the conversation: {error}", field="conversation"
            ) from error


class TextStream:
    """Text that grows token by token and never shows half a character."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that they add."""
        self._ids += ids
        text = "".join(self._tokenizer.decode_step(self._stream, token_id) for token_id in ids)
        self._shown += len(text)
        return text

    def finish(self) -> str:
        """Return what is left at the end: the replacement of a character that stayed incomplete."""
        return self._tokenizer.decode(self._ids)[self._shown :]


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PreconditionFailed(f"{path} is missing: a model directory needs it") from error
    except ValueError as error:
        raise PreconditionFailed(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _content(token: object) -> str:
    """Return a special token's text: configurations hold it plain or as {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _refuse(message: str) -> str:
    raise TemplateError(message)
