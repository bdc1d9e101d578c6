"""A typed client of a cascade.

>>> async with CascadeClient("127.0.0.1:50050") as cascade:  # doctest: +SKIP
...     answer = await cascade.answer(Request("What is 12 plus 30?"))
"""

from __future__ import annotations

import logging
import re
from contextlib import aclosing
from typing import TYPE_CHECKING, Self, TypeVar

import grpc

from asd.v1 import cascade_pb2, cascade_pb2_grpc, policy_pb2_grpc
from services.client import convert
from services.common.addresses import is_loopback
from services.common.auth import bearer
from services.common.channel import call_stream, call_unary, open_channel
from services.common.errors import AsdError, PreconditionFailed, Unavailable
from services.common.patience import Patience

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from types import TracebackType

    from services.client.values import Answer, BatchItem, Description, Event, ReportReceipt, Request
    from services.common.tls import ClientTls

logger = logging.getLogger(__name__)

DEFAULT_TARGET = "127.0.0.1:50050"
DEFAULT_POLICY_TARGET = "127.0.0.1:50051"
# As the router's own default for callers that set no deadline.
DEFAULT_TIMEOUT_MS = 60_000.0

# How gRPC says that nothing answers at an address, after the name of what was called.
_UNANSWERED = re.compile(
    r": (?:connections to all backends failing|failed to connect to all addresses); last error: [A-Z_]+: "
    r"ipv[46]:\S+: (?:Failed to connect to remote host: )?([^:;]+)"
)

# What it says where a connection stands, and nothing comes over it.
_UNGREETED = "connection attempt timed out before receiving SETTINGS frame"

# What gRPC says where a connection is refused for its encryption, and what to do.
_UNENCRYPTED = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "shows a certificate of an authority that is not trusted here: name a file with it by --tls-ca",
    ),
    (
        "Hostname Verification Check failed",
        "shows a certificate for another name: say which one with --tls-server-name",
    ),
    ("WRONG_VERSION_NUMBER", "does not speak TLS: leave the --tls options out"),
)

Sent = TypeVar("Sent")
Received = TypeVar("Received")


def encryption_advice(message: str, *, is_encrypted: bool) -> str:
    """Return what a refused connection says of its encryption, and what to do: "" where it says nothing.

    message: gRPC's. The words go on from the name of whom was called.
    """
    for sign, advice in _UNENCRYPTED:
        if sign in message:
            return advice
    if message.endswith("Socket closed"):
        wish = "a certificate (--tls-cert, --tls-key)" if is_encrypted else "TLS (--tls-ca)"
        return f"closes the connection: it may want {wish}"
    return ""


