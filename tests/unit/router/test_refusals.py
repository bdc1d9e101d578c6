"""What a stage refuses or fails is the stage's: another is asked, and an answer that exists is kept."""

from __future__ import annotations

from typing import Any

import pytest

from asd.errors import (
    AsdError,
    BudgetSpent,
    ConversationRefused,
    InputFailed,
    InvalidRequest,
    ModelRefusal,
    Overloaded,
    PreconditionFailed,
    PromptTooLong,
    QueueFull,
    ResourceExhausted,
    Unavailable,
)
from asd.values import DecisionReason, Message, Objective, PlanSource, Preference, Role
from services.router.domain import Overload, Refusal, RoutedRequest, Visibility
from services.router.request import RequestState
from tests.unit.router.small_cascade import (
    NAMES,
    OTHER,
    OWN,
    Policy,
    SmallCascade,
    answered,
    called,
    show_nothing,
    shown,
)

TOO_LONG = PromptTooLong("prompt has 600 tokens; small takes at most 511", field="prompt")
NO_SYSTEM = ConversationRefused("no system role", field="conversation")
BROKEN = AsdError("stage small: it failed on this request")

# What a stage can end a call with that says nothing of the caller's request.
OF_THE_STAGE = {
    "too long": TOO_LONG,
    "no form": NO_SYSTEM,
    "refused": ModelRefusal("the library refuses it"),
    "internal": BROKEN,
    "full": QueueFull("the queue is full"),
    "fails on this input": InputFailed("the chat template is stopped"),
    "too large": ResourceExhausted("an answer of more bytes than a message may have"),
    "away": Unavailable("gone"),
    "not loaded": PreconditionFailed("the model is not loaded"),
}
# Those after which other requests go on asking the stage.
OF_ONE_REQUEST = ("too long", "no form", "refused", "internal", "full", "fails on this input", "too large")


def failing(error: AsdError, after: int = 0) -> dict[str, Any]:
    return {"fail_after": after, "failure": error}


each_error = pytest.mark.parametrize("name", OF_THE_STAGE)


@each_error
@pytest.mark.parametrize("has_policy", [True, False])
async def test_the_next_stage_is_asked_where_the_first_cannot_answer(name: str, has_policy: bool) -> None:
    policy = Policy() if has_policy else None
    cascade = SmallCascade(policy, small=failing(OF_THE_STAGE[name]))
    outcome = await cascade.ask()
    assert answered(outcome) == ["medium" if has_policy else "large"]
    assert outcome.plan_source is (PlanSource.POLICY if has_policy else PlanSource.STATIC)
    if policy is not None:
        assert policy.plans == [set(), {"small"}]


@each_error
async def test_an_answer_stands_where_a_later_stage_cannot_give_another(name: str) -> None:
    policy = Policy({0: (2,)})
    cascade = SmallCascade(policy, large=failing(OF_THE_STAGE[name]))
    outcome = await cascade.ask()
    assert (answered(outcome), outcome.answer.result.text) == (["small"], "abc")
    assert called(cascade) == ["small", "large"]
    assert outcome.records[0].decision.reason is DecisionReason.STAGE_UNAVAILABLE
    # What comes next was decided once more, without it.
    assert policy.decisions == [set(), {"large"}]
    for view in (Visibility.COMMITTED, Visibility.DRAFTS):
        cascade.clock.now += 60.0
        events = await cascade.events(view)
        assert shown(events) == "abc"


@each_error
async def test_an_escalation_goes_past_a_stage_that_cannot_answer(name: str) -> None:
    cascade = SmallCascade(Policy({0: (1, 2)}), medium=failing(OF_THE_STAGE[name]))
    assert answered(await cascade.ask()) == ["small", "large"]


