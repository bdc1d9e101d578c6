"""Collects outcomes from stages that it starts itself: `python -m benchmarks.outcomes FILE`.

`asd-policy collect` without a running cascade. Interrupt it at any time: the same command goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.processes import ROOT, process
from policy_service.train.collect import CollectOptions, collect_outcomes
from policy_service.train.outcomes import UnfitOutcomes
from services.common.errors import AsdError
from services.common.server import run_service

NAMES = ("small", "medium", "large")


async def collect(options: argparse.Namespace) -> None:
    """Start the embedded family's stages and collect."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets = {}
        for name in NAMES:
            settings = folder / f"{name}.yaml"
            model = {"name": name, "path": str(ROOT / "models" / name)}
            settings.write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "models": [model]}))
            running = process("services.stage", "--config", str(settings))
            targets[name], _ = await stack.enter_async_context(running)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        await collect_outcomes(
            CollectOptions(
                options.output, targets, options.split, options.prompts, options.conversations, 0, 4, 60_000
            ),
            Console(),
        )


def main() -> None:
    """Collect what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outcomes", description=__doc__)
    parser.add_argument("output", type=Path, help="file to write, or to go on with (Parquet)")
    parser.add_argument("--split", default="evaluation", help="split of the suites")
    parser.add_argument("--prompts", type=int, default=27_384)
    parser.add_argument("--conversations", type=int, default=0, help="further ones that are second turns")
    options = parser.parse_args()
    try:
        run_service(collect(options))
    except (AsdError, UnfitOutcomes) as error:
        raise SystemExit(f"benchmarks.outcomes: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here") from None


if __name__ == "__main__":
    main()
