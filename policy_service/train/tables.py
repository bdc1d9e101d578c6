"""Tables of an evaluation, as `asd-policy evaluate` prints them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from policy_service.train.console import number_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from policy_service.train.evaluate import Comparison, Evaluation, Prediction


def lines_table(evaluation: Evaluation, cascade: Sequence[str]) -> Table:
    """Return a table of the policy, fixed stages, thresholds and the oracle."""
    first = ("accuracy", "of the\nlast's", "cost", "of oracle's\nsaving")
    headings = (*first, "latency\nms", "early\nstops", *cascade)
    title = f"policy {evaluation.policy_version} on {evaluation.prompts} prompts"
    if evaluation.unlike_share is not None:
        share = f"{evaluation.unlike_share:.1%}"
        title += f", {share} of them unlike all that it was fitted to: as served, without predictions"
    table = number_table(title, ("", *headings))
    for line in evaluation.lines:
        table.add_row(
            line.name,
            f"{line.accuracy:.2%}",
            f"{line.accuracy_ratio:.2%}",
            f"{line.cost:.2f}",
            f"{evaluation.oracle_share[line.name]:.0%}",
            f"{line.latency_ms:.1f}",
            f"{line.early_stop_share:.1%}",
            *(f"{share:.1%}" for share in line.mix),
        )
    return table


def comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    """Return a table of the policy and the best threshold, by value of quality."""
    headings = ("lambda", "policy", "best\nthreshold", "difference", "95% interval")
    table = number_table(
        "Value per prompt, beside the best fixed threshold (chosen with hindsight)", ("", *headings)
    )
    for each in comparisons:
        interval = f"{each.low:+.4f} to {each.high:+.4f}"
        numbers = (f"{each.quality_value:g}", f"{each.value:.4f}", f"{each.threshold_value:.4f}")
        table.add_row(each.name, *numbers, f"{each.difference:+.4f}", interval)
    return table


def predictions_table(predictions: Sequence[Prediction]) -> Table:
    """Return a table of the quality of each view's predictions."""
    table = number_table("P(correct) of the judged answer", ("answer of", "R²", "AUROC", "ECE", "Brier"))
    for each in predictions:
        numbers = (each.r2, each.auroc, each.calibration_error, each.brier)
        table.add_row(each.view, *("–" if math.isnan(number) else f"{number:.3f}" for number in numbers))
    return table
