"""asd.visible, for services. Pure."""

from asd.visible import MOST_CHARACTERS, UNSEEN, OneLineError, one_line, visible

__all__ = ["MOST_CHARACTERS", "UNSEEN", "OneLineError", "one_line", "visible"]
