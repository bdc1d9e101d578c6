"""A candidate beside the live policy: what is recorded, dropped and survived."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from asd.values import DecisionReason
from policy_service.domain import Estimate, Judgement, Plan, StageFacts
from policy_service.shadow import Shadow, ShadowJob, compare, read_shadow
from tests.limits import CALL_S

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("small", "medium", "large")


class FakePolicy:
    """Answers with what it was given, or raises it."""

    version = "candidate"
    stages = tuple(StageFacts(name, 1.0, 1.0, 0.5, 0.0) for name in NAMES)

    def __init__(self, answer: Plan | Judgement | Exception) -> None:
        self.answer = answer

    def say(self) -> Plan | Judgement:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Heard:
    """Keeps what an observer is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def shadow_compared(self, step: str, stage: str, *, agrees: bool) -> None:
        self.told.append((step, stage, agrees))

    def shadow_dropped(self) -> None:
        self.told.append("dropped")

    def shadow_failed(self) -> None:
        self.told.append("failed")


def plan(first: int, *p_correct: float) -> Plan:
    return Plan(first, estimates(0, *p_correct), 0.0, None, (), None)


def decision(next_stage: int | None, *p_correct: float, judged: int = 0) -> Judgement:
    return Judgement(
        next_stage,
        DecisionReason.VALUE,
        p_correct[0],
        0.0,
        1.0,
        0.0,
        estimates(judged, *p_correct, own_cost=0.0),
    )


def estimates(first: int, *p_correct: float, own_cost: float = 1.0) -> tuple[Estimate, ...]:
    """One estimate per stage from the first on; stage i costs 10 ** i."""
    costs = [own_cost, *(10.0**index for index in range(first + 1, first + len(p_correct)))]
    return tuple(
        Estimate(first + index, p, 0.0, cost, 0.0)
        for index, (p, cost) in enumerate(zip(p_correct, costs, strict=True))
    )


def job(live: Plan | Judgement, judged: int | None, **fields: str) -> ShadowJob:
    return ShadowJob(
        lambda policy: policy.say(),  # type: ignore[attr-defined]
        live,
        "live",
        judged,
        fields.get("request_id", "r"),
        "t",
        5.0,
    )


def make(answer: Plan | Judgement | Exception, path: Path | None, **options: float) -> tuple[Shadow, Heard]:
    heard = Heard()
    return Shadow(FakePolicy(answer), path, heard, **options), heard  # type: ignore[arg-type]


def test_actions_are_compared_by_the_predictions_of_both():
    live, candidate = decision(None, 0.6, 0.8, 0.95), decision(2, 0.5, 0.7, 0.9)
    record = compare(job(live, 0), candidate, "candidate", NAMES)
    assert (record.step, record.judged_stage, record.request_id, record.at) == ("decide", "small", "r", 5.0)
    assert (record.live_version, record.shadow_version) == ("live", "candidate")
    assert (record.live_action, record.shadow_action, record.agrees) == ("stop", "large", False)
    assert (record.live_p_correct, record.shadow_p_correct) == (0.6, 0.5)
    # The live policy expects 0.95 of large after 0.6 of what there is, the candidate 0.9 after 0.5.
    assert record.quality_change_by_live == pytest.approx(0.35)
    assert record.quality_change_by_shadow == pytest.approx(0.4)
    assert (record.cost_change_by_live, record.cost_change_by_shadow) == (100.0, 100.0)


def test_the_same_action_changes_nothing_whatever_is_predicted():
    record = compare(job(decision(1, 0.2, 0.8, 0.9), 0), decision(1, 0.1, 0.3, 0.4), "candidate", NAMES)
    assert record.agrees
    changes = (record.quality_change_by_live, record.quality_change_by_shadow, record.cost_change_by_live)
    assert changes == (0.0, 0.0, 0.0)


def test_a_later_stages_answer_and_a_plan_are_compared_likewise():
    record = compare(
        job(decision(2, 0.5, 0.9, judged=1), 1), decision(None, 0.7, 0.9, judged=1), "candidate", NAMES
    )
    assert (record.judged_stage, record.live_action, record.shadow_action) == ("medium", "large", "stop")
    assert record.quality_change_by_live == pytest.approx(-0.4)
    assert record.cost_change_by_shadow == -100.0
    record = compare(job(plan(0, 0.5, 0.7, 0.9), None), plan(1, 0.4, 0.8, 0.9), "candidate", NAMES)
    assert (record.step, record.judged_stage) == ("plan", "")
    assert (record.live_action, record.shadow_action) == ("small", "medium")
    assert (record.live_p_correct, record.shadow_p_correct) == (0.5, 0.8)
    assert record.quality_change_by_live == pytest.approx(0.2)
    assert record.cost_change_by_live == 9.0


