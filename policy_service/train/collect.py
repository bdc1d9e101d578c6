"""Collects outcomes from running stages: every stage's own answer to every prompt, graded, and every
verification of an earlier stage's draft.

Only latencies of fresh prompts are kept. A stage with a prefix cache that verifies a draft for a prompt it
has just answered reuses that prompt, and is too quick.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast, get_args

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asd.convert import FINISH_REASONS
from asd.errors import AsdError, InvalidRequest
from asd.transport.channel import call_stream
from asd.transport.files import DamagedFile
from asd.v1 import common_pb2, stage_pb2, stage_pb2_grpc
from policy_service.features import round_signals
from policy_service.train.console import warn
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.outcome_table import SCHEMA, VERSION, pair_name, pairs, write_outcomes
from policy_service.train.outcomes import read_cascade, read_prompts
from services.common.channel import open_channel
from services.common.disks import writing
from services.common.documents import parse_json
from services.common.line_log import LineLog
from suites import Task, grade
from suites.splits import Split
from suites.splits import split as split_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from asd.transport.tls import TlsFiles

_DECIMALS = 3

_Record = dict[str, Any]


@dataclass(frozen=True)
class CollectOptions:
    """What to collect. targets: host:port of every replica, by stage, in cascade order.

    prompts: number of single questions. conversations: number of questions that are a second turn; they
    follow the prompts. concurrency: prompts in flight at once. Each uses one replica of every stage, in turn,
    so none waits while there are as many replicas. timeout_ms: of one stage call. tls: None for plain
    connections.
    """

    output: Path
    targets: dict[str, tuple[str, ...]]
    split: str
    prompts: int
    conversations: int
    seed: int
    concurrency: int
    timeout_ms: float
    tls: TlsFiles | None = None


@dataclass(frozen=True)
class _Written:
    """A stage's answer: as a draft for later stages, and as a record for the file."""

    draft: common_pb2.Draft
    record: dict[str, object]


