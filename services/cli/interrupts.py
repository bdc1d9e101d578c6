"""What Ctrl-C does to a command before and after its work: it ends at once, without a traceback.

While there is nothing to clean up, unwinding only shows the insides of whatever is being imported or closed.
Nothing slow is imported here, since Ctrl-C before `end_quietly` has that effect.
"""

from __future__ import annotations

import atexit
import os
import signal

INTERRUPTED = 130


def end_quietly() -> None:
    """Let SIGINT end the process with code 130, unless it is ignored, as for jobs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
        # Python takes its handlers away before it ends, and a signal in between would change the exit code.
        # What is registered first runs last.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


class Unwinding:
    """Lets SIGINT raise KeyboardInterrupt in the body, which has something to clean up."""

    def __enter__(self) -> None:
        self._was_quiet = signal.getsignal(signal.SIGINT) is _end
        if self._was_quiet:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        # Also undoes what an event loop left when it took its own handler away.
        if self._was_quiet:
            signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: object) -> None:
    os._exit(INTERRUPTED)
