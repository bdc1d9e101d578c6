"""Real clients against a gateway that `python -m tests.clients` runs; left out where it does not."""

from __future__ import annotations

import os

import pytest

GATEWAY = os.environ.get("ASD_GATEWAY", "")
# Their packages are in an environment of their own.
collect_ignore_glob = [] if GATEWAY else ["test_*.py"]


@pytest.fixture
def url() -> str:
    """The gateway's address."""
    return GATEWAY


@pytest.fixture
def api(url: str) -> str:
    """The address of OpenAI's API."""
    return f"{url}/v1"


@pytest.fixture
def router() -> str:
    """The address of the router behind the gateway."""
    return os.environ["ASD_ROUTER"]
