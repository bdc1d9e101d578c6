"""Where the `asd` command starts. The commands are in services.cli.commands."""

from __future__ import annotations

import os

from services.cli import interrupts
from services.common.privacy import report_nothing


def main() -> None:
    """Run the `asd` command."""
    # Before anything that takes time to import.
    interrupts.end_quietly()

    # Failures are ours to tell: gRPC would tell each handshake's on standard error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    # For the processes that are started, too.
    report_nothing()

    from services.cli.commands import app
    from services.common.terminal import prepare_streams

    prepare_streams()
    app()


if __name__ == "__main__":
    main()
