"""Short Python programs: say what they print, or complete them. In the shape of HumanEval and CRUXEval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suites.task import Task
from suites.wording import choose_kind, conclude

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

NAME = "code"
# (kind, first level, weight); see wording.choose_kind.
KINDS = (
    ("trace", 1, 1.0),
    ("string", 2, 0.4),
    ("branch", 3, 0.4),
    ("complete", 3, 0.3),
    ("loop", 4, 0.6),
    ("alias", 7, 0.4),
    ("while", 8, 0.4),
    ("nested", 10, 0.8),
)
_VARIABLES = "a b c d e f g h k m n t v x y".split()
_LARGEST = 999


def generate(level: int, rng: random.Random) -> Task:
    """Return a program of a level (1 to 15). Higher levels have more statements and turns of loops."""
    kind = choose_kind(KINDS, level, rng)
    return _MAKERS[kind](kind, level, rng)


def generate_follow_up(level: int, rng: random.Random) -> Task:
    """Return a second turn that adds a line to the program of the first one."""
    first = _trace("trace", max(1, level - 2), rng)
    variable = first.prompt.rsplit("print(", 1)[1][:-1]
    value = int(first.answer)
    statement, step, value = _assign(variable, variable, value, level, rng)
    return Task(
        NAME,
        level,
        "follow_up",
        f"Now add this line before the print. What does it print then?\n{statement}",
        conclude([step], str(value), rng),
        str(value),
        ((first.prompt, first.solution),),
    )


def _ask(lines: list[str], question: str = "What does this print?") -> str:
    return "\n".join([question, *lines])


def _assign(target: str, source: str, value: int, level: int, rng: random.Random) -> tuple[str, str, int]:
    """Draw an assignment to `target` from `source`, which holds `value`: statement, worked step, result."""
    operand = rng.randint(2, 20 + 3 * level)
    roll = rng.random()
    if roll < 0.2 and value * (operand % 4 + 2) <= _LARGEST:
        factor = operand % 4 + 2
        return (
            f"{target} = {source} * {factor}",
            f"{target}={value}*{factor}={value * factor}",
            value * factor,
        )
    if roll < 0.3 and value >= 4:
        return f"{target} = {source} // 2", f"{target}={value}//2={value // 2}", value // 2
    if roll < 0.4:
        divisor = rng.randint(3, 9)
        return (
            f"{target} = {source} % {divisor}",
            f"{target}={value}%{divisor}={value % divisor}",
            value % divisor,
        )
    if (roll < 0.7 and value + operand <= _LARGEST) or operand > value:
        return (
            f"{target} = {source} + {operand}",
            f"{target}={value}+{operand}={value + operand}",
            value + operand,
        )
    return (
        f"{target} = {source} - {operand}",
        f"{target}={value}-{operand}={value - operand}",
        value - operand,
    )


def _trace(kind: str, level: int, rng: random.Random) -> Task:
    """Follow straight-line assignments to one variable."""
    name = rng.choice(_VARIABLES)
    value = rng.randint(2, 30 + 3 * level)
    lines, steps = [f"{name} = {value}"], [f"{name}={value}"]
    for _ in range(1 + level // 2):
        statement, step, value = _assign(name, name, value, level, rng)
        lines.append(statement)
        steps.append(step)
    return Task(
        NAME, level, kind, _ask([*lines, f"print({name})"]), conclude(steps, str(value), rng), str(value)
    )


def _branch(kind: str, level: int, rng: random.Random) -> Task:
    name = rng.choice(_VARIABLES)
    value = rng.randint(2, 9 + 3 * level)
    lines, steps = [f"{name} = {value}"], [f"{name}={value}"]
    for _ in range(1 + level // 5):
        bound = max(1, value + rng.randint(-9, 9))
        sign = rng.choice((">", "<"))
        holds = value > bound if sign == ">" else value < bound
        yes, step_yes, value_yes = _assign(name, name, value, level, rng)
        no, step_no, value_no = _assign(name, name, value, level, rng)
        lines += [f"if {name} {sign} {bound}:", f"    {yes}", "else:", f"    {no}"]
        steps.append(f"{value}{sign}{bound} is {holds}")
        steps.append(step_yes if holds else step_no)
        value = value_yes if holds else value_no
    return Task(
        NAME, level, kind, _ask([*lines, f"print({name})"]), conclude(steps, str(value), rng), str(value)
    )


def _loop(kind: str, level: int, rng: random.Random) -> Task:
    name = rng.choice([v for v in _VARIABLES if v != "i"])
    value = rng.randint(0, 9 + level)
    start = rng.randint(0, 4)
    turns = 2 + level // 3
    extra = rng.randint(1, 3 + level // 3)
    bodies: tuple[tuple[str, Callable[[int, int], int]], ...] = (
        (f"{name} = {name} + i", lambda v, i: v + i),
        (f"{name} = {name} + {extra}", lambda v, _: v + extra),
        (f"{name} = {name} + i * 2", lambda v, i: v + i * 2),
    )
    body, update = rng.choice(bodies)
    lines = [
        f"{name} = {value}",
        f"for i in range({start}, {start + turns}):",
        f"    {body}",
        f"print({name})",
    ]
    steps = [f"{name}={value}"]
    for i in range(start, start + turns):
        value = update(value, i)
        steps.append(f"i={i} {name}={value}")
    return Task(NAME, level, kind, _ask(lines), conclude(steps, str(value), rng), str(value))


def _while(kind: str, level: int, rng: random.Random) -> Task:
    name = rng.choice(_VARIABLES)
    step_size = rng.randint(3, 9 + level)
    turns = 2 + level // 4
    value = rng.randint(1, 9)
    bound = value + step_size * (turns - 1) + rng.randint(1, step_size)
    lines = [
        f"{name} = {value}",
        f"while {name} < {bound}:",
        f"    {name} = {name} + {step_size}",
        f"print({name})",
    ]
    steps = [f"{name}={value}"]
    while value < bound:
        value += step_size
        steps.append(f"{name}={value}")
    return Task(NAME, level, kind, _ask(lines), conclude(steps, str(value), rng), str(value))


def _nested(kind: str, level: int, rng: random.Random) -> Task:
    name = rng.choice(_VARIABLES)
    value = rng.randint(0, 9)
    outer, inner = rng.choice(((2, 2), (2, 3), (3, 2), (2, 4)))
    bodies: tuple[tuple[str, Callable[[int, int, int], int]], ...] = (
        (f"{name} = {name} + i * j", lambda v, i, j: v + i * j),
        (f"{name} = {name} + i + j", lambda v, i, j: v + i + j),
    )
    body, update = rng.choice(bodies)
    low = rng.randint(1, 3)
    lines = [
        f"{name} = {value}",
        f"for i in range({low}, {low + outer}):",
        f"    for j in range(1, {1 + inner}):",
        f"        {body}",
        f"print({name})",
    ]
    steps = [f"{name}={value}"]
    for i in range(low, low + outer):
        for j in range(1, 1 + inner):
            value = update(value, i, j)
            steps.append(f"i={i} j={j} {name}={value}")
    return Task(NAME, level, kind, _ask(lines), conclude(steps, str(value), rng), str(value))


def _string(kind: str, level: int, rng: random.Random) -> Task:
    """Apply string operations one after the other, spelt out letter by letter."""
    name = rng.choice(("s", "w", "z"))
    text = "".join(rng.choice("abcdefghkmnopqrstuw") for _ in range(3 + level // 4))
    lines, steps = [f'{name} = "{text}"'], [f"{name}={_spell(text)}"]
    for _ in range(1 + level // 4):
        roll = rng.random()
        if roll < 0.3:
            lines.append(f"{name} = {name}[::-1]")
            text = text[::-1]
        elif roll < 0.55 and len(text) > 3:
            cut = rng.randint(1, len(text) - 2)
            lines.append(f"{name} = {name}[{cut}:]")
            text = text[cut:]
        elif roll < 0.75 and len(text) > 3:
            cut = rng.randint(2, len(text) - 1)
            lines.append(f"{name} = {name}[:{cut}]")
            text = text[:cut]
        else:
            letter = rng.choice("vxyz")
            lines.append(f'{name} = {name} + "{letter}"')
            text += letter
        steps.append(f"{name}={_spell(text)}")
    if rng.random() < 0.3:
        lines.append(f"print(len({name}))")
        answer = str(len(text))
    else:
        lines.append(f"print({name})")
        answer = _spell(text)
    prompt = _ask(lines, "What does this print? Put dashes between letters.")
    return Task(NAME, level, kind, prompt, conclude(steps, answer, rng), answer)


def _spell(text: str) -> str:
    return "-".join(text)


def _alias(kind: str, level: int, rng: random.Random) -> Task:
    """Follow two names of which the second is an alias of the first or a copy of it."""
    first, second = rng.sample(("p", "q", "r", "u"), 2)
    items = [rng.randint(1, 20) for _ in range(2 + level // 6)]
    is_alias = rng.random() < 0.5
    lines = [f"{first} = {items}", f"{second} = {first}" if is_alias else f"{second} = list({first})"]
    lists = {first: items, second: items if is_alias else list(items)}
    steps = [f"{second} is {'the same list' if is_alias else 'a copy'}"]
    for _ in range(1 + level // 5):
        changed = rng.choice((first, second))
        added = rng.randint(1, 20)
        lines.append(f"{changed}.append({added})")
        lists[changed].append(added)
        steps.append(f"{first} has {len(lists[first])}, {second} has {len(lists[second])}")
    shown = rng.choice((first, second))
    lines.append(f"print(len({shown}))")
    answer = str(len(lists[shown]))
    return Task(NAME, level, kind, _ask(lines), conclude(steps, answer, rng), answer)


def _complete(kind: str, level: int, rng: random.Random) -> Task:
    """Fill the blank in the last line so that the program prints a given number."""
    name = rng.choice(_VARIABLES)
    value = rng.randint(3, 9 + 2 * level)
    lines, steps = [f"{name} = {value}"], [f"{name}={value}"]
    for _ in range(level // 4):
        statement, step, value = _assign(name, name, value, level, rng)
        lines.append(statement)
        steps.append(step)
    operand = rng.randint(2, 9)
    sign = rng.choice("+-*")
    wanted = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
    # Only one sign may fit.
    if [value + operand, value - operand, value * operand].count(wanted) > 1:
        return _complete(kind, level, rng)
    lines.append(f"print({name} ? {operand})")
    steps.append(f"{value}{sign}{operand}={wanted}")
    prompt = f"Which of + - * must replace the question mark to print {wanted}?\n" + "\n".join(lines)
    return Task(NAME, level, kind, prompt, conclude(steps, sign, rng), sign)


_MAKERS = {
    "trace": _trace,
    "branch": _branch,
    "loop": _loop,
    "while": _while,
    "nested": _nested,
    "string": _string,
    "alias": _alias,
    "complete": _complete,
}
