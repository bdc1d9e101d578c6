"""Small working gRPC servers around a real router: stages that write words, a policy with a script."""

# ruff: noqa: N802 - methods have the protos' names

from __future__ import annotations

import asyncio
import socket
import zlib
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from asd.errors import AsdError, NotFound, Unavailable
from asd.v1 import (
    cascade_pb2_grpc,
    common_pb2,
    policy_pb2,
    policy_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
)
from services.common.channel import open_channel
from services.common.server import ServiceRegistration, start_server
from services.router.__main__ import assemble
from services.router.settings import RouterSettings
from tests.limits import CALL_S
from tests.recording import metered, recorded  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from services.router.planning.load import Load
    from services.router.servicer import CascadeServicer

COSTS = (1.6, 4.2, 8.8)
NAMES = ("small", "medium", "large")


def token_id(piece: bytes) -> int:
    return zlib.crc32(piece) % 50_000


@dataclass
class FakeStage(stage_pb2_grpc.StageServiceServicer):
    """Writes fixed tokens and verifies by the EXACT rule. A token is UTF-8, perhaps part of a character."""

    name: str
    pieces: tuple[bytes, ...] = (b"one", b" two", b" three")
    fingerprint: str = "f" * 64
    # Tokens that one message of the stream carries.
    chunk: int = 1
    # After this many tokens: wait for the gate, or fail with the error.
    pause_after: int | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fail_after: int | None = None
    failure: AsdError = field(default_factory=lambda: Unavailable("the stage is going away"))
    sends_result: bool = True
    prefill_gate: asyncio.Event | None = None
    verification_first: bool = False
    # Wait in the queue, as the result tells it.
    queue_ms: float = 0.25
    # Calls of other routers that it says are under way.
    others: int = 0
    # Types of task that it serves its model's adapters for.
    adapters: tuple[str, ...] = ()
    # Whether it says that it keeps constraints, and does.
    constrains: bool = False
    keeps_constraints: bool = True
    # Times that it was asked for its status.
    statuses: int = 0
    # Runs as each call begins.
    on_call: Callable[[], None] | None = None
    # Per call, the seconds that its deadline left it.
    left_s: list[float] = field(default_factory=list)
    streamed_drafts: list = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    requests: list = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    most_running: int = 0

    async def Generate(self, request, context):
        self._begin("generate", request, context)
        try:
            async for tokens in self._write():
                yield stage_pb2.StageServiceGenerateResponse(
                    tokens=tokens, tokenizer_fingerprint=self.fingerprint
                )
            if self.sends_result:
                result = self._result(0, 0, len(self.pieces) + 1, request.model)
                yield stage_pb2.StageServiceGenerateResponse(result=result)
        except (asyncio.CancelledError, GeneratorExit):
            # The latter where a message was being sent.
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def Verify(self, request, context):
        self._begin("verify", request, context)
        try:
            own = [token_id(piece) for piece in self.pieces]
            ids_used = request.draft.tokenizer_fingerprint == self.fingerprint
            draft = list(request.draft.token_ids)
            proposed = len(draft) + (request.draft.finish_reason == common_pb2.FINISH_REASON_EOS)
            accepted = 0
            while accepted < min(len(own), len(draft)) and own[accepted] == draft[accepted]:
                accepted += 1
            if accepted == len(draft) == len(own) and proposed > len(draft):
                accepted += 1
            if self.fail_after == 0:
                raise self.failure
            yield stage_pb2.VerifyResponse(
                verification=stage_pb2.Verification(
                    proposed_tokens=proposed,
                    accepted_tokens=accepted,
                    ranks=[0] * accepted + [3] * (proposed - accepted),
                    ids_used=ids_used,
                )
            )
            async for tokens in self._write():
                yield stage_pb2.VerifyResponse(tokens=tokens)
            passes = 1 + max(len(own) + 1 - accepted, 0)
            yield stage_pb2.VerifyResponse(result=self._result(proposed, accepted, passes, request.model))
        except (asyncio.CancelledError, GeneratorExit):
            # The latter where a message was being sent.
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def Status(self, request, context):
        self.statuses += 1
        return stage_pb2.StatusResponse(
            models=[
                stage_pb2.ModelStatus(
                    name=name,
                    engine="fake",
                    parameters=7,
                    context_length=512,
                    queued_requests=1,
                    constrains=self.constrains,
                )
                for name in self._models
            ]
        )

    async def VerifyStream(self, request_iterator, context):
        """Emit the first token at once, and the rest when the draft has ended."""
        steps = aiter(request_iterator)
        start = (await anext(steps)).start
        self._begin("verify_stream", start, context)
        draft, chunks = [], []
        try:
            first = await anext(self._write())
            if self.verification_first:
                # Nothing of its own before the whole draft is judged.
                response = stage_pb2.VerifyStreamResponse(tokenizer_fingerprint=self.fingerprint)
            else:
                yield stage_pb2.VerifyStreamResponse(tokens=first, tokenizer_fingerprint=self.fingerprint)
                response = stage_pb2.VerifyStreamResponse()
            async for step in steps:
                if step.HasField("end"):
                    break
                chunks.append(step.chunk)
                draft += step.chunk.token_ids
            self.streamed_drafts.append(chunks)
            own = [token_id(piece) for piece in self.pieces]
            accepted = 0
            while accepted < min(len(own), len(draft)) and own[accepted] == draft[accepted]:
                accepted += 1
            response.verification.CopyFrom(
                stage_pb2.Verification(
                    proposed_tokens=len(draft),
                    accepted_tokens=accepted,
                    ranks=[0] * len(draft),
                    ids_used=True,
                )
            )
            yield response
            is_first = True
            async for tokens in self._write():
                if self.verification_first or not is_first:
                    yield stage_pb2.VerifyStreamResponse(tokens=tokens)
                is_first = False
            passes = 1 + max(len(own) + 1 - accepted, 0)
            result = self._result(len(draft), accepted, passes, start.model)
            yield stage_pb2.VerifyStreamResponse(result=result)
        except (asyncio.CancelledError, GeneratorExit):
            # The latter where a message was being sent.
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    async def Prefill(self, request, context):
        self.calls.append("prefill")
        self.requests.append(request)
        self.left_s.append(context.time_remaining())
        if self.on_call is not None:
            self.on_call()
        if self.prefill_gate is not None:
            await self.prefill_gate.wait()
        return stage_pb2.PrefillResponse(prompt_tokens=4, total_ms=1)

    async def Load(self, request, context):
        raise NotImplementedError

    async def Unload(self, request, context):
        raise NotImplementedError

    def add(self, server):
        stage_pb2_grpc.add_StageServiceServicer_to_server(self, server)

    full_name = "asd.v1.StageService"

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode()

    @property
    def _models(self) -> list[str]:
        return [self.name, *(f"{self.name}/{task}" for task in self.adapters)]

    def _begin(self, call, request, context):
        self.calls.append(call)
        self.requests.append(request)
        self.left_s.append(context.time_remaining())
        if request.model not in {"", *self._models}:
            raise NotFound(
                f"no model {request.model!r} here: choose one of {', '.join(self._models)}", field="model"
            )
        if self.on_call is not None:
            self.on_call()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.started.set()

    async def _write(self):
        pending = b""
        for start in range(0, len(self.pieces), self.chunk):
            if self.pause_after is not None and start >= self.pause_after:
                await self.gate.wait()
            if self.fail_after is not None and start >= self.fail_after:
                raise self.failure
            part = self.pieces[start : start + self.chunk]
            pending += b"".join(part)
            text = pending.decode(errors="ignore")
            pending = pending[len(text.encode()) :]
            yield common_pb2.TokenChunk(
                token_ids=[token_id(piece) for piece in part],
                text=text,
                logprobs=[-0.25] * len(part),
                entropies=[0.5] * len(part),
                top2_margins=[0.75] * len(part),
            )
        if self.pause_after is not None and self.pause_after >= len(self.pieces):
            await self.gate.wait()
        if self.fail_after is not None and self.fail_after >= len(self.pieces):
            raise self.failure

    def _result(self, proposed, accepted, passes, model):
        return stage_pb2.StageResult(
            text=self.text,
            token_ids=[token_id(piece) for piece in self.pieces],
            tokenizer_fingerprint=self.fingerprint,
            finish_reason=common_pb2.FINISH_REASON_EOS,
            usage=common_pb2.Usage(
                prompt_tokens=4,
                completion_tokens=len(self.pieces),
                proposed_tokens=proposed,
                accepted_tokens=accepted,
                forward_passes=passes,
            ),
            timing=common_pb2.StageTiming(
                queue_ms=self.queue_ms, prefill_ms=1, decode_ms=2, total_ms=3 + self.queue_ms
            ),
            model=model or self.name,
            others_under_way=self.others,
            constrained=self.constrains and self.keeps_constraints,
        )