class CascadeClient:
    """Asks a cascade's router. An asynchronous context manager; one instance serves many concurrent calls.

    target: "host:port" or a gRPC name such as "dns:///asd-router:50050". timeout_ms: deadline of each call.
    tls: None for a plain connection. token: shown with each call; "" for a cascade that wants none. Raises
    ValueError for a token that cannot be one, UnusableFile (on entry) for certificates that cannot be used.
    A call that a router which ends has not begun to answer is made again within its deadline, at another
    router or at the same one after its return.
    Every method raises the AsdError that the router's status stands for (services.common.errors):
    InvalidRequest and NotFound for a request at fault, Unavailable where nothing answers, BudgetSpent after
    the deadline, Overloaded where there is no room for the request: its retry_after_s says when to ask again.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_ms: float = DEFAULT_TIMEOUT_MS,
        tls: ClientTls | None = None,
        token: str = "",
    ) -> None:
        self._target = target
        self._tls = tls
        self._metadata = bearer(token)
        self._timeout_ms = timeout_ms
        self._peer = f"cascade at {target}"
        self._patience = Patience()

    async def __aenter__(self) -> Self:
        if self._metadata and self._tls is None and not is_loopback(self._target):
            logger.warning(
                "the token goes to %s in the clear: use TLS (--tls-ca), or a tunnel that ends here",
                self._target,
            )
        self._channel = open_channel(self._target, tls=self._tls)
        self._stub = cascade_pb2_grpc.CascadeServiceStub(self._channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def answer(self, request: Request) -> Answer:
        """Return the answer to a request."""
        message = convert.request_to(request)
        return convert.answer_from(await self._call(self._stub.Generate, message))

    async def stream(self, request: Request, *, drafts: bool = False) -> AsyncGenerator[Event, None]:
        """Yield what happens to a request; the Answer comes last.

        drafts: yield tokens that a later stage may still revise as well (see values.StreamedText).
        """
        message = cascade_pb2.GenerateStreamRequest(
            request=convert.request_to(request), include_drafts=drafts
        )
        async with aclosing(self._call_stream(self._stub.GenerateStream, message)) as responses:
            async for response in responses:
                event = convert.event_from(response)
                if event is not None:
                    yield event

    async def answer_batch(self, requests: Sequence[Request]) -> AsyncGenerator[BatchItem, None]:
        """Yield the outcome of each request as it is ready; one's failure leaves the others alone."""
        message = cascade_pb2.GenerateBatchRequest(requests=[convert.request_to(each) for each in requests])
        async with aclosing(self._call_stream(self._stub.GenerateBatch, message)) as responses:
            async for response in responses:
                yield convert.batch_item_from(response)

    async def describe(self) -> Description:
        """Return which stages there are, what they cost and which policy is in force."""
        message = cascade_pb2.DescribeRequest()
        return convert.description_from(await self._call(self._stub.Describe, message))

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Sent, Received], message: Sent
    ) -> Received:
        try:
            return await call_unary(
                method,
                message,
                timeout_ms=self._timeout_ms,
                peer=self._peer,
                metadata=self._metadata,
                patience=self._patience,
            )
        except AsdError as error:
            raise self._explained(error) from error

    async def _call_stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[Sent, Received], message: Sent
    ) -> AsyncGenerator[Received, None]:
        responses = call_stream(
            method,
            message,
            timeout_ms=self._timeout_ms,
            peer=self._peer,
            metadata=self._metadata,
            patience=self._patience,
        )
        async with aclosing(responses):
            try:
                async for response in responses:
                    yield response
            except AsdError as error:
                raise self._explained(error) from error

    def _explained(self, error: AsdError) -> AsdError:
        """Return the error with advice where no router answers, and without gRPC's words where a stage does
        not."""
        if _is_unknown_service(error):
            return PreconditionFailed(f"{self._target} is not a router: a router's default port is 50050")
        if not isinstance(error, Unavailable):
            return error
        if self._channel.get_state() is grpc.ChannelConnectivity.READY:
            return Unavailable(in_plain_words(error.message).removeprefix(f"{self._peer}: "))
        if _UNGREETED in error.message:
            return Unavailable(
                f"{self._target} takes the connection and does not answer: its process may be stopped or "
                "hang, or be no router"
            )
        advice = encryption_advice(error.message, is_encrypted=self._tls is not None)
        if advice:
            return Unavailable(f"{self._target} {advice}")
        return Unavailable(
            f"no cascade answers at {self._target}: start one with `asd up`, or name another with --target"
        )


async def report(
    answer: Answer,
    *,
    correct: bool,
    policy_target: str = DEFAULT_POLICY_TARGET,
    timeout_ms: float = 5_000.0,
    tls: ClientTls | None = None,
) -> ReportReceipt:
    """Tell the policy service how an answer turned out.

    The cascade's router takes no reports, so this calls the policy service itself. Raises InvalidRequest if
    the policy did not judge the answer, and the AsdError that the service's status stands for.
    """
    message = convert.report_to(answer, correct=correct)
    async with open_channel(policy_target, tls=tls) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        peer = f"policy service at {policy_target}"
        try:
            response = await call_unary(stub.Report, message, timeout_ms=timeout_ms, peer=peer)
        except Unavailable as error:
            raise Unavailable(in_plain_words(error.message)) from error
        except AsdError as error:
            if not _is_unknown_service(error):
                raise
            raise PreconditionFailed(
                f"{policy_target} is not a policy service: its default port is 50051"
            ) from error
    return convert.receipt_from(response)


def in_plain_words(message: str) -> str:
    """Return what an error says without what gRPC adds for those who work on gRPC."""
    message = message.replace(_UNGREETED, "it takes the connection and is silent")
    return _UNANSWERED.sub(lambda found: f" does not answer ({found[1].lower()})", message)


def _is_unknown_service(error: AsdError) -> bool:
    cause = error.__cause__
    return isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNIMPLEMENTED
