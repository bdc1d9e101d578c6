"""Measures routers on published outcomes of real models: `python -m benchmarks.routing DATA`.

Puts figures into benchmarks/results/routing.json, one by one: interrupt it, and what is measured is kept.
The data is not part of the project (docs/routing.md).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.arguments import count
from benchmarks.record import update_result
from benchmarks.routing.evaluate import SUBJECT_REPEATS, RoutingOptions, evaluate_file
from policy_service.train.faults import UnfitOutcomes

_ROUTELLM = ("mixtral_8x7b_instruct_v0_1", "gpt_4_1106_preview")
_LLAMA = ("llama_2_13b_hf", "meta_llama_3_70b")
_YI = ("yi_34b", "meta_llama_3_70b")
CELLS = {
    "apgr_gsm8k": ("routellm_gsm8k.csv.gz", _ROUTELLM, False),
    "apgr_mmlu": ("routellm_mmlu.csv.gz", _ROUTELLM, False),
    "apgr_mmlu_grouped": ("routellm_mmlu.csv.gz", _ROUTELLM, True),
    "apgr_mmlu_pro": ("mmlu_pro.csv.gz", _LLAMA, False),
    "apgr_mmlu_pro_grouped": ("mmlu_pro.csv.gz", _LLAMA, True),
    "apgr_mmlu_pro_yi": ("mmlu_pro.csv.gz", _YI, False),
    "apgr_mmlu_pro_yi_grouped": ("mmlu_pro.csv.gz", _YI, True),
}
"""File, ladder, and whether the folds are by subject, by figure."""


def main() -> None:
    """Measure every cell that is asked for, and keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("data", type=Path, help="directory of the outcome files")
    parser.add_argument("only", nargs="*", choices=[*CELLS, []], help="these alone")
    parser.add_argument(
        "--repeats",
        type=count,
        default=SUBJECT_REPEATS,
        help="random assignments of subjects to folds, by subject (default: %(default)s)",
    )
    parser.add_argument("--embeddings", type=Path, help="sentence encoder, as of `asd-policy evaluate`")
    options = parser.parse_args()
    console = Console(stderr=True)
    command = f"python -m benchmarks.routing DATA --repeats {options.repeats}"
    command += " --embeddings FILE" if options.embeddings else ""
    for figure in options.only or CELLS:
        file, ladder, by_subject = CELLS[figure]
        try:
            with console.status(figure) as status:
                evaluation = evaluate_file(
                    options.data / file,
                    ladder,
                    RoutingOptions(by_subject=by_subject, repeats=options.repeats if by_subject else 1),
                    [],
                    options.embeddings,
                    status.update,
                )
        except (UnfitOutcomes, OSError) as error:
            raise SystemExit(f"benchmarks.routing: {error}") from error
        found = asdict(evaluation)
        apgr = found["routers"]["ours"]["apgr"]
        path = update_result("routing", command, {figure: round(apgr, 4), f"{figure}_routing": found})
        print(f"{figure} {apgr:.4f} {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
