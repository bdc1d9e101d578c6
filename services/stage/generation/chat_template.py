"""A model's chat template, rendered as transformers renders it.

A template may use what transformers' `apply_chat_template` gives it (read at version 5.24): loop
controls, `{% generation %}`, `strftime_now`, `raise_exception`, a `tojson` that escapes nothing, the special
tokens by name, `tools` and `documents`.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.utils import pass_environment

from asd.errors import ConversationRefused, InputFailed, PreconditionFailed
from asd.values import Conversation, Message, Tools
from services.stage.generation.template_limits import (
    Meter,
    MeteredEnvironment,
    MeteredGenerator,
    TooMuchWork,
    count_parts,
    metered,
)
from services.stage.generation.template_values import (
    characters,
    has_tools,
    message_values,
    offered,
    tool_values,
)
from services.stage.generation.tool_grammar import PROBE_CALL, PROBE_TOOL, find_form
from services.stage.generation.traced_text import MESSAGE, TEMPLATE, TracedText, join_texts, origins_of
from services.stage.model_files import read_json_file, read_text_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from jinja2 import Environment
    from jinja2.compiler import Frame
    from jinja2.parser import Parser
    from jinja2.runtime import Macro

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
# Conversations that any chat model may get; a template that fails on one of them is broken.
_PROBES = (
    (Message("user", "Hello"),),
    (Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "How are you?")),
    (Message("system", "Be brief."), Message("user", "Hello")),
)


class ChatTemplate:
    """Writes conversations as one text.

    meter: makes the meter of a rendering from the conversation's characters and messages. Raises
    PreconditionFailed if there is no template, if it cannot be read, if it fails on a plain conversation, or
    if it refuses every one.
    """

    def __init__(self, directory: Path, meter: Callable[[int, int], Meter] = Meter) -> None:
        self._meter = meter
        config = read_json(directory / "tokenizer_config.json")
        source, self._where = _find_template(directory, config)
        self._tokens = _special_tokens(directory, config)
        try:
            with metered(Meter(0)):
                self._plain = _environment(MeteredEnvironment).from_string(source)
                self._tracing = _environment(_TracingEnvironment).from_string(source)
        except TemplateSyntaxError as error:
            raise PreconditionFailed(
                f"{self._where}: the chat template is no template: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            # The library and Python's compiler have limits of their own, such as on nested blocks.
            raise PreconditionFailed(
                f"{self._where}: the chat template is no template: {type(error).__name__}: {error}"
            ) from error
        refusals = []
        # The plain conversations that it accepts.
        self.plain: list[tuple[Message, ...]] = []
        for turns in _PROBES:
            try:
                self.render(turns)
                self.plain.append(turns)
            except ConversationRefused as error:
                # A model need not know every role.
                refusals.append(error)
        if len(refusals) == len(_PROBES):
            words = dict.fromkeys(str(error.__cause__) for error in refusals)
            raise PreconditionFailed(
                f"{self._where}: the chat template refuses every plain conversation: {'; '.join(words)}"
            ) from refusals[0]
        # Whether it tells the model of tools, and how it writes calls; None: not in a form that is known.
        self.takes_tools = any(
            PROBE_TOOL.name in self._tried(Conversation(turns, Tools((PROBE_TOOL,)))) for turns in self.plain
        )
        self.call_form = find_form(self._tried(PROBE_CALL)) if self.takes_tools else None

    def render(self, turns: Sequence[Message]) -> str:
        """Return a conversation's text, up to where the model's answer begins.

        Raises ConversationRefused if the template refuses it, or knows no tools and there are such;
        InputFailed if the template fails.
        """
        self._check_tools(turns)
        return self._run(self._plain, turns, datetime.now())

    def check_reads_messages(self) -> None:
        """Raise PreconditionFailed if a plain conversation's text lacks its last message."""
        now = datetime.now()
        for turns in self.plain:
            text = self._run(self._plain, turns, now)
            if not text.strip():
                raise PreconditionFailed(f"{self._where}: the chat template makes nothing of a conversation")
            # Of the same length, so that a template that counts letters does not pass.
            other = (*turns[:-1], Message("user", turns[-1].content.swapcase()[::-1]))
            if self._run(self._plain, other, now) == text:
                raise PreconditionFailed(
                    f"{self._where}: the chat template leaves out what the user says: "
                    "the model would answer without the question"
                )

    def trace(self, turns: Sequence[Message]) -> TracedText:
        """Return the same text with the origin of each character. Raises as `render` does."""
        self._check_tools(turns)
        now = datetime.now()
        text = self._run(self._tracing, turns, now)
        if not isinstance(text, TracedText) or text != self._run(self._plain, turns, now):
            raise InputFailed(f"{self._where}: what the chat template makes of a message cannot be followed")
        return text

    def _check_tools(self, turns: Sequence[Message]) -> None:
        if has_tools(turns) and not self.takes_tools:
            raise ConversationRefused(
                "the model's chat template knows no tools: leave out tools, tool calls and their results, or "
                "ask a stage whose model takes tools",
                field="conversation.tools",
            )

    def _tried(self, turns: Sequence[Message]) -> str:
        """Return a conversation's text; "" if the template does not take it."""
        try:
            return self._run(self._plain, turns, datetime.now())
        except (ConversationRefused, InputFailed):
            return ""

    def _run(self, template: Any, turns: Sequence[Message], now: datetime) -> str:
        traced = template is self._tracing
        own, given = (_own, _given) if traced else (str, str)
        tools = offered(turns)
        try:
            with metered(self._meter(characters(turns), len(turns) + len(tools))):
                text: str = template.render(
                    {name: own(token) for name, token in self._tokens.items()}
                    | {
                        "messages": message_values(turns, own, given),
                        "tools": tool_values(tools, own, given),
                        "documents": None,
                        "add_generation_prompt": True,
                        "raise_exception": _refuse,
                        "strftime_now": lambda pattern: own(now.strftime(pattern)),
                    }
                )
        except _Refusal as error:
            raise ConversationRefused(
                f"the model's chat template refuses the conversation: {error}", field="conversation"
            ) from error
        except TooMuchWork as error:
            raise InputFailed(f"{self._where}: the chat template is stopped: {error}") from error
        except Exception as error:
            # A template is a program, so any exception is its own fault.
            raise InputFailed(
                f"{self._where}: the chat template fails: {type(error).__name__}: {error}"
            ) from error
        return text


