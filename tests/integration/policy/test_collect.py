"""Collecting outcomes from real stages: complete, graded, resumable, and fit to make a policy from."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from asd.errors import InvalidRequest, Unavailable
from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from benchmarks.instant_stage import InstantStage
from policy_service.train.collect import CollectOptions, collect_outcomes, parse_targets
from policy_service.train.costs import StageCosts
from policy_service.train.dataset import read_dataset
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.outcomes import read_rows
from services.common.server import ServerOptions, ServiceRegistration, start_server
from services.common.tls import ServerTls
from services.stage.engines.onnx.engine import OnnxEngine, OnnxOptions
from services.stage.model_pool import ModelPool
from services.stage.servicer import StageServicer
from suites import grade, split
from tests.file_limit import limited
from tests.integration.common.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[3]
QUIET = Console(file=io.StringIO())


Targets = dict[str, tuple[str, ...]]
NOWHERE = ("127.0.0.1:1",)


async def serve(stack: AsyncExitStack, servicer: Any, encryption: ServerTls | None = None) -> str:
    """Serve a stage until the stack ends; return its address."""
    registration = ServiceRegistration(
        "asd.v1.StageService",
        lambda server: stage_pb2_grpc.add_StageServiceServicer_to_server(servicer, server),
    )
    server, port = await start_server("127.0.0.1:0", [registration], options=ServerOptions(encryption))
    stack.push_async_callback(server.stop, None)
    return f"127.0.0.1:{port}"


@pytest.fixture
async def targets(request: pytest.FixtureRequest) -> AsyncIterator[Targets]:
    """Addresses of real stage services of the two smaller models. Parameter: sequences that they cache."""
    engine_options = OnnxOptions(cached_sequences=getattr(request, "param", 0))
    async with AsyncExitStack() as stack:
        found = {}
        for name in ("small", "medium"):
            engine = OnnxEngine(name, ROOT / "models" / name, engine_options)
            await engine.load()
            stack.push_async_callback(engine.unload)
            found[name] = (await serve(stack, StageServicer(ModelPool({name: engine}, name))),)
        yield found


def options(output: Path, targets: Targets, prompts: int = 24) -> CollectOptions:
    return CollectOptions(output, targets, "train", prompts, 4, 0, 4, 30_000)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--tls-ca", "--tls-cert", "--tls-key"), ""),
        ((), "stage small closes the connection: it may want TLS (--tls-ca)"),
        (
            ("--tls-ca",),
            "stage small closes the connection: it may want a certificate (--tls-cert, --tls-key)",
        ),
        (("--tls", "--tls-cert", "--tls-key"), "name a file with it by --tls-ca"),
        (("--tls-ca", "--tls-cert"), "--tls-cert and --tls-key belong together"),
    ],
)
async def test_stages_that_ask_for_certificates_are_collected_from_with_those_options(
    tmp_path: Path, given: tuple[str, ...], says: str
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("stage", "127.0.0.1")
    own = authority.issue("client", "asd-collect")
    files = {"--tls-ca": authority.file, "--tls-cert": own[0], "--tls-key": own[1]}
    options = [f"{name}={files[name]}" if name in files else name for name in given]
    encryption = ServerTls(cert_file=cert, key_file=key, client_ca_file=authority.file)
    output = tmp_path / "train.parquet"
    async with AsyncExitStack() as stack:
        stages = [
            f"--stage={name}={await serve(stack, CountingStage(), encryption)}" for name in ("small", "large")
        ]
        command = [Path(sys.executable).with_name("asd-policy"), "collect", str(output), *stages]
        process = await asyncio.create_subprocess_exec(
            *command, "--prompts=3", *options, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        _, said = await process.communicate()
    if says:
        assert says in said.decode()
        assert process.returncode in {1, 2}
        assert not output.exists()
    else:
        assert (process.returncode, said.decode()) == (0, "")
        assert len(list(read_rows(output))) == 3


async def test_outcomes_are_complete_and_graded(targets: Targets, tmp_path: Path) -> None:
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
        assert check.latency_ms is not None
    costs = [StageCosts(name=name, cost=cost) for name, cost in (("small", 1.0), ("medium", 3.0))]
    assert len(read_dataset(output, costs)) == 28
    assert not (tmp_path / "train.parquet.partial").exists()


@pytest.mark.parametrize("targets", [4], indirect=True)
async def test_a_call_that_a_prefix_cache_helped_has_no_latency(targets: Targets, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    said = io.StringIO()
    one_at_a_time = CollectOptions(output, targets, "train", 3, 0, 0, 1, 30_000)
    await collect_outcomes(one_at_a_time, Console(file=said))
    rows = list(read_rows(output))
    # The target has just answered the prompt whose draft it verifies.
    assert [row.verifications["small>medium"].latency_ms for row in rows] == [None, None, None]
    # Nothing was cached for the first call of all.
    assert rows[0].stages["small"].latency_ms is not None
    left_out = sum(
        call.latency_ms is None
        for row in rows
        for call in (*row.stages.values(), *row.verifications.values())
    )
    assert f"{left_out} calls took" in said.getvalue()
    # The costs stand in for the times that are left out.
    costs = [
        StageCosts(name=name, cost=cost, prefill_ms=1234.0)
        for name, cost in (("small", 1.0), ("medium", 3.0))
    ]
    assert read_dataset(output, costs).latencies_ms[1, 0].min() >= 1234.0


class CountingStage(InstantStage):
    """Answers and verifies at once; remembers the prompts that it was asked to answer, and to verify for."""

    def __init__(self) -> None:
        self.generated: list[str] = []
        self.verified: list[str] = []

    async def Generate(  # noqa: N802
        self, request: stage_pb2.StageServiceGenerateRequest, context: object
    ) -> AsyncIterator[stage_pb2.StageServiceGenerateResponse]:
        self.generated.append(request.conversation.messages[-1].content)
        async for response in super().Generate(request, context):
            yield response

    async def Verify(  # noqa: N802
        self, request: stage_pb2.VerifyRequest, context: object
    ) -> AsyncIterator[stage_pb2.VerifyResponse]:
        self.verified.append(request.conversation.messages[-1].content)
        yield stage_pb2.VerifyResponse(
            verification=stage_pb2.Verification(proposed_tokens=1, accepted_tokens=1, ranks=[0])
        )
        usage = common_pb2.Usage(prompt_tokens=8, proposed_tokens=1, forward_passes=1)
        yield stage_pb2.VerifyResponse(result=stage_pb2.StageResult(text="ok", usage=usage))


async def test_replicas_share_the_prompts(tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    async with AsyncExitStack() as stack:
        stages = {name: [CountingStage(), CountingStage()] for name in ("small", "medium")}
        found = {
            name: tuple([await serve(stack, replica) for replica in replicas])
            for name, replicas in stages.items()
        }
        await collect_outcomes(CollectOptions(output, found, "train", 20, 0, 0, 2, 30_000), QUIET)
    prompts = sorted(task.prompt for task in split("train", 20))
    assert sorted(row.prompt for row in read_rows(output)) == prompts
    for replicas in stages.values():
        assert sorted(itertools.chain(*(each.generated for each in replicas))) == prompts
        assert all(each.generated for each in replicas)
    # A worker keeps to one replica of every stage.
    for small, medium in zip(*stages.values(), strict=True):
        assert small.generated == medium.generated == medium.verified
        assert not small.verified


async def test_a_stage_with_fewer_replicas_is_shared(tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    async with AsyncExitStack() as stack:
        smalls, medium = [CountingStage(), CountingStage()], CountingStage()
        found = {
            "small": tuple([await serve(stack, each) for each in smalls]),
            "medium": (await serve(stack, medium),),
        }
        await collect_outcomes(CollectOptions(output, found, "train", 20, 0, 0, 2, 30_000), QUIET)
    assert all(each.generated for each in smalls)
    assert len(medium.generated) == 20


async def test_an_interrupted_run_goes_on_where_it_stopped(targets: Targets, tmp_path: Path) -> None:
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


async def test_a_finished_file_is_left_alone(targets: Targets, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    await collect_outcomes(options(output, targets), QUIET)
    before = output.read_bytes()
    await collect_outcomes(options(output, dict.fromkeys(targets, NOWHERE)), QUIET)
    assert output.read_bytes() == before
    with pytest.raises(UnfitOutcomes, match="another cascade"):
        await collect_outcomes(options(output, targets, prompts=30), QUIET)


async def test_a_stage_that_is_away_is_named_and_nothing_is_lost(targets: Targets, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    with pytest.raises(Unavailable, match="stage medium"):
        await collect_outcomes(options(output, {**targets, "medium": NOWHERE}), QUIET)
    assert not output.exists()
    await collect_outcomes(options(output, targets), QUIET)
    assert len(list(read_rows(output))) == 28


@pytest.mark.parametrize("argument", ["small", "=host:1", "small=", ""])
def test_a_stage_argument_is_name_and_target(argument: str) -> None:
    with pytest.raises(InvalidRequest, match="NAME=HOST:PORT"):
        parse_targets([argument])


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("small=a:1,", "between commas is empty"),
        ("small=,a:1", "between commas is empty"),
        ("small=a:1,,b:1", "between commas is empty"),
        ("small=a:1,b:1,a:1", "replica a:1 is there twice"),
        ("small=a:1, a:1", "replica a:1 is there twice"),
    ],
)
def test_malformed_replicas_are_named(argument: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        parse_targets(["medium=a:1", argument])


def test_a_stage_may_have_several_replicas() -> None:
    assert parse_targets(["small=a:1,b:2", "medium=c:3"]) == {"small": ("a:1", "b:2"), "medium": ("c:3",)}


async def test_a_damaged_journal_is_named(targets: Targets, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    output.with_name("train.parquet.partial").write_text('{"a": NaN\n')
    with pytest.raises(UnfitOutcomes, match="damaged: delete it"):
        await collect_outcomes(options(output, targets), QUIET)


async def test_a_journal_without_prompts_blocks_nothing(targets: Targets, tmp_path: Path) -> None:
    output = tmp_path / "train.parquet"
    with pytest.raises(Unavailable):
        await collect_outcomes(options(output, {"tiny": NOWHERE, "huge": NOWHERE}, 2), QUIET)
    await collect_outcomes(options(output, targets, 2), QUIET)
    assert len(list(read_rows(output))) == 6


async def test_one_stage_is_no_cascade(targets: Targets, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="two stages") as caught:
        await collect_outcomes(options(tmp_path / "o.parquet", {"small": targets["small"]}), QUIET)
    assert caught.value.field == "stage"


async def test_a_damaged_line_is_collected_once_more_and_no_other(
    targets: Targets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "train.parquet"
    await collect_outcomes(options(output, targets), QUIET)
    records = pq.read_table(output).to_pylist()
    lines = [json.dumps({**each, "kind": "kept"}) for each in records[:4]]
    lines[1] = lines[1][:40] + lines[1]
    header = json.dumps({"schema": "asd.outcomes", "version": 2, "cascade": ["small", "medium"]})
    (tmp_path / "train.parquet.partial").write_text("\n".join((header, *lines)) + "\n")
    output.unlink()
    await collect_outcomes(options(output, targets), QUIET)
    assert "1 damaged lines" in capsys.readouterr().err
    assert [row.kind == "kept" for row in read_rows(output)] == [
        index in {0, 2, 3} for index in range(len(records))
    ]


def test_outcomes_on_a_full_disk_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from policy_service.train.outcome_table import write_outcomes
from asd.errors import AsdError
try:
    write_outcomes(Path(sys.argv[1]), ["a", "b"], ({"prompt": str(n) * 50} for n in range(50_000)))
except AsdError as error:
    print(type(error).__name__, error.message)
"""
    ended = subprocess.run(
        limited(20_000, "-c", code, str(tmp_path / "train.parquet")),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout.startswith(f"ResourceExhausted {tmp_path / 'train.parquet'} ")
    assert not [*tmp_path.iterdir()]
