"""Tables of a routing evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policy_service.train.console import number_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from benchmarks.routing.evaluate import RoutingEvaluation


def routing_tables(evaluation: RoutingEvaluation) -> Iterator[Table]:
    """Yield tables of an evaluation: the routers, then the ladder's stages where it was replayed."""
    small, large = evaluation.ladder[0], evaluation.ladder[-1]
    table = number_table(
        f"{small} ({evaluation.accuracy[0]:.1%}) to {large} ({evaluation.accuracy[-1]:.1%}): "
        f"{evaluation.prompts} prompts, {evaluation.folds}",
        ("", "APGR", "95% interval", "over length", "CPT(50%)", "CPT(80%)"),
    )
    for name, routed in evaluation.routers.items():
        table.add_row(
            name,
            f"{routed.apgr:.3f}",
            f"{routed.interval[0]:.3f}–{routed.interval[1]:.3f}",
            "–" if routed.over_length is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*routed.over_length),
            f"{routed.cpt50:.1%}",
            f"{routed.cpt80:.1%}",
        )
    notes = []
    ours = evaluation.routers["ours"]
    if ours.folds is not None:
        notes.append(
            f"ours, between assignments: {ours.assignments[0]:.3f}–{ours.assignments[1]:.3f}; "
            f"between single folds of unseen subjects: {ours.folds[0]:.3f}–{ours.folds[1]:.3f} (95% each)"
        )
    if evaluation.published is not None:
        each = evaluation.published
        table.add_row(each.name, f"{each.apgr:.3f}", "–", "–", f"{each.cpt50:.1%}", f"{each.cpt80:.1%}")
        notes.append(f"{each.name}: as published, {each.source}; on the full benchmark")
    table.caption = "\n".join(notes)
    yield table
    if evaluation.ladder_lines:
        headings = ("", "accuracy", "of the\nlast's", "cost", *evaluation.ladder)
        table = number_table("the ladder; cost by parameters, the last stage alone is 1", headings)
        for line in evaluation.ladder_lines:
            shares = (f"{share:.1%}" for share in line.mix)
            table.add_row(
                line.name, f"{line.accuracy:.2%}", f"{line.accuracy_ratio:.1%}", f"{line.cost:.3f}", *shares
            )
        yield table
