"""What runs in vLLM's workers: drafts scored at their own tokens, whatever a step has beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from services.stage.engines.vllm import proposer as module
from services.stage.engines.vllm.proposer import IDS, KEY, RESYNC, DraftProposer, WorkerExtension
from services.stage.generation.proposals import StepTimes
from tests.fakes.vllm_batch import Tensor

VOCABULARY = 50
DRAFT = [11, 12, 13, 14]
OTHER = [21, 22, 23, 24]
CONTEXT, MOST = 100, 8
NOTHING: tuple[Any, ...] = ([], 0, [])


class _Runner:
    """As much of vLLM's model runner as a proposer sees, with requests by id."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_ids=[], spec_token_ids=[])
        self.rejection_sampler = SimpleNamespace(_get_logprobs_tensors=lambda *_: None)
        self.sampler = SimpleNamespace(forward=lambda *_, **__: None)
        self.max_model_len = self.effective_drafter_max_model_len = CONTEXT

    def start(self, name: str, draft: list[int], *, resync: bool = True) -> None:
        extra = {KEY: name, IDS: draft, RESYNC: resync}
        self.requests[name] = SimpleNamespace(
            sampling_params=SimpleNamespace(extra_args=extra), output_token_ids=[]
        )


def unattached(most_tokens: int = 1000, graphs: int | None = None) -> DraftProposer:
    scheduler = SimpleNamespace(max_num_scheduled_tokens=None, max_num_batched_tokens=most_tokens)
    return DraftProposer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=MOST),
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=graphs),
            scheduler_config=scheduler,
        )
    )


class _Steps:
    """A proposer and the steps of its runner. Each takes a second."""

    def __init__(self, most_tokens: int = 1000, *, graphs: int | None = None) -> None:
        self.runner = _Runner()
        self.proposer = unattached(most_tokens, graphs)
        self.lacking = self.proposer.attach(self.runner)

    def schedule(self, **proposals: list[int]) -> None:
        """Begin a step of some requests, with the tokens that it verifies."""
        self.runner.input_batch.req_ids = list(proposals)
        self.runner.input_batch.spec_token_ids = list(proposals.values())

    def verify(self, proposed: Tensor, following: Tensor) -> None:
        """Sample a step in which some requests have proposals."""
        metadata = SimpleNamespace(
            num_draft_tokens=[len(each) for each in self.runner.input_batch.spec_token_ids]
        )
        self.runner.rejection_sampler._get_logprobs_tensors(  # noqa: SLF001 - vLLM calls it
            20, metadata, None, proposed, following, None
        )

    def wrote(self, *written: list[int]) -> list[list[int]]:
        """End a step; return what is proposed for the next one."""
        for name, tokens in zip(self.runner.input_batch.req_ids, written, strict=True):
            self.runner.requests[name].output_token_ids += tokens
        return self.proposer.propose(written, None, None)


def logits(*ranks: tuple[int, int]) -> Tensor:
    """Return a row for each of some tokens, with the token at a rank."""
    rows = np.zeros((len(ranks), VOCABULARY), np.float32)
    for row, (token, rank) in enumerate(ranks):
        rows[row, token] = 10.0
        rows[row, [t for t in range(VOCABULARY) if t != token][:rank]] = 20.0
    return Tensor(rows)


def ranks(outcome: Any) -> list[int]:
    return [rank for rank, _ in outcome[0]]


@pytest.mark.parametrize("filler", [-1, 0])
@pytest.mark.parametrize("placeholders", [1, 3, 8])
def test_placeholders_of_the_librarys_are_no_proposal(placeholders: int, filler: int) -> None:
    # A request whose prompt is in the cache, but for its last token, beside one that is being written.
    steps = _Steps()
    steps.runner.start("old", DRAFT)
    steps.schedule(old=[])
    assert steps.wrote([11]) == [DRAFT[1:]]
    steps.runner.start("new", [21, 22, 23])
    steps.schedule(old=DRAFT[1:], new=[filler] * placeholders)
    own = logits((12, 0), (13, 2), (14, 0), (21, 4), *[(40, 0)] * (placeholders - 1))
    steps.verify(own, logits((9, 0), (9, 0)))
    steps.wrote([12, 13, 30], [7])
    outcome = steps.proposer.outcome("new")
    assert (ranks(outcome), *outcome[1:]) == ([4], 1, [])


