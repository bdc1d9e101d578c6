"""What every command checks of its arguments, and which of them a field of the contract was typed as."""

from __future__ import annotations

import math
import os
import re
import sys
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# As help and usage show the argument.
PROMPT = "prompt"

# From a field of GenerateRequest to what `asd ask` takes it from.
ASK_OPTIONS = {
    "prompt": PROMPT,
    "conversation": PROMPT,
    "conversation.messages": PROMPT,
    "conversation.messages.role": PROMPT,
    "conversation.messages.content": PROMPT,
    # A system message comes before the question.
    "conversation.messages[0].content": "--system",
    "sampling.max_new_tokens": "--max-new-tokens",
    "sampling.temperature": "--temperature",
    "sampling.top_p": "--top-p",
    "sampling.seed": "--seed",
    "sampling.stop": "--stop",
    "sampling.constraint.json_schema": "--json-schema",
    "sampling.constraint.regex": "--regex",
    "sampling.constraint.choice.texts": "--choice",
    "sampling.top_logprobs": "--top-logprobs",
    "objective.lambda": "--lambda",
    "objective.max_cost": "--max-cost",
    "objective.max_latency_ms": "--max-latency-ms",
    "objective.min_quality": "--min-quality",
    "objective.preference": "--preference",
    "acceptance.mode": "--tolerance",
    "acceptance.threshold": "--tolerance",
    "session_id": "--session",
    "stage": "--stage",
    "chain": "--chain",
    "task": "--task",
    "prediction": "--prediction",
}
_INDEX = re.compile(r"\[\d+\]")
# Words of the contract that are no words of English, and so stand for the field alone.
_TERM = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")


def option_of(field: str, options: Mapping[str, str]) -> str:
    """Return the option that a field was typed as; "" where no option stands for it.

    field: as a service names it, such as `request.sampling.stop[1]`.
    """
    field = field.removeprefix("request.")
    return options.get(field) or options.get(_INDEX.sub("", field), "")


def in_options(message: str, field: str, options: Mapping[str, str]) -> str:
    """Return a service's message about a field in terms of the options that were typed."""
    option = option_of(field, options)
    if not option:
        return message
    path = field.removeprefix("request.")
    leaf = _INDEX.sub("", path).rpartition(".")[2]
    for name in (path, leaf):
        said, count = re.subn(rf"(?<![\w'.-]){re.escape(name)}(?![\w'.])", option, message, count=1)
        if count:
            message = said
            break
    by_leaf = {each.rpartition(".")[2]: named for each, named in options.items()}
    message = _TERM.sub(lambda found: by_leaf.get(found[0], found[0]), message)
    return message if option in message else f"{option}: {message}"


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of an option's text, which names the range where the text is not in it."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise typer.BadParameter(f"{text} is not a whole number from {least} to {most}")
        return number

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a parser of an option's text, which names the range where the text is not in it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # What is not a number is in no range.
        if not least <= value <= most:
            place = "" if least == -math.inf else f" from {least:.15g} to {most:.15g}"
            raise typer.BadParameter(f"{text} is not a number{place}")
        return value

    return parse


class CheckedCommand(TyperCommand):
    """A command that refuses empty texts, and texts that are not UTF-8, by the name of the argument.

    An empty text is most often a variable that is not set. Taken for an option that was left out, it would
    be answered in another way than was meant.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            _tidy(error, ctx)
            raise
        options = {name: each for each in self.params if _takes_value(each) for name in each.opts}
        arguments = [each for each in self.params if each.param_type_name == "argument"]
        for before, text in pairwise(("", *given)):
            if before == "--":
                break
            option, has_value, value = text.partition("=")
            named: Any = None
            if has_value and not value and option.startswith("--"):
                named = options.get(option)
            elif not text:
                named = options.get(before) or next(iter(arguments), None)
            if named is not None:
                raise typer.BadParameter(_empty(named), ctx=ctx, param=named)
        for each in cast("list[Any]", self.params):
            for text in _texts(ctx.params.get(each.name)):
                if not _is_unicode(text):
                    raise typer.BadParameter(_not_utf8(text), ctx=ctx, param=each)
        return rest


def _tidy(error: Any, ctx: Any) -> None:
    """Leave out of a message what is not about the command line: pydantic's words, unused variables."""
    error.message = error.message.removeprefix("Value error, ")
    parameter = getattr(error, "param", None)
    if parameter is None or not getattr(parameter, "envvar", None):
        return
    source = ctx.get_parameter_source(parameter.name)
    if source is not None and source.name == "COMMANDLINE":
        error.param_hint = [max(parameter.opts, key=len)]


def _not_utf8(text: str) -> str:
    """Return what is wrong with a text that Python could not decode."""
    encoding = sys.getfilesystemencoding()
    if encoding.replace("-", "") == "utf8":
        return "the text is not valid UTF-8"
    with suppress(UnicodeError):
        os.fsencode(text).decode()
        return (
            f"the locale's encoding is {encoding}, which lacks characters of the text: choose a UTF-8 locale "
            "(LC_ALL=C.UTF-8), or set PYTHONUTF8=1"
        )
    return "the text is not valid UTF-8"


def _takes_value(parameter: Any) -> bool:
    return parameter.param_type_name == "option" and not parameter.is_flag


def _empty(parameter: Any) -> str:
    advice = "" if parameter.required else ", or leave it out"
    return f"the text is empty: give one{advice}"


def _texts(value: object) -> Iterable[str]:
    """Return the texts of a parameter. Paths may hold any byte."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [each for each in values if isinstance(each, str)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
