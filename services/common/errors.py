"""The error that only services raise; asd.errors has the rest."""

from __future__ import annotations

from asd.errors import Unavailable


class Draining(Unavailable):
    """This service is shutting down and has not begun the request. Callers see Away."""
