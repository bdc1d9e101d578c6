"""Errors of a user's files, in words. Needs no library, so every command can report them."""

from __future__ import annotations

from asd.visible import OneLineError


class UnfitOutcomes(OneLineError):  # noqa: N818 - an error is named by its cause
    """A file has no usable outcomes; the message names the file and the row."""


def say_why(error: Exception) -> str:
    """Return why a file cannot be read, without its name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
