"""Train the models and measure them: `python -m models.train --out DIR`. Wants one GPU and all cores."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from models.train.family import FAMILY, MODELS
from services.common.privacy import report_nothing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from models.train.family import Recipe
    from models.train.llama import Llama

STEPS = ("all", "corpus", "fit", "measure", "outcomes")
# Files of outcomes: the split of the suites, prompts and conversations of each. What is
# in `evaluation` and `conversations` only measures.
OUTCOMES = {
    "train": ("train", 100_000, 20_000),
    "calibration": ("calibration", 25_000, 5_000),
    "evaluation": ("evaluation", 27_384, 0),
    "conversations": ("evaluation", 0, 5_000),
}

# torch is imported inside the steps that need it: the processes that build the corpus import this module too.


def main() -> None:
    """Run one step, or all of them."""
    report_nothing()
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    parser.add_argument("step", choices=STEPS, nargs="?", default="all")
    parser.add_argument("--out", type=Path, required=True, help="directory of the models")
    parser.add_argument("--work", type=Path, default=Path("/tmp/asd-family"), help="directory of the corpora")  # noqa: S108
    parser.add_argument("--samples", type=int, default=2_500_000)
    parser.add_argument("--model", choices=[recipe.name for recipe in MODELS], help="this one alone")
    parser.add_argument("--tokenizer", type=Path, help="with --model: use this tokenizer.json")
    parser.add_argument("--start", type=Path, help="go on from the models in this directory")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="end each training after this time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="do not compile the training step")
    parser.add_argument("--evaluation", type=int, default=27_384, help="prompts for the model cards")
    parser.add_argument(
        "--outcomes",
        type=Path,
        help="write outcome files for the policy to this directory (step outcomes, or all)",
    )
    parser.add_argument("--outcome-share", type=float, default=1.0, help="of the rows of every outcome file")
    parser.add_argument(
        "--reference", type=Path, help="also write transformers' outputs for the tests to this file"
    )
    options = parser.parse_args()
    if options.tokenizer and not options.model:
        parser.error("--tokenizer needs --model: the models do not share one")
    if options.model and (options.outcomes or options.reference):
        parser.error("--outcomes and --reference are of the whole family: leave --model out")
    if options.step == "outcomes" and not options.outcomes:
        parser.error("step outcomes needs --outcomes")
    recipes = [recipe for recipe in MODELS if options.model in (None, recipe.name)]
    if options.step != "corpus" and find_spec("torch") is None:
        # Said before the corpus, which takes minutes.
        raise SystemExit('training needs torch: python -m pip install --editable ".[train]"')
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step in ("all", "corpus"):
        _corpora(recipes, options)
    if options.step in ("all", "fit"):
        _fit(recipes, options)
    if options.step in ("all", "measure"):
        _measure(recipes, options)
    if options.outcomes and options.step in ("all", "outcomes"):
        _outcomes(options)


def _corpora(recipes: Sequence[Recipe], options: argparse.Namespace) -> None:
    """Write tokenizer and corpus of each vocabulary to its own directory under --work."""
    from tokenizers import Tokenizer

    from models.train.corpus import build_corpus, save_corpus
    from models.train.vocabulary import train_tokenizer

    for vocabulary in dict.fromkeys(recipe.vocabulary for recipe in recipes):
        started = time.monotonic()
        directory = options.work / vocabulary.name
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = (
            Tokenizer.from_file(str(options.tokenizer)) if options.tokenizer else train_tokenizer(vocabulary)
        )
        tokenizer.save(str(directory / "tokenizer.json"))
        corpus = build_corpus(tokenizer, vocabulary, options.samples)
        save_corpus(corpus, directory / "corpus.npz")
        print(
            f"corpus {vocabulary.name}: {len(corpus.answers)} samples, {len(corpus.tokens)} tokens, "
            f"{time.monotonic() - started:.0f} s"
        )


def _fit(recipes: Sequence[Recipe], options: argparse.Namespace) -> None:
    """Train one model here, several side by side in processes: none of them fills a GPU alone."""
    if len(recipes) == 1:
        _fit_one(recipes[0], options)
        return
    same = ["--out", options.out, "--work", options.work, "--device", options.device]
    same += ["--max-seconds", options.max_seconds, "--rate-scale", options.rate_scale]
    same += ["--start", options.start] if options.start else []
    same += ["--eager"] if options.eager else []
    running = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "models.train", "fit", "--model", recipe.name, *map(str, same)]
        )
        for recipe in recipes
    ]
    failed = [process.wait() != 0 for process in running]
    if any(failed):
        raise SystemExit("a training failed: see its message above")


def _fit_one(recipe: Recipe, options: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from models.train.corpus import load_corpus
    from models.train.fit import save_model, train_model

    directory = options.work / recipe.vocabulary.name
    model = train_model(
        recipe,
        load_corpus(directory / "corpus.npz"),
        device=options.device,
        start=options.start and options.start / recipe.name,
        rate_scale=options.rate_scale,
        max_seconds=options.max_seconds,
        compiled=not options.eager,
    )
    save_model(
        model, recipe, Tokenizer.from_file(str(directory / "tokenizer.json")), options.out / recipe.name
    )


def _measure(recipes: Sequence[Recipe], options: argparse.Namespace) -> None:
    """Write card and report.json beside each model."""
    from models.train.card import write_card
    from models.train.outcomes import answer_tasks
    from models.train.report import summarise
    from suites import split

    models, tokenizers = _load(recipes, options)
    tasks = list(split("evaluation", options.evaluation))
    for recipe in recipes:
        name = recipe.name
        started = time.monotonic()
        summary = summarise(tasks, answer_tasks(models[name], tokenizers[name], tasks, options.device))
        write_card(options.out / name, recipe, summary)
        (options.out / name / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(name, json.dumps(summary), f"{time.monotonic() - started:.0f} s", flush=True)
    if options.reference:
        from models.train.reference import write_reference

        directories = [options.out / recipe.name for recipe in FAMILY]
        write_reference(options.reference, directories, 500, options.device)


def _outcomes(options: argparse.Namespace) -> None:
    """Write the outcome files of the family; one that is there already is left alone."""
    from models.train.corpus import draw_tasks
    from models.train.outcomes import answer_tasks, check_drafts, outcome_rows
    from models.train.vocabulary import END
    from policy_service.train.outcome_table import write_outcomes

    options.outcomes.mkdir(parents=True, exist_ok=True)
    family = [recipe.name for recipe in FAMILY]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            name: pool.submit(draw_tasks, *source, options.outcome_share)
            for name, source in OUTCOMES.items()
            if not (options.outcomes / f"{name}.parquet").exists()
        }
        models, tokenizers = _load(FAMILY, options)
        end_id = tokenizers[family[0]].token_to_id(END)
        for name, drawn in waiting.items():
            started = time.monotonic()
            tasks = drawn.result()
            answers = {
                each: answer_tasks(models[each], tokenizers[each], tasks, options.device) for each in family
            }
            checks = {
                (draft, target): check_drafts(
                    models[target], tokenizers[target], tasks, answers[draft], options.device
                )
                for draft, target in combinations(family, 2)
            }
            rows = outcome_rows(tasks, OUTCOMES[name][0], answers, checks, end_id)
            count = write_outcomes(options.outcomes / f"{name}.parquet", family, rows)
            print(f"outcomes {name}: {count} rows, {time.monotonic() - started:.0f} s", flush=True)


def _load(
    recipes: Sequence[Recipe], options: argparse.Namespace
) -> tuple[dict[str, Llama], dict[str, Tokenizer]]:
    from tokenizers import Tokenizer

    from models.train.fit import load_model

    models, tokenizers = {}, {}
    for recipe in recipes:
        directory = options.out / recipe.name
        models[recipe.name] = load_model(directory, recipe).to(options.device)
        tokenizers[recipe.name] = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return models, tokenizers


if __name__ == "__main__":
    main()