@dataclass
class FakePolicy(policy_pb2_grpc.PolicyServiceServicer):
    """Plans a stage and decides by a script: stage name to the next stage's name, or to None for a stop.

    Of several next stages it takes the first that is not away; one alone it names whatever its condition.
    """

    first: str = "small"
    script: dict = field(default_factory=dict)
    p_escalate: float = 0.0
    likely_next: str = ""
    abandon: tuple = ()
    plan_failure: AsdError | None = None
    decide_failure: AsdError | None = None
    # Set: calls wait for it.
    gate: asyncio.Event | None = None
    plan_response: policy_pb2.PlanResponse | None = None
    decide_response: policy_pb2.DecideResponse | None = None
    expected_ms: float = 0.0
    # Runs as each call begins, with "plan" or "decide".
    on_call: Callable[[str], None] | None = None
    plans: list = field(default_factory=list)
    decisions: list = field(default_factory=list)
    # Per call, the seconds that its deadline left it.
    plan_left_s: list[float] = field(default_factory=list)
    decide_left_s: list[float] = field(default_factory=list)

    async def Plan(self, request, context):
        self.plans.append(request)
        self.plan_left_s.append(context.time_remaining())
        if self.on_call is not None:
            self.on_call("plan")
        if self.gate is not None:
            await self.gate.wait()
        if self.plan_failure is not None:
            raise self.plan_failure
        away = {each.stage for each in request.conditions if not each.available}
        first = next((name for name in (self.first, *request.cascade) if name not in away), self.first)
        return self.plan_response or policy_pb2.PlanResponse(
            first_stage=first,
            policy_version="v7",
            p_escalate=self.p_escalate,
            likely_next_stage=self.likely_next,
            abandon=self.abandon,
            abandon_stage=self.likely_next if self.abandon else "",
        )

    async def Decide(self, request, context):
        self.decisions.append(request)
        self.decide_left_s.append(context.time_remaining())
        if self.on_call is not None:
            self.on_call("decide")
        if self.decide_failure is not None:
            raise self.decide_failure
        if self.decide_response is not None:
            return self.decide_response
        next_stage = self.script.get(request.stage)
        if isinstance(next_stage, tuple):
            away = {each.stage for each in request.conditions if not each.available}
            next_stage = next((name for name in next_stage if name not in away), None)
        return policy_pb2.DecideResponse(
            action=policy_pb2.DECISION_ACTION_ESCALATE if next_stage else policy_pb2.DECISION_ACTION_STOP,
            next_stage=next_stage or "",
            reason=policy_pb2.DECISION_REASON_VALUE,
            p_correct=0.5 if next_stage else 0.9,
            p_correct_stderr=0.01,
            policy_version="v7",
            estimates=[
                policy_pb2.StageEstimate(stage=name, latency_ms=self.expected_ms) for name in request.cascade
            ],
        )

    async def Report(self, request, context):
        raise NotImplementedError

    async def Describe(self, request, context):
        return policy_pb2.PolicyServiceDescribeResponse(policy_version="v7")

    def add(self, server):
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self, server)

    full_name = "asd.v1.PolicyService"