def parse_targets(stages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the replicas by stage of NAME=TARGET[,TARGET...] arguments. Raises InvalidRequest."""
    targets: dict[str, tuple[str, ...]] = {}
    for stage in stages:
        name, sign, rest = stage.partition("=")
        if not (name and sign and rest) or name in targets:
            raise InvalidRequest(
                f"--stage {stage}: write NAME=HOST:PORT[,HOST:PORT...], each name once", field="stage"
            )
        replicas = tuple(piece.strip() for piece in rest.split(","))
        if not all(replicas):
            raise InvalidRequest(f"--stage {stage}: a replica between commas is empty", field="stage")
        for replica in replicas:
            if replicas.count(replica) > 1:
                raise InvalidRequest(f"--stage {stage}: replica {replica} is there twice", field="stage")
        targets[name] = replicas
    return targets


async def collect_outcomes(options: CollectOptions, console: Console) -> None:
    """Write the outcomes to the output. Resumes an interrupted run from `<output>.partial`."""
    if options.split not in get_args(Split):
        raise InvalidRequest(f"unknown split {options.split!r}: choose one of {', '.join(get_args(Split))}")
    cascade = list(options.targets)
    if len(cascade) < 2:
        raise InvalidRequest("a cascade has two stages or more: give --stage for each", field="stage")
    with console.status("generating prompts"):
        split, seed = cast("Split", options.split), options.seed
        tasks = list(split_tasks(split, options.prompts, seed))
        tasks += split_tasks(split, options.conversations, seed, follow_ups=True)
    if _is_complete(options.output, cascade, tasks):
        console.print(f"{options.output} is complete")
        return
    partial = options.output.with_name(options.output.name + ".partial")
    done = _read_partial(partial, cascade)
    todo = [task for task in tasks if _key(task) not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("collecting", total=len(tasks), completed=len(tasks) - len(todo))
        async with AsyncExitStack() as stack:
            replicas = [
                [
                    _StageCalls(
                        name,
                        stage_pb2_grpc.StageServiceStub(
                            await stack.enter_async_context(open_channel(target, tls=options.tls))
                        ),
                        options.timeout_ms,
                    )
                    for target in targets
                ]
                for name, targets in options.targets.items()
            ]
            file = _open_partial(partial, cascade, is_new=not done)
            waiting = iter(todo)
            warm_calls = 0

            async def work(number: int) -> None:
                nonlocal warm_calls
                stages = [each[number % len(each)] for each in replicas]
                for task in waiting:
                    record = await _collect_one(stages, task, options.split)
                    warm_calls += _count_warm(record)
                    file.append(json.dumps(record, separators=(",", ":")))
                    progress.advance(bar)

            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(options.concurrency):
                        group.create_task(work(number))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
    _finish(partial, options.output, cascade, tasks)
    console.print(f"{options.output}: {len(tasks)} prompts")
    if warm_calls:
        console.print(
            f"{warm_calls} calls took prompt tokens from a prefix cache: their latencies are left out, and "
            "the file of costs stands in for them",
            soft_wrap=True,
        )


class _StageCalls:
    """Calls one stage."""

    def __init__(self, name: str, stub: stage_pb2_grpc.StageServiceAsyncStub, timeout_ms: float) -> None:
        self.name = name
        self._stub = stub
        self._timeout_ms = timeout_ms

    async def generate(self, task: Task) -> _Written:
        """Return the stage's own answer."""
        request = stage_pb2.StageServiceGenerateRequest(conversation=_conversation(task))
        signals: dict[str, list[float]] = {"logprobs": [], "entropies": [], "top2_margins": []}
        result = None
        call = call_stream(
            self._stub.Generate, request, timeout_ms=self._timeout_ms, peer=f"stage {self.name}"
        )
        async with aclosing(call) as responses:
            async for response in responses:
                if response.HasField("tokens"):
                    for name, values in signals.items():
                        values.extend(getattr(response.tokens, name))
                elif response.HasField("result"):
                    result = response.result
        if result is None:
            raise AsdError(f"stage {self.name}: the call ended without a result")
        draft = common_pb2.Draft(
            text=result.text,
            token_ids=result.token_ids,
            tokenizer_fingerprint=result.tokenizer_fingerprint,
            finish_reason=result.finish_reason,
        )
        record: dict[str, object] = {
            "text": result.text,
            "finish_reason": FINISH_REASONS.members[result.finish_reason].value,
            **{name: round_signals(np.array(values, np.float32)) for name, values in signals.items()},
            "latency_ms": _fresh_latency(result),
        }
        return _Written(draft, record)

    async def verify(self, task: Task, draft: common_pb2.Draft) -> dict[str, object]:
        """Return the verification of a draft, as a record for the file."""
        request = stage_pb2.VerifyRequest(conversation=_conversation(task), draft=draft)
        verification = result = None
        call = call_stream(self._stub.Verify, request, timeout_ms=self._timeout_ms, peer=f"stage {self.name}")
        async with aclosing(call) as responses:
            async for response in responses:
                if response.HasField("verification"):
                    verification = response.verification
                elif response.HasField("result"):
                    result = response.result
        if verification is None or result is None:
            raise AsdError(f"stage {self.name}: the call ended without a result")
        return {
            "proposed": verification.proposed_tokens,
            "accepted": verification.accepted_tokens,
            "ranks": list(verification.ranks),
            "forward_passes": result.usage.forward_passes,
            "proposed_again": result.usage.proposed_tokens - verification.proposed_tokens,
            "latency_ms": _fresh_latency(result),
        }


def _fresh_latency(result: stage_pb2.StageResult) -> float | None:
    """Return a call's latency; None if prompt tokens came from the prefix cache."""
    return None if result.usage.cached_prompt_tokens else round(result.timing.total_ms, _DECIMALS)


def _count_warm(record: _Record) -> int:
    """Return how many calls of a record took prompt tokens from a prefix cache."""
    calls = [*record["stages"].values(), *record["verifications"].values()]
    return sum(call.get("latency_ms", 0.0) is None for call in calls)


async def _collect_one(stages: Sequence[_StageCalls], task: Task, split: str) -> _Record:
    written = [await stage.generate(task) for stage in stages]
    names = [stage.name for stage in stages]
    verifications = {}
    for origin, target in pairs(names):
        # An empty draft has nothing to verify: the target would generate its own answer.
        draft = written[origin].draft
        if draft.text or draft.token_ids:
            check = await stages[target].verify(task, draft)
        else:
            tokens = len(written[target].draft.token_ids)
            check = {"proposed": 0, "accepted": 0, "ranks": [], "forward_passes": tokens + 1}
            check["proposed_again"] = 0
        verifications[pair_name(names, origin, target)] = check
    return {
        "prompt": task.prompt,
        "history": _messages(task),
        "suite": task.suite,
        "level": task.level,
        "kind": task.kind,
        "split": split,
        "stages": {
            name: {**each.record, "correct": grade(task, each.draft.text)}
            for name, each in zip(names, written, strict=True)
        },
        "verifications": verifications,
    }


def _messages(task: Task) -> list[str]:
    return [message for turn in task.history for message in turn]


def _key(task: Task) -> tuple[tuple[str, ...], str]:
    return tuple(_messages(task)), task.prompt


def _conversation(task: Task) -> common_pb2.Conversation:
    roles = itertools.cycle((common_pb2.ROLE_USER, common_pb2.ROLE_ASSISTANT))
    turns = zip(roles, [*_messages(task), task.prompt], strict=False)
    return common_pb2.Conversation(
        messages=[common_pb2.Message(role=role, content=text) for role, text in turns]
    )


def _is_complete(output: Path, cascade: Sequence[str], tasks: Sequence[Task]) -> bool:
    if not output.exists():
        return False
    if list(read_cascade(output)) == list(cascade) and list(read_prompts(output)) == list(map(_key, tasks)):
        return True
    raise UnfitOutcomes(f"{output} holds other prompts or another cascade: choose another file")


def _open_partial(partial: Path, cascade: Sequence[str], *, is_new: bool) -> LineLog:
    """Return the file of the collected records, with its header. Raises the AsdError of cannot_write."""
    with writing(partial, "name another file"):
        if is_new:
            partial.unlink(missing_ok=True)
        file = LineLog(partial, log=None)
    if is_new:
        file.append(json.dumps({"schema": SCHEMA, "version": VERSION, "cascade": list(cascade)}))
    return file


def _read_partial(partial: Path, cascade: Sequence[str]) -> set[tuple[tuple[str, ...], str]]:
    """Return the prompts of an earlier run. Prompts of damaged lines are left out, and collected again.

    Raises UnfitOutcomes if the file is another cascade's, or does not name its cascade.
    """
    if not partial.exists():
        return set()
    with partial.open("rb") as file:
        first = file.readline()
        positions, damaged = _positions(file)
    try:
        header = parse_json(first, str(partial))
    except DamagedFile as error:
        if not positions and not first.endswith(b"\n"):
            # The run was killed before the header was complete.
            return set()
        raise UnfitOutcomes(f"{partial} is damaged: delete it, and collect anew") from error
    if damaged:
        warn(f"{partial}: {damaged} damaged lines: their prompts are collected once more")
    if not positions:
        # It has no records, so it does not matter which cascade it is for.
        return set()
    if header != {"schema": SCHEMA, "version": VERSION, "cascade": list(cascade)}:
        raise UnfitOutcomes(f"{partial} holds another cascade: choose another file, or delete it")
    return set(positions)


def _positions(file: BinaryIO) -> tuple[dict[tuple[tuple[str, ...], str], int], int]:
    """Return each prompt's record position, from the file's position on, and the number of bad lines."""
    positions: dict[tuple[tuple[str, ...], str], int] = {}
    damaged = 0
    while True:
        position, line = file.tell(), file.readline()
        if not line:
            return positions, damaged
        try:
            record = parse_json(line, "a line")
            positions[tuple(record["history"]), record["prompt"]] = position
        except (TypeError, KeyError, DamagedFile):
            damaged += 1


def _finish(partial: Path, output: Path, cascade: Sequence[str], tasks: Sequence[Task]) -> None:
    """Write the output in the order of the prompts, in one step, and remove the partial file."""
    with partial.open("rb") as file:
        file.readline()
        positions, _ = _positions(file)

        def rows() -> Iterator[dict[str, object]]:
            for task in tasks:
                file.seek(positions[_key(task)])
                yield json.loads(file.readline())

        write_outcomes(output, cascade, rows())
    partial.unlink()
