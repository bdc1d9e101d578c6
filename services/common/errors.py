"""The error that a service alone raises; the rest are in asd.errors."""

from __future__ import annotations

from asd.errors import Unavailable


class Draining(Unavailable):
    """This service is about to end, and has not begun with the request. Callers see Away."""