@each_error
async def test_a_stage_is_avoided_only_where_other_requests_would_find_it_so(name: str) -> None:
    cascade = SmallCascade(Policy(), small=failing(OF_THE_STAGE[name]))
    await cascade.ask()
    cascade.forget_calls()
    await cascade.ask()
    assert ("small" in called(cascade)) is (name in OF_ONE_REQUEST)


async def test_a_draft_that_breaks_off_with_a_fault_is_replaced() -> None:
    cascade = SmallCascade(Policy(), small=failing(BROKEN, after=2), medium={"text": "xyz"})
    events = await cascade.events(Visibility.DRAFTS)
    assert events[-1].answer.result.text == "xyz"  # type: ignore[union-attr]
    assert (await cascade.ask()).answer.stage.name == "medium"


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ((TOO_LONG, TOO_LONG, TOO_LONG), PromptTooLong),
        ((TOO_LONG, NO_SYSTEM, TOO_LONG), ModelRefusal),
        ((BROKEN, BROKEN, BROKEN), AsdError),
        ((QueueFull("full"),) * 3, Overloaded),
        # Only what a stage says of its queue passes with time.
        ((ResourceExhausted("CLIENT: Received message larger than max"),) * 3, ResourceExhausted),
        ((BudgetSpent("late"),) * 3, BudgetSpent),
        # The request is not at fault while a stage that was not there might take it.
        ((TOO_LONG, TOO_LONG, Unavailable("gone")), Unavailable),
        ((TOO_LONG, BudgetSpent("late"), TOO_LONG), BudgetSpent),
        ((TOO_LONG, BROKEN, TOO_LONG), AsdError),
        ((BudgetSpent("late"), Unavailable("gone"), BROKEN), Unavailable),
        ((BROKEN, PreconditionFailed("not loaded"), BROKEN), AsdError),
    ],
)
@pytest.mark.parametrize("has_policy", [True, False])
async def test_a_request_that_no_stage_answers_says_why_of_each(
    errors: tuple[AsdError, ...], kind: type[AsdError], has_policy: bool
) -> None:
    options = {name: failing(error) for name, error in zip(("small", "medium", "large"), errors, strict=True)}
    policy = Policy() if has_policy else None
    cascade = SmallCascade(policy, overload=Overload.DEGRADE, **options)
    with pytest.raises(AsdError) as caught:
        await cascade.ask()
    assert type(caught.value) is kind
    assert called(cascade) == ["small", "medium", "large"]
    for error in errors:
        assert error.message in caught.value.message
    if kind is PromptTooLong:
        assert caught.value.field == "prompt"


@pytest.mark.parametrize("error", [*OF_THE_STAGE.values(), InvalidRequest("no", field="sampling.top_p")])
async def test_what_a_fixed_stage_says_is_the_callers_to_know(error: AsdError) -> None:
    cascade = SmallCascade(Policy(), medium=failing(error))
    # Of a full one it is known when to ask again.
    kind = Overloaded if isinstance(error, QueueFull) else type(error)
    with pytest.raises(kind) as caught:
        await cascade.ask(stage="medium")
    assert caught.value.message == error.message
    assert called(cascade) == ["medium"]


@pytest.mark.parametrize("static_plan", [(0, 1, 2), (1, 2), (2,)])
async def test_no_lesser_stage_stands_in_for_one_that_is_full(static_plan: tuple[int, ...]) -> None:
    full = failing(QueueFull("256 wait"))
    cascade = SmallCascade(static_plan=static_plan, **{NAMES[static_plan[0]]: full})
    if static_plan[0] < 2:
        assert (await cascade.ask()).answer.stage.name == "large"
    else:
        with pytest.raises(Overloaded, match="256 wait") as caught:
            await cascade.ask()
        assert caught.value.retry_after_s is not None
        assert cascade.observer.refusals == [Refusal.STAGE_FULL]
    assert called(cascade) == list(NAMES[static_plan[0] :])
    degraded = SmallCascade(static_plan=static_plan, overload=Overload.DEGRADE, large=full)
    assert (await degraded.ask()).answer.stage.name != "large"


