"""What an operator sees of a request: spans with marks and errors, and metrics in their units."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.trace import StatusCode

from asd.errors import AsdError, BudgetSpent, Unavailable
from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from asd.values import DecisionAction, DecisionReason
from services.router.domain import Decision
from services.router.planning.draft_selection import DraftChoice, DraftSelection, SkipReason
from tests.recording import counts, sums
from tests.unit.router.small_cascade import Policy
from tests.unit.router.small_router import SmallRouter

ESCALATES = {0: (2,)}
SMALL_ALONE = {"static_plan": (0,)}


def failing(error: AsdError, after: int = 0) -> dict[str, Any]:
    return {"fail_after": after, "failure": error}


def gen_ai(span: Any) -> dict[str, Any]:
    """Return the attributes of a span that the GenAI conventions name, without their prefix."""
    found = span.attributes.items()
    return {name.removeprefix("gen_ai."): value for name, value in found if name.startswith("gen_ai.")}


class Deciding(Policy):
    """Decides one thing, or fails with an error."""

    def __init__(self, outcome: Decision | AsdError) -> None:
        super().__init__()
        self._outcome = outcome

    async def decide(self, *arguments: Any, **options: Any) -> Decision:
        if isinstance(self._outcome, AsdError):
            raise self._outcome
        return self._outcome


async def test_a_request_is_described_as_the_conventions_say(recorded):
    sampling = common_pb2.Sampling(temperature=0.5, top_p=0.75, max_new_tokens=9, seed=11, stop=["a secret"])
    router = SmallRouter(Policy(ESCALATES), large={"adapters": ("math",)})
    router.stages["small"].on_token = lambda _: router.clock.advance(0.25)
    request = cascade_pb2.GenerateRequest(prompt="a secret", sampling=sampling, session_id="s-1", task="math")
    response = await router.generate(request)
    described = {
        "operation.name": "chat",
        "provider.name": "asd",
        "conversation.id": "s-1",
        "request.temperature": 0.5,
        "request.top_p": 0.75,
        "request.max_tokens": 9,
        "request.seed": 11,
        "response.finish_reasons": ("eos",),
        "usage.input_tokens": 4,
        "usage.output_tokens": 3,
        "usage.cache_read.input_tokens": 0,
    }
    small = {"request.model": "small", "response.model": "small", "response.time_to_first_chunk": 0.25}
    large = {"request.model": "large", "response.model": "large/math", "response.time_to_first_chunk": 0.0}
    assert [gen_ai(span) for span in recorded.spans("asd.stage")] == [
        {**described, **small},
        {**described, **large},
    ]
    assert [gen_ai(span) for span in recorded.spans("asd.cascade")] == [
        {
            "conversation.id": "s-1",
            "response.id": response.request_id,
            "response.model": "large/math",
            "response.finish_reasons": ("eos",),
        }
    ]
    names = ("asd.cascade", "asd.plan", "asd.stage", "asd.decide")
    assert "secret" not in "".join(span.to_json() for name in names for span in recorded.spans(name))


@pytest.mark.parametrize("seed", [None, 2**63], ids=["drawn by the router", "more than a span can hold"])
async def test_a_seed_that_is_not_the_callers_or_not_exportable_is_left_out(recorded, seed):
    sampling = common_pb2.Sampling(temperature=1.0, seed=seed)
    await SmallRouter(**SMALL_ALONE).generate(cascade_pb2.GenerateRequest(prompt="hi", sampling=sampling))
    assert recorded.values("asd.stage", "gen_ai.request.temperature") == [1.0]
    assert recorded.values("asd.stage", "gen_ai.request.seed") == [None]


async def test_what_has_a_name_of_asds_keeps_it_beside_the_conventions(recorded):
    response = await SmallRouter(**SMALL_ALONE).generate()
    for name in ("asd.request.id", "gen_ai.response.id"):
        assert recorded.values("asd.cascade", name) == [response.request_id]
    for name in ("asd.stage.cached_prompt_tokens", "gen_ai.usage.cache_read.input_tokens"):
        assert recorded.values("asd.stage", name) == [0]


async def test_a_plan_without_the_policy_is_marked_and_counted(recorded, metered):
    router = SmallRouter(Policy(answers=0), static_plan=(1,))
    response = await router.generate()
    assert response.plan_source == cascade_pb2.PLAN_SOURCE_STATIC
    for name in ("asd.plan", "asd.cascade"):
        assert recorded.values(name, "asd.plan.source") == ["static"]
    assert recorded.values("asd.plan", "asd.plan.first_stage") == ["medium"]
    # Of the draft, and of the last stage's answer.
    assert recorded.values("asd.decide", "asd.plan.source") == ["static", "static"]
    assert recorded.values("asd.decide", "asd.decision.reason") == ["static_plan", "static_plan"]
    assert counts(metered()["asd.static_plans"]) == {("plan",): 1}
    await router.generate()
    assert counts(metered()["asd.static_plans"]) == {("plan",): 2}


async def test_a_decision_without_the_policy_is_marked_and_counted(recorded, metered):
    # The plan is the policy's, which then goes away.
    response = await SmallRouter(Policy(answers=1)).generate()
    assert response.plan_source == cascade_pb2.PLAN_SOURCE_POLICY
    assert [record.stage for record in response.stages] == ["small", "large"]
    assert recorded.values("asd.plan", "asd.plan.source") == ["policy"]
    # The static plan holds from there on: it decides twice, and stands in once.
    assert recorded.values("asd.decide", "asd.plan.source") == ["static", "static"]
    assert recorded.values("asd.decide", "asd.decision.outcome") == ["escalate", "stop"]
    assert recorded.values("asd.decide", "asd.decision.p_correct") == [None, None]
    assert counts(metered()["asd.static_plans"]) == {("decide",): 1}


async def test_decisions_of_the_policy_are_marked_as_its_own(recorded, metered):
    await SmallRouter(Policy(ESCALATES)).generate()
    for name in ("asd.plan", "asd.cascade"):
        assert recorded.values(name, "asd.plan.source") == ["policy"]
    assert recorded.values("asd.decide", "asd.plan.source") == ["policy", "policy"]
    assert recorded.values("asd.decide", "asd.decision.p_correct") == [0.5, 0.9]
    assert recorded.values("asd.decide", "asd.stage.name") == ["small", "large"]
    assert recorded.values("asd.decide", "asd.policy.version") == ["v1", "v1"]
    assert not {"asd.static_plans", "asd.stage.failures"} & metered().keys()


async def test_what_the_policy_makes_of_an_answer_is_an_evaluation(recorded):
    response = await SmallRouter(Policy(ESCALATES)).generate()
    events = [event for span in recorded.spans("asd.decide") for event in span.events]
    assert [event.name for event in events] == ["gen_ai.evaluation.result"] * 2
    escalated, stopped = (
        {name.removeprefix("gen_ai."): value for name, value in event.attributes.items()} for event in events
    )
    assert escalated == {
        "evaluation.name": "p_correct",
        "evaluation.score.value": 0.5,
        "evaluation.score.label": "escalate",
    }
    assert stopped == {
        "evaluation.name": "p_correct",
        "evaluation.score.value": 0.9,
        "evaluation.score.label": "stop",
        "response.id": response.request_id,
    }


async def test_an_answer_that_the_policy_has_not_judged_has_no_evaluation(recorded):
    unlike = Decision(DecisionAction.STOP, DecisionReason.OUT_OF_FAMILY, is_out_of_family=True)
    for policy in (Deciding(unlike), Policy(answers=1), Policy(answers=0)):
        await SmallRouter(policy).generate()
    decided = recorded.spans("asd.decide")
    assert decided
    assert not [event for span in decided for event in span.events]


async def test_a_policy_that_is_lost_on_the_way_is_marked_from_there_on(recorded, metered):
    await SmallRouter(Policy({0: (1,)}, answers=2)).generate()
    assert recorded.values("asd.decide", "asd.plan.source") == ["policy", "static", "static"]
    assert counts(metered()["asd.static_plans"]) == {("decide",): 1}


async def test_a_fixed_stage_is_no_static_plan(recorded, metered):
    await SmallRouter(Policy()).generate(cascade_pb2.GenerateRequest(prompt="hi", stage="large"))
    for name in ("asd.plan", "asd.decide", "asd.cascade"):
        assert recorded.values(name, "asd.plan.source") == ["fixed"]
    assert "asd.static_plans" not in metered()


async def test_durations_reach_the_histograms_in_seconds(metered):
    # The clock passes by hand: 250 ms for the plan, 2 s for small, 3 s for large, 500 ms for each decision.
    policy = Policy(ESCALATES)
    router = SmallRouter(policy)
    policy.on_call = lambda step: router.clock.advance({"plan": 0.25, "decide": 0.5}[step])
    router.stages["small"].on_call = lambda: router.clock.advance(2.0)
    router.stages["large"].on_call = lambda: router.clock.advance(3.0)
    response = await router.generate()
    assert response.latency_ms == pytest.approx(6250.0)
    metrics = metered()
    for name in ("gen_ai.server.request.duration", "asd.stage.duration", "asd.policy.duration"):
        assert metrics[name].unit == "s"
    assert sums(metrics["gen_ai.server.request.duration"]) == {
        ("chat", "asd", "large"): (1, pytest.approx(6.25))
    }
    assert sums(metrics["asd.stage.duration"]) == {
        ("generate", "small"): (1, pytest.approx(2.0)),
        ("verify", "large"): (1, pytest.approx(3.0)),
    }
    assert sums(metrics["asd.policy.duration"]) == {(): (1, pytest.approx(1.25))}


async def test_an_inference_is_measured_by_its_models_as_the_conventions_say(metered):
    router = SmallRouter(Policy(ESCALATES), large={"adapters": ("math",), "prompt_tokens": 7})
    router.stages["small"].on_token = lambda _: router.clock.advance(0.5)
    router.stages["large"].on_call = lambda: router.clock.advance(2.0)
    await router.generate(cascade_pb2.GenerateRequest(prompt="hi", task="math"))
    metrics = metered()
    # The labels: operation, provider, and the models that were asked for and that answered.
    small, large = ("chat", "asd", "small", "small"), ("chat", "asd", "large", "large/math")
    for name, of_small in (("duration", 1.5), ("time_to_first_chunk", 0.5)):
        metric = metrics[f"gen_ai.client.inference.{name}"]
        assert metric.unit == "s"
        assert sums(metric) == {small: (1, pytest.approx(of_small)), large: (1, pytest.approx(2.0))}
    for name, of_small, of_large in (
        ("input_tokens", 4, 7),
        ("output_tokens", 3, 3),
        ("cache_read.input_tokens", 0, 0),
    ):
        metric = metrics[f"gen_ai.client.inference.usage.{name}"]
        assert metric.unit == "{token}"
        assert counts(metric) == {(*small, "text"): of_small, (*large, "text"): of_large}


async def test_a_failed_inference_is_measured_with_its_error(metered):
    router = SmallRouter(Policy({0: (1,)}), medium=failing(Unavailable("gone"), after=1))
    router.stages["medium"].on_token = lambda _: router.clock.advance(1.5)
    await router.generate()
    measured = sums(metered()["gen_ai.client.inference.duration"])
    assert measured.pop(("chat", "asd", "small", "small"))
    # The labels: the error, then operation, provider, and the model that was asked for.
    assert measured == {("Unavailable", "chat", "asd", "medium"): (1, pytest.approx(1.5))}


async def test_requests_stages_and_tokens_are_counted(metered):
    router = SmallRouter(Policy(ESCALATES))
    escalated = await router.generate()
    fixed = await router.generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"))
    metrics = metered()
    assert counts(metrics["asd.requests"]) == {("policy", "large"): 1, ("fixed", "small"): 1}
    assert counts(metrics["asd.early_stops"]) == {("fixed", "small"): 1}
    assert counts(metrics["asd.stage.requests"]) == {("generate", "small"): 2, ("verify", "large"): 1}
    # The three letters of the draft, all accepted.
    assert counts(metrics["asd.verify.proposed_tokens"]) == {("large",): 3}
    assert counts(metrics["asd.verify.accepted_tokens"]) == {("large",): 3}
    assert sums(metrics["asd.request.cost"]) == {(): (2, pytest.approx(escalated.cost + fixed.cost))}


async def test_a_prompt_that_the_policy_does_not_know_is_marked_and_counted(recorded, metered):
    unlike = Decision(DecisionAction.STOP, DecisionReason.OUT_OF_FAMILY, is_out_of_family=True)
    response = await SmallRouter(Deciding(unlike)).generate()
    assert response.out_of_family
    assert not response.HasField("p_correct")
    assert recorded.values("asd.decide", "asd.decision.out_of_family") == [True]
    assert recorded.values("asd.decide", "asd.plan.source") == ["policy"]
    metrics = metered()
    assert counts(metrics["asd.out_of_family"]) == {(response.stage,): 1}
    assert counts(metrics["asd.requests"]) == {("policy", response.stage): 1}


async def test_a_stage_that_fails_marks_its_span_and_the_requests(recorded, metered):
    router = SmallRouter(small=failing(Unavailable("small is gone"), after=2), **SMALL_ALONE)
    with pytest.raises(Unavailable):
        await router.generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"))
    assert recorded.status("asd.stage") == [(StatusCode.ERROR, "Unavailable")]
    assert recorded.status("asd.cascade") == [(StatusCode.ERROR, "Unavailable")]
    assert recorded.spans("asd.stage")[0].status.description == "small is gone"
    assert counts(metered()["asd.stage.failures"]) == {("small", "Unavailable"): 1}


async def test_a_failed_escalation_marks_its_span_alone(recorded):
    router = SmallRouter(Policy({0: (1,)}), medium=failing(Unavailable("gone")))
    response = await router.generate()
    assert response.stages[0].reason == policy_pb2.DECISION_REASON_STAGE_UNAVAILABLE
    assert recorded.values("asd.stage", "asd.stage.name") == ["small", "medium"]
    assert recorded.status("asd.stage") == [(StatusCode.UNSET, None), (StatusCode.ERROR, "Unavailable")]
    assert recorded.status("asd.cascade") == [(StatusCode.UNSET, None)]
    assert recorded.values("asd.cascade", "asd.decision.reason") == ["stage_unavailable"]


async def test_a_stage_out_of_time_marks_its_span(recorded):
    router = SmallRouter(small=failing(BudgetSpent("late")), **SMALL_ALONE)
    with pytest.raises(BudgetSpent):
        await router.generate(cascade_pb2.GenerateRequest(prompt="hi", stage="small"))
    assert recorded.status("asd.stage") == [(StatusCode.ERROR, "BudgetSpent")]


async def test_a_policy_that_answers_nonsense_marks_the_decision(recorded):
    router = SmallRouter(Deciding(AsdError("an action that there is not")))
    with pytest.raises(AsdError):
        await router.generate()
    assert recorded.status("asd.decide") == [(StatusCode.ERROR, "AsdError")]
    assert recorded.status("asd.stage") == [(StatusCode.UNSET, None)]


async def test_a_draft_that_a_target_does_without_is_marked_and_counted(recorded, metered, monkeypatch):
    choices = iter([DraftChoice(SkipReason.PROBE), DraftChoice(), DraftChoice(SkipReason.LOAD)])
    monkeypatch.setattr(DraftSelection, "choose", lambda *_, **__: next(choices))
    router = SmallRouter(Policy(ESCALATES))
    actions = [(await router.generate()).stages[-1].action for _ in range(3)]
    generate, verify = common_pb2.STAGE_ACTION_GENERATE, common_pb2.STAGE_ACTION_VERIFY
    assert actions == [generate, verify, generate]
    skipped = [value for value in recorded.values("asd.stage", "asd.draft.skipped") if value]
    assert skipped == ["probe", "load"]
    assert counts(metered()["asd.drafts_skipped"]) == {("probe", "large"): 1, ("load", "large"): 1}


async def test_whether_a_stage_has_an_adapter_for_a_task_is_marked_and_counted(recorded, metered):
    router = SmallRouter(Policy(ESCALATES), large={"adapters": ("math",)})
    tasks = ("math", "poetry", "")
    for task in tasks:
        await router.generate(cascade_pb2.GenerateRequest(prompt="hi", task=task))
    named = [task or None for task in tasks for _ in range(2)]
    assert recorded.values("asd.stage", "asd.request.task") == named
    models = recorded.values("asd.stage", "gen_ai.response.model")
    assert models == ["small", "large/math", "small", "large", "small", "large"]
    assert counts(metered()["asd.stage.tasks"]) == {
        ("small", "none"): 2,
        ("large", "used"): 1,
        ("large", "none"): 1,
    }