def test_a_request_that_a_step_leaves_out_keeps_its_proposal() -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT)
    steps.runner.start("two", OTHER)
    steps.schedule(one=[], two=[])
    steps.wrote([11], [21])
    # The token budget holds the first one alone.
    steps.schedule(one=DRAFT[1:])
    steps.verify(logits((12, 0), (13, 0), (14, 0)), logits((9, 0)))
    steps.wrote([12, 13, 14, 9])
    # Then the second one, but for its last token.
    steps.schedule(one=[], two=OTHER[1:3])
    steps.verify(logits((22, 0), (23, 3)), logits((9, 0), (24, 0)))
    steps.wrote([8], [22, 7])
    outcome = steps.proposer.outcome("two")
    assert (ranks(outcome), *outcome[1:]) == ([3, 0], 2, [(1, 2, 2)])


def test_a_request_that_lost_its_proposal_is_scored_at_its_next_token() -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT)
    steps.schedule(one=[])
    steps.wrote([11])
    # Out of memory, vLLM takes it back, and fills its next step up.
    steps.schedule(one=[-1] * MOST)
    steps.verify(logits((12, 3), *[(40, 0)] * (MOST - 1)), logits((9, 0)))
    steps.wrote([8])
    outcome = steps.proposer.outcome("one")
    assert (ranks(outcome), *outcome[1:]) == ([3], 2, [])


def test_a_step_that_is_not_told_of_moves_no_draft() -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT)
    steps.schedule(one=[])
    steps.wrote([11])
    # As vLLM does where a proposal might not fit.
    steps.schedule(one=[0] * MOST)
    steps.verify(logits((12, 3), *[(40, 0)] * (MOST - 1)), logits((9, 0)))
    steps.runner.requests["one"].output_token_ids += [30]
    steps.schedule(one=[0] * MOST)
    steps.verify(logits((12, 7), *[(40, 0)] * (MOST - 1)), logits((9, 0)))
    assert steps.wrote([13]) == [[14]]
    assert ranks(steps.proposer.outcome("one")) == [3]


def test_proposals_go_on_to_the_end_of_the_context() -> None:
    runner = _Steps().runner
    assert runner.max_model_len + MOST <= runner.effective_drafter_max_model_len


def test_log_probabilities_have_the_precision_of_float32() -> None:
    rows = np.random.default_rng(1).normal(size=(1, VOCABULARY)).astype(np.float32)
    rows[0, 30] = 3.0
    found = []
    for kind in (np.float32, np.float16):
        steps = _Steps()
        steps.runner.start("one", [11])
        steps.schedule(one=[])
        steps.runner.sampler.forward(Tensor(rows.astype(np.float16).astype(kind)), None)
        steps.wrote([30])
        found.append(steps.proposer.outcome("one"))
    assert found[0] == found[1]


def test_a_step_of_many_rows_is_scored_in_parts_that_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_a_time in (2, 1000):
        monkeypatch.setattr(module, "_ROWS_AT_A_TIME", at_a_time)
        steps = _Steps()
        steps.runner.start("one", DRAFT)
        steps.schedule(one=[])
        steps.wrote([11])
        steps.schedule(one=DRAFT[1:])
        steps.verify(logits((12, 1), (13, 2), (14, 3)), logits((9, 0)))
        steps.wrote([7])
        found.append(steps.proposer.outcome("one"))
    assert ranks(found[0]) == [1, 2, 3]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("most_tokens", "graphs", "without_graphs"), [(5, None, 1000), (5, 1000, 1), (1000, 5, 1), (1000, 0, 5)]
)
def test_a_step_has_no_more_tokens_than_it_may(
    monkeypatch: pytest.MonkeyPatch, most_tokens: int, graphs: int | None, without_graphs: int
) -> None:
    monkeypatch.setattr(module, "_MOST_TOKENS", without_graphs)
    steps = _Steps(most_tokens, graphs=graphs)
    names = {"one": DRAFT, "two": OTHER}
    for name, draft in names.items():
        steps.runner.start(name, draft)
    steps.schedule(one=[], two=[])
    found = steps.wrote([11], [21])
    assert 0 < sum(map(len, found)) <= 5 - 2


