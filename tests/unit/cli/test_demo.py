"""The demo's choice of questions, its means, and how results look."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console

import suites
from asd.values import (
    Answer,
    Description,
    Drafted,
    Objective,
    Request,
    StageDescription,
    StageRecord,
    StageStarted,
    StreamedText,
    Tokens,
)
from services.cli import console
from services.cli.demo import (
    EXAMPLE_PROMPT,
    DemoAnswer,
    DemoRow,
    ask_both_ways,
    choose_tasks,
    summarise,
)


def test_sixty_prompts_cover_every_suite_and_level_once():
    places = Counter((task.suite, task.level) for task in choose_tasks(60))
    assert places == Counter((suite, level) for suite in suites.SUITES for level in range(1, 16))


@pytest.mark.parametrize("count", [1, 7, 60, 61, 100, 180])
def test_any_number_of_prompts_is_spread_evenly(count):
    tasks = choose_tasks(count)
    assert len({task.prompt for task in tasks}) == len(tasks) == count
    assert {suites.split_of(task) for task in tasks} == {"demo"}
    places = Counter((task.suite, task.level) for task in tasks)
    assert max(places.values()) - min(places.values() if len(places) == 60 else [0]) <= 1


def _outcome(
    index: int, latency_ms: float, cost: float, *, is_right: bool = True, source="policy"
) -> DemoAnswer:
    stage = ("small", "medium", "large")[index]
    version = "v7" if source == "policy" else ""
    return DemoAnswer("so 4. Answer: 4", is_right, stage, index, 0.75, latency_ms, cost, source, version)


_ROWS = [
    DemoRow("arithmetic", 1, "2 + 2?\n", "4", _outcome(0, 10, 1.5), _outcome(2, 40, 8, source="fixed")),
    DemoRow("code", 2, "p" * 300, "4", _outcome(0, 20, 1.5, is_right=False), _outcome(2, 80, 8)),
    DemoRow("claims", 3, "c", "4", _outcome(1, 30, 5), _outcome(2, 60, 8, is_right=False)),
    DemoRow("claims", 9, "d", "4", _outcome(2, 60, 10, source="static"), _outcome(2, 60, 8)),
]


def test_the_summary_holds_means_by_hand():
    summary = summarise(_ROWS)
    assert (summary.prompts, summary.accuracy, summary.accuracy_largest) == (4, 0.75, 0.75)
    assert (summary.latency_ms, summary.latency_largest_ms, summary.speedup) == (30.0, 60.0, 2.0)
    assert (summary.latency_p95_ms, summary.latency_largest_p95_ms) == (60.0, 80.0)
    assert (summary.cost, summary.cost_largest) == (4.5, 8.0)
    assert summary.early_stop_share == 0.75
    assert summary.stage_shares == {"small": 0.5, "medium": 0.25, "large": 0.25}
    assert (summary.largest_stage, summary.policy_version) == ("large", "v7")
    assert summary.plan_sources == ("policy", "static")


class _Cascade:
    """Answers every question with the reference answer of the first task, and notes who was asked."""

    def __init__(self, answer: str) -> None:
        self.asked: list[tuple[str, str | tuple[str, ...]]] = []
        self._text = f"Answer: {answer}"

    async def describe(self) -> Description:
        names = ("small", "large")
        stages = tuple(StageDescription(name, i, "", "", 0, 0, 1, True, 0) for i, name in enumerate(names))
        return Description(stages, None, ("large",), "0.1.0")

    async def ask(self, request: Request) -> Answer:
        self.asked.append((request.input, request.chain or request.stage))
        return _answer(text=self._text, stage=request.stage or "small", stage_index=request.stage == "large")


async def test_the_two_ways_take_turns_after_a_warm_up():
    tasks = choose_tasks(3)
    first, second, third = (task.prompt for task in tasks)
    cascade = _Cascade(tasks[0].answer)
    rows = [row async for row in ask_both_ways(cascade, tasks, Objective(preference="best"))]
    assert cascade.asked == [
        (EXAMPLE_PROMPT, "small"),
        (EXAMPLE_PROMPT, "large"),
        (EXAMPLE_PROMPT, ""),
        (EXAMPLE_PROMPT, ("small", "large")),
        (first, ""),
        (first, "large"),
        (second, "large"),
        (second, ""),
        (third, ""),
        (third, "large"),
    ]
    assert [(row.cascade.stage, row.largest.stage) for row in rows] == [("small", "large")] * 3
    assert [row.cascade.is_right for row in rows] == [task.answer == tasks[0].answer for task in tasks]
    assert rows[0].wanted == tasks[0].answer


def _printed(renderable, width=120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(renderable)
    return file.getvalue()


def test_the_table_has_one_line_per_question_at_any_width():
    for width in (80, 120, 200):
        lines = _printed(console.demo_rows(_ROWS, width), 200).splitlines()
        # Three rules and a header around the rows.
        assert len(lines) == 4 + len(_ROWS)
    assert "right" in lines[3]
    assert "wrong" in lines[4]
    assert "0.75" in lines[3]


def test_the_summary_sets_the_cascade_beside_its_largest_stage():
    text = _printed(console.demo_summary(summarise(_ROWS)))
    for words in (
        "always large",
        "2.00 × as fast",
        "56% of its cost",
        "75% of the answers",
        "policy v7",
        "away",
    ):
        assert words in text


def _record(stage: str, action: str, decision: str, reason: str) -> StageRecord:
    return StageRecord(stage, 0, action, 1, 1, decision, reason, 0.5, 0.1, 1, 0, 1, 8, 5, 1, 0, 0, 0, "")


def _answer(**changes) -> Answer:
    records = (
        _record("small", "generate", "escalate", "value"),
        _record("medium", "verify", "stop", "last_stage"),
    )
    fields = {
        "request_id": "r",
        "text": "t",
        "token_ids": (),
        "tokenizer_fingerprint": "",
        "finish_reason": "eos",
        "stage": "medium",
        "stage_index": 1,
        "p_correct": 0.914,
        "cost": 4.9,
        "latency_ms": 12.34,
        "policy_ms": 0.0,
        "plan_source": "policy",
        "policy_version": "v7",
        "trace_id": "",
        "stages": records,
    }
    return Answer(**{**fields, **changes})


def test_the_closing_line_says_who_answered_and_why():
    line = console.answer_line(_answer()).plain
    assert line == (
        "medium · predicted quality 0.91 · 12.3 ms · cost 4.90 · small writes, escalate: value → "
        "medium verifies (5 of 8 draft tokens accepted), stop: last stage"
    )
    assert "predicted quality – " in console.answer_line(_answer(p_correct=None)).plain
    unlike = console.answer_line(_answer(p_correct=None, out_of_family=True)).plain
    assert "no predicted quality: unlike what the policy was fitted to" in unlike
    assert "predicted quality –" not in unlike
    assert "ended by length" in console.answer_line(_answer(finish_reason="length")).plain


@pytest.mark.parametrize(
    ("reason", "min_quality", "is_said"),
    [
        ("max_cost", 0.95, True),
        ("deadline", 0.95, True),
        ("value", 0.95, False),
        ("last_stage", 0.95, False),
        ("max_cost", None, False),
    ],
)
def test_a_minimum_that_a_budget_came_before_is_said(reason, min_quality, is_said):
    answer = _answer(stages=(_record("medium", "generate", "stop", reason),))
    line = console.answer_line(answer, min_quality=min_quality).plain
    assert ("not known to be right 95% of the time" in line) is is_said


def test_a_stage_without_a_draft_writes():
    first, second = _answer().stages
    refused = replace(first, completion_tokens=0, text="")
    alone = replace(second, proposed_tokens=0, accepted_tokens=0)
    line = console.answer_line(_answer(stages=(refused, alone))).plain
    assert "medium writes, stop" in line
    failed = replace(alone, forward_passes=0)
    line = console.answer_line(_answer(stages=(first, failed))).plain
    assert "medium verifies, stop" in line


def test_the_closing_line_ends_with_the_trace():
    traced = console.answer_line(_answer(trace_id="t" * 32)).plain
    assert traced == f"{console.answer_line(_answer()).plain} · trace {'t' * 32}"


def test_a_stage_that_read_ahead_is_told_beside_the_steps():
    ahead = _record("medium", "prefill", "unspecified", "unspecified")
    first, second = _answer().stages
    line = console.answer_line(_answer(stages=(ahead, first, second))).plain
    assert line == f"{console.answer_line(_answer()).plain} · medium read the prompt ahead"
    line = console.answer_line(_answer(stages=(ahead, first))).plain
    assert line.endswith("escalate: value · medium read the prompt ahead, unused")


def test_the_closing_line_says_whether_adapters_for_the_task_answered():
    first, second = _answer().stages
    answer = _answer(
        stages=(replace(first, model="small"), replace(second, model="medium/math", adapted=True))
    )
    line = console.answer_line(answer, "math").plain
    assert "small writes without an adapter for math, escalate" in line
    assert ") with an adapter" in line
    assert "adapter" not in console.answer_line(answer).plain
    # A stage that failed answered with nothing.
    assert "adapter" not in console.answer_line(_answer(), "math").plain


def test_one_of_a_thing_is_singular():
    assert [console.count(number, "prompt") for number in (0, 1, 1200)] == [
        "0 prompts",
        "1 prompt",
        "1,200 prompts",
    ]
    assert "\n1 prompt, asked" in _printed(console.demo_summary(summarise(_ROWS[:1])))


def test_a_stream_shows_the_stage_at_work():
    text = StreamedText().after(Drafted(Tokens((1,), "half an ans")))
    assert _printed(console.streamed(text, StageStarted("medium", 1, "verify"))) == (
        "half an ans\nmedium verifies …\n"
    )


def test_a_stage_that_is_away_and_a_missing_policy_are_said():
    stage = StageDescription("small", 0, "", "", 0, 0, 1.5, available=False, queue_depth=0)
    text = _printed(console.description(Description((stage,), None, ("small",), "0.1.0")))
    assert "away" in text
    assert "Policy: none answers" in text
    assert "Static plan, while the policy is away: small" in text


def test_what_a_stage_can_do_is_said():
    able = StageDescription(
        *("large", 1, "l", "vllm", 1, 64, 4.0, True, 0),
        constrains=True,
        most_top_logprobs=20,
        verifies_inside=True,
    )
    plain = StageDescription("small", 0, "s", "onnx", 1, 64, 1.5, available=True, queue_depth=0)
    text = _printed(console.description(Description((plain, able), None, ("small",), "0.1.0")))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["small", "in passes of their own", "no", "no", "none"] in rows
    assert ["large", "while it writes", "yes", "no", "20"] in rows
