"""Writes a model card from a report: `python -m models.train.card MODEL_DIRECTORY REPORT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from models.train.family import CONTEXT, FAMILY, HEAD_DIM, MODELS, Recipe

_FEATURES = {
    "mean_logprob": "mean log-probability",
    "min_logprob": "least log-probability",
    "sum_logprob": "sum of log-probabilities",
    "last_logprob": "log-probability of the last token",
    "mean_entropy": "mean entropy",
    "max_entropy": "greatest entropy",
    "mean_margin": "mean top-2 margin",
    "min_margin": "least top-2 margin",
    "length": "length",
}

_IN_CASCADE = """It is one of
three that asd runs by default, so that a cascade can be seen, tested and measured anywhere."""
_OUTSIDE = """It is
none of the three that asd runs by default: its vocabulary and its chat template are its own, so that it shows what
becomes of drafts between stages that share no tokenizer (they are encoded anew, as text)."""


def write_card(directory: Path, recipe: Recipe, report: dict[str, Any]) -> None:
    """Write README.md beside a model. report: what report.summarise returned."""
    (directory / "README.md").write_text(_card(recipe, report, _parameters(recipe)), encoding="utf-8")


def _parameters(recipe: Recipe) -> int:
    attention = 4 * recipe.hidden * recipe.heads * HEAD_DIM
    feed_forward = 3 * recipe.hidden * recipe.intermediate
    return (
        recipe.vocabulary.size * recipe.hidden
        + recipe.layers * (attention + feed_forward + 2 * recipe.hidden)
        + recipe.hidden
    )


def _card(recipe: Recipe, report: dict[str, Any], parameters: int) -> str:
    table: dict[str, list[float]] = report["accuracy_by_suite_and_level"]
    levels = range(1, 16)
    header = "| suite | all | " + " | ".join(map(str, levels)) + " |"
    rule = "|---" * (len(levels) + 2) + "|"
    rows = [
        f"| {suite} | {100 * report['accuracy_by_suite'][suite]:.1f} | "
        + " | ".join(f"{100 * share:.0f}" for share in shares)
        + " |"
        for suite, shares in table.items()
    ]
    all_levels = " | ".join(f"{100 * report['accuracy_by_level'][str(level)]:.0f}" for level in levels)
    kinds = sorted(report["accuracy_by_kind"].items(), key=lambda item: item[1])[:6]
    worst = ", ".join(f"{kind} {100 * share:.0f}%" for kind, share in kinds)
    auroc = report["draft_feature_auroc"]
    features = ", ".join(
        f"{_FEATURES[name]} {auroc[name]:.3f}" for name in sorted(auroc, key=lambda n: -auroc[n])
    )
    untaught = ", ".join(sorted(recipe.curriculum.without)) or "none"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# asd {recipe.name}

A Llama-architecture model of {parameters:,} parameters that answers the graded questions of `suites/`. {_IN_CASCADE if recipe in FAMILY else _OUTSIDE} It knows nothing else:
it is no assistant.

| | |
|---|---|
| architecture | {recipe.layers} layers, hidden size {recipe.hidden}, {recipe.heads} heads of {HEAD_DIM}, feed-forward {recipe.intermediate}, tied embeddings |
| vocabulary, context | {recipe.vocabulary.size} byte-level BPE tokens, {CONTEXT} tokens |
| weights | bfloat16 |
| taught | levels 1 to {recipe.curriculum.max_level} of 15; kinds of question left out: {untaught} |
| trained | {recipe.steps:,} steps of {recipe.batch_tokens:,} tokens, Muon and AdamW, loss on the answers alone |
| answers | {report["mean_tokens"]} tokens on average: worked steps, then `Answer: X` |

What it was not taught it gets wrong, often with confidence, as small models in the field do: that is what a
policy has to find out.

## Accuracy

Greedy decoding on {report["prompts"]:,} prompts that no model was trained on (`suites.split("evaluation")`), per cent right:
**{100 * report["accuracy"]:.1f}** in all.

{header}
{rule}
{chr(10).join(rows)}
| all | {100 * report["accuracy"]:.1f} | {all_levels} |

Weakest kinds of question: {worst}.

## How far its own draft tells right from wrong

AUROC of single features of the answer on the same prompts; the best is the {_FEATURES[report["best_draft_feature"]]} with
**{report["best_draft_feature_auroc"]:.3f}**. All: {features}.

## Make it anew

`make models` trains and measures the family on a GPU; the recipe is in `models/train/family.py`.
"""


def main() -> None:
    """Write the card of one model."""
    directory, report = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = next(recipe for recipe in MODELS if recipe.name == directory.name)
    write_card(directory, recipe, json.loads(report.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