@pytest.mark.parametrize("objective", [Objective(preference=Preference.BEST), Objective(min_quality=0.9)])
async def test_a_full_stage_costs_who_asks_for_quality_no_quality(objective: Objective) -> None:
    cascade = SmallCascade(Policy({0: (2,)}), large=failing(QueueFull("the queue is full")))
    with pytest.raises(Overloaded) as caught:
        await cascade.ask(objective=objective)
    assert caught.value.retry_after_s is not None
    # Others have more of the answer that there is.
    cascade = SmallCascade(Policy({0: (2,)}), large=failing(QueueFull("the queue is full")))
    assert answered(await cascade.ask()) == ["small"]


async def test_a_request_that_breaks_the_contract_is_not_sent_to_every_stage() -> None:
    mistake = InvalidRequest("top_p 7", field="sampling.top_p")
    cascade = SmallCascade(Policy(), small=failing(mistake))
    with pytest.raises(InvalidRequest) as caught:
        await cascade.ask()
    assert caught.value is mistake
    assert called(cascade) == ["small"]
    # But what there is, is kept.
    cascade = SmallCascade(Policy({0: (2,)}), large=failing(mistake))
    assert answered(await cascade.ask()) == ["small"]


async def test_a_budget_that_leaves_no_other_stage_leaves_the_stages_own_reason() -> None:
    budget = InvalidRequest("max_cost is below the cheapest stage", field="objective.max_cost")
    for policy in (Policy(plan_failure=budget), None):
        cascade = SmallCascade(policy, small=failing(TOO_LONG))
        with pytest.raises(PromptTooLong) as caught:
            await cascade.ask(objective=Objective(max_cost=1.5))
        assert caught.value is TOO_LONG


async def test_refusals_do_not_count_as_failures_of_the_stage() -> None:
    cascade = SmallCascade(Policy(), small=failing(TOO_LONG), medium=failing(BROKEN))
    await cascade.ask()
    assert cascade.observer.failures == [("medium", "AsdError")]


# Chains, and what is known in advance.


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("chain", [("small", "large"), ("small", "medium", "large")], ids="-".join)
async def test_a_chain_does_without_a_drafter_that_cannot_take_the_request(
    pipelined: bool, chain: tuple[str, ...]
) -> None:
    cascade = SmallCascade(Policy(), pipelined=pipelined, small=failing(TOO_LONG), large={"text": "xyz"})
    outcome = await cascade.ask(chain=chain)
    assert (outcome.answer.stage.name, outcome.answer.result.text) == ("large", "xyz")
    assert "small" not in answered(outcome)
    cascade.forget_calls()
    await cascade.ask()
    assert "small" in called(cascade)


@pytest.mark.parametrize("pipelined", [True, False])
async def test_a_chain_is_refused_where_its_last_stage_refuses(pipelined: bool) -> None:
    cascade = SmallCascade(Policy(), pipelined=pipelined, large=failing(TOO_LONG))
    with pytest.raises(PromptTooLong):
        await cascade.ask(chain=("small", "large"))


async def test_a_stage_that_refuses_to_read_ahead_is_not_escalated_to() -> None:
    policy = Policy({0: (2, 1)}, likely_next=2)
    cascade = SmallCascade(policy, large={"prefill_failure": NO_SYSTEM})
    assert answered(await cascade.ask()) == ["small", "medium"]
    assert cascade.stages["large"].calls == ["prefill"]
    assert policy.decisions[0] == {"large"}
    # Any other failure of a favour says nothing.
    cascade = SmallCascade(Policy({0: (2, 1)}, likely_next=2), large={"prefill_failure": BROKEN})
    assert answered(await cascade.ask()) == ["small", "large"]


