"""Measures routers on published outcomes of real models: `python -m benchmarks.routing DATA`.

Puts figures into benchmarks/results/routing.json, one by one: interrupt it, and what is measured is kept.
With --ladder, DATA is one file of outcomes, and the result is printed. The data is not part of the project
(docs/routing.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.arguments import count
from benchmarks.record import update_result
from benchmarks.routing.evaluate import SUBJECT_REPEATS, RoutingEvaluation, RoutingOptions, evaluate_file
from benchmarks.routing.report import routing_tables
from benchmarks.routing.table import UnfitOptions
from policy_service.train.console import finite, result_console, warn
from policy_service.train.faults import UnfitOutcomes
from services.common.disks import explain

if TYPE_CHECKING:
    from collections.abc import Sequence

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
_MOST_FOLDS = 100


def main(arguments: list[str] | None = None) -> None:
    """Measure one file, or every figure that is named, and keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("data", type=Path, help="directory of the outcome files; with --ladder, one of them")
    parser.add_argument("only", nargs="*", choices=[*CELLS, []], help="these figures alone")
    parser.add_argument(
        "--repeats",
        type=count,
        default=SUBJECT_REPEATS,
        help="random assignments of subjects to folds, by subject (default: %(default)s)",
    )
    parser.add_argument(
        "--embeddings", type=Path, help="sentence encoder (zip with .onnx and tokenizer.json)"
    )
    one = parser.add_argument_group("one file")
    one.add_argument("--ladder", help="its models, smallest first: a,b[,c]")
    one.add_argument(
        "--group",
        choices=["question", "subject"],
        default="question",
        help="test on unseen questions, or on unseen subjects (default: %(default)s)",
    )
    one.add_argument("--folds", type=_folds, default=5, help="of the cross-validation (default: %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="of the folds and routers (default: %(default)s)")
    one.add_argument(
        "--also", type=Path, action="append", default=[], help="further models on its prompts, to train on"
    )
    one.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        if options.ladder is None:
            _measure_cells(options)
        else:
            _measure_file(options)
    except UnfitOptions as error:
        parser.error(str(error))
    except (UnfitOutcomes, OSError) as error:
        said = explain(error) if isinstance(error, OSError) else error
        raise SystemExit(f"benchmarks.routing: {said}") from error


def _folds(text: str) -> int:
    number = count(text)
    if not 2 <= number <= _MOST_FOLDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 2 to {_MOST_FOLDS}")
    return number


def _measure_file(options: argparse.Namespace) -> None:
    ladder = [name.strip() for name in options.ladder.split(",") if name.strip()]
    by_subject = options.group == "subject"
    test = RoutingOptions(by_subject, options.folds, options.seed, options.repeats if by_subject else 1)
    found = _evaluate(options.data, ladder, test, options, "reading")
    if options.json:
        print(json.dumps(finite(asdict(found)), indent=2))
        return
    if found.dropped:
        warn(f"{found.dropped} prompts lack an outcome of the ladder and were left out")
    for table in routing_tables(found):
        result_console().print(table)


def _measure_cells(options: argparse.Namespace) -> None:
    command = f"python -m benchmarks.routing DATA --repeats {options.repeats}"
    command += " --embeddings FILE" if options.embeddings else ""
    for figure in options.only or CELLS:
        file, ladder, by_subject = CELLS[figure]
        test = RoutingOptions(by_subject=by_subject, repeats=options.repeats if by_subject else 1)
        found = asdict(_evaluate(options.data / file, ladder, test, options, figure))
        apgr = found["routers"]["ours"]["apgr"]
        path = update_result("routing", command, {figure: round(apgr, 4), f"{figure}_routing": found})
        print(f"{figure} {apgr:.4f} {path}", file=sys.stderr)


def _evaluate(
    file: Path,
    ladder: Sequence[str],
    test: RoutingOptions,
    options: argparse.Namespace,
    what: str,
) -> RoutingEvaluation:
    with Console(stderr=True).status(what) as status:
        return evaluate_file(file, ladder, test, options.also, options.embeddings, status.update)


if __name__ == "__main__":
    main()
