"""What the policy service computes of a request is what a policy was fitted to, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asd.v1 import common_pb2, policy_pb2
from policy_service.artifact import build_policy, read_document
from policy_service.features import round_signals
from policy_service.servicer import PolicyServicer
from policy_service.train.costs import EMBEDDED, read_costs
from policy_service.train.dataset import read_dataset, view_keys
from policy_service.train.outcome_table import write_outcomes
from suites import split

if TYPE_CHECKING:
    import numpy.typing as npt

    from suites import Task

ARTIFACT = Path(__file__).parents[3] / "policy_service" / "policy.zip"
CASCADE = ["small", "medium", "large"]
ROWS = 1500


class Recorder:
    """A predictor that keeps the features it is asked about, by view."""

    def __init__(self, heads: list[int]) -> None:
        self.seen: dict[int, list[npt.NDArray[np.float32]]] = {}
        self._heads = heads

    def scores(self, view: int, features: npt.NDArray[np.float32]) -> list[float]:
        self.seen.setdefault(view, []).append(features)
        return [0.0] * self._heads[view]


def signals(rng: np.random.Generator) -> dict[str, list[float]]:
    """Token signals as a stage sends them: float32, not rounded."""
    count = int(rng.integers(1, 40))
    logprobs = -rng.exponential(0.7, count).astype(np.float32)
    return {
        "logprobs": logprobs.tolist(),
        "entropies": rng.exponential(0.5, count).astype(np.float32).tolist(),
        "top2_margins": rng.random(count).astype(np.float32).tolist(),
    }


def conversation(task: Task) -> common_pb2.Conversation:
    roles = {0: common_pb2.ROLE_USER, 1: common_pb2.ROLE_ASSISTANT}
    texts = [message for turn in task.history for message in turn] + [task.prompt]
    return common_pb2.Conversation(
        messages=[common_pb2.Message(role=roles[index % 2], content=text) for index, text in enumerate(texts)]
    )


@pytest.fixture(scope="module")
def cases() -> list[tuple[Task, dict[str, dict[str, list[float]]], list[int]]]:
    rng = np.random.default_rng(0)
    tasks = [*split("calibration", ROWS - 300), *split("calibration", 300, follow_ups=True)]
    random.Random(0).shuffle(tasks)
    return [
        (
            task,
            {name: signals(rng) for name in CASCADE},
            rng.integers(0, 3, int(rng.integers(1, 30))).tolist(),
        )
        for task in tasks
    ]


async def test_features_of_requests_equal_those_of_outcome_files(cases: Any, tmp_path: Path) -> None:
    document = read_document(ARTIFACT)
    recorder = Recorder([len(view.heads) for view in document.views])
    # Every prompt is predicted for, also the few that look new.
    servicer = PolicyServicer(build_policy(document, recorder), document, None, novelty_threshold=1.0)
    keys = view_keys(len(CASCADE))
    rows = []
    for task, drafts, ranks in cases:
        accepted = next((index for index, rank in enumerate(ranks) if rank), len(ranks))
        check = {
            "proposed": len(ranks),
            "accepted": accepted,
            "ranks": ranks,
            "forward_passes": 1,
            "proposed_again": 0,
        }
        rows.append(
            {
                "prompt": task.prompt,
                "history": [message for turn in task.history for message in turn],
                "suite": task.suite,
                "level": task.level,
                "kind": task.kind,
                "split": "calibration",
                "stages": {
                    name: {
                        "text": task.solution,
                        "finish_reason": "eos",
                        "correct": True,
                        **{key: round_signals(np.array(values, np.float32)) for key, values in draft.items()},
                    }
                    for name, draft in drafts.items()
                },
                "verifications": {"small>medium": check, "small>large": check, "medium>large": check},
            }
        )
        stage, origin = keys[1 + len(rows) % (len(keys) - 1)]
        assert stage is not None
        request = policy_pb2.DecideRequest(
            conversation=conversation(task),
            cascade=CASCADE,
            stage=CASCADE[stage],
            draft=policy_pb2.DraftEvidence(
                text=task.solution,
                finish_reason=common_pb2.FINISH_REASON_EOS,
                **drafts[CASCADE[stage]],
            ),
        )
        if origin is not None:
            request.verification.CopyFrom(
                policy_pb2.VerificationEvidence(
                    draft_stage=CASCADE[origin],
                    proposed_tokens=len(ranks),
                    accepted_tokens=accepted,
                    ranks=ranks,
                )
            )
        # Over the wire and back.
        await servicer.Decide(policy_pb2.DecideRequest.FromString(request.SerializeToString()), None)
    write_outcomes(tmp_path / "o.parquet", CASCADE, rows)
    data = read_dataset(tmp_path / "o.parquet", read_costs(EMBEDDED))
    assert sum(map(len, recorder.seen.values())) == ROWS
    taken = dict.fromkeys(range(len(keys)), 0)
    for row in range(ROWS):
        view = 1 + (row + 1) % (len(keys) - 1)
        served = recorder.seen[view][taken[view]]
        taken[view] += 1
        np.testing.assert_array_equal(served, data.features[keys[view]][row])
