"""Output of the `asd-policy` commands."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from services.common.terminal import LiteralConsole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

# Width in files and pipes: no table is wider.
_WIDE = 160


def result_console() -> Console:
    """Return the console for results. In files and pipes, it is wide enough for every table."""
    console = LiteralConsole()
    return console if console.is_terminal else LiteralConsole(width=_WIDE)


def warn(line: str) -> None:
    """Print a warning on standard error."""
    LiteralConsole(stderr=True).print(
        f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True
    )


def number_table(title: str, headings: Sequence[str], texts: int = 1) -> Table:
    """Return a table of numbers. texts: its first columns are text, which is cut so that no number is."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, heading in enumerate(headings):
        is_text = index < texts or not heading
        table.add_column(
            heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
        )
    return table


def finite(value: object) -> object:
    """Return a value with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
