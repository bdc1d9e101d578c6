"""`asd-engine check MODEL`: run the conformance suite against a real installation, in one command."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from asd.errors import AsdError, InvalidRequest
from services.common.documents import parse_yaml
from services.common.extras import needs
from services.common.privacy import report_nothing
from services.common.settings import Section, explain, suggestion
from services.stage.engines.factory import make_engines
from services.stage.engines.settings import TensorrtLlmSettings, VllmSettings
from services.stage.settings import ModelSettings

with needs("stage", "asd-engine"):
    from services.stage.engines.conformance import (
        CHECKS,
        CheckOutcome,
        Suite,
        a_model_can_be_unloaded_and_loaded_again,
        run_check,
        status_tells_what_is,
    )

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.stage.engines.engine import Engine

# Half a step of bfloat16 logits at 16 is 0.03, which moves a probability near one half by this much. Chosen.
_TIE_MARGIN = {"onnx": 0.0, "vllm": 0.02, "tensorrt_llm": 0.02}
# Checks that adapters skip: they are part of their model's memory, and are loaded and unloaded with it.
_OF_A_MODEL = (status_tells_what_is, a_model_can_be_unloaded_and_loaded_again)
_SIGNAL_TOLERANCE = {"onnx": 2e-3, "vllm": 0.15, "tensorrt_llm": 0.15}
_SECTIONS: dict[str, type[Section]] = {"vllm": VllmSettings, "tensorrt_llm": TensorrtLlmSettings}
_OPTIONS = {
    "onnx": tuple(each for each in ModelSettings.model_fields if each not in _SECTIONS),
    **{engine: tuple(section.model_fields) for engine, section in _SECTIONS.items()},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    report_nothing()
    parser = argparse.ArgumentParser(
        prog="asd-engine",
        description="Check an engine against what asd's stages need of it.",
        epilog="Exit codes: 0 all checks pass, 1 one fails, 2 wrong usage or the engine cannot be loaded.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="run the whole conformance suite against a model")
    check.add_argument("model", type=Path, help="Hugging Face model directory")
    check.add_argument("--engine", choices=list(_TIE_MARGIN), default="vllm", help="vllm unless it is given")
    check.add_argument("--options", default="{}", metavar="YAML", help="the engine's section of the settings")
    check.add_argument("--max-batch", type=_at_least(1), help="requests in the engine at a time")
    check.add_argument("--tie-margin", type=_share, help="closer tokens may swap ranks between passes")
    check.add_argument("--signal-tolerance", type=_share, help="of log-probabilities between passes")
    check.add_argument("--max-new-tokens", type=_at_least(8), default=48)
    check.add_argument(
        "--beside", choices=list(_TIE_MARGIN), help="another engine whose greedy answers count"
    )
    check.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(arguments)
    if not options.model.is_dir():
        parser.error(f"{options.model}: no such directory")
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        entry: dict[str, Any] = {"name": "model", "path": options.model, "engine": options.engine}
        section = _read_section(options.options, entry)
        entry |= section if options.engine == "onnx" else {options.engine: section}
        if options.max_batch is not None:
            entry["max_batch"] = options.max_batch
        engines = make_engines(ModelSettings(**entry), 256)
        other = None
        if options.beside:
            entry = {"name": "model", "path": options.model, "engine": options.beside}
            other = make_engines(ModelSettings(**entry), 256)["model"]
        outcomes, inside = asyncio.run(_check(engines, other, options))
    except ValidationError as error:
        parser.exit(2, f"asd-engine: --options: {explain(error)}\n")
    except AsdError as error:
        parser.exit(2, f"asd-engine: {error}\n")
    failed = [outcome for outcome in outcomes if outcome.error]
    if options.json:
        report = {"checks": [outcome._asdict() for outcome in outcomes], "verifies_inside": inside}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        ties = sum(outcome.near_ties for outcome in outcomes)
        where = "inside the engine, while it wrote" if inside else "in passes of their own"
        sys.stdout.write(f"drafts were verified {where}\n")
        sys.stdout.write(f"{len(outcomes) - len(failed)} of {len(outcomes)} checks pass, {ties} near ties\n")
    sys.exit(1 if failed else 0)


def _read_section(text: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an engine's section.

    Raises InvalidRequest if it is no mapping, repeats an argument, or has an option that the engine has not.
    """
    section = parse_yaml(text, "--options") or {}
    if not isinstance(section, dict):
        raise InvalidRequest(f"--options {text!r} is no mapping: write it as '{{dtype: float32}}'")
    if taken := sorted(entry.keys() & section.keys()):
        raise InvalidRequest(f"--options: {taken[0]} is an argument of its own")
    engine = entry["engine"]
    known = [name for name in _OPTIONS[engine] if name not in entry]
    for name in section:
        if name not in known:
            others = [each for each, names in _OPTIONS.items() if name in names]
            of_others = f"it is of {' and '.join(others)}; " if others else ""
            hint = suggestion(str(name), known)
            raise InvalidRequest(f"--options: {name} is no option of engine {engine}: {of_others}{hint}")
    return section


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} on")
        return int(text)

    return read


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to below 1")
    return number


async def _check(
    engines: Mapping[str, Engine], other: Engine | None, options: argparse.Namespace
) -> tuple[list[CheckOutcome], bool]:
    """Check a model's adapters, and then the model; return also whether it verifies drafts inside."""
    tie, tolerance = options.tie_margin, options.signal_tolerance
    model, *adapters = engines
    references = await greedy_answers(other, options.max_new_tokens) if other else None
    await engines[model].load()
    inside = engines[model].status().verifies_inside
    outcomes = []
    try:
        for name in (*adapters, model):
            suite = Suite(
                engines[name],
                references=references if name == model else None,
                max_new_tokens=options.max_new_tokens,
                tie_margin=_TIE_MARGIN[options.engine] if tie is None else tie,
                signal_tolerance=_SIGNAL_TOLERANCE[options.engine] if tolerance is None else tolerance,
            )
            for check in CHECKS:
                if name != model and check in _OF_A_MODEL:
                    continue
                outcome = await run_check(suite, check)
                if name != model:
                    outcome = outcome._replace(check=f"{name.removeprefix(f'{model}/')}: {outcome.check}")
                outcomes.append(outcome)
                _say(outcome, is_quiet=options.json)
    finally:
        await engines[model].unload()
    return outcomes, inside


async def greedy_answers(engine: Engine, tokens: int) -> list[tuple[int, ...]]:
    """Return an engine's greedy answers to the suite's prompts."""
    await engine.load()
    try:
        suite = Suite(engine, max_new_tokens=tokens)
        return [(await suite.plain(prompt)).result.ids for prompt in suite.prompts]
    finally:
        await engine.unload()


def _say(outcome: CheckOutcome, *, is_quiet: bool) -> None:
    if is_quiet:
        return
    ties = f", {outcome.near_ties} near ties" if outcome.near_ties else ""
    state = f"FAILED: {outcome.error}" if outcome.error else "ok"
    sys.stdout.write(f"{outcome.check} ({outcome.seconds:.1f} s{ties}): {state}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
