"""The faults of `make faults` fit the code as it is: one that no longer does is found here, in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.fault_list import FAULTS, ROUTER, Fault

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.words)
def test_a_fault_fits_once(fault: Fault) -> None:
    text = (ROOT / ROUTER / fault.present.file).read_text(encoding="utf-8")
    assert text.count(fault.present.find) == 1


def test_there_are_thirty() -> None:
    assert len({fault.words for fault in FAULTS}) == 30