@pytest.mark.parametrize(
    ("prompt_tokens", "fingerprint", "turns", "is_asked"),
    [
        (511, OWN, 0, True),
        # Some of these may be the first stage's chat template's: another one's has no system text.
        (600, OWN, 0, True),
        (9000, OWN, 0, False),
        (9000, OWN, 1, False),
        # What a template leaves out of several turns may be any part of them.
        (9000, OWN, 3, True),
        (9000, OTHER, 0, True),
    ],
)
@pytest.mark.parametrize("has_policy", [True, False])
async def test_a_stage_whose_context_is_known_to_be_too_short_is_left_out_in_advance(
    prompt_tokens: int, fingerprint: str, turns: int, is_asked: bool, has_policy: bool
) -> None:
    policy = Policy({0: (2,)}) if has_policy else None
    cascade = SmallCascade(policy, large={"context_length": 512, "fingerprint": OWN})
    small = cascade.stages["small"]
    small.fingerprint = fingerprint
    # Its own answer says what the context is.
    assert answered(await cascade.ask()) == ["small", "large"]
    cascade.forget_calls()
    small.prompt_tokens = prompt_tokens
    roles = (Role.USER, Role.ASSISTANT, Role.USER)[:turns]
    conversation = tuple(Message(role, "hi") for role in roles)
    outcome = await cascade.ask(**({"input": conversation} if turns else {}))
    assert answered(outcome) == (["small", "large"] if is_asked else ["small"])
    assert called(cascade) == answered(outcome)
    reason = outcome.records[0].decision.reason
    if not has_policy:
        assert (reason is DecisionReason.STAGE_UNAVAILABLE) is not is_asked
    # The next short prompt goes there again.
    small.prompt_tokens = 4
    assert answered(await cascade.ask()) == ["small", "large"]


async def test_a_stage_that_was_away_may_come_back_with_a_longer_context() -> None:
    cascade = SmallCascade(Policy({0: (2,)}), large={"context_length": 512})
    small, large = cascade.stages["small"], cascade.stages["large"]
    await cascade.ask()
    large.fail_after, large.failure = 0, Unavailable("restarting")
    await cascade.ask()
    cascade.clock.now += 60.0
    large.fail_after, small.prompt_tokens = None, 9000
    assert answered(await cascade.ask()) == ["small", "large"]


@pytest.mark.parametrize(("is_silent", "calls"), [(False, ["verify"]), (True, ["generate"])])
async def test_a_draft_without_text_is_not_handed_on(is_silent: bool, calls: list[str]) -> None:
    # A stage with another tokenizer could make nothing of its ids.
    cascade = SmallCascade(pipelined=False, small={"is_silent": is_silent})
    outcome = await cascade.ask(chain=("small", "large"))
    assert outcome.answer.result.text == "abc"
    assert cascade.stages["large"].calls == calls


async def test_a_wait_for_a_stage_that_sleeps_is_no_overload() -> None:
    """Unrelated requests are under way elsewhere."""
    cascade = SmallCascade(Policy())
    state = RequestState(RoutedRequest("hi", id="id"), 60.0, Visibility.OUTCOME, cascade.clock, show_nothing)
    with cascade.load.calling(0), cascade.load.calling(0), cascade.planner.plan_for(state) as plan:
        error = BudgetSpent("stage large is not awake")
        assert plan.refusal(error) is error


@pytest.mark.parametrize("view", [Visibility.OUTCOME, Visibility.COMMITTED])
async def test_who_was_given_final_tokens_is_late_and_not_refused(view: Visibility) -> None:
    # Of a stage that always takes long, and does not hang.
    cascade = SmallCascade(Policy(), medium={"total_ms": 20_000.0}, timeout_ms=120_000.0)
    await cascade.ask(stage="medium")
    cascade.stages["medium"].fail_after, cascade.stages["medium"].failure = 2, BudgetSpent("late")
    kind = Overloaded if view is Visibility.OUTCOME else BudgetSpent
    with cascade.load.calling(1), pytest.raises(kind):
        await cascade.events(view, stage="medium")
