"""The cascade that the tests of services.local start, for the clients."""

from tests.integration.local.conftest import cascade_file, start_up, up

__all__ = ["cascade_file", "start_up", "up"]
