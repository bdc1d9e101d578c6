"""Limits on the work of a chat template: it is a program in a model's folder, and may loop for ever.

Steps, text and processor time are counted while it runs, and before any single operation that could take
long: `'a' * 10**9`, `'%999999999d'`, a list of lists of lists. No template that writes a conversation comes
near the limits.
"""

from __future__ import annotations

import functools
import re
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jinja2.compiler import Frame
    from jinja2.runtime import Context

# Loop passes, calls and filters. Chosen: a template with tools and roles takes about 50 per message, and a
# conversation has 4096 messages at most; a second's work.
MOST_STEPS = 1_000_000
# Bytes of one value, and of all values at a time: written text and list entries. Longer conversations get
# more. Chosen.
MOST_BYTES, MOST_BYTES_PER_CHARACTER = 64 << 20, 64
# Sums whose value the next one replaces, such as `text = text + content` in a loop, may take MOST_BYTES and
# this many copies of the whole conversation per message. Chosen: room for sums of five terms.
MOST_COPIES_PER_MESSAGE = 2
# Bytes of a message besides its characters: its entries, and the marks around it.
_MESSAGE_BYTES = 512
# Processor time of a rendering; longer conversations get more. Chosen: with 4095 messages, on one core, a
# template that writes each message once takes 0.2 s, and one that copies the conversation for each takes 1 s.
MOST_SECONDS, MOST_SECONDS_PER_CHARACTER, MOST_SECONDS_PER_MESSAGE = 0.5, 2e-6, 1e-3
# Steps between readings of the clock.
_STEPS_PER_LOOK = 64
# Bytes of a list entry: uninspected, and inspected.
_ENTRY_BYTES, _DEEP_ENTRY_BYTES = 8, 64
# The largest number of digits, columns or copies that a filter or a method may be given. Chosen.
_MOST_COUNT = 10_000
# Bits of the largest integer that a template may compute.
_MOST_BITS = 4096
# A format field that is too wide, or whose width is another field.
_WIDE_FIELD = re.compile(r"\d{5}|\*|\{[^{}]*\{")
# Useless in a prompt, and random or slower than linear.
_NO_FILTERS = ("pprint", "random", "striptags", "urlize", "xmlattr")
_NO_GLOBALS = ("lipsum",)
# Useless string methods whose result may be longer than their arguments.
_NO_METHODS = frozenset({"expandtabs", "translate"})
_PADDING = frozenset({"center", "ljust", "rjust", "zfill"})
_PARTS = frozenset({"split", "rsplit", "splitlines", "list"})
_FORMATS = frozenset({"format", "format_map"})
_TOO_MUCH_TEXT = "it makes more text than any prompt has"
_COUNTED, _MADE = "asd_counted", "asd_made"


class TooMuchWork(Exception):  # noqa: N818 - named by its cause
    """A template computes more than any prompt needs."""


