"""Collecting outcomes from real stages: complete, graded, resumable, and fit to make a policy from."""

from __future__ import annotations

import io
import itertools
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from asd.v1 import stage_pb2_grpc
from policy_service.train.collect import CollectOptions, collect_outcomes, parse_targets
from policy_service.train.costs import StageCosts
from policy_service.train.dataset import read_dataset
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.outcomes import read_rows
from services.common.errors import InvalidRequest, Unavailable
from services.common.server import ServiceRegistration, start_server
from services.stage.onnx_engine import OnnxEngine, OnnxOptions
from services.stage.residency import Residency
from services.stage.servicer import StageServicer
from suites import grade, split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[3]
QUIET = Console(file=io.StringIO())


@pytest.fixture
async def targets() -> AsyncIterator[dict[str, str]]:
    """Addresses of real stage services of the two smaller models."""
    async with AsyncExitStack() as stack:
        found = {}
        for name in ("small", "medium"):
            engine = OnnxEngine(name, ROOT / "models" / name, OnnxOptions())
            await engine.load()
            stack.push_async_callback(engine.unload)
            servicer = StageServicer(Residency({name: engine}, name))
            registration = ServiceRegistration(
                "asd.v1.StageService",
                lambda server, each=servicer: stage_pb2_grpc.add_StageServiceServicer_to_server(each, server),
            )
            server, port = await start_server("127.0.0.1:0", [registration])
            stack.push_async_callback(server.stop, None)
            found[name] = f"127.0.0.1:{port}"
        yield found


def options(output: Path, targets: dict[str, str], prompts: int = 24) -> CollectOptions:
    return CollectOptions(output, targets, "train", prompts, 4, 0, 4, 30_000)


async def test_outcomes_are_complete_and_graded(targets: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    await collect_outcomes(options(output, targets), QUIET)
    rows = list(read_rows(output))
    tasks = [*split("train", 24), *split("train", 4, follow_ups=True)]
    assert [row.prompt for row in rows] == [task.prompt for task in tasks]
    assert [row.history for row in rows] == [tuple(itertools.chain(*task.history)) for task in tasks]
    for row, task in zip(rows, tasks, strict=True):
        for stage in row.stages.values():
            assert stage.correct is grade(task, stage.text)
            assert stage.latency_ms is not None
        check = row.verifications["small>medium"]
        small, medium = row.stages["small"], row.stages["medium"]
        # EXACT verification ends in the target's own answer: accepted in full where both wrote the same.
        assert (check.accepted == check.proposed) == (small.text == medium.text)
    costs = [StageCosts(name=name, cost=cost) for name, cost in (("small", 1.0), ("medium", 3.0))]
    assert len(read_dataset(output, costs)) == 28
    assert not (tmp_path / "train.parquet.partial").exists()


async def test_an_interrupted_run_goes_on_where_it_stopped(targets: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    await collect_outcomes(options(output, targets), QUIET)
    records = pq.read_table(output).to_pylist()
    # A marked record shows that the first rows are kept rather than collected again.
    kept = {**records[0], "kind": "kept"}
    partial = tmp_path / "train.parquet.partial"
    header = json.dumps({"schema": "asd.outcomes", "version": 2, "cascade": ["small", "medium"]})
    lines = [json.dumps(each) for each in (kept, *records[1:3])]
    partial.write_text(f"{header}\n{lines[0]}\n{lines[1]}\n{lines[2][:50]}")
    output.unlink()
    await collect_outcomes(options(output, targets), QUIET)
    rows = list(read_rows(output))
    assert [row.prompt for row in rows] == [
        *(task.prompt for task in split("train", 24)),
        *(task.prompt for task in split("train", 4, follow_ups=True)),
    ]
    assert rows[0].kind == "kept"


async def test_a_finished_file_is_left_alone(targets: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    await collect_outcomes(options(output, targets), QUIET)
    before = output.read_bytes()
    await collect_outcomes(options(output, dict.fromkeys(targets, "127.0.0.1:1")), QUIET)
    assert output.read_bytes() == before
    with pytest.raises(UnfitOutcomes, match="other prompts or another cascade"):
        await collect_outcomes(options(output, targets, prompts=30), QUIET)


async def test_a_stage_that_is_away_is_named_and_nothing_is_lost(
    targets: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "train.parquet"
    with pytest.raises(Unavailable, match="stage medium"):
        await collect_outcomes(options(output, {**targets, "medium": "127.0.0.1:1"}), QUIET)
    assert not output.exists()
    await collect_outcomes(options(output, targets), QUIET)
    assert len(list(read_rows(output))) == 28


@pytest.mark.parametrize("argument", ["small", "=host:1", "small=", ""])
def test_a_stage_argument_is_name_and_target(argument: str) -> None:
    with pytest.raises(InvalidRequest, match="NAME=HOST:PORT"):
        parse_targets([argument])


async def test_a_damaged_journal_is_named(targets: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    output.with_name("train.parquet.partial").write_text('{"a": NaN\n')
    with pytest.raises(UnfitOutcomes, match="damaged: delete it"):
        await collect_outcomes(options(output, targets), QUIET)


async def test_a_journal_without_prompts_blocks_nothing(targets: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    with pytest.raises(Unavailable):
        await collect_outcomes(options(output, {"tiny": "127.0.0.1:1", "huge": "127.0.0.1:1"}, 2), QUIET)
    await collect_outcomes(options(output, targets, 2), QUIET)
    assert len(list(read_rows(output))) == 6


async def test_one_stage_is_no_cascade(targets: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="two stages or more"):
        await collect_outcomes(options(tmp_path / "o.parquet", {"small": targets["small"]}), QUIET)
