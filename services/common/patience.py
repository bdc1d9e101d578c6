"""asd.transport.patience, for services. Pure."""

from asd.transport.patience import NEW_SECONDS, RESTART_SECONDS, Patience

__all__ = ["NEW_SECONDS", "RESTART_SECONDS", "Patience"]