class Meter:
    """Counts what one rendering computes. Raises TooMuchWork.

    characters, messages: the conversation's. clock: processor time, in seconds.
    """

    def __init__(
        self, characters: int, messages: int = 0, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._steps = MOST_STEPS
        self._most_at_once = MOST_BYTES + MOST_BYTES_PER_CHARACTER * characters
        self._bytes = self._most_at_once
        copied = characters + _MESSAGE_BYTES * messages
        self._most_passing = self._most_at_once + MOST_COPIES_PER_MESSAGE * messages * copied
        self._passing = self._most_passing
        self._clock = clock
        self._seconds = (
            MOST_SECONDS + MOST_SECONDS_PER_CHARACTER * characters + MOST_SECONDS_PER_MESSAGE * messages
        )
        self._end = clock() + self._seconds

    @property
    def steps(self) -> int:
        """How many steps were counted."""
        return MOST_STEPS - self._steps

    @property
    def bytes(self) -> int:
        """How many bytes of lasting values were counted."""
        return self._most_at_once - self._bytes

    @property
    def passing_bytes(self) -> int:
        """How many bytes of sums were counted."""
        return self._most_passing - self._passing

    def step(self) -> None:
        """Count a step."""
        self._steps -= 1
        if self._steps < 0:
            raise TooMuchWork(f"it takes more than {MOST_STEPS} steps")
        if self._steps % _STEPS_PER_LOOK == 0 and self._clock() > self._end:
            raise TooMuchWork(f"it computes for more than {self._seconds:.1f} s")

    def make(self, size: int) -> None:
        """Count bytes of a lasting value that is made, or about to be."""
        self._bytes -= max(size, 0)
        if self._bytes < 0:
            raise TooMuchWork(_TOO_MUCH_TEXT)

    def make_passing(self, value: object) -> None:
        """Count a sum without the contents of its entries: the next sum replaces it under its name.

        Other uses of it are counted where they happen.
        """
        size = _shallow_size(value)
        self._passing -= size
        if self._passing < 0 or size > self._most_at_once:
            raise TooMuchWork(_TOO_MUCH_TEXT)

    def make_value(self, value: object, times: int = 1) -> None:
        """Count a value with its contents, repeated ones each time, as its text would hold them."""
        waiting = [value]
        for each in waiting:
            if isinstance(each, str):
                self.make(times * len(each))
            elif isinstance(each, dict):
                self.make(2 * times * _DEEP_ENTRY_BYTES * len(each))
                waiting += [*each, *each.values()]
            elif isinstance(each, list | tuple | set | frozenset):
                self.make(times * _DEEP_ENTRY_BYTES * len(each))
                waiting += each

    def make_shallow(self, value: object) -> None:
        """Count a value without the contents of its entries."""
        self.make(_shallow_size(value))


def _shallow_size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return _ENTRY_BYTES * len(value) if isinstance(value, list | tuple | dict | set) else 0


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Count the work of templates in this block."""
    token = _meter.set(meter)
    try:
        yield
    finally:
        _meter.reset(token)


def _running() -> Meter:
    # The library computes constants when it compiles a template.
    return _meter.get() or Meter(0)


class MeteredGenerator(CodeGenerator):
    """Compiles a template so that the environment handles `~`."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Write the call."""
        self.write("environment.concat((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose templates' work is counted."""

    code_generator_class: type[CodeGenerator] = MeteredGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        for name in _NO_FILTERS:
            del self.filters[name]
        for name in _NO_GLOBALS:
            del self.globals[name]
        for name, apply in list(self.filters.items()):
            self.set_filter(name, apply)
        self.filters[_COUNTED] = _counted
        self.filters[_MADE] = _made

    def set_filter(self, name: str, apply: Callable[..., Any]) -> None:
        """Give templates a filter."""
        self.filters[name] = _metered_filter(name, apply)

    @staticmethod
    def concat(parts: Iterable[object]) -> str:
        """Return parts as one text."""
        return "".join(map(str, count_parts(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute, unless the result would be too large for a prompt."""
        meter = _running()
        meter.step()
        if operator == "*":
            _check_product(meter, left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(meter, left, right)
        made = super().call_binop(context, operator, left, right)
        if operator == "+":
            meter.make_passing(made)
        elif operator != "*":
            meter.make_shallow(made)
        return made

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call, unless the result would be too large for a prompt."""
        meter = _running()
        meter.step()
        if isinstance(__obj, LoopContext) and args:
            # A recursive loop does not copy its argument.
            args = (_counted(args[0]), *args[1:])
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if name in _FORMATS and isinstance(getattr(__obj, "__wrapped__", __obj), _METHOD):
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", owner)
        if isinstance(owner, str):
            _check_method(meter, owner, name, args, kwargs)
        elif not isinstance(owner, dict):
            # Macros and loops take arguments as they are. A function may turn them into text, and an object
            # may keep them.
            is_taken = isinstance(__obj, Macro | LoopContext) or isinstance(owner, LoopContext)
            for each in () if is_taken else (*args, *kwargs.values()):
                meter.make_value(each)
        made = super().call(__context, __obj, *args, **kwargs)
        if not isinstance(__obj, Macro):
            # A macro counts what it writes.
            meter.make_shallow(made)
        return made

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _count_within(source)
        return super()._generate(source, *args, **kwargs)


_METHOD = type("".format)


def count_parts(parts: Iterable[object]) -> Iterator[object]:
    """Yield the parts of one text, counted."""
    meter = _running()
    for part in parts:
        meter.step()
        if isinstance(part, str):
            meter.make_passing(part)
        else:
            meter.make_value(part)
        yield part


def _count_within(source: nodes.Node) -> None:
    """Rewrite loops and list-making so that they pass through counting filters."""
    for loop in list(source.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
    for node in list(source.find_all(nodes.Node)):
        for name, value in list(node.iter_fields()):
            if isinstance(value, list):
                value[:] = [_wrapped(each) for each in value]
            else:
                setattr(node, name, _wrapped(value))


def _wrapped(value: Any) -> Any:
    is_made = isinstance(value, nodes.List | nodes.Dict) or (
        isinstance(value, nodes.Tuple) and value.ctx == "load"
    )
    if not is_made:
        return value
    return nodes.Filter(value, _MADE, [], [], None, None, lineno=value.lineno)


def _counted(values: Iterable[Any]) -> Any:
    """Yield the items of a loop, counted."""
    meter = _running()
    for value in values:
        meter.step()
        yield value


def _made(value: Any) -> Any:
    meter = _running()
    meter.step()
    meter.make_value(value)
    return value


def _written(value: Any) -> Any:
    if isinstance(value, dict | list | tuple | str):
        _running().make_value(value)
    return value


def _metered_filter(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    # Index of the filter's value: the library may pass an argument before it.
    first = 0 if getattr(apply, "jinja_pass_arg", None) is None else 1

    @functools.wraps(apply)
    def call(*args: Any, **kwargs: Any) -> Any:
        meter = _running()
        meter.step()
        value, others = args[first], (*args[first + 1 :], *kwargs.values())
        _check_counts(name, others)
        if isinstance(value, str):
            _check_method(meter, value, name, args[first + 1 :], kwargs)
        if name == "sum" and any(isinstance(each, list | tuple) for each in others):
            raise TooMuchWork("it sums up lists")
        if name == "indent":
            meter.make(str(value).count("\n") * max(map(_width, others), default=4))
        if name in {"batch", "slice", "join", "string", "tojson", "replace", "format", "trim"}:
            meter.make_value(value)
            meter.make_value(others)
        made = apply(*args, **kwargs)
        if hasattr(made, "__next__"):
            return _counted(made)
        meter.make_shallow(made)
        return made

    return call


def _width(value: object) -> int:
    return len(value) if isinstance(value, str) else value if isinstance(value, int) else 0


def _check_counts(name: str, others: Iterable[object]) -> None:
    most = 100 if name in {"round", "tojson"} else _MOST_COUNT
    if any(isinstance(each, int) and abs(each) > most for each in others) and name not in {"default", "d"}:
        raise TooMuchWork(f"it gives {name} a number above {most}")


def _check_method(meter: Meter, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count the result of a method or filter of a text before it is made."""
    if name in _NO_METHODS:
        raise TooMuchWork(f"it calls {name}, which no prompt needs")
    if name in _PADDING:
        _check_counts(name, (*args, *kwargs.values()))
        meter.make(_MOST_COUNT)
    elif name in _PARTS:
        meter.make(_ENTRY_BYTES * len(text))
    elif name in _FORMATS:
        _check_format(meter, text, (args, kwargs))
    elif name == "wordwrap":
        # A long word is copied once per line that it fills.
        width = next((each for each in (*args, *kwargs.values()) if isinstance(each, int)), 79)
        meter.make(len(text) * len(text) // max(width, 1))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        meter.make(text.count(args[0]) * len(args[1]))
    elif name == "join":
        for each in args:
            if isinstance(each, list | tuple | str | dict):
                meter.make(len(text) * len(each))
                meter.make_value(each)


def _check_format(meter: Meter, text: str, values: object) -> None:
    if _WIDE_FIELD.search(text):
        raise TooMuchWork("it writes a field of more than 9999 places, or of a computed width")
    # Each field may be the same value.
    meter.make_value(values, 1 + text.count("{") + text.count("%"))


def _check_product(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MOST_BITS:
            raise TooMuchWork("it computes a number of more than a thousand digits")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, str | list | tuple):
            meter.make(len(value) * (1 if isinstance(value, str) else _ENTRY_BYTES) * times)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MOST_BITS:
        raise TooMuchWork("it computes a number of more than a thousand digits")