class _Refusal(TemplateError):  # noqa: N818 - the template refuses, it does not fail
    """A template refused a conversation."""


class _Generation(Extension):
    """`{% generation %}`: marks what the model wrote, for training. Here it is the text within."""

    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call, so that its variables stay local."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_within"), [], [], body).set_lineno(line)

    def _within(self, caller: Macro) -> str:
        return caller()


class _TracingGenerator(MeteredGenerator):
    """Compiles a template so that its own text is traced as such.

    The library does not document this use, but its NativeEnvironment is made in the same way.
    """

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return _source("".join(map(str, group)))

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        self.write(_source(node.as_const(frame.eval_ctx)))

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:  # noqa: N802
        self.write(_source(node.data))


class _TracingEnvironment(MeteredEnvironment):
    """An environment whose templates make traced text."""

    code_generator_class = _TracingGenerator

    @staticmethod
    def concat(parts: Iterable[object]) -> TracedText:
        """Return parts as one text."""
        return join_texts("", map(_text_of, count_parts(parts)))

    @staticmethod
    def own(text: str) -> TracedText:
        """Return text of the template itself."""
        return _own(text)


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a file. Raises PreconditionFailed if the file is missing or no JSON."""
    content = read_json_file(path, "a model directory needs it")
    return content if isinstance(content, dict) else {}


def _environment(kind: type[MeteredEnvironment]) -> Environment:
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.set_filter("tojson", _to_json)
    if kind is _TracingEnvironment:
        environment.set_filter("join", _join)
    return environment


def _find_template(directory: Path, config: dict[str, object]) -> tuple[str, str]:
    """Return a directory's template and the file that it is in.

    A file of its own comes before the configuration, as in transformers; the file that processors keep it
    in comes last.
    """
    file = directory / "chat_template.jinja"
    if file.exists():
        return read_text_file(file), str(file)
    file = directory / "tokenizer_config.json"
    template = _default(config.get("chat_template"), file)
    if template is None and (other := directory / "chat_template.json").exists():
        file = other
        template = _default(read_json(file).get("chat_template"), file)
    if template is None:
        raise PreconditionFailed(
            f"{directory}: no chat_template in tokenizer_config.json, and no chat_template.jinja beside it"
        )
    return template, str(file)


def _default(template: object, file: Path) -> str | None:
    """Return a configuration's template: the only one, or the default of several; None if there is none."""
    if template is None or isinstance(template, str):
        return template
    named: dict[object, object] = {}
    if isinstance(template, dict):
        named = template
    elif isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
    default = named.get("default")
    if not isinstance(default, str):
        names = ", ".join(sorted(map(str, named))) or "none"
        raise PreconditionFailed(
            f"{file}: chat_template holds no template named default, only {names}: "
            "put the one to use into chat_template.jinja beside it"
        )
    return default


