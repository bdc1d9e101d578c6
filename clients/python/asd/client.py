"""Clients of a cascade: a blocking one and one for asyncio, with the same methods.

>>> Client("127.0.0.1:50050").ask("What is 12 plus 30?", min_quality=0.95).text  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import logging
import re
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Literal, Self, TypeVar, Unpack

import grpc

from asd import convert
from asd.errors import AsdError, Away, PreconditionFailed, Unavailable
from asd.transport import blocking
from asd.transport.addresses import is_loopback
from asd.transport.channel import call_stream, call_unary, open_channel
from asd.transport.patience import Patience
from asd.transport.token import bearer
from asd.v1 import cascade_pb2, cascade_pb2_grpc, policy_pb2_grpc
from asd.values import Request

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from asd.transport.tls import TlsFiles
    from asd.values import Answer, BatchItem, Description, Event, Options, Question, ReportReceipt

logger = logging.getLogger(__name__)

DEFAULT_TARGET = "127.0.0.1:50050"
DEFAULT_POLICY_TARGET = "127.0.0.1:50051"
# The router's own default for callers that set no deadline.
DEFAULT_TIMEOUT_MS = 60_000.0
_REPORT_TIMEOUT_MS = 5_000.0

# gRPC's message if nothing answers at an address, after the name of the peer.
_UNANSWERED = re.compile(
    r": (?:connections to all backends failing|failed to connect to all addresses); last error: [A-Z_]+: "
    r"ipv[46]:\S+: (?:Failed to connect to remote host: )?([^:;]+)"
)

# gRPC's message if a connection opens but nothing arrives on it.
_UNGREETED = "connection attempt timed out before receiving SETTINGS frame"

# gRPC's message if a connection is refused because of its encryption, and the advice for it.
_UNENCRYPTED = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "shows a certificate of an authority that is not trusted here: name a file with it by tls.ca_file",
    ),
    (
        "Hostname Verification Check failed",
        "shows a certificate for another name: say which one with tls.server_name",
    ),
    ("WRONG_VERSION_NUMBER", "does not speak TLS: leave tls out"),
)

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class _Connection:
    """What both clients share: the cascade's address, call options, and the explanation of failures.

    target: "host:port" or a gRPC name such as "dns:///asd-router:50050". timeout_ms: deadline of a call that
    has none of its own. tls: None for a plain connection. token: sent with each call; "" for a cascade that
    requires none. Raises ValueError for a malformed token.
    """

    def __init__(self, target: str, timeout_ms: float, tls: TlsFiles | None, token: str) -> None:
        self.target = target
        self.timeout_ms = timeout_ms
        self.tls = tls
        self.metadata = bearer(token)
        self.peer = f"cascade at {target}"
        self.patience = Patience()
        if self.metadata and tls is None and not is_loopback(target):
            logger.warning(
                "the token goes to %s in the clear: use TLS, or a tunnel that ends here",
                target,
            )

    def with_token(self, token: str) -> _Connection:
        """Return the same connection with another token. Raises ValueError for a malformed one."""
        other = copy.copy(self)
        other.metadata = bearer(token)
        return other

    def tls_for_reports(self, tls: TlsFiles | Literal["as router"] | None) -> TlsFiles | None:
        """Return how the policy service is called."""
        return self.tls if tls == "as router" else tls

    def explained(self, error: AsdError, *, is_connected: bool) -> AsdError:
        """Return the error in plain words, with advice if no router answers."""
        if _is_unknown_service(error):
            return PreconditionFailed(f"{self.target} is not a router: a router's default port is 50050")
        if not isinstance(error, Unavailable):
            return error
        if is_connected:
            return Unavailable(in_plain_words(error.message).removeprefix(f"{self.peer}: "))
        if _UNGREETED in error.message:
            return Unavailable(
                f"{self.target} takes the connection and does not answer: its process may be stopped or "
                "hang, or be no router"
            )
        advice = encryption_advice(error.message, is_encrypted=self.tls is not None)
        if advice:
            return Unavailable(f"{self.target} {advice}")
        return Away(f"no cascade answers at {self.target}")


class Client:
    """Calls a cascade's router. Threads may share one; close it, or use it in a `with` statement.

    target: "host:port" or a gRPC name such as "dns:///asd-router:50050". timeout_ms: default deadline of a
    call. tls: None for a plain connection. token: sent with each call; "" for a cascade that requires none.
    Raises ValueError for a malformed token, UnusableFile for certificates that cannot be used.
    If a router shuts down before it has begun to answer, the call is repeated within its deadline, at another
    router or at the same one after its restart.
    Every method raises the AsdError of the router's status (asd.errors): InvalidRequest and NotFound for a
    request at fault, Unavailable if nothing answers, BudgetSpent after the deadline, and Overloaded if there
    is no capacity; its retry_after_s says when to try again.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_ms: float = DEFAULT_TIMEOUT_MS,
        tls: TlsFiles | None = None,
        token: str = "",
    ) -> None:
        self._connection = _Connection(target, timeout_ms, tls, token)
        self._channel = blocking.BlockingChannel(target, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight end."""
        self._channel.close()

    def ask(
        self, question: Question, *, timeout_ms: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Return the answer to a question: a text, a conversation, or a Request, which has no options."""
        message = convert.request_to(Request.of(question, **options))
        return convert.answer_from(self._call(self._stub().Generate, message, timeout_ms))

    def stream(
        self,
        question: Question,
        *,
        drafts: bool = False,
        timeout_ms: float | None = None,
        **options: Unpack[Options],
    ) -> Generator[Event, None, None]:
        """Yield the events of an answer; the Answer comes last. Closing the iterator ends the call.

        drafts: also yield tokens that a later stage may still revise (see values.StreamedText).
        """
        message = cascade_pb2.GenerateStreamRequest(
            request=convert.request_to(Request.of(question, **options)), include_drafts=drafts
        )
        with closing(self._call_stream(self._stub().GenerateStream, message, timeout_ms)) as responses:
            for response in responses:
                event = convert.event_from(response)
                if event is not None:
                    yield event

    def ask_batch(
        self, requests: Sequence[Question], *, timeout_ms: float | None = None
    ) -> Generator[BatchItem, None, None]:
        """Yield the outcome of each request when it is ready; a failure does not affect other requests.

        requests: Requests, or questions without options.
        """
        message = _batch(requests)
        with closing(self._call_stream(self._stub().GenerateBatch, message, timeout_ms)) as responses:
            for response in responses:
                yield convert.batch_item_from(response)

    def describe(self, *, timeout_ms: float | None = None) -> Description:
        """Return the stages, their costs and the policy in force."""
        message = cascade_pb2.DescribeRequest()
        return convert.description_from(self._call(self._stub().Describe, message, timeout_ms))

    def report(
        self,
        answer: Answer,
        *,
        correct: bool,
        policy_target: str = DEFAULT_POLICY_TARGET,
        timeout_ms: float = _REPORT_TIMEOUT_MS,
        tls: TlsFiles | Literal["as router"] | None = "as router",
    ) -> ReportReceipt:
        """Report to the policy service whether an answer was correct.

        The router takes no reports, so this calls the policy service directly, without the token. tls: of the
        policy service; None for a plain connection. Raises InvalidRequest if the policy did not judge the
        answer.
        """
        message = convert.report_to(answer, correct=correct)
        with closing(
            blocking.BlockingChannel(policy_target, self._connection.tls_for_reports(tls))
        ) as channel:
            stub = channel.stub(policy_pb2_grpc.PolicyServiceStub)
            try:
                response = blocking.call_unary(
                    stub.Report,
                    message,
                    timeout_ms=timeout_ms,
                    peer=f"policy service at {policy_target}",
                    metadata=(),
                    patience=Patience(),
                )
            except AsdError as error:
                raise _explained_report(error, policy_target) from error
        return convert.receipt_from(response)

    def _stub(self) -> cascade_pb2_grpc.CascadeServiceStub:
        return self._channel.stub(cascade_pb2_grpc.CascadeServiceStub)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Sent, Received],
        message: Sent,
        timeout_ms: float | None,
    ) -> Received:
        known = self._connection
        try:
            return blocking.call_unary(
                method,
                message,
                timeout_ms=known.timeout_ms if timeout_ms is None else timeout_ms,
                peer=known.peer,
                metadata=known.metadata,
                patience=known.patience,
            )
        except AsdError as error:
            raise known.explained(error, is_connected=blocking.is_told(error.__cause__)) from error

    def _call_stream(
        self,
        method: grpc.UnaryStreamMultiCallable[Sent, Received],
        message: Sent,
        timeout_ms: float | None,
    ) -> Generator[Received, None, None]:
        known = self._connection
        responses = blocking.call_stream(
            method,
            message,
            timeout_ms=known.timeout_ms if timeout_ms is None else timeout_ms,
            peer=known.peer,
            metadata=known.metadata,
            patience=known.patience,
        )
        with closing(responses):
            try:
                yield from responses
            except AsdError as error:
                raise known.explained(error, is_connected=blocking.is_told(error.__cause__)) from error


