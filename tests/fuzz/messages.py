"""Damaged messages to a whole cascade: a router, two stages that write words, a small policy.

Over real connections, byte by byte as a foreign client would send them. Whatever comes, each method answers,
or ends with a status of its documentation, soon.
"""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from asd.v1 import cascade_pb2, common_pb2, policy_pb2, policy_pb2_grpc, stage_pb2, stage_pb2_grpc
from policy_service.artifact import load_usable
from policy_service.servicer import PolicyServicer
from services.common.server import ServiceRegistration, start_server
from services.router.__main__ import build
from services.router.settings import RouterSettings
from services.stage.model_pool import ModelPool
from services.stage.servicer import StageServicer
from tests.fakes.quick_stage import QuickEngine
from tests.fuzz.mutations import damage_bytes
from tests.unit.policy.tiny_policy import make_artifact

if TYPE_CHECKING:
    from google.protobuf.message import Message

NAMES = ("small", "large")
# Of one call, by the wall. No test of speed but of what hangs: a machine that runs other work beside may give
# a process no time for many seconds.
MOST_SECONDS = 60.0
# By how much this process, with everything that answers in it, may grow over a run. No test of thrift but of
# what has no end: it grows by some tens of MB as gRPC's and the allocator's pools fill.
MOST_GROWTH_BYTES = 512 << 20
# Messages before the growth counts: imports and pools.
_WARM_UP = 100
# What a caller can bring about. INTERNAL and UNKNOWN are faults.
_FINE = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
_NUMBERS = (0, 1, 2, 7, 1023, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_REALS = (0.0, -1.0, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324)
_TEXTS = ("", "small", "large", "\x1b[2J\r\n", "\u202e", "\0", "x" * 3000, "é漢😀")


class MessageFault(Exception):  # noqa: N818 - as LoaderFault
    """A method did other than it should. raw: the message."""

    def __init__(self, problem: str, raw: bytes) -> None:
        super().__init__(problem)
        self.raw = raw


class _Tracebacks(logging.Handler):
    """Keeps what is logged with a traceback: an error that nobody foresaw."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(record.getMessage())


async def fuzz(seconds: float, seed: int) -> int:
    """Send damaged messages for so long; return how many. Raises MessageFault."""
    tracebacks = _Tracebacks()
    logging.getLogger().addHandler(tracebacks)
    try:
        async with AsyncExitStack() as stack:
            methods = await _start(stack)
            end = time.monotonic() + seconds
            count, began = 0, 0
            while time.monotonic() < end:
                rng = random.Random(f"{seed} {count}")
                name, call, message = methods[count % len(methods)]
                raw = _damage(rng, message)
                await _send(name, call, raw)
                if tracebacks.found:
                    raise MessageFault(f"{name}: a traceback in the log: {tracebacks.found[0]}", raw)
                count += 1
                if count == _WARM_UP:
                    began = peak_bytes()
                if count > _WARM_UP and peak_bytes() - began > MOST_GROWTH_BYTES:
                    raise MessageFault(f"{name}: the process has grown by {MOST_GROWTH_BYTES >> 20} MB", raw)
            return count
    finally:
        logging.getLogger().removeHandler(tracebacks)


def peak_bytes() -> int:
    """Return the most memory that this process has had at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak << 10


async def _send(name: str, call: Any, raw: bytes) -> None:
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for _ in call(raw):
                pass
    except grpc.aio.AioRpcError as error:
        details = error.details() or ""
        if error.code() not in _FINE:
            raise MessageFault(f"{name}: ended {error.code().name}: {details}", raw) from error
        if not details.isprintable():
            raise MessageFault(f"{name}: its message is not one printable line: {details!r}", raw) from error
    except TimeoutError as error:
        raise MessageFault(f"{name}: took more than {MOST_SECONDS:g} s", raw) from error


def _damage(rng: random.Random, message: Message) -> bytes:
    made = type(message)()
    made.CopyFrom(message)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        _damage_field(rng, made)
    raw = made.SerializeToString()
    return damage_bytes(rng, raw) if rng.random() < 0.5 else raw


def _damage_field(rng: random.Random, message: Message) -> None:
    """Give a field, of this message or of one within, a value of its type that may be out of range."""
    if not message.DESCRIPTOR.fields:
        return
    field = rng.choice(message.DESCRIPTOR.fields)
    value = _value(rng, field)
    if field.message_type is None:
        if field.is_repeated:
            getattr(message, field.name).extend([value] * rng.choice((1, 2, 9, 2000)))
        else:
            setattr(message, field.name, value)
    elif field.is_repeated:
        entries = getattr(message, field.name)
        if hasattr(entries, "add") and (not entries or rng.random() < 0.3):
            entries.add()
        if hasattr(entries, "add"):
            _damage_field(rng, rng.choice(entries))
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type.fields:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _damage_field(rng, inner)


def _value(rng: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in {field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE}:
        return rng.choice(_REALS)
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_STRING:
        text = rng.choice(_TEXTS)
        return text.encode() if field.type == field.TYPE_BYTES else text
    if kind == field.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 99, 2**31 - 1))
    most = {field.CPPTYPE_INT32: 2**31 - 1, field.CPPTYPE_UINT32: 2**32 - 1}.get(kind, 2**63 - 1)
    return rng.choice([number for number in _NUMBERS if number <= most])


