"""Random mutations of the router's loop, of the operators that cosmic-ray has."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

# The same code before and after the loop was rebuilt: planner.py became the files of planning/ that are named
# here, and progress.py became request.py. Modules that moved unchanged (load, health, ...) are left out: they
# would be most of the mutants, and say nothing of the loop.
_BEFORE = "cascade delivery pipeline ahead planner progress"
_PRESENT = (
    "cascade running request stream chain prefill planning/planner planning/fixed_plan planning/policy_plan "
    "planning/time_budget planning/knowledge planning/failures"
)

Position = tuple[int, int]


@dataclass(frozen=True)
class Mutation:
    """A change of one place of a file. occurrence: of the operator, in that file."""

    file: str
    start: Position
    end: Position
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """Its name among those of a revision."""
        return f"{self.file}:{self.start[0]}:{self.start[1]} {self.operator} {self.occurrence}"


def cores(root: Path) -> list[str]:
    """Return the files of the loop that a revision has."""
    router = "services/router"
    names = _PRESENT if (root / router / "planning").is_dir() else _BEFORE
    return [f"{router}/{name}.py" for name in names.split()]


def sample(root: Path, files: Collection[str], count: int, seed: int) -> list[Mutation]:
    """Return mutations of as many different places, drawn by seed; fewer where there are not as many.

    A place, and then one of its mutations: an operator with ten substitutes counts no more than another.
    Whatever does not compile is left out.
    """
    chance = random.Random(seed)
    places: dict[tuple[str, Position, Position], list[Mutation]] = {}
    for file in files:
        for mutation in _mutations(root, file):
            places.setdefault((file, mutation.start, mutation.end), []).append(mutation)
    order = sorted(places)
    chance.shuffle(order)
    drawn: list[Mutation] = []
    for place in order:
        mutation = chance.choice(places[place])
        if len(drawn) < count and _compiles(mutated(root, mutation)):
            drawn.append(mutation)
    return drawn


def mutated(root: Path, mutation: Mutation) -> str:
    """Return a file's text with a mutation."""
    code = (root / mutation.file).read_text(encoding="utf-8")
    changed = mutate_code(code, get_operator(mutation.operator)(), mutation.occurrence)
    assert changed is not None, f"{mutation.name} changes nothing"
    return str(changed)


def _mutations(root: Path, file: str) -> list[Mutation]:
    code = (root / file).read_text(encoding="utf-8")
    nodes, unseen = list(ast_nodes(get_ast(code))), _never_run(code)
    found = []
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():
            # Which variables those are to replace would have to be said.
            continue
        operator = kind()
        places = [each for node in nodes for each in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start and end <= last for first, last in unseen):
                found.append(Mutation(file, start, end, name, occurrence))
    return found


def _never_run(code: str) -> list[tuple[Position, Position]]:
    """Return where annotations, and imports for them, begin and end: a mutation there changes nothing."""
    spans: list[ast.expr | ast.stmt | None] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.AnnAssign | ast.arg):
            spans.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            spans.append(node.returns)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            spans.append(node)
    return [
        ((each.lineno, each.col_offset), (each.end_lineno or 0, each.end_col_offset or 0))
        for each in spans
        if each is not None
    ]


def _compiles(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True
