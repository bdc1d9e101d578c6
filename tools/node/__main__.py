"""Starts and ends a Kubernetes node for tests: `python -m tools.node up`, and `down`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tools.images import build as images
from tools.machine import CANNOT, MissingProgramError, say
from tools.node.node import DEFAULT_FOLDER, Node, NodeError, check_machine
from tools.node.programs import absent_packages, find_all


def _where_is_helm() -> str:
    beside = Path(sys.executable).with_name("helm")
    found = shutil.which("helm") or (str(beside) if beside.exists() else "")
    return (
        found or "none is here; `.venv/bin/python tools/kubernetes_programs.py FOLDER` puts one into a folder"
    )


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m tools.node", description=(__doc__ or "").strip())
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the node keeps everything")
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start a node that has asd's images")
    starting.add_argument("--bare", action="store_true", help="without asd's images")
    commands.add_parser("check", help=f"say whether this machine can run one; exit {CANNOT} where it cannot")
    commands.add_parser("missing", help="list Debian's packages that one needs and this machine lacks")
    commands.add_parser("down", help="end it and remove all of it but its logs")
    commands.add_parser("images", help="build asd's images anew and load them onto the node")
    options = parser.parse_args()
    node = Node(options.folder)
    try:
        if options.command == "up":
            node.up([] if options.bare else [images.release_archive()])
            sys.stdout.write(f"export KUBECONFIG={node.kubeconfig}\n")
            say(f"kubectl: {find_all(('kubectl',))['kubectl']}")
            say(f"helm: {_where_is_helm()}")
            say(f"pods and Services: {' '.join(node.enter('COMMAND'))}")
        elif options.command == "missing":
            sys.stdout.write("".join(f"{package}\n" for package in absent_packages()))
        elif options.command == "check":
            try:
                check_machine()
            except (NodeError, MissingProgramError) as error:
                say(str(error))
                sys.exit(CANNOT)
            say("this machine can run a node")
        elif options.command == "images":
            node.import_images(images.release_archive())
        else:
            node.down()
    except (NodeError, MissingProgramError, images.ImageError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
