"""Fixtures of the router's unit tests."""

from tests.recording import metered, recorded  # noqa: F401 - fixtures
