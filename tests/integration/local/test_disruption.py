"""No request is lost while processes are asked to end and started again. At length: `make drains`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from services.local.cascade_file import ROUTER
from tests.integration.local.disruption import ENDS, PATH, REQUESTS, STAGES, disturb

if TYPE_CHECKING:
    from pathlib import Path

# Which processes end, and how often, in how many requests.
_SHORT = {"stages": (STAGES, 400, 10), "router": ((ROUTER,), 120, 3), "all": ((ROUTER, *STAGES), 200, 5)}
_WHOLE = {
    "stages": (STAGES, REQUESTS, ENDS),
    "router": ((ROUTER,), REQUESTS, ENDS // 2),
    "all": ((ROUTER, *STAGES), REQUESTS, ENDS),
}
# Set by `make drains`: minutes instead of seconds.
_CASES = _WHOLE if os.environ.get("TEST_DRAINS") == "whole" else _SHORT


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", _CASES)
async def test_processes_that_end_and_return_lose_no_request(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PATH)
    victims, requests, ends = _CASES[case]
    outcome = await disturb(tmp_path, requests=requests, ends=ends, victims=victims)
    assert outcome.failures == []
    assert outcome.answered == requests
    assert outcome.ended.total() == ends
