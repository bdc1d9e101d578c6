"""Builds asd's images: `python -m tools.images`; `check` and `missing` say whether this machine can."""

from __future__ import annotations

import argparse
import sys

from tools.images import build
from tools.machine import CANNOT, MissingProgramError, say


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m tools.images", description=(__doc__ or "").strip())
    parser.add_argument("command", nargs="?", default="build", choices=("build", "check", "missing"))
    command = parser.parse_args().command
    try:
        if command == "missing":
            sys.stdout.write("".join(f"{package}\n" for package in build.missing()))
            return
        build.check()
    except MissingProgramError as error:
        say(str(error))
        sys.exit(CANNOT)
    if command == "check":
        say("this machine can build images")
        return
    try:
        archive = build.release_archive()
        sizes = build.sizes_mb()
    except build.ImageError as error:
        sys.exit(str(error))
    for name, size in sizes.items():
        sys.stdout.write(f"{name}\t{size:.0f} MB\n")
    sys.stdout.write(f"{archive}\n")


if __name__ == "__main__":
    main()