def test_steps_that_only_decode_show_what_a_token_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    observed = []

    class Times(StepTimes):
        def observe(self, tokens: int, seconds: float) -> None:
            observed.append((tokens, seconds))
            super().observe(tokens, seconds)

    monkeypatch.setattr(module, "StepTimes", Times)
    # A step takes as long as it says.
    now = [0.0]
    monkeypatch.setattr(module, "clock", lambda: now[0])
    steps = _Steps()
    for name, draft in (("long", []), ("one", DRAFT), ("late", [])):
        steps.runner.start(name, draft)

    def step(seconds: float, proposals: dict[str, list[int]], *written: list[int]) -> None:
        now[0] += seconds
        steps.schedule(**proposals)
        steps.wrote(*written)

    step(10, {"long": [], "one": []}, [], [11])
    # The rest of the long prompt.
    step(20, {"long": [], "one": DRAFT[1:]}, [9], [12, 30])
    step(3, {"long": [], "one": [14]}, [9], [14, 31])
    # A prompt that is read in one step.
    step(40, {"long": [], "one": [], "late": []}, [9], [32], [9])
    step(5, {"long": [], "one": [], "late": []}, [9], [33], [9])
    assert observed == [(3, 3.0), (3, 5.0)]


def test_what_comes_of_a_draft_goes_to_its_own_request() -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT[:2])
    steps.runner.start("two", OTHER[:2])
    # Before its request has been seen, and after.
    steps.proposer.grow("two", OTHER[2:3])
    steps.schedule(one=[], two=[])
    steps.wrote([11], [21])
    steps.proposer.grow("one", DRAFT[2:])
    steps.proposer.grow("two", OTHER[3:])
    steps.schedule(one=[], two=[])
    assert steps.wrote([12], [22]) == [DRAFT[2:], OTHER[2:]]


def test_the_outcome_is_kept_until_it_is_forgotten() -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT)
    steps.schedule(one=[])
    steps.wrote([11])
    del steps.runner.requests["one"]
    steps.runner.start("two", OTHER)
    steps.schedule(two=[])
    steps.wrote([21])
    for _ in range(2):
        assert steps.proposer.outcome("one") == ([], 1, [])
    steps.proposer.forget("one")
    assert steps.proposer.outcome("one") == NOTHING


def test_what_comes_after_the_end_is_dropped() -> None:
    steps = _Steps()
    for name in ("one", "other"):
        steps.runner.start(name, DRAFT[:2])
        steps.schedule(**{name: []})
        steps.wrote([11])
        del steps.runner.requests[name]
    steps.proposer.grow("one", DRAFT[2:])
    # Another request under its key, as none is made.
    steps.runner.start("one", DRAFT[:2])
    steps.schedule(one=[])
    assert steps.wrote([11]) == [DRAFT[1:2]]


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_forgotten_draft_is_proposed_no_more(is_seen: bool) -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT[:2])
    steps.schedule(one=[])
    if is_seen:
        steps.wrote([11])
    else:
        steps.proposer.grow("one", DRAFT[2:])
    steps.proposer.forget("one")
    assert steps.proposer.outcome("one") == NOTHING
    assert steps.wrote([11 + is_seen]) == [[] if is_seen else [12]]