def _special_tokens(directory: Path, config: dict[str, object]) -> dict[str, str]:
    """Return the special tokens that a template may name."""
    named = dict(config)
    file = directory / "special_tokens_map.json"
    # As in transformers, the older file counts if the configuration does not list the tokens themselves.
    if "added_tokens_decoder" not in config and file.exists():
        named |= read_json(file)
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    tokens = {name: _content(token) for name, token in named.items()}
    return {
        name: token
        for name, token in tokens.items()
        if token is not None and (name.endswith("_token") or (isinstance(extra, dict) and name in extra))
    }


def _content(token: object) -> str | None:
    """Return a special token's text: configurations hold a string or {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escapes, as in transformers."""
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts = list(_strings(value, sort_keys=sort_keys))
    if not any(isinstance(each, TracedText) for each in parts):
        return text
    origins, end = [], 0
    for found, part in zip(_JSON_STRING.finditer(text), parts, strict=True):
        start, stop = found.start() + 1, found.end() - 1
        origins += [TEMPLATE * (start - end), _coded_origins(part, stop - start, ensure_ascii=ensure_ascii)]
        end = stop
    return TracedText(text, "".join([*origins, TEMPLATE * (len(text) - end)]))


def _strings(value: object, *, sort_keys: bool) -> Iterator[str]:
    """Yield the strings of a value in the order in which JSON has them, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each, sort_keys=sort_keys)
    elif isinstance(value, dict):
        for name in sorted(value) if sort_keys else value:
            # Other names become texts of the template's.
            yield name if isinstance(name, str) else _own(json.dumps(name))
            yield from _strings(value[name], sort_keys=sort_keys)


def _coded_origins(text: str, length: int, *, ensure_ascii: bool) -> str:
    """Return the origins of a string as JSON codes it. length: of the coded text."""
    origins = origins_of(text)
    if length == len(text):
        return origins
    lengths = (len(json.dumps(letter, ensure_ascii=ensure_ascii)) - 2 for letter in str.__str__(text))
    return "".join(origin * count for origin, count in zip(origins, lengths, strict=True))


def _own(text: str) -> TracedText:
    return TracedText(text, TEMPLATE * len(text))


def _given(text: str) -> TracedText:
    return TracedText(text, MESSAGE * len(text))


def _text_of(value: object) -> str:
    """Return a value as text. Values that are no text come from the template: messages hold only text."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return _own(str(value))
    return str(value)


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    """Join a sequence as the library's filter of this name does, traced."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return join_texts(str(d), map(_text_of, value))


def _source(value: object) -> str:
    """Return Python source of a constant of a template, its strings traced."""
    if type(value) is str:
        return f"environment.own({value!r})"
    if isinstance(value, tuple):
        return f"({''.join(f'{_source(each)}, ' for each in value)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_source, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_source(k)}: {_source(v)}' for k, v in value.items())}}}"
    return repr(value)
