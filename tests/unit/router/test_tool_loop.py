"""Tool calls in answers, and the stage that goes on with their results."""

from __future__ import annotations

import pytest

from asd.convert import request_to
from asd.errors import InvalidRequest
from asd.v1 import cascade_pb2
from asd.values import Conversation, Message, Request, Tool, ToolCall, Tools
from tests.unit.router.small_cascade import Policy
from tests.unit.router.small_router import SmallRouter

NOW = '<tool_call>{"name": "now", "arguments": {"zone": 1}}</tool_call>'
TOOLS = (Tool("now"),)
ASK = (Message("user", "How late?"),)


def _router(text: str = "late", **options) -> SmallRouter:
    return SmallRouter(Policy(), small={"text": text}, large={"text": text}, **options)


async def _asked(router: SmallRouter, turns, *, stream=False, tools=None, **options):
    turns = turns if tools is None else Conversation(turns, tools)
    message = request_to(Request(turns, **options))
    return await (router.stream(message) if stream else router.generate(message))


def _results(*ids: str) -> tuple[Message, ...]:
    """Return a conversation that goes on with the results of calls."""
    calls = tuple(ToolCall(each, "now", "{}") for each in ids)
    return (*ASK, Message("assistant", "", calls), *(Message("tool", "5", tool_call_id=each) for each in ids))


async def _ids(stage: str, text: str = NOW) -> list[str]:
    answer = await _asked(_router(text), ASK, tools=Tools(TOOLS), stage=stage)
    return [each.id for each in answer.tool_calls]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_calls_of_an_answer_come_beside_the_text_without_them(stream):
    answer = await _asked(_router(f"I look. {NOW}\n{NOW}"), ASK, tools=Tools(TOOLS), stream=stream)
    assert answer.text == f"I look. {NOW}\n{NOW}"
    assert answer.content == "I look."
    assert [(each.name, each.arguments) for each in answer.tool_calls] == [("now", '{"zone": 1}')] * 2
    assert len({each.id for each in answer.tool_calls}) == 2


async def test_one_call_is_kept_if_one_is_wanted():
    answer = await _asked(_router(f"{NOW} {NOW} end"), ASK, tools=Tools(TOOLS, single_call=True))
    assert len(answer.tool_calls) == 1
    assert answer.content == "end"


@pytest.mark.parametrize("tools", [None, Tools(TOOLS, "none"), Tools((Tool("other"),))])
async def test_an_answer_has_calls_of_offered_tools_alone(tools):
    answer = await _asked(_router(NOW), ASK, tools=tools)
    assert not answer.tool_calls
    assert (answer.text, answer.content) == (NOW, "")


async def test_the_stage_that_called_goes_on_with_the_results(recorded):
    for stage in ("large", "small"):
        router = _router()
        ids = await _ids(stage, f"{NOW} {NOW}")
        for stream in (False, True):
            assert (await _asked(router, _results(*ids), stream=stream)).stage == stage
        # Also where the user says something to them.
        said = (*_results(*ids), Message("user", "Be brief."))
        assert (await _asked(router, said)).stage == stage
        # Not a turn later, when the user asks anew.
        again = (*_results(*ids), Message("assistant", "late"), *ASK)
        assert (await _asked(router, again)).plan_source == cascade_pb2.PLAN_SOURCE_POLICY
    held = recorded.values("asd.stage", "asd.tool_loop.held")
    assert held == [None, True, True, True, None] * 2


async def test_another_stage_may_go_on_if_the_caller_says_so():
    ids = await _ids("large")
    other = await _ids("small")
    policy = cascade_pb2.PLAN_SOURCE_POLICY
    router = _router()
    assert (await _asked(router, _results(*ids), allow_switch=True)).plan_source == policy
    assert (await _asked(router, _results(*ids), stage="small")).stage == "small"
    assert (await _asked(router, _results(*ids), chain=("small", "medium"))).stage == "medium"
    # Calls of two stages, and ids that no stage of the cascade made.
    for foreign in ([*ids, *other], ["call_1"], ["toolu_0123456789"]):
        assert (await _asked(router, _results(*foreign))).plan_source == policy


@pytest.mark.parametrize(("choice", "name"), [("required", ""), ("named", "now")])
async def test_an_answer_cannot_be_a_call_and_keep_a_constraint(choice, name):
    message = request_to(Request(Conversation(ASK, Tools(TOOLS, choice, name))))
    message.sampling.constraint.regex = "a+"
    with pytest.raises(InvalidRequest) as refused:
        await _router().generate(message)
    assert refused.value.field == "sampling.constraint"
