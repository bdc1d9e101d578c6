"""Runs a program that may write small files alone, as on a full disk."""

from __future__ import annotations

import sys

_LIMIT = """
import os, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), hard))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def limited(most_bytes: int, *arguments: str) -> list[str]:
    """Return the command that runs Python with arguments, its files bounded.

    subprocess's preexec_fn would fork this process as it is: gRPC's threads, if a test has started them, may
    end the child.
    """
    return [sys.executable, "-c", _LIMIT, str(most_bytes), *arguments]