def test_what_is_offered_is_written_and_counted(tmp_path: Path):
    path = tmp_path / "new" / "shadow.jsonl"
    shadow, heard = make(decision(1, 0.3, 0.8), path)
    with shadow:
        shadow.offer(job(decision(1, 0.4, 0.8), 0, request_id="same"))
        shadow.offer(job(decision(None, 0.9, 0.8), 0, request_id="other"))
    records = list(read_shadow(path))
    assert [(each.request_id, each.agrees) for each in records] == [("same", True), ("other", False)]
    counts = shadow.counts
    assert (counts.version, counts.decisions, counts.agreements) == ("candidate", 2, 1)
    assert (counts.dropped, counts.failures) == (0, 0)
    assert heard.told == [("decide", "small", True), ("decide", "small", False)]


def test_too_many_are_dropped_and_counted_at_once(tmp_path: Path):
    shadow, heard = make(plan(0, 0.5), tmp_path / "s.jsonl", capacity=3)
    # Nothing takes them before the shadow is entered.
    for _ in range(5):
        shadow.offer(job(plan(0, 0.5), None))
    assert shadow.counts.dropped == 2
    assert heard.told == ["dropped", "dropped"]
    with shadow:
        pass
    assert shadow.counts.decisions == 3
    assert len(list(read_shadow(tmp_path / "s.jsonl"))) == 3


def test_a_candidate_that_fails_is_counted_logged_once_and_asked_again(tmp_path: Path, caplog):
    shadow, heard = make(RuntimeError("broken candidate"), tmp_path / "s.jsonl")
    with shadow:
        for _ in range(3):
            shadow.offer(job(plan(0, 0.5), None))
    assert shadow.counts.failures == 3
    assert heard.told == ["failed"] * 3
    (told,) = caplog.records
    assert "candidate" in told.getMessage()
    assert list(read_shadow(tmp_path / "s.jsonl")) == []


def test_a_file_that_cannot_be_written_is_a_failure_and_no_more(tmp_path: Path, caplog):
    path = tmp_path / "s.jsonl"
    shadow, heard = make(plan(0, 0.5), path)
    path.unlink()
    path.mkdir()
    with shadow:
        for _ in range(3):
            shadow.offer(job(plan(0, 0.5), None))
    assert heard.told == ["failed"] * 3
    (told,) = caplog.records
    assert str(path) in told.getMessage()
    assert told.exc_info is None


def test_a_full_file_is_written_no_more_and_counting_goes_on(tmp_path: Path, caplog):
    path = tmp_path / "s.jsonl"
    shadow, _ = make(plan(0, 0.5), path, max_bytes=600)
    with shadow:
        for _ in range(6):
            shadow.offer(job(plan(0, 0.5), None))
    written = path.stat().st_size
    assert 600 <= written < 1200
    assert shadow.counts.decisions == 6
    assert caplog.text.count(str(path)) == 1
    again, _ = make(plan(0, 0.5), path, max_bytes=600)
    with again:
        again.offer(job(plan(0, 0.5), None))
    assert path.stat().st_size == written


def test_without_a_file_it_only_counts():
    shadow, _ = make(plan(0, 0.5), None)
    with shadow:
        shadow.offer(job(plan(0, 0.5), None))
    assert shadow.counts.agreements == 1


def test_a_candidate_that_hangs_neither_holds_the_offer_nor_the_end():
    entered, leave = threading.Event(), threading.Event()

    class Hanging(FakePolicy):
        def say(self) -> Plan | Judgement:
            entered.set()
            # What waited for it would see it decide.
            leave.wait(CALL_S)
            return super().say()

    candidate = Hanging(plan(0, 0.5))
    shadow = Shadow(candidate, None, Heard(), capacity=1, closing_s=0.01)  # type: ignore[arg-type]
    with shadow:
        shadow.offer(job(plan(0, 0.5), None))
        assert entered.wait(CALL_S)
        shadow.offer(job(plan(0, 0.5), None))
        shadow.offer(job(plan(0, 0.5), None))
    assert shadow.counts.dropped == 1
    assert shadow.counts.decisions == 0
    leave.set()


def test_a_line_that_was_cut_off_is_skipped_and_counted(tmp_path: Path, caplog):
    path = tmp_path / "s.jsonl"
    shadow, _ = make(plan(0, 0.5), path)
    with shadow:
        shadow.offer(job(plan(0, 0.5), None))
    path.write_text(path.read_text() + path.read_text()[:50] + "\n")
    assert len(list(read_shadow(path))) == 1
    (told,) = caplog.records
    assert told.args == (path, 1, 2)