async def _start(stack: AsyncExitStack) -> list[tuple[str, Any, Message]]:
    """Start everything; return every method's name, how to call it with bytes, and a valid request."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asd-fuzz-")))
    stages = []
    for name in NAMES:
        servicer = StageServicer(ModelPool({name: QuickEngine()}, name))
        stages.append(await _serve(stack, "StageService", stage_pb2_grpc, servicer))
    policy, document, _ = load_usable(make_artifact(folder / "policy", "v1", stages=NAMES))
    port = await _serve(stack, "PolicyService", policy_pb2_grpc, PolicyServicer(policy, document, None))
    settings = RouterSettings(
        stages=[
            {"name": name, "target": f"127.0.0.1:{at}", "cost": place + 1.0}
            for place, (name, at) in enumerate(zip(NAMES, stages, strict=True))
        ],
        policy={"target": f"127.0.0.1:{port}", "timeout_ms": 5000.0},
        static_plan=["large"],
    )
    router = await build(settings, stack)
    server, router_port = await start_server("127.0.0.1:0", [router.registration()])
    stack.push_async_callback(server.stop, 0)
    methods = []
    for module, service, at in (
        (cascade_pb2, "CascadeService", router_port),
        (policy_pb2, "PolicyService", port),
        (stage_pb2, "StageService", stages[0]),
    ):
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{at}"))
        for method in module.DESCRIPTOR.services_by_name[service].methods:
            message = _SEEDS.get(method.input_type.name)
            request = message or getattr(module, method.input_type.name)()
            methods.append((f"{service}.{method.name}", _caller(channel, method), request))
    return methods


async def _serve(stack: AsyncExitStack, service: str, module: Any, servicer: Any) -> int:
    add = getattr(module, f"add_{service}Servicer_to_server")
    registration = ServiceRegistration(f"asd.v1.{service}", lambda server: add(servicer, server))
    server, port = await start_server("127.0.0.1:0", [registration])
    stack.push_async_callback(server.stop, 0)
    return port


def _caller(channel: grpc.aio.Channel, method: Any) -> Any:
    path = f"/{method.containing_service.full_name}/{method.name}"
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    # gRPC gives bytes where there is no serializer.
    call = kinds[method.client_streaming, method.server_streaming](path)

    async def send(raw: bytes) -> Any:
        request = iter([raw]) if method.client_streaming else raw
        running = call(request, timeout=MOST_SECONDS / 2)
        if method.server_streaming:
            async for response in running:
                yield response
        else:
            yield await running

    return send


_CONVERSATION = common_pb2.Conversation(
    messages=[
        common_pb2.Message(role=common_pb2.ROLE_USER, content="What is 1 + 1?"),
        common_pb2.Message(role=common_pb2.ROLE_ASSISTANT, content="2"),
        common_pb2.Message(role=common_pb2.ROLE_USER, content="And 2 + 2?"),
    ]
)
_SAMPLING = common_pb2.Sampling(max_new_tokens=4, temperature=0.5, top_p=0.9, seed=1, stop=["."])
_DRAFT = common_pb2.Draft(text="The answer", finish_reason=common_pb2.FINISH_REASON_EOS)
_GENERATE = cascade_pb2.GenerateRequest(conversation=_CONVERSATION, sampling=_SAMPLING)
_SEEDS: dict[str, Message] = {
    "GenerateRequest": _GENERATE,
    "GenerateStreamRequest": cascade_pb2.GenerateStreamRequest(request=_GENERATE),
    "GenerateBatchRequest": cascade_pb2.GenerateBatchRequest(requests=[_GENERATE, _GENERATE]),
    "StageServiceGenerateRequest": stage_pb2.StageServiceGenerateRequest(
        model="small", conversation=_CONVERSATION, sampling=_SAMPLING
    ),
    "VerifyRequest": stage_pb2.VerifyRequest(model="small", prompt="What is 1 + 1?", draft=_DRAFT),
    "PrefillRequest": stage_pb2.PrefillRequest(model="small", prompt="What is 1 + 1?"),
    "DecideRequest": policy_pb2.DecideRequest(
        prompt="What is 1 + 1?",
        cascade=NAMES,
        stage="large",
        draft=policy_pb2.DraftEvidence(
            text="2",
            logprobs=[-0.1, -0.2],
            entropies=[0.1, 0.2],
            top2_margins=[0.9, 0.8],
            finish_reason=common_pb2.FINISH_REASON_EOS,
        ),
        verification=policy_pb2.VerificationEvidence(
            proposed_tokens=2, accepted_tokens=1, ranks=[0, 3], draft_stage="small"
        ),
        spent_cost=1.0,
        spent_ms=5.0,
    ),
    "PlanRequest": policy_pb2.PlanRequest(prompt="What is 1 + 1?", cascade=NAMES),
}
