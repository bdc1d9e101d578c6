"""What cascades take by measured pieces: `python -m benchmarks.gpu.projection` prints a Markdown table.

An answer of n tokens at batch 1. The share a of the first stage's draft is accepted by the second one, which
writes the rest; a third one accepts all of the second one's answer:

    alone(L)           = generate_n(L)
    cascade(S, L)      = generate_n(S) + verify_n(L) + (1 - a) * n * decode(L)
    cascade(S, M, L)   = generate_n(S) + verify_n(M) + (1 - a) * n * decode(M) + verify_n(L)

generate_n, verify_n and decode are rows of benchmarks/results/gpu.json, of one kind of device: prompts of 256
tokens, the verified ones computed anew. The services' own time, queues and the network are not in it; what of
it was measured live is in benchmarks/results/gpu_cascade.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from typing import TYPE_CHECKING, Any

from benchmarks.record import RESULTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MODELS = ("13b", "34b", "70b")
ANSWER = 64
ACCEPTANCES = (1.0, 0.75, 0.5, 0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of every kind of device."""
    argparse.ArgumentParser(
        prog="benchmarks.gpu.projection", description=(__doc__ or "").partition("\n")[0]
    ).parse_args(arguments)
    rows = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        f"| device | chain | alone, ms | {' | '.join(f'{a:.0%} accepted, ms' for a in ACCEPTANCES)} |",
        "|---|---|---|" + "---|" * len(ACCEPTANCES),
    ]
    for device in sorted({row["device"] for row in rows}):
        found = held_by_fewest(rows, device)
        for chain in chains(found):
            alone = found[chain[-1]][f"generate{ANSWER}_ms"]
            times = [projected_ms(found, chain, acceptance) for acceptance in ACCEPTANCES]
            cells = " | ".join(f"{ms:,.0f} ({alone / ms:.2f} ×)" for ms in times)
            lines.append(
                f"| {device} | {' → '.join(map(name_of, chain, [found] * 3))} | {alone:,.0f} | {cells} |"
            )
    sys.stdout.write("\n".join(lines) + "\n")


def held_by_fewest(rows: Sequence[Mapping[str, Any]], device: str) -> dict[str, Mapping[str, Any]]:
    """Return the row of each model on a kind of device: of the fewest GPUs that hold it."""
    own = [row for row in rows if row["device"] == device and f"verify{ANSWER}_ms" in row]
    return {row["model"]: row for row in sorted(own, key=lambda row: -int(row["tensor_parallel"]))}


def chains(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the chains of two and three of the models that were measured, in their order."""
    names = [name for name in MODELS if name in found]
    return [chain for count in (2, 3) for chain in combinations(names, count)]


def name_of(model: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a model's name, with the number of GPUs that hold it where it is more than one."""
    count = found[model]["tensor_parallel"]
    return model.upper() + (f" on {count}" if count > 1 else "")


def projected_ms(found: Mapping[str, Mapping[str, Any]], chain: Sequence[str], acceptance: float) -> float:
    """Return what a chain takes by the formula above. found: rows by model."""
    first, *others = (found[name] for name in chain)
    written = (1.0 - acceptance) * ANSWER * others[0]["decode_ms_b1"]
    return float(first[f"generate{ANSWER}_ms"] + sum(row[f"verify{ANSWER}_ms"] for row in others) + written)


if __name__ == "__main__":
    main()