@dataclass
class World:
    """A router with what is around it."""

    stub: cascade_pb2_grpc.CascadeServiceStub
    channel: grpc.aio.Channel
    stages: dict[str, FakeStage]
    policy: FakePolicy | None
    targets: dict[str, str]
    servers: dict[str, grpc.aio.Server]
    servicer: CascadeServicer
    port: int
    load: Load

    async def stop(self, name: str) -> None:
        await self.servers[name].stop(0)

    async def start(self, name: str) -> None:
        fake = self.policy if name == "policy" else self.stages[name]
        self.servers[name], _ = await start_server(
            self.targets[name], [ServiceRegistration(fake.full_name, fake.add)]
        )


@dataclass
class Clock:
    """Monotonic seconds that pass only when a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Return the clock of the routers that `world` builds. Deadlines on the wire still pass."""
    clock = Clock()
    monkeypatch.setattr("services.router.__main__.time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
async def world():
    """Return a function that starts stages, policy and router, all on free ports, and returns a World."""
    async with AsyncExitStack() as stack:

        async def start(
            *stages: FakeStage,
            policy: FakePolicy | None = None,
            policy_target: str = "",
            dead: tuple[str, ...] = (),
            stage_timeout_ms: float = CALL_S * 1e3,
            policy_timeout_ms: float = CALL_S * 1e3,
            stage_settings: dict[str, dict] | None = None,
            **settings,
        ) -> World:
            stages = stages or tuple(FakeStage(name) for name in NAMES)
            fakes = {stage.name: stage for stage in stages}
            everyone = {**fakes, "policy": policy} if policy else dict(fakes)
            targets, servers = {}, {}

            async def stop_all() -> None:
                await asyncio.gather(*(each.stop(0) for each in servers.values()))

            stack.push_async_callback(stop_all)
            for name, fake in everyone.items():
                if name in dead:
                    targets[name] = f"127.0.0.1:{free_port()}"
                    continue
                server, port = await start_server(
                    "127.0.0.1:0", [ServiceRegistration(fake.full_name, fake.add)]
                )
                targets[name], servers[name] = f"127.0.0.1:{port}", server
            entries = [
                {"name": name, "target": targets[name], "cost": COSTS[index], "timeout_ms": stage_timeout_ms}
                | (stage_settings or {}).get(name, {})
                for index, name in enumerate(fakes)
            ]
            options = {"static_plan": ("medium",), "stages": entries, **settings}
            if policy_target:
                options["policy"] = {"target": policy_target, "timeout_ms": policy_timeout_ms}
            elif policy:
                options.setdefault("policy", {"target": targets["policy"], "timeout_ms": policy_timeout_ms})
            router = await assemble(RouterSettings(**options), stack)
            servicer = router.servicer
            server, port = await start_server("127.0.0.1:0", [servicer.registration()])
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{port}", retry=False))
            # An attempt to connect has a second, which a busy machine may need for other programs.
            await asyncio.wait_for(channel.channel_ready(), CALL_S)
            servers["router"] = server
            return World(
                cascade_pb2_grpc.CascadeServiceStub(channel),
                channel,
                fakes,
                policy,
                targets,
                servers,
                servicer,
                port,
                router.load,
            )

        start.stage = FakeStage
        start.policy = FakePolicy
        yield start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
