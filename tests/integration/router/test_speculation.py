# ruff: noqa: ASYNC110 - what ends by itself is awaited by asking again
"""Chains of stages, pipelined or not, prefill-ahead, early abandon, and drafts that are not worth it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from asd.v1 import cascade_pb2, common_pb2, policy_pb2
from services.common.errors import BrokenOff, Unavailable
from services.router.clients import stage as stage_client
from services.router.planning.draft_selection import DraftSelection
from tests.limits import CALL_S, HANGS_MS

FIXED = cascade_pb2.PLAN_SOURCE_FIXED
CHAINS = [("small", "medium"), ("small", "large"), ("medium", "large"), ("small", "medium", "large")]
VERIFY = common_pb2.STAGE_ACTION_VERIFY
GENERATE = common_pb2.STAGE_ACTION_GENERATE


def ask(*chain: str, **fields) -> cascade_pb2.GenerateRequest:
    return cascade_pb2.GenerateRequest(prompt="hi", chain=chain, **fields)


async def running(stage, count):
    while stage.running < count:
        await asyncio.sleep(0)


def three_stages(world, **options):
    return (
        world.stage("small", pieces=(b"one", b" two", b" four"), **options),
        world.stage("medium", pieces=(b"one", b" two", b" five", b" six")),
        world.stage("large"),
    )


async def idle(*stages) -> None:
    async with asyncio.timeout(CALL_S):
        while any(stage.running for stage in stages):
            await asyncio.sleep(0)


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
@pytest.mark.parametrize("pipelined", [False, True])
async def test_a_chain_answers_as_its_last_stage_does(world, chain, pipelined):
    w = await world(*three_stages(world), speculation={"pipelined": pipelined})
    response = await w.stub.Generate(ask(*chain), timeout=CALL_S)
    last = w.stages[chain[-1]]
    assert (response.text, response.stage, response.plan_source) == (last.text, chain[-1], FIXED)
    assert [record.stage for record in response.stages] == list(chain)
    assert [record.text for record in response.stages] == [w.stages[name].text for name in chain]
    assert [record.action for record in response.stages[1:]] == [VERIFY] * (len(chain) - 1)
    assert [record.decision for record in response.stages] == [
        *[policy_pb2.DECISION_ACTION_ESCALATE] * (len(chain) - 1),
        policy_pb2.DECISION_ACTION_STOP,
    ]
    assert response.cost == pytest.approx(sum(record.cost for record in response.stages))
    verify = "verify_stream" if pipelined else "verify"
    assert w.stages[chain[0]].calls == ["generate"]
    assert [w.stages[name].calls for name in chain[1:]] == [[verify]] * (len(chain) - 1)


async def test_a_pipelined_draft_travels_as_it_is_written(world):
    w = await world(*three_stages(world))
    await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    (chunks,) = w.stages["large"].streamed_drafts
    assert "".join(chunk.text for chunk in chunks) == w.stages["small"].text
    assert len(chunks) == 3
    assert chunks[0].tokenizer_fingerprint == w.stages["small"].fingerprint


async def test_times_of_stages_that_wait_for_their_drafter_are_not_learned(world):
    w = await world(*three_stages(world, queue_ms=0.0))
    w.stages["large"].queue_ms = 50_000.0
    load = w.load
    await w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    assert [w.stages[name].calls for name in ("medium", "large")] == [["verify_stream"]] * 2
    # 3 ms each by the stages' clocks, of which only the first one's are its own.
    assert [load.service_ms(place) for place in range(3)] == [3.0, 0.0, 0.0]
    assert [load.capacity(place) for place in range(3)] == [8.0] * 3
    # A wait in the queue is one all the same: the stages work one after the other from now on.
    assert load.expected_queue_ms(2) == pytest.approx(10_000.0, rel=0.1)
    await w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    assert [w.stages[name].calls[1:] for name in ("medium", "large")] == [["verify"]] * 2
    assert [load.service_ms(place) for place in range(3)] == [3.0] * 3


async def test_the_first_committed_token_comes_while_the_draft_is_being_written(world):
    small, medium, large = three_stages(world, pause_after=1)
    w = await world(small, medium, large)
    request = cascade_pb2.GenerateStreamRequest(request=ask("small", "large"))
    call = w.stub.GenerateStream(request, timeout=CALL_S)
    committed = []
    async for event in call:
        if event.HasField("commit"):
            committed.append(event.commit.tokens.text)
            # The draft waits for this: nothing but the target's own first token can have come.
            small.gate.set()
    assert committed[0] == "one"
    assert "".join(committed) == large.text


async def test_stages_of_a_pipeline_stop_with_the_caller(world):
    small, medium, large = three_stages(world, pause_after=1)
    w = await world(small, medium, large)
    call = w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    await asyncio.gather(*(stage.started.wait() for stage in (small, medium, large)))
    call.cancel()
    await idle(small, medium, large)


async def test_a_target_that_fails_ends_the_drafting(world):
    small = world.stage("small", pause_after=2)
    large = world.stage("large", fail_after=0)
    w = await world(small, world.stage("medium"), large)
    call = w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    await idle(small)


@pytest.mark.parametrize(("times", "has_begun"), [(1, False), (2, False), (1, True)])
async def test_a_verification_whose_end_is_lost_is_asked_for_once_more(world, monkeypatch, times, has_begun):
    """As where a stage refuses it while the draft is still being sent."""
    exchange, left, held = stage_client.call_exchange, [times], []

    async def broken_off(*arguments, **options):
        is_lost = left[0] > 0
        left[0] -= 1
        held.append(options["hold_s"] > 0.0)
        if is_lost and not has_begun:
            raise BrokenOff("the stage broke the call off")
        async for response in exchange(*arguments, **options):
            yield response
            if is_lost:
                raise BrokenOff("the stage broke the call off")

    monkeypatch.setattr(stage_client, "call_exchange", broken_off)
    w = await world(*three_stages(world))
    call = w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    if times == 1 and not has_begun:
        assert (await call).text == w.stages["large"].text
        assert w.stages["large"].calls == ["verify_stream"]
        # The draft waits, so that the reason is heard this time.
        assert held == [False, True]
        return
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert w.stages["large"].calls == ["verify_stream"] * has_begun


async def test_a_drafter_that_dies_leaves_its_target_to_write_alone(world):
    small, medium, large = three_stages(world, fail_after=1)
    w = await world(small, medium, large)
    response = await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    assert (response.text, response.stage) == (large.text, "large")


@pytest.mark.parametrize("options", [{"fail_after": 0}, {"pieces": ()}], ids=["dies", "writes nothing"])
@pytest.mark.parametrize("chain", [("small", "large"), ("small", "medium", "large")], ids="-".join)
async def test_a_drafter_without_a_draft_leaves_its_target_to_write_alone(world, chain, options):
    w = await world(world.stage("small", **options), world.stage("medium"), world.stage("large"))
    response = await w.stub.Generate(ask(*chain), timeout=CALL_S)
    assert (response.text, response.stage) == (w.stages["large"].text, "large")
    assert [record.stage for record in response.stages] == list(chain[1:])


async def test_of_a_verification_that_is_cut_off_what_it_has_shown_is_recorded(world):
    small, medium, large = three_stages(world)
    # Two tokens in one message, then the verification: both are the draft's, and one pass gave them.
    medium.chunk, medium.fail_after = 2, 2
    w = await world(small, medium, large)
    response = await w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    record = response.stages[1]
    assert (record.stage, record.action, record.text) == ("medium", VERIFY, "one two")
    assert record.usage == common_pb2.Usage(
        completion_tokens=2, proposed_tokens=3, accepted_tokens=2, forward_passes=1
    )
    assert record.cost == pytest.approx(4.2 * (1 + 3 * 0.022) / 3)


async def test_a_draft_keeps_its_fingerprint_where_the_verification_comes_first(world):
    small, _, large = three_stages(world)
    medium = world.stage("medium", verification_first=True)
    w = await world(small, medium, large)
    await w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    (chunks,) = large.streamed_drafts
    assert chunks[0].tokenizer_fingerprint == medium.fingerprint


async def test_a_chain_does_not_settle_for_an_earlier_answer(world):
    small, medium, large = three_stages(world)
    large.fail_after = 0
    w = await world(small, medium, large, speculation={"pipelined": False})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"chain": ["small"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"chain": ["large", "small"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"chain": ["small", "small"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"chain": ["small", "huge"]}, grpc.StatusCode.NOT_FOUND),
        ({"chain": ["small", "large"], "stage": "small"}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_chains_that_make_no_sense_are_refused(world, fields, code):
    w = await world()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", **fields), timeout=CALL_S)
    assert caught.value.code() == code
    assert (await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)).text


async def test_a_likely_target_is_warmed_while_the_first_stage_drafts(world):
    policy = world.policy(script={"small": "large"}, p_escalate=0.8, likely_next="large")
    w = await world(policy=policy)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert w.stages["large"].calls == ["prefill", "verify"]
    warmed = response.stages[0]
    assert (warmed.stage, warmed.action) == ("large", common_pb2.STAGE_ACTION_PREFILL)
    # One pass of the four that an answer of three tokens takes.
    assert warmed.cost == pytest.approx(8.8 / 4)
    assert response.cost == pytest.approx(sum(record.cost for record in response.stages))
    assert response.stages[-1].text == response.text


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"p_escalate": 0.2, "likely_next": "large"}, {}),
        ({"p_escalate": 0.8}, {}),
        ({"p_escalate": 0.8, "likely_next": "large"}, {"speculation": {"prefill_ahead": False}}),
    ],
)
async def test_nothing_is_warmed_where_nothing_is_likely_or_wanted(world, options, settings):
    w = await world(policy=world.policy(script={"small": "large"}, **options), **settings)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert w.stages["large"].calls == ["verify"]
    assert response.stages[0].action == common_pb2.STAGE_ACTION_GENERATE


async def test_a_busy_target_is_not_warmed(world):
    large = world.stage("large", pause_after=0)
    policy = world.policy(p_escalate=0.8, likely_next="large")
    w = await world(world.stage("small"), world.stage("medium"), large, policy=policy)
    busy = w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="large"), timeout=CALL_S)
    await large.started.wait()
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert response.stage == "small"
    assert large.calls == ["generate"]
    large.gate.set()
    await busy


@pytest.mark.parametrize(("others", "first"), [(5, ["prefill"]), (20, [])])
async def test_a_target_with_many_calls_of_others_is_not_warmed(world, others, first):
    policy = world.policy(script={"small": "large"}, p_escalate=0.8, likely_next="large")
    large = world.stage("large", others=others)
    w = await world(world.stage("small"), world.stage("medium"), large, policy=policy)
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="large"), timeout=CALL_S)
    large.calls.clear()
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert large.calls == [*first, "verify"]
    (caller,) = {request.caller for request in large.requests}
    assert caller


@pytest.mark.parametrize(("busy", "is_pipelined"), [("small", True), ("medium", False), ("large", False)])
async def test_stages_that_verify_do_not_work_ahead_where_calls_queue(world, busy, is_pipelined):
    stages = {name: world.stage(name) for name in ("small", "medium", "large")}
    w = await world(*stages.values())
    stages[busy].queue_ms = 50_000.0
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage=busy), timeout=CALL_S)
    for stage in stages.values():
        stage.calls.clear()
    response = await w.stub.Generate(ask("small", "medium", "large"), timeout=CALL_S)
    # The answer is made by the same stages, one after the other.
    assert [record.stage for record in response.stages] == ["small", "medium", "large"]
    assert response.text == stages["large"].text
    verify = "verify_stream" if is_pipelined else "verify"
    assert [stages[name].calls for name in ("medium", "large")] == [[verify], [verify]]


async def test_a_target_that_calls_waited_for_is_not_warmed(world):
    policy = world.policy(script={"small": "large"}, p_escalate=0.8, likely_next="large")
    large = world.stage("large", queue_ms=50_000.0)
    w = await world(world.stage("small"), world.stage("medium"), large, policy=policy)
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert large.calls == ["prefill", "verify"]
    large.calls.clear()
    await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert large.calls == ["verify"]


async def test_warming_ends_with_an_answer_that_stands(world):
    gate = asyncio.Event()
    large = world.stage("large", prefill_gate=gate)
    policy = world.policy(p_escalate=0.8, likely_next="large")
    w = await world(world.stage("small"), world.stage("medium"), large, policy=policy)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    # What was not finished is not charged for.
    assert [record.stage for record in response.stages] == ["small"]


async def test_a_hopeless_draft_is_not_finished(world):
    small = world.stage("small", pause_after=2)
    rule = policy_pb2.AbandonRule(tokens=1, mean_logprob=-0.2)
    policy = world.policy(likely_next="large", abandon=(rule,))
    w = await world(small, world.stage("medium"), world.stage("large"), policy=policy)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    # The drafts have a log-probability of -0.25 per token; the third token never came.
    first, last = response.stages
    assert (first.stage, first.text) == ("small", "one two")
    assert first.reason == policy_pb2.DECISION_REASON_ABANDONED
    assert (last.stage, last.action, response.text) == ("large", VERIFY, w.stages["large"].text)
    async with asyncio.timeout(CALL_S):
        await small.cancelled.wait()
    assert len(policy.decisions) == 1


async def test_a_draft_that_was_given_up_is_never_the_answer(world):
    small = world.stage("small", pause_after=2)
    large = world.stage("large", fail_after=0, failure=Unavailable("gone"))
    rule = policy_pb2.AbandonRule(tokens=1, mean_logprob=-0.2)
    policy = world.policy(likely_next="large", abandon=(rule,))
    w = await world(
        *(small, world.stage("medium", pieces=(b"own",)), large),
        policy=policy,
        stage_settings={"small": {"timeout_ms": HANGS_MS}},
    )
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    # Small is planned again, and hangs this time.
    assert (response.stage, response.text) == ("medium", "own")
    fragment = response.stages[0]
    assert (fragment.stage, fragment.text) == ("small", "one two")


async def test_rules_for_one_stage_are_not_applied_to_another(world):
    rule = policy_pb2.AbandonRule(tokens=1, mean_logprob=-0.2)
    policy = world.policy(likely_next="medium", abandon=(rule,))
    plan = policy.Plan

    async def plan_once(request, context):
        response = await plan(request, context)
        policy.plan_failure = Unavailable("gone")
        return response

    policy.Plan = plan_once
    stages = world.stage("small", fail_after=0), world.stage("medium"), world.stage("large")
    w = await world(*stages, policy=policy, static_plan=("large",))
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert [(record.stage, record.text) for record in response.stages] == [("large", w.stages["large"].text)]


async def test_requests_that_come_together_warm_a_target_once(world):
    gate = asyncio.Event()
    large = world.stage("large", prefill_gate=gate)
    small = world.stage("small", pause_after=0)
    w = await world(
        small, world.stage("medium"), large, policy=world.policy(p_escalate=0.8, likely_next="large")
    )
    calls = [w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S) for _ in range(6)]
    async with asyncio.timeout(CALL_S):
        while small.running < 6 or not large.calls:
            await asyncio.sleep(0)
    assert large.calls == ["prefill"]
    small.gate.set()
    await asyncio.gather(*calls)


async def test_an_escalation_does_not_wait_for_a_prefill_that_hangs(world):
    large = world.stage("large", prefill_gate=asyncio.Event())
    policy = world.policy(script={"small": "large"}, p_escalate=0.8, likely_next="large")
    w = await world(world.stage("small"), world.stage("medium"), large, policy=policy)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=4)
    assert (response.stage, response.text) == ("large", large.text)


@pytest.mark.parametrize(
    ("mean_logprob", "settings"), [(-0.3, {}), (-0.2, {"speculation": {"early_abandon": False}})]
)
async def test_a_draft_with_hope_is_finished(world, mean_logprob, settings):
    rule = policy_pb2.AbandonRule(tokens=2, mean_logprob=mean_logprob)
    w = await world(policy=world.policy(likely_next="large", abandon=(rule,)), **settings)
    response = await w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi"), timeout=CALL_S)
    assert (response.stage, response.text) == ("small", w.stages["small"].text)


async def test_chains_take_turns_where_their_last_stage_is_busy(world):
    large = world.stage("large", pause_after=0)
    w = await world(*three_stages(world)[:2], large)
    large.gate.clear()
    fixed = [w.stub.Generate(cascade_pb2.GenerateRequest(prompt="hi", stage="large")) for _ in range(7)]
    await asyncio.wait_for(running(large, 7), CALL_S)
    chain = w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    await asyncio.wait_for(running(large, 8), CALL_S)
    large.gate.set()
    await asyncio.gather(chain, *fixed)
    assert not large.streamed_drafts
    await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    assert large.streamed_drafts


@pytest.mark.parametrize(("others", "is_busy"), [(0, False), (40, True)])
async def test_calls_of_other_routers_make_a_target_busy(world, others, is_busy):
    large = world.stage("large", others=others)
    w = await world(*three_stages(world)[:2], large, speculation={"adaptive": False})
    for _ in range(20):
        await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    # The first answer tells of them.
    assert large.calls[0] == "verify_stream"
    assert ("verify_stream" in large.calls[1:]) is not is_busy


@pytest.mark.parametrize(("verify_s", "used"), [(0.5, ["large"]), (0.1, ["small", "large"])])
async def test_what_answers_took_turns_what_is_chosen(world, clock, verify_s, used):
    stages = three_stages(world)
    w = await world(*stages, speculation={"pipelined": False})
    large = w.stages["large"]
    large.on_call = lambda: clock.advance(verify_s if large.calls[-1] == "verify" else 0.3)
    found = []
    for _ in range(300):
        response = await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
        found.append([record.stage for record in response.stages])
    # Verified at first; then the faster way, but for trials of the other one.
    assert found[0] == ["small", "large"]
    assert found[-20:].count(used) >= 15


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_request_without_an_answer_ends_what_was_chosen_for_it(world, monkeypatch, how):
    large, ended = world.stage("large", pause_after=0), []
    monkeypatch.setattr(DraftSelection, "ended", lambda _, choice: ended.append(choice))
    w = await world(*three_stages(world)[:2], large, speculation={"pipelined": False})
    if how == "fails":
        large.fail_after = 0
        large.gate.set()
        with pytest.raises(grpc.aio.AioRpcError):
            await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    else:
        call = w.stub.Generate(ask("small", "large"), timeout=CALL_S)
        await asyncio.wait_for(running(large, 1), CALL_S)
        call.cancel()
        await asyncio.wait_for(large.cancelled.wait(), CALL_S)
        async with asyncio.timeout(CALL_S):
            while not ended:
                await asyncio.sleep(0)
    assert [choice.counts for choice in ended] == [True]


@pytest.mark.parametrize("pipelined", [False, True])
async def test_worthless_drafts_are_no_longer_verified(world, pipelined):
    def stages():
        return (
            world.stage("small", pieces=(b"x", b"y", b"z")),
            world.stage("medium"),
            world.stage("large"),
        )

    w = await world(*stages(), speculation={"pipelined": pipelined})
    used = []
    for _ in range(40):
        response = await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
        used.append([record.stage for record in response.stages])
        # A draft that was asked for is verified.
        assert response.stages[-1].action == (VERIFY if len(response.stages) == 2 else GENERATE)
    assert used[0] == ["small", "large"]
    # A few that say nothing yet, and one of sixteen.
    assert used[16:].count(["large"]) >= 22
    # It is tried again from time to time, and used again once it is worth it.
    assert ["small", "large"] in used[8:]
    w.stages["small"].pieces = w.stages["large"].pieces
    for _ in range(64):
        response = await w.stub.Generate(ask("small", "large"), timeout=CALL_S)
    assert len(response.stages) == 2
    tolerant = common_pb2.Acceptance(mode=common_pb2.ACCEPTANCE_MODE_TOLERANT, threshold=0.5)
    w.stages["small"].pieces = (b"x", b"y", b"z")
    for _ in range(8):
        # What a tolerant target answers depends on the draft: it is never left out.
        response = await w.stub.Generate(ask("small", "large", acceptance=tolerant), timeout=CALL_S)
        assert len(response.stages) == 2
    always = await world(*stages(), speculation={"pipelined": False, "adaptive": False})
    for _ in range(8):
        response = await always.stub.Generate(ask("small", "large"), timeout=CALL_S)
        assert len(response.stages) == 2
