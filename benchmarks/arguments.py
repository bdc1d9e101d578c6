"""Types of command-line arguments: argparse says what is wrong with one before anything is measured."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from asd.errors import AsdError
from services.stage.engines.checkpoint import read_checkpoint


def count(text: str) -> int:
    """Return a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def counts(text: str) -> tuple[int, ...]:
    """Return whole numbers of 1 or more, from a list with commas."""
    return tuple(count(each) for each in text.split(","))


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def part(text: str) -> float:
    """Return a number above 0, up to 1."""
    if share(text) == 0.0:
        raise ArgumentTypeError(f"{text!r} is not above 0")
    return share(text)


def shares(text: str) -> tuple[float, ...]:
    """Return numbers from 0 to 1, from a list with commas."""
    return tuple(share(each) for each in text.split(","))


def model(text: str) -> Path:
    """Return a directory that holds a model."""
    try:
        read_checkpoint(Path(text))
    except AsdError as error:
        raise ArgumentTypeError(str(error)) from error
    return Path(text)


def output(text: str) -> Path:
    """Return where a file can be written."""
    if Path(text).is_dir():
        raise ArgumentTypeError(f"{text} is a directory: name a file")
    return Path(text)


def file(text: str) -> Path:
    """Return a file that is there."""
    if not Path(text).is_file():
        raise ArgumentTypeError(f"there is no file {text}")
    return Path(text)
