"""What is missing is told with the extra that brings it."""

from __future__ import annotations

import sys

import pytest

from asd.errors import PreconditionFailed
from services.common.extras import EXTRAS, check_extras, explain_missing, needs
from tests.unit.test_packaging import modules_of


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_is_known_by_what_it_brings(extra):
    # numpy's types, which only what reads weights imports by itself.
    assert modules_of(extra) - {"ml_dtypes"} == set(EXTRAS[extra]) - {"ml_dtypes"}


def test_all_that_is_missing_is_named_with_one_command(monkeypatch):
    check_extras(["stage", "policy"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PreconditionFailed) as refused:
        check_extras(["stage", "policy", "stage"])
    assert refused.value.message == (
        "onnxruntime, jinja2 are not installed: install 'asd-cascade[policy,stage]', "
        "in a checkout ./clients/python '.[policy,stage]'"
    )
    monkeypatch.delitem(sys.modules, "jinja2")
    with (
        pytest.raises(SystemExit, match=r"^asd-x: onnxruntime .*\[policy\]"),
        needs("policy", "asd-x"),
    ):
        import onnxruntime  # noqa: F401


def test_a_module_of_no_extra_is_a_fault_of_ours():
    error = ModuleNotFoundError(name="services.nonsense")
    with pytest.raises(ModuleNotFoundError):
        explain_missing(error, "stage")
