"""Prompts that are unlike all that a policy was fitted to: which they are, and what becomes of them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd.values import DecisionReason, Preference
from policy_service.artifact import Artifact, load_artifact, load_usable, read_artifact, read_document
from policy_service.document import FamilyEntry, UnfitArtifact
from policy_service.domain import Condition, PolicyObjective, Spent, UnmeetableBudget
from policy_service.family import MOST_CHARACTERS, Family
from policy_service.features import Draft, PromptText
from policy_service.servicer import PolicyServicer
from policy_service.store import write_artifact
from policy_service.train.family import MARKED, fit_family, suite_prompts, with_family
from services.cli.demo import EXAMPLE_PROMPTS
from tests.fakes.renamed_tasks import renamed_prompts
from tests.unit.policy.tiny_policy import change_document, make_artifact

if TYPE_CHECKING:
    from policy_service.policy import Policy

ROOT = Path(__file__).parents[3]
OFF_TOPIC = ROOT / "tests" / "data" / "off_topic.jsonl"
NAMES = [f"{a}{b}" for a, b in itertools.product(("An", "Be", "Cle", "Do"), ("na", "ri", "tto", "vik"))]
THINGS = [f"{a}s" for a in "pen cup map key bell ring stamp coin shell bead card nut".split()]
SIGNALS = np.zeros(1, np.float32)
DRAFT = Draft("x", SIGNALS, SIGNALS, SIGNALS, "eos")
UNLIKE = PromptText("hello")


def stories(count: int, seed: int) -> list[PromptText]:
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        story = f"{name} has {rng.randint(1, 99)} {thing}. {name} buys {rng.randint(1, 99)} more."
        question = f"How many {thing} does {name} have now?"
        prompts.append(PromptText(f"{story} {question}"))
        prompts.append(PromptText("And is that much?", (f"{story} {question}", f"{rng.randint(1, 99)}")))
    return prompts


@pytest.fixture(scope="module")
def family() -> Family:
    return fit_family(stories(400, 1), stories(100, 2)).family()


KNOWN = "Ulla has 7 spoons. Ulla buys 500 more. How many spoons does Ulla have now?"


@pytest.mark.parametrize(
    "prompt",
    [
        PromptText(KNOWN),
        PromptText(KNOWN.replace("Ulla", "Mary Ann Smith")),
        # A word of the patterns may also be a name.
        PromptText(KNOWN.replace("Ulla", "More")),
        PromptText("And is that much?", (KNOWN, "507")),
        PromptText("And is that much?", (KNOWN, "507", "And is that much?", "12")),
        # White space at the ends, kinds of line breaks, case, thanks.
        PromptText(f"\n {KNOWN}\r\n"),
        PromptText("And is that much?\r", (f"{KNOWN}\n", " 507 ")),
        PromptText(KNOWN.lower()),
        PromptText(KNOWN.upper()),
        PromptText(KNOWN.replace("Ulla", "mary smith")),
        PromptText(f"{KNOWN} Thanks!"),
        PromptText(f"{KNOWN}, please. Thank you very much."),
        # System turns that ask for nothing.
        PromptText(KNOWN, ("",)),
        PromptText(KNOWN, ("You are a helpful assistant.",)),
        PromptText(KNOWN, ("You are a helpful, respectful and honest AI assistant.",)),
        PromptText("And is that much?", ("You are a helpful assistant.", KNOWN, "507")),
    ],
)
def test_new_names_things_and_numbers_in_known_patterns_are_known(family: Family, prompt: PromptText):
    assert family.has(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        PromptText("hello"),
        PromptText(""),
        PromptText("🙂"),
        PromptText("Ulla"),
        PromptText("12"),
        PromptText("Write a poem about spoons."),
        PromptText(f"{KNOWN} Write a poem about it."),
        # What is asked second is not asked first, and known words in another order are new.
        PromptText("And is that much?"),
        PromptText("How many have Ulla does more now?"),
        # Thanks alone, a polite opening, which throws models off, and a system turn that asks for more.
        PromptText("Thanks!"),
        PromptText("write a poem about spoons. Thanks!"),
        PromptText(f"Please answer: {KNOWN}"),
        PromptText(KNOWN, ("You are a helpful assistant. Answer in rhymes.",)),
        PromptText(KNOWN, ("You are an assistant " * 20,)),
        PromptText("And is that much?", ("You are a helpful assistant.",)),
        # What is asked first is not asked later: nothing was fitted to that.
        PromptText("What does this print?", (KNOWN, "507")),
        # Neither a long history nor a known question hides the other.
        PromptText("Write a poem.", (KNOWN, "507") * 6),
        PromptText("And is that much?", ("Write a poem about the sea.", "Waves and salt and wind.")),
    ],
)
def test_other_prompts_are_unlike(family: Family, prompt: PromptText):
    assert not family.has(prompt)


TINY = fit_family(stories(20, 1), []).family()


@given(st.text(), st.lists(st.text(), max_size=4))
def test_novelty_is_a_share_whatever_is_asked(question: str, history: list[str]):
    assert 0.0 <= TINY.novelty(PromptText(question, tuple(history))) <= 1.0


def test_of_long_prompts_the_end_counts(family: Family):
    filling = "lorem ipsum dolor " * (MOST_CHARACTERS // 10)
    assert family.has(PromptText("And is that much?", (filling, *("And is that much?", "12") * 8)))
    assert not family.has(PromptText(KNOWN + filling))


def test_of_the_calibration_prompts_hardly_any_is_marked():
    """The bound of conformal prediction holds where many prompts have something new."""
    rng = random.Random(3)

    def noisy(count: int) -> list[PromptText]:
        words = [f"{a}{b}{c}" for a, b, c in itertools.product("bdkl", "aeiou", "mnrst")]
        return [PromptText(" ".join(rng.choices(words, k=rng.randint(3, 30)))) for _ in range(count)]

    fitted = fit_family(noisy(300), noisy(400)).family()
    # 400 others: 4 expected at most, and more than 11 with a chance of one in a thousand.
    assert sum(not fitted.has(prompt) for prompt in noisy(400)) <= 11
    assert fitted.threshold > 0.1
    assert MARKED == 0.01


def test_too_few_calibration_prompts_mark_nothing():
    assert fit_family(stories(50, 1), stories(40, 2)).family().has(UNLIKE)
    assert fit_family([], []).family().has(UNLIKE)


# The shipped policy.


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return load_artifact(ROOT / "policy_service" / "policy.zip").policy


def test_the_shipped_policy_marks_what_is_off_topic(shipped: Policy):
    rows = [json.loads(line) for line in OFF_TOPIC.read_text("utf-8").splitlines()]
    prompts = [PromptText(row["prompt"], tuple(row.get("history", ()))) for row in rows]
    assert np.mean([*map(shipped.is_unlike, prompts)]) >= 0.95


def test_the_shipped_policy_knows_held_out_prompts_of_the_suites(shipped: Policy):
    assert np.mean([*map(shipped.is_unlike, suite_prompts("evaluation", 200, 1))]) <= 0.02


def test_the_shipped_policy_knows_the_suites_forms_with_new_names_and_numbers(shipped: Policy):
    prompts = [PromptText(question, history) for history, question in renamed_prompts(200, 1)]
    assert np.mean([*map(shipped.is_unlike, prompts)]) <= 0.02


def test_the_shipped_policy_knows_what_asd_up_proposes(shipped: Policy):
    assert not any(shipped.is_unlike(PromptText(prompt)) for prompt in EXAMPLE_PROMPTS)


@pytest.mark.parametrize(
    "form", ["{}\n", "\r\n{}\r\n", "{} Thanks!", "{} please", "{} Thank you.", "lower"], ids=repr
)
@pytest.mark.parametrize("history", [(), ("",), ("You are a helpful assistant.",)])
def test_the_shipped_policy_knows_questions_in_other_forms(
    shipped: Policy, form: str, history: tuple[str, ...]
):
    questions = [each.question for each in suite_prompts("evaluation", 100, 1) if not each.history]
    written = [q.lower() if form == "lower" else form.format(q) for q in questions]
    assert np.mean([shipped.is_unlike(PromptText(each, history)) for each in written]) <= 0.02


@pytest.mark.parametrize("form", ["{} Thanks!", "{}\n", "lower"])
def test_the_shipped_policy_marks_what_is_off_topic_in_other_forms(shipped: Policy, form: str):
    rows = [json.loads(line) for line in OFF_TOPIC.read_text("utf-8").splitlines()]
    texts = [row["prompt"] for row in rows if row["part"] == "open"]
    written = [text.lower() if form == "lower" else form.format(text) for text in texts]
    assert np.mean([shipped.is_unlike(PromptText(text)) for text in written]) >= 0.95


# What becomes of them. Costs of 1, 2 and 3, and as much for a verification.

STAGES = ("small", "medium", "large")


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    policy = load_artifact(make_artifact(tmp_path / "a", "v1", stages=STAGES)).policy
    policy.use_family(Family(frozenset(), frozenset(), 0.5))
    return policy


def decide(policy: Policy, stage: int, objective: PolicyObjective, spent: Spent, **away: bool):
    conditions = {STAGES.index(name): Condition(is_available=False) for name in away}
    return policy.decide(UNLIKE, stage, DRAFT, None, None, objective, spent, conditions)


@pytest.mark.parametrize("preference", list(Preference))
def test_it_goes_to_the_last_stage_whatever_the_preference(policy: Policy, preference: Preference):
    objective = PolicyObjective(preference=preference)
    for stage in (0, 1):
        decision = decide(policy, stage, objective, Spent(1.0))
        assert (decision.next_stage, decision.reason) == (2, DecisionReason.OUT_OF_FAMILY)
        assert (decision.p_correct, decision.stderr) == (None, None)
        assert {each.p_correct for each in decision.estimates} == {None}
    last = decide(policy, 2, objective, Spent(3.0))
    assert (last.next_stage, last.reason, last.p_correct) == (None, DecisionReason.OUT_OF_FAMILY, None)


@pytest.mark.parametrize(
    ("objective", "away", "next_stage", "reason"),
    [
        (PolicyObjective(min_quality=0.1, quality_value=0.0), {}, 2, DecisionReason.OUT_OF_FAMILY),
        (PolicyObjective(max_cost=4.0), {}, 2, DecisionReason.OUT_OF_FAMILY),
        (PolicyObjective(max_cost=3.9), {}, 1, DecisionReason.OUT_OF_FAMILY),
        (PolicyObjective(max_cost=2.9), {}, None, DecisionReason.MAX_COST),
        (PolicyObjective(max_cost=2.9, min_quality=0.9), {}, None, DecisionReason.MAX_COST),
        (PolicyObjective(max_latency_ms=1.5), {}, None, DecisionReason.MAX_LATENCY),
        (PolicyObjective(), {"large": True}, 1, DecisionReason.OUT_OF_FAMILY),
        (PolicyObjective(), {"medium": True, "large": True}, None, DecisionReason.LAST_STAGE),
    ],
)
def test_the_budgets_and_what_is_there_bound_it(
    policy: Policy,
    objective: PolicyObjective,
    away: dict[str, bool],
    next_stage: int | None,
    reason: DecisionReason,
):
    decision = decide(policy, 0, objective, Spent(1.0, 1.0), **away)
    assert (decision.next_stage, decision.reason, decision.p_correct) == (next_stage, reason, None)


@pytest.mark.parametrize(
    ("max_cost", "first", "following"),
    # A draft saves nothing here, as a verification costs as much as an answer.
    [(9.0, 2, None), (3.0, 2, None), (2.5, 1, None), (1.0, 0, None)],
)
def test_it_starts_with_the_last_stage_that_the_budget_leaves(
    policy: Policy, max_cost: float, first: int, following: int | None
):
    plan = policy.plan(UNLIKE, PolicyObjective(max_cost=max_cost), {})
    assert (plan.first_stage, plan.likely_next, plan.is_unlike) == (first, following, True)
    assert {each.p_correct for each in plan.estimates} == {None}
    assert plan.abandon == ()


def test_it_starts_with_a_draft_where_that_is_cheaper(shipped: Policy):
    plan = shipped.plan(UNLIKE, PolicyObjective(), {})
    assert (plan.first_stage, plan.likely_next, plan.p_escalate) == (0, 2, 1.0)
    # Not where the two do not fit the budget, or the drafter is away.
    assert shipped.plan(UNLIKE, PolicyObjective(max_cost=9.0), {}).first_stage == 2
    assert shipped.plan(UNLIKE, PolicyObjective(), {0: Condition(is_available=False)}).first_stage == 1


def test_where_no_stage_is_in_time_the_fastest_answers(policy: Policy):
    assert policy.plan(UNLIKE, PolicyObjective(max_latency_ms=0.1), {}).first_stage == 0


def test_a_budget_below_every_stage_is_refused(policy: Policy):
    with pytest.raises(UnmeetableBudget, match="small"):
        policy.plan(UNLIKE, PolicyObjective(max_cost=0.5), {})


def test_prompts_that_it_knows_are_judged_as_ever(policy: Policy):
    marked = decide(policy, 0, PolicyObjective(), Spent(1.0))
    policy.mark_above(1.0)
    known = decide(policy, 0, PolicyObjective(), Spent(1.0))
    policy.use_family(None)
    assert known == decide(policy, 0, PolicyObjective(), Spent(1.0)) != marked
    assert known.p_correct is not None


# Artifacts.


def test_an_artifact_keeps_it(tmp_path: Path):
    path = make_artifact(tmp_path / "v1", "v1")
    document, models = read_document(path), read_artifact(path).models
    assert document.family is None
    assert "family" not in document.model_dump(by_alias=True)
    changed = with_family(document, stories(50, 1), stories(60, 2))
    assert changed.policy_version != "v1"
    assert changed.model_copy(update={"family": None, "policy_version": "v1"}) == document
    write_artifact(Artifact(changed, models), path)
    assert load_usable(path).policy.family == fit_family(stories(50, 1), stories(60, 2)).family()


@pytest.mark.parametrize(
    ("field", "value"),
    [("grams", "ä"), ("grams", "AAAA"), ("threshold", 2), ("words", [""]), ("prompts", -1)],
)
def test_a_damaged_one_is_refused_by_name(tmp_path: Path, field: str, value: object):
    artifact = make_artifact(tmp_path / "v1", "v1")
    entry = FamilyEntry.of(Family(frozenset("a"), frozenset({1, 2}), 0.5), prompts=1, calibration=1)
    change_document(artifact, lambda content: {**content, "family": {**entry.model_dump(), field: value}})
    with pytest.raises(UnfitArtifact, match="family"):
        read_document(artifact)


def test_the_service_may_have_a_threshold_of_its_own(tmp_path: Path, policy: Policy):
    document = read_document(make_artifact(tmp_path / "b", "v1", stages=STAGES))
    PolicyServicer(policy, document, None, novelty_threshold=1.0)
    assert not policy.is_unlike(UNLIKE)
    servicer = PolicyServicer(policy, document, None, novelty_threshold=0.0)
    assert policy.is_unlike(UNLIKE)
    another = load_artifact(make_artifact(tmp_path / "c", "v2", stages=STAGES)).policy
    another.use_family(Family(frozenset(), frozenset(), 1.0))
    servicer.use(another, document)
    assert another.is_unlike(UNLIKE)
