"""Runs a service as a child: `python -m services.local.child MODULE ARGUMENTS...`.

The parent holds the other end of standard input and never writes to it. End of file tells the child that the
parent has ended, for whatever reason and on every system; the child then drains as on SIGTERM. (Linux's
PR_SET_PDEATHSIG fires when the thread that started the child ends, and macOS has no such signal.)
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

# Longer than any service drains.
_LAST_RESORT_S = 30.0


def _follow_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_RESORT_S)
    os._exit(1)


def main() -> None:
    """Run the module that the first argument names, with the remaining arguments."""
    threading.Thread(target=_follow_parent, name="follow-parent", daemon=True).start()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
