"""How long a stage has been idle, by an injected clock."""

from __future__ import annotations

from typing import Any, cast

from services.stage.engines.engine import ModelState
from services.stage.model_pool import ModelPool


class Engine:
    """A model that is there."""

    def status(self) -> Any:
        class Status:
            state = ModelState.READY
            memory_bytes = 1

        return Status


async def test_a_stage_is_idle_since_its_last_call_ended() -> None:
    now = [100.0]
    engines = {"small": cast("Any", Engine()), "medium": cast("Any", Engine())}
    pool = ModelPool(engines, "small", clock=lambda: now[0])
    now[0] = 107.0
    # Nobody has called yet: since it was there.
    assert pool.idle_ms() == 7000.0
    async with pool.use("medium"):
        now[0] = 110.0
        assert pool.idle_ms() == 0.0
    assert pool.idle_ms() == 0.0
    now[0] = 110.5
    assert pool.idle_ms() == 500.0
    async with pool.use("small"), pool.use("medium"):
        pass
    now[0] = 112.0
    assert pool.idle_ms() == 1500.0
