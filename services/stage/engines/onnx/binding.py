"""onnxruntime-genai's Python binding, and what it needs before its first use."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from services.common.privacy import report_nothing


def load_binding() -> Any:
    """Return the module `onnxruntime_genai`, which takes a while at first."""
    report_nothing()
    import onnxruntime_genai

    return onnxruntime_genai


def remember_array_formats() -> None:
    """Have the binding parse the format of the arrays that it returns only once, not for every array.

    pybind11, of which the binding is made, has NumPy's Python code parse the format of every array, which
    costs a tenth of a small model's decode step. It looks the parser up once in a process, at its first
    array: what it finds in this call remembers what it parsed. Where NumPy has moved the parser, nothing
    changes. Remove once the binding is made with nanobind, or pybind11 knows plain formats itself.
    """
    og = load_binding()
    try:
        internal: Any = importlib.import_module("numpy._core._internal")
        parse = internal._dtype_from_pep3118  # noqa: SLF001
    except (ImportError, AttributeError):
        return
    internal._dtype_from_pep3118 = functools.cache(parse)  # noqa: SLF001
    try:
        og.Tensor(np.zeros(1, np.float32)).as_numpy()
    finally:
        internal._dtype_from_pep3118 = parse  # noqa: SLF001
