"""What every command checks of its arguments, and which of them a field of the contract was typed as."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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


class CheckedCommand(TyperCommand):
    """A command that refuses empty texts, and texts that are not UTF-8, by the name of the argument.

    An empty text is most often a variable that is not set. Taken for an option that was left out, it would
    be answered in another way than was meant.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line."""
        given = list(args)
        rest = super().parse_args(ctx, args)
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
                    raise typer.BadParameter("the text is not valid UTF-8", ctx=ctx, param=each)
        return rest


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
