"""Which model of a stage is asked for a type of task, and when the stage is asked for its models."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from asd.errors import Unavailable
from services.router.clients.adapters import FRESH_SECONDS, RETRY_SECONDS, Adapters, tasks_of
from services.router.settings import StagePeer
from tests.limits import CALL_S

LEFT_MS = 60_000.0


class Stage:
    """Lists its models once its gate is open."""

    def __init__(self, *models: str) -> None:
        self.models: tuple[str, ...] = models
        self.is_away = False
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.now = 100.0

    async def list_models(self) -> tuple[str, ...]:
        self.asked += 1
        await self.gate.wait()
        if self.is_away:
            raise Unavailable("gone")
        return self.models


def adapters(stage: Stage, model: str = "", tasks: tuple[str, ...] | None = None) -> Adapters:
    return Adapters(model, tasks, stage.list_models, lambda: stage.now)


@pytest.mark.parametrize(
    ("model", "models", "tasks"),
    [
        ("", ("7b", "7b/math", "7b/code", "1b", "1b/law"), {"math": "7b/math", "code": "7b/code"}),
        ("1b", ("7b", "7b/math", "1b", "1b/law"), {"law": "1b/law"}),
        # A name that begins alike is another model's.
        ("7b", ("7b", "7b-chat", "7b-chat/math"), {}),
        ("", (), {}),
    ],
)
def test_adapters_are_models_below_the_models_name(model, models, tasks):
    assert tasks_of(model, models) == tasks


async def test_a_task_is_answered_by_its_adapter_and_others_without():
    stage = Stage("7b", "7b/math")
    found = adapters(stage)
    assert [await found.model_for(task, LEFT_MS) for task in ("", "math", "law")] == ["", "7b/math", ""]
    assert stage.asked == 1


async def test_a_stage_that_nobody_names_a_task_to_is_not_asked():
    stage = Stage("7b", "7b/math")
    assert await adapters(stage).model_for("", LEFT_MS) == ""
    assert stage.asked == 0


async def test_settings_stand_in_for_what_the_stage_says():
    stage = Stage("7b", "7b/math")
    found = adapters(stage, "7b", ("code",))
    assert [await found.model_for(task, LEFT_MS) for task in ("", "math", "code")] == ["7b", "7b", "7b/code"]
    assert await adapters(stage, tasks=()).model_for("math", LEFT_MS) == ""
    assert stage.asked == 0


async def test_requests_that_come_together_ask_once():
    stage = Stage("7b", "7b/math")
    stage.gate.clear()
    found = adapters(stage)
    asking = [asyncio.create_task(found.model_for("math", LEFT_MS)) for _ in range(8)]
    await asyncio.sleep(0)
    # One of them leaves; the others are answered all the same.
    asking.pop(0).cancel()
    stage.gate.set()
    assert await asyncio.gather(*asking) == ["7b/math"] * 7
    assert stage.asked == 1


async def test_what_a_stage_said_is_renewed_without_anybody_waiting():
    stage = Stage("7b", "7b/math")
    found = adapters(stage)
    assert await found.model_for("law", LEFT_MS) == ""
    stage.models = ("7b", "7b/law")
    stage.now += FRESH_SECONDS - 1
    assert await found.model_for("law", LEFT_MS) == ""
    assert stage.asked == 1
    stage.now += 1
    stage.gate.clear()
    # What was known holds meanwhile.
    assert await found.model_for("math", LEFT_MS) == "7b/math"
    stage.gate.set()
    await asyncio.sleep(0)
    assert [await found.model_for(task, LEFT_MS) for task in ("law", "math")] == ["7b/law", ""]
    assert stage.asked == 2


async def test_a_stage_that_does_not_answer_is_asked_again_soon():
    stage = Stage("7b", "7b/math")
    stage.is_away = True
    found = adapters(stage)
    assert [await found.model_for("math", LEFT_MS) for _ in range(3)] == [""] * 3
    assert stage.asked == 1
    stage.is_away = False
    stage.now += RETRY_SECONDS
    assert await found.model_for("math", LEFT_MS) == "7b/math"


@pytest.mark.parametrize("tasks", [None, ("math",)])
async def test_an_adapter_that_is_not_there_is_done_without_for_a_while(tasks):
    stage = Stage("7b", "7b/math")
    found = adapters(stage, "7b", tasks)
    assert await found.model_for("math", LEFT_MS) == "7b/math"
    found.lacks("math", "7b/math")
    assert await found.model_for("math", LEFT_MS) == "7b"
    stage.now += FRESH_SECONDS
    assert await found.model_for("math", LEFT_MS) == "7b/math"


async def test_a_stage_may_drop_an_adapter_while_it_is_asked_for_it(caplog):
    stage = Stage("7b", "7b/math", "7b/code")
    found = adapters(stage)
    assert await found.model_for("math", LEFT_MS) == "7b/math"
    stage.models = ("7b", "7b/code")
    stage.now += FRESH_SECONDS
    name = await found.model_for("math", LEFT_MS)
    assert name == "7b/math"
    # The stage says meanwhile what it has now.
    await asyncio.sleep(0)
    found.lacks("math", name)
    assert await found.model_for("math", LEFT_MS) == ""
    (said,) = caplog.messages
    assert "7b/math" in said


async def test_a_stage_that_says_nothing_is_not_waited_for_beyond_the_time_left():
    stage = Stage("7b", "7b/math")
    stage.gate.clear()
    found = adapters(stage)
    async with asyncio.timeout(CALL_S):
        assert await found.model_for("math", 20.0) == ""
        # Nor with no time at all.
        assert await found.model_for("math", -1.0) == ""
    # It is still being asked: the next request has the answer.
    stage.gate.set()
    assert await found.model_for("math", LEFT_MS) == "7b/math"
    assert stage.asked == 1


async def test_closing_ends_what_is_being_asked():
    stage = Stage("7b")
    stage.gate.clear()
    found = adapters(stage)
    asking = asyncio.create_task(found.model_for("math", LEFT_MS))
    await asyncio.sleep(0)
    await found.close()
    assert await asking == ""


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"adapters": ["math"]}, "adapters: are asked for as MODEL/TASK: set model, too"),
        ({"model": "7b", "adapters": ["Math"]}, "must be 1 to 64 characters of a-z"),
        ({"model": "7b", "adapters": ["7b/math"]}, "must be 1 to 64 characters of a-z"),
        ({"model": "7b", "adapters": [""]}, "must be 1 to 64 characters of a-z"),
    ],
)
def test_adapters_that_no_stage_can_have_are_refused_at_start(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        StagePeer(name="small", target="localhost:1", cost=1.0, **settings)
