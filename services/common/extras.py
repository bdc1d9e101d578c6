"""Modules that the base install leaves out, and the extra of pyproject.toml that installs them."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asd.errors import PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Modules of each extra.
EXTRAS = {
    "stage": (
        "jinja2",
        "llguidance",
        "ml_dtypes",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxruntime_genai",
        "tokenizers",
    ),
    "vllm": ("jinja2", "llguidance", "numpy", "tokenizers", "vllm"),
    "tensorrt-llm": ("jinja2", "llguidance", "numpy", "tokenizers"),
    "hub": ("huggingface_hub",),
    "policy": ("numpy", "onnxruntime"),
    "gateway": ("httptools", "starlette", "uvicorn"),
    "kubernetes": ("kubernetes",),
    "policy-train": (
        "numpy",
        "onnx",
        "onnxruntime",
        "pyarrow",
        "scipy",
        "sklearn",
        "threadpoolctl",
        "tokenizers",
    ),
}


def check_extras(extras: Iterable[str]) -> None:
    """Raise PreconditionFailed, with what to install, if a module of these extras is missing."""
    lacking = {extra: missing for extra in sorted(set(extras)) if (missing := missing_of(extra))}
    if lacking:
        modules = list(dict.fromkeys(name for names in lacking.values() for name in names))
        raise PreconditionFailed(explain_lacking(modules, lacking))


def explain_missing(error: ModuleNotFoundError, extra: str) -> PreconditionFailed:
    """Return an error that says what to install. Raises the given error if the module is of no extra."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS[extra]:
        raise error
    return PreconditionFailed(explain_lacking(missing_of(extra) or [name], [extra]))


@contextmanager
def needs(extra: str, program: str) -> Iterator[None]:
    """End the program with one sentence if a module that the block imports is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f"{program}: {explain_missing(error, extra).message}") from error


def missing_of(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def explain_lacking(modules: list[str], extras: Iterable[str]) -> str:
    """Return a sentence that says how to install extras. modules: those of them that are missing."""
    are = "is" if len(modules) == 1 else "are"
    names = f"[{','.join(extras)}]"
    return (
        f"{', '.join(modules)} {are} not installed: install 'asd-cascade{names}', in a checkout "
        f"./clients/python '.{names}'"
    )
