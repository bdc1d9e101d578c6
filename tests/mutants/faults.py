"""`python -m tests.mutants.faults`: which of thirty faults the router's tests catch."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from benchmarks.record import update_result
from benchmarks.revisions import commit_of
from tests.mutants.fault_list import FAULTS, ROUTER
from tests.mutants.trials import INTEGRATION, UNIT, Kept, cloned, judged, measured, say

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mutants.fault_list import Edit, Fault


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.faults", description=__doc__)
    parser.add_argument("--commit", default="HEAD", help="the revision whose code and tests run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    parser.add_argument("--unit-only", action="store_true", help="run the unit room alone; writes no result")
    parser.add_argument("--check", action="store_true", help="only say whether every edit fits")
    parser.add_argument("--only", default="", help="faults with this text in their words")
    options = parser.parse_args()
    commit = commit_of(options.commit)
    folders = [UNIT] if options.unit_only else [UNIT, INTEGRATION]
    kept = Kept(f"faults-{commit}{'-unit' if options.unit_only else ''}")
    with cloned(commit) as clone:
        # All of them first: one that does not fit is no reason to lose an hour.
        faults = [fault for fault in FAULTS if options.only in fault.words]
        changed = {fault.words: edited(clone.root, edit_of(clone.root, fault)) for fault in faults}
        if options.check:
            say(f"{len(changed)} faults fit {commit}")
            return
        rooms = measured(clone, kept, folders)
    rows = {name: row for name in changed if (row := kept.get(name)) is not None}
    todo = {name: change for name, change in changed.items() if name not in rows}
    for words, verdict in judged(commit, rooms, todo, options.jobs):
        row = rows[words] = kept.put(words, asdict(verdict))
        what = row["by"] if row["is_caught"] else "NOT CAUGHT"
        say(f"{len(rows)}/{len(changed)} {words} | {what} | {row['seconds']:.0f} s")
    caught = sum(row["is_caught"] for row in rows.values())
    say(f"{commit}: {caught} of {len(rows)} caught")
    if not (options.unit_only or options.only):
        figures = {
            "tests": folders,
            "faults": len(rows),
            "caught": caught,
            "caught_by": {words: rows[words]["by"] for words in changed},
        }
        command = f"python -m tests.mutants.faults --commit {commit}"
        say(f"written to {update_result('faults', command, {commit: figures})}")


def edit_of(root: Path, fault: Fault) -> Edit:
    """Return a fault's edit for the code that a revision has."""
    return fault.present if (root / ROUTER / "planning").is_dir() else fault.before


def edited(root: Path, edit: Edit) -> tuple[str, str]:
    """Return an edit's file with its text changed. Raises SystemExit where it does not fit."""
    file = f"{ROUTER}/{edit.file}"
    text = (root / file).read_text(encoding="utf-8")
    if text.count(edit.find) != 1:
        raise SystemExit(f"{file} has {text.count(edit.find)} times, not once:\n{edit.find}")
    return file, text.replace(edit.find, edit.replace)


if __name__ == "__main__":
    main()
