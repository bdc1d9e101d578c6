"""`python -m tests.fuzz [loaders|messages]`: damaged files and messages, for ASD_FUZZ_SECONDS each (60).

ASD_FUZZ_SEED makes a run again; it is printed. At the first fault the damaged file, or the message, is left
under build/fuzz, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from services.common.privacy import report_nothing

report_nothing()

KEPT = Path("build/fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["loaders", "messages", []], default=[])
    options = parser.parse_args()
    seconds = float(os.environ.get("ASD_FUZZ_SECONDS", "60"))
    seed = int(os.environ.get("ASD_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    for part in options.parts or ["loaders", "messages"]:
        say(f"fuzzing {part} for {seconds:g} s, ASD_FUZZ_SEED={seed}")
        if not {"loaders": fuzz_loaders, "messages": fuzz_messages}[part](seconds, seed):
            return 1
    return 0


def fuzz_loaders(seconds: float, seed: int) -> bool:
    from tests.fuzz.loaders import LoaderFault, make_loaders, run_once

    with tempfile.TemporaryDirectory(prefix="asd-fuzz-") as scratch:
        loaders = make_loaders(Path(scratch))
        end = time.monotonic() + seconds
        for count in itertools.count():
            if time.monotonic() > end:
                say(f"{count} damaged files, {len(loaders)} readers")
                return True
            loader = loaders[count % len(loaders)]
            at = Path(scratch) / "damaged"
            try:
                run_once(loader, random.Random(f"{seed} {count}"), at)
            except LoaderFault as fault:
                kept = KEPT / f"{loader.name}-{seed}-{count}".replace(" ", "-")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(at, kept)
                say(f"{fault}\n  the files: {kept}")
                return False
    return True


def fuzz_messages(seconds: float, seed: int) -> bool:
    from tests.fuzz.messages import MessageFault, fuzz

    try:
        count = asyncio.run(fuzz(seconds, seed))
    except MessageFault as fault:
        KEPT.mkdir(parents=True, exist_ok=True)
        kept = KEPT / f"message-{seed}.bin"
        kept.write_bytes(fault.raw)
        say(f"{fault}\n  the message: {kept}")
        return False
    say(f"{count} damaged messages")
    return True


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
