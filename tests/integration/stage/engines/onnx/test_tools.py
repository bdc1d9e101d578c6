"""Tools with a trained model whose chat template is one that knows them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from asd.errors import ConversationRefused, InvalidRequest
from asd.values import Constraint, Conversation, FinishReason, Message, Sampling, Tool, ToolCall, Tools
from services.common.tool_calls import read_tool_calls
from services.stage.domain import DraftText, Result
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from tests.fakes.tiny_llama import SMALL
from tests.fakes.tool_templates import SHORT
from tests.integration.stage.conftest import engine

if TYPE_CHECKING:
    from pathlib import Path

ASK = Message("user", "Max has 9 beads. Max finds 10 more. How many beads does Max have now?")
ADD = Tool(
    "add",
    "",
    '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, '
    '"b": {"enum": [10, 11]}}, "required": ["a", "b"], "additionalProperties": false}',
)
TOOLS = (ADD, Tool("now"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tools") / "small"
    shutil.copytree(SMALL, copy)
    (copy / "chat_template.jinja").write_text(SHORT)
    return copy


@pytest.fixture
async def model(folder: Path):
    made = OnnxEngine("small", folder, OnnxOptions())
    await made.load()
    yield made
    await made.unload()


async def _result(events) -> Result:
    return [event async for event in events][-1]


@pytest.mark.parametrize("tools", [Tools(TOOLS, "required"), Tools(TOOLS, "named", "add", single_call=True)])
async def test_an_answer_that_must_be_a_call_is_one_written_or_verified(model: OnnxEngine, tools: Tools):
    turns = Conversation((ASK,), tools)
    written = await _result(model.generate(turns, Sampling(max_new_tokens=120)))
    assert written.constrained
    content, calls = read_tool_calls(written.text, ["add", "now"])
    # It ends by itself, or was cut within a later call.
    assert calls
    assert not content or written.finish is FinishReason.LENGTH
    for call in calls:
        keys = {"add": {"a", "b"}, "now": set()}[call.name]
        assert set(json.loads(call.arguments)) == keys
    for draft in (written.text, "<tool_call>\nno call", '<tool_call>\n{"name": "now", "arguments": {}}'):
        sent = DraftText(draft, (), "", FinishReason.EOS)
        verified = await _result(model.verify(turns, Sampling(max_new_tokens=120), sent, None))
        assert (verified.text, verified.prompt_tokens) == (written.text, written.prompt_tokens)


async def test_the_prompt_is_the_same_for_every_kind_of_call(model: OnnxEngine):
    calls = (ToolCall("call_1", "add", '{"a": 9, "b": 10}'),)
    loop = (ASK, Message("assistant", "", calls), Message("tool", "19", tool_call_id="call_1"))
    turns, sampling = Conversation(loop, Tools(TOOLS)), Sampling(max_new_tokens=8)
    written = await _result(model.generate(turns, sampling))

    async def pieces():
        yield FinishReason.EOS

    verified = await _result(model.verify_stream(turns, sampling, pieces(), None))
    prefilled = await model.prefill(turns)
    assert written.prompt_tokens == verified.prompt_tokens == prefilled.prompt_tokens
    assert written.text == verified.text
    assert model.status().takes_tools


async def test_a_call_and_a_constraint_exclude_each_other(model: OnnxEngine):
    constrained = Sampling(constraint=Constraint(regex="a+"))
    with pytest.raises(InvalidRequest) as refused:
        await _result(model.generate(Conversation((ASK,), Tools(TOOLS, "required")), constrained))
    assert refused.value.field == "sampling.constraint"


async def test_the_embedded_family_takes_no_tools():
    made = engine("small")
    assert not made.status().takes_tools
    await made.load()
    with pytest.raises(ConversationRefused):
        await _result(made.generate(Conversation((ASK,), Tools(TOOLS, "required")), Sampling()))
    await made.unload()
