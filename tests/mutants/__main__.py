"""`python -m tests.mutants`: how many random mutants of the router's loop the tests catch."""

from __future__ import annotations

import argparse
import difflib
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.record import update_result
from benchmarks.revisions import commit_of
from benchmarks.stats import wilson
from tests.mutants.mutations import cores, mutated, sample
from tests.mutants.trials import INTEGRATION, UNIT, Kept, cloned, judged, measured, say

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mutants.mutations import Mutation

# Chosen once the tests were written: no mutant of it was looked at. Those of 17 were.
SEED = 2026


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--commit", default="HEAD", help="the revision whose code and tests run")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants (200)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--unit-only", action="store_true", help="run the unit room alone; writes no result")
    options = parser.parse_args()
    commit = commit_of(options.commit)
    folders = [UNIT] if options.unit_only else [UNIT, INTEGRATION]
    kept = Kept(f"mutants-{commit}-{options.seed}{'-unit' if options.unit_only else ''}")
    with cloned(commit) as clone:
        mutations = sample(clone.root, cores(clone.root), options.sample, options.seed)
        say(f"{len(mutations)} mutants of {commit}, seed {options.seed}; verdicts in {kept.path}")
        rooms = measured(clone, kept, folders)
        texts = {each.name: (each.file, mutated(clone.root, each)) for each in mutations}
        lines = {each.name: _change(clone.root, each, texts[each.name][1]) for each in mutations}
    rows = {name: row for name in texts if (row := kept.get(name)) is not None}
    todo = {name: change for name, change in texts.items() if name not in rows}
    for name, verdict in judged(commit, rooms, todo, options.jobs):
        row = {"file": texts[name][0], "change": lines[name], **asdict(verdict)}
        rows[name] = kept.put(name, row)
        caught = sum(each["is_caught"] for each in rows.values())
        say(f"{len(rows)}/{len(mutations)} {caught} killed | {_line(row)}")
    figures = _figures([rows[name] for name in texts], options.seed, folders)
    say(f"{commit}: {figures['killed']} of {figures['mutants']} killed, {figures['share_killed']:.1%}")
    if not options.unit_only:
        command = f"python -m tests.mutants --commit {commit} --sample {options.sample} --seed {options.seed}"
        say(f"written to {update_result('mutants', command, {commit: figures})}")


def _figures(rows: list[dict[str, Any]], seed: int, folders: list[str]) -> dict[str, Any]:
    killed = sum(row["is_caught"] for row in rows)
    made, lost = Counter(row["file"] for row in rows), Counter(r["file"] for r in rows if r["is_caught"])
    return {
        "seed": seed,
        "tests": folders,
        "mutants": len(rows),
        "killed": killed,
        "killed_by_unit_tests": sum(row["by"].startswith(UNIT) for row in rows),
        "timeouts": sum(row["by"] == "timeout" for row in rows),
        "share_killed": round(killed / len(rows), 4),
        "share_killed_wilson_95": [round(bound, 4) for bound in wilson(killed, len(rows))],
        "by_file": {file: {"mutants": made[file], "killed": lost[file]} for file in sorted(made)},
        "survivors": [row["change"] for row in rows if not row["is_caught"]],
    }


def _change(root: Path, mutation: Mutation, text: str) -> str:
    """Return where a mutation is, and the lines before and after it."""
    own = (root / mutation.file).read_text(encoding="utf-8").splitlines()
    lines = list(difflib.unified_diff(own, text.splitlines(), lineterm="", n=0))[2:]
    gone = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    new = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return f"{mutation.file}:{mutation.start[0]}: {gone} -> {new}"


def _line(row: dict[str, Any]) -> str:
    what = row["by"] if row["is_caught"] else "SURVIVED"
    return f"{row['change']} | {what} | {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
