"""What runs in vLLM's workers: drafts judged at their own tokens, whatever a step has beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from services.stage.engines.vllm.proposer import IDS, KEY, DraftProposer
from tests.fakes.fake_vllm import Tensor

VOCABULARY = 50
DRAFT = [11, 12, 13, 14]


class _Runner:
    """As much of vLLM's model runner as a proposer sees, with requests by id."""

    def __init__(self, drafts: dict[str, list[int]]) -> None:
        self.requests = {
            name: SimpleNamespace(sampling_params=SimpleNamespace(extra_args={KEY: name, IDS: draft}))
            for name, draft in drafts.items()
        }
        self.input_batch = SimpleNamespace(req_ids=list(drafts))
        self.rejection_sampler = SimpleNamespace(_get_logprobs_tensors=lambda *_: None)
        self.sampler = SimpleNamespace(forward=lambda *_, **__: None)

    def verify(self, counts: list[int], proposed: Tensor, following: Tensor) -> None:
        """Sample a step in which some requests have proposals."""
        metadata = SimpleNamespace(num_draft_tokens=counts)
        self.rejection_sampler._get_logprobs_tensors(  # noqa: SLF001 - vLLM calls it
            20, metadata, None, proposed, following, None
        )


def attached(drafts: dict[str, list[int]]) -> tuple[DraftProposer, Any]:
    runner = _Runner(drafts)
    proposer = DraftProposer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=8),
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
        )
    )
    proposer.attach(runner)
    return proposer, runner


def logits(*ranks: tuple[int, int]) -> Tensor:
    """Return a row for each of some tokens, with the token at a rank."""
    rows = np.zeros((len(ranks), VOCABULARY))
    for row, (token, rank) in enumerate(ranks):
        rows[row, token] = 10.0
        rows[row, [t for t in range(VOCABULARY) if t != token][:rank]] = 20.0
    return Tensor(rows)


@pytest.mark.parametrize("placeholders", [1, 3, 8])
def test_placeholders_of_the_librarys_are_no_proposal(placeholders: int) -> None:
    # A request whose prompt is in the cache, but for its last token, beside one that is being written.
    proposer, runner = attached({"old": DRAFT})
    proposer.propose([[11]], None, None)
    runner.requests["new"] = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={KEY: "new", IDS: [21, 22, 23]})
    )
    runner.input_batch.req_ids = ["old", "new"]
    own = logits((12, 0), (13, 2), (14, 0), (21, 4), *[(40, 0)] * (placeholders - 1))
    runner.verify([3, placeholders], own, logits((9, 0), (9, 0)))
    proposer.propose([[12, 13, 30], [7]], None, None)
    judged, steps, passes = proposer.evidence("new")
    assert ([rank for rank, _ in judged], steps, passes) == ([4], 1, [])


def test_a_request_that_a_step_leaves_out_has_no_proposal() -> None:
    proposer, runner = attached({"one": DRAFT, "two": [21, 22, 23, 24]})
    proposer.propose([[11], [21]], None, None)
    # Out of memory, vLLM takes the second one back, and fills its next step up.
    runner.input_batch.req_ids = ["one"]
    runner.verify([3], logits((12, 0), (13, 0), (14, 0)), logits((9, 0)))
    proposer.propose([[12, 13, 14, 9]], None, None)
    runner.input_batch.req_ids = ["one", "two"]
    runner.verify([0, 8], logits((22, 3), *[(40, 0)] * 7), logits((9, 0), (9, 0)))
    proposer.propose([[9], [8]], None, None)
    judged, steps, passes = proposer.evidence("two")
    assert ([rank for rank, _ in judged], steps, passes) == ([3], 2, [])