class AsyncClient:
    """Calls a cascade's router, for asyncio; one instance serves many concurrent calls of one event loop.

    Arguments and errors: see Client. It connects at its first call, or when an `async with` block begins.
    interceptors: gRPC interceptors for each call, such as OpenTelemetry's.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_ms: float = DEFAULT_TIMEOUT_MS,
        tls: TlsFiles | None = None,
        token: str = "",
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    ) -> None:
        self._connection = _Connection(target, timeout_ms, tls, token)
        self._interceptors = interceptors
        self._channel: grpc.aio.Channel | None = None
        self._made_stub: cascade_pb2_grpc.CascadeServiceAsyncStub | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight end."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    def with_token(self, token: str) -> AsyncClient:
        """Return a client with another token, on this one's connection, which this one closes.

        For a service that calls in the name of its own callers. Raises ValueError for a malformed token.
        """
        self._open()
        other = copy.copy(self)
        other._connection = self._connection.with_token(token)  # noqa: SLF001 - its own class
        return other

    async def ask(
        self, question: Question, *, timeout_ms: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Return the answer to a question: a text, a conversation, or a Request, which has no options."""
        message = convert.request_to(Request.of(question, **options))
        return convert.answer_from(await self._call(self._stub().Generate, message, timeout_ms))

    async def stream(
        self,
        question: Question,
        *,
        drafts: bool = False,
        timeout_ms: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of an answer; the Answer comes last. Closing the iterator ends the call.

        drafts: also yield tokens that a later stage may still revise (see values.StreamedText).
        """
        message = cascade_pb2.GenerateStreamRequest(
            request=convert.request_to(Request.of(question, **options)), include_drafts=drafts
        )
        stream = self._call_stream(self._stub().GenerateStream, message, timeout_ms)
        async with aclosing(stream) as responses:
            async for response in responses:
                event = convert.event_from(response)
                if event is not None:
                    yield event

    async def ask_batch(
        self, requests: Sequence[Question], *, timeout_ms: float | None = None
    ) -> AsyncGenerator[BatchItem, None]:
        """Yield the outcome of each request when it is ready; a failure does not affect other requests.

        requests: Requests, or questions without options.
        """
        message = _batch(requests)
        stream = self._call_stream(self._stub().GenerateBatch, message, timeout_ms)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield convert.batch_item_from(response)

    async def describe(self, *, timeout_ms: float | None = None) -> Description:
        """Return the stages, their costs and the policy in force."""
        message = cascade_pb2.DescribeRequest()
        return convert.description_from(await self._call(self._stub().Describe, message, timeout_ms))

    async def report(
        self,
        answer: Answer,
        *,
        correct: bool,
        policy_target: str = DEFAULT_POLICY_TARGET,
        timeout_ms: float = _REPORT_TIMEOUT_MS,
        tls: TlsFiles | Literal["as router"] | None = "as router",
    ) -> ReportReceipt:
        """Report to the policy service whether an answer was correct; see Client.report."""
        message = convert.report_to(answer, correct=correct)
        used = self._connection.tls_for_reports(tls)
        async with open_channel(policy_target, tls=used, interceptors=self._interceptors) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            try:
                response = await call_unary(
                    stub.Report,
                    message,
                    timeout_ms=timeout_ms,
                    peer=f"policy service at {policy_target}",
                )
            except AsdError as error:
                raise _explained_report(error, policy_target) from error
        return convert.receipt_from(response)

    def _open(self) -> grpc.aio.Channel:
        if self._is_closed:
            raise PreconditionFailed(blocking.CLOSED)
        if self._channel is None:
            known = self._connection
            self._channel = open_channel(known.target, tls=known.tls, interceptors=self._interceptors)
        return self._channel

    def _stub(self) -> cascade_pb2_grpc.CascadeServiceAsyncStub:
        channel = self._open()
        if self._made_stub is None:
            self._made_stub = cascade_pb2_grpc.CascadeServiceStub(channel)
        return self._made_stub

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Sent, Received],
        message: Sent,
        timeout_ms: float | None,
    ) -> Received:
        known = self._connection
        try:
            return await call_unary(
                method,
                message,
                timeout_ms=known.timeout_ms if timeout_ms is None else timeout_ms,
                peer=known.peer,
                metadata=known.metadata,
                patience=known.patience,
            )
        except AsdError as error:
            raise known.explained(error, is_connected=self._is_connected()) from error

    async def _call_stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Sent, Received],
        message: Sent,
        timeout_ms: float | None,
    ) -> AsyncGenerator[Received, None]:
        known = self._connection
        responses = call_stream(
            method,
            message,
            timeout_ms=known.timeout_ms if timeout_ms is None else timeout_ms,
            peer=known.peer,
            metadata=known.metadata,
            patience=known.patience,
        )
        async with aclosing(responses):
            try:
                async for response in responses:
                    yield response
            except AsdError as error:
                raise known.explained(error, is_connected=self._is_connected()) from error

    def _is_connected(self) -> bool:
        return self._channel is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY


def _batch(questions: Sequence[Question]) -> cascade_pb2.GenerateBatchRequest:
    if isinstance(questions, str):
        raise TypeError("requests is a list of questions, not one text")
    return cascade_pb2.GenerateBatchRequest(
        requests=[convert.request_to(Request.of(each)) for each in questions]
    )


def encryption_advice(message: str, *, is_encrypted: bool) -> str:
    """Return advice if an error message shows a mismatch of encryption; "" if it does not.

    message: gRPC's. The advice continues a sentence that begins with the peer's name.
    """
    for sign, advice in _UNENCRYPTED:
        if sign in message:
            return advice
    if message.endswith("Socket closed"):
        wish = "a certificate (tls.cert_file, tls.key_file)" if is_encrypted else "TLS (tls.ca_file)"
        return f"closes the connection: it may want {wish}"
    return ""


def in_plain_words(message: str) -> str:
    """Return an error message without gRPC's internal details."""
    message = message.replace(_UNGREETED, "it takes the connection and is silent")
    return _UNANSWERED.sub(lambda found: f" does not answer ({found[1].lower()})", message)


def _explained_report(error: AsdError, policy_target: str) -> AsdError:
    """Return the error of a report's call, in plain words."""
    if isinstance(error, Unavailable):
        return Unavailable(in_plain_words(error.message))
    if _is_unknown_service(error):
        return PreconditionFailed(f"{policy_target} is not a policy service: its default port is 50051")
    return error


def _is_unknown_service(error: AsdError) -> bool:
    cause = error.__cause__
    return isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNIMPLEMENTED
