"""onnxruntime-genai's Python binding, and what it needs before its first use."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from services.common.privacy import report_nothing


def load_binding() -> Any:
    """Return the module `onnxruntime_genai`; its first import is slow."""
    report_nothing()
    import onnxruntime_genai

    return onnxruntime_genai


def remember_array_formats() -> None:
    """Have the binding parse the format of the arrays that it returns only once, not for every array.

    The binding uses pybind11, which has NumPy's Python code parse the format of every array. That costs a
    tenth of a small model's decode step. pybind11 looks the parser up once per process, at its first array,
    and this call makes it find one with a cache. If NumPy has moved the parser, nothing changes. Remove this
    once the binding uses nanobind, or pybind11 knows plain formats itself.
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