@pytest.mark.parametrize("ends", [True, False])
def test_what_nobody_forgets_is_bounded(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 2)
    steps = _Steps()
    names = ("a", "b", "c")
    for name in names:
        if ends:
            steps.runner.start(name, DRAFT)
            steps.schedule(**{name: []})
            steps.wrote([11])
            del steps.runner.requests[name]
        else:
            steps.proposer.grow(name, [12])
    steps.runner.start("last", OTHER)
    steps.schedule(last=[])
    steps.wrote([21])
    if ends:
        kept = [steps.proposer.outcome(name) != NOTHING for name in names]
    else:
        for name in names:
            steps.runner.start(name, [11])
        steps.schedule(a=[], b=[], c=[])
        kept = [bool(rest) for rest in steps.wrote([11], [11], [11])]
    assert kept == [False, True, True]


def test_what_has_reached_its_request_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 2)
    steps = _Steps()
    for name in ("late", "one"):
        steps.proposer.grow(name, [12])
    steps.runner.start("one", [11])
    steps.schedule(one=[])
    steps.wrote([11])
    steps.proposer.grow("other", [12])
    steps.runner.start("late", [11])
    steps.schedule(late=[])
    assert steps.wrote([11]) == [[12]]


def test_the_average_draft_learns_from_one_that_has_ended_or_is_forgotten() -> None:
    def proposed(*, ends: bool, is_forgotten: bool) -> int:
        steps = _Steps()
        for index in range(20):
            name = f"noise{index}"
            steps.runner.start(name, [1] * 9)
            for _ in range(9):
                steps.schedule(**{name: []})
                steps.wrote([2])
            if is_forgotten:
                steps.proposer.forget(name)
            if ends:
                del steps.runner.requests[name]
        steps.runner.start("one", list(range(11, 20)))
        steps.schedule(one=[])
        return len(steps.wrote([9])[0])

    untaught = proposed(ends=False, is_forgotten=False)
    assert proposed(ends=True, is_forgotten=False) < untaught
    assert proposed(ends=False, is_forgotten=True) < untaught


@pytest.mark.parametrize("resync", [True, False])
def test_without_resync_nothing_is_proposed_after_a_wrong_token(resync: bool) -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT, resync=resync)
    steps.schedule(one=[])
    steps.wrote([11])
    steps.schedule(one=[12, 13, 14])
    assert steps.wrote([7]) == [[13, 14] if resync else []]
    assert steps.proposer.outcome("one")[2] == [(1, 1, 3)]


def test_what_the_runner_lacks_is_told() -> None:
    steps = _Steps()
    assert steps.lacking == []
    bare = _Runner()
    del bare.effective_drafter_max_model_len
    del bare.rejection_sampler._get_logprobs_tensors  # noqa: SLF001 - vLLM's
    assert steps.proposer.attach(bare) == ["effective_drafter_max_model_len", "_get_logprobs_tensors"]


def test_the_row_after_a_proposal_does_not_score_its_first_token() -> None:
    steps = _Steps()
    steps.runner = _Runner()
    # Only the sampler of that row can be watched then.
    del steps.runner.rejection_sampler._get_logprobs_tensors  # noqa: SLF001 - vLLM's
    steps.proposer.attach(steps.runner)
    steps.runner.start("one", DRAFT)
    steps.schedule(one=[])
    steps.wrote([11])
    steps.schedule(one=DRAFT[1:])
    steps.runner.sampler.forward(logits((12, 5)), None, predict_bonus_token=True)
    steps.wrote([7])
    assert ranks(steps.proposer.outcome("one")) == []


def test_workers_but_the_first_propose_and_keep_nothing() -> None:
    steps = _Steps()
    steps.runner.start("one", DRAFT)
    worker = WorkerExtension()
    worker.rank = 1
    worker.model_runner = steps.runner
    steps.runner.drafter = unattached()
    assert worker.asd_attach() == []
    worker.asd_grow("one", [15])
    steps.schedule(one=[])
    steps.runner.sampler.forward(logits((11, 0)), None)
    assert steps.runner.drafter.propose([[11]], None, None) == [[]]
    assert tuple(worker.asd_outcome("one")) == NOTHING
    worker.rank = 0
    assert worker.asd_attach() == []
    steps.runner.requests["one"].output_token_ids.append(11)
    assert steps.runner.drafter.propose([[11]], None, None) == [DRAFT[1:]]
