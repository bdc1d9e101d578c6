"""What a request may hold, counted before it is decoded, and the text in it that is not UTF-8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from asd.errors import InvalidRequest
from asd.v1 import cascade_pb2, common_pb2, manager_pb2, policy_pb2, stage_pb2
from services.common import wire
from services.common.server import StatusInterceptor
from services.common.wire import MAX_ENTRIES, MAX_FIELDS, UNCOUNTED_BYTES, check_entries, find_invalid_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor

REQUESTS: list[Descriptor] = [
    method.input_type
    for module in (cascade_pb2, manager_pb2, policy_pb2, stage_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
_MIB = 1 << 20
# An unknown field of so many bytes, so that a message is large enough to be counted.
PADDING = b"\xa2\x06\x81\x10" + bytes(2049)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def delimited(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def lists(
    message: Descriptor, way: tuple[FieldDescriptor, ...] = ()
) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Yield the way to each list that a message can hold, the list last."""
    for field in message.fields:
        if field.is_repeated:
            yield (*way, field)
        if field.message_type is not None:
            yield from lists(field.message_type, (*way, field))


def entries(field: FieldDescriptor, count: int) -> bytes:
    """Return so many entries of a list, on the wire."""
    if field.type in {FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_STRING}:
        return delimited(field.number, b"") * count
    # 300 takes two bytes as a varint.
    one = bytes(4) if field.type == FieldDescriptor.TYPE_FLOAT else varint(300)
    return delimited(field.number, one * count)


WAYS = [(request, way) for request in REQUESTS for way in lists(request)]


def name(way: tuple[FieldDescriptor, ...]) -> str:
    """Return a list's path, as a refusal names it."""
    *outer, last = way
    return ".".join([*(f"{each.name}[0]" if each.is_repeated else each.name for each in outer), last.name])


def test_every_list_of_the_contracts_requests_has_a_bound() -> None:
    assert {way[-1].full_name for _, way in WAYS} == set(MAX_ENTRIES)


@pytest.mark.parametrize(
    ("request_type", "way"), [pytest.param(*each, id=f"{each[0].name} {name(each[1])}") for each in WAYS]
)
def test_a_list_is_refused_from_one_more_than_its_bound_on(
    request_type: Descriptor, way: tuple[FieldDescriptor, ...]
) -> None:
    *outer, last = way
    most = MAX_ENTRIES[last.full_name]
    for count in (most, most + 1):
        raw = entries(last, count)
        for field in reversed(outer):
            raw = delimited(field.number, raw)
        raw += PADDING
        assert GetMessageClass(request_type).FromString(raw)
        if count == most:
            check_entries(raw, request_type)
            continue
        with pytest.raises(InvalidRequest) as caught:
            check_entries(raw, request_type)
        assert caught.value.field == name(way)
        assert str(most) in caught.value.message


def test_numbers_that_do_not_stand_together_are_counted_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FIELDS", 1 << 21)
    most = MAX_ENTRIES["asd.v1.DraftChunk.token_ids"]
    check_entries(b"\x08\x01" * most, stage_pb2.DraftChunk.DESCRIPTOR)
    # The last one with those of before.
    for more in (b"\x08\x01", b"\x0a\x01\x01"):
        with pytest.raises(InvalidRequest, match="token_ids"):
            check_entries(b"\x08\x01" * most + more, stage_pb2.DraftChunk.DESCRIPTOR)


def test_parts_of_one_message_are_counted_together() -> None:
    """A message that comes twice is one: its lists are joined."""
    part = delimited(2, delimited(1, b"") * 2049)
    request = cascade_pb2.GenerateRequest
    check_entries(part, request.DESCRIPTOR)
    assert len(request.FromString(part * 2).conversation.messages) == 4098
    with pytest.raises(InvalidRequest) as caught:
        check_entries(part * 2, request.DESCRIPTOR)
    assert caught.value.field == "conversation.messages"
    # Those of two requests of a batch are not one.
    check_entries(delimited(1, part) * 2, cascade_pb2.GenerateBatchRequest.DESCRIPTOR)


def test_what_comes_behind_a_group_is_counted() -> None:
    """The decoder keeps groups that it does not know."""
    nine = delimited(3, delimited(5, b"x") * 9)
    for group in (b"\xa3\x06\xa4\x06", b"\xa3\x06\x0a\x01x\xa4\x06"):
        raw = PADDING + group + nine
        assert len(cascade_pb2.GenerateRequest.FromString(raw).sampling.stop) == 9
        with pytest.raises(InvalidRequest) as caught:
            check_entries(raw, cascade_pb2.GenerateRequest.DESCRIPTOR)
        assert caught.value.field == "sampling.stop"


def test_the_field_says_which_of_a_batchs_requests_it_is() -> None:
    fine = delimited(1, delimited(1, b"hi"))
    wrong = delimited(1, delimited(3, delimited(5, b"x") * 9))
    with pytest.raises(InvalidRequest) as caught:
        check_entries(fine * 3 + wrong + PADDING, cascade_pb2.GenerateBatchRequest.DESCRIPTOR)
    assert caught.value.field == "requests[3].sampling.stop"


@pytest.mark.parametrize(
    "field", [b"\xa0\x06\x01", b"\xa5\x06abcd", b"\xa1\x06abcdefgh", b"\xa2\x06\x00", b"\x3a\x00"]
)
@pytest.mark.parametrize("is_inner", [False, True])
def test_a_message_has_so_many_fields_at_most(field: bytes, is_inner: bool) -> None:
    """Unknown ones among them, and one that comes again and again."""
    descriptor = cascade_pb2.GenerateBatchRequest.DESCRIPTOR
    for count in (MAX_FIELDS - is_inner, MAX_FIELDS + 1):
        raw = delimited(1, field * count) if is_inner else field * count
        if count > MAX_FIELDS:
            with pytest.raises(InvalidRequest, match=str(MAX_FIELDS)):
                check_entries(raw, descriptor)
        else:
            check_entries(raw, descriptor)


@pytest.mark.parametrize(
    "raw",
    [
        PADDING[:-1],
        PADDING + b"\x0a\x05abcd",
        PADDING + b"\x0a",
        PADDING + b"\x08" + b"\xff" * 10,
        PADDING + b"\xff" * 10,
        PADDING + b"\x0f",
        PADDING + b"\x0d\x01",
        # The inner message ends in the midst of a field of its own.
        PADDING + delimited(2, b"\x0a\x05a") + b"\xa2\x06\x02bc",
    ],
)
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        cascade_pb2.GenerateRequest.FromString(raw)
    with pytest.raises(InvalidRequest, match="not a message"):
        check_entries(raw, cascade_pb2.GenerateRequest.DESCRIPTOR)


def test_a_message_of_another_package_has_fields_counted_alone() -> None:
    """Its types may hold themselves, as a value of OpenTelemetry does."""
    resource = Resource(attributes=[KeyValue(key=str(place)) for place in range(2000)])
    value = AnyValue(array_value=ArrayValue(values=[AnyValue(bool_value=True)]))
    for place in range(20):
        value = AnyValue(array_value=ArrayValue(values=[value, AnyValue(int_value=place)]))
    resource.attributes[0].value.CopyFrom(value)
    check_entries(resource.SerializeToString(), Resource.DESCRIPTOR)
    with pytest.raises(InvalidRequest, match=str(MAX_FIELDS)):
        check_entries(b"\x0a\x00" * (MAX_FIELDS + 1), Resource.DESCRIPTOR)


def test_a_small_message_is_not_counted() -> None:
    """What can be too long in it is checked once it is decoded."""
    checked = {"asd.v1.Sampling.stop", "asd.v1.Tools.tools", "asd.v1.Message.tool_calls"}
    others = {each: most for each, most in MAX_ENTRIES.items() if each not in checked}
    assert min(others.values()) >= UNCOUNTED_BYTES // 2
    check_entries(b"\x08" * UNCOUNTED_BYTES, cascade_pb2.GenerateBatchRequest.DESCRIPTOR)


_NUMBERS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 15, 16, 100])
_FIELDS = st.deferred(
    lambda: st.one_of(
        st.builds(lambda number, value: varint(number << 3) + varint(value), _NUMBERS, st.integers(0, 2**63)),
        st.builds(lambda number: varint(number << 3 | 5) + bytes(4), _NUMBERS),
        st.builds(lambda number: varint(number << 3 | 1) + bytes(8), _NUMBERS),
        # A group, which the decoder keeps as it is.
        st.builds(lambda inner: b"\xa3\x06" + inner + b"\xa4\x06", _MESSAGES),
        st.builds(delimited, _NUMBERS, st.sampled_from([b"", b"a", b"ab" * 70])),
        st.builds(delimited, _NUMBERS, _MESSAGES),
    )
)
_MESSAGES = st.lists(_FIELDS, max_size=14).map(b"".join)


@given(_MESSAGES)
def test_no_message_that_is_let_through_has_more_than_the_bounds(raw: bytes) -> None:
    request = cascade_pb2.GenerateBatchRequest
    raw = PADDING + delimited(1, raw) + raw
    try:
        check_entries(raw, request.DESCRIPTOR)
    except InvalidRequest:
        return
    try:
        message = request.FromString(raw)
    except DecodeError:
        return
    for each in message.requests:
        assert len(each.sampling.stop) <= 8


class Counted:
    """A message type that counts how often it is decoded."""

    DESCRIPTOR = cascade_pb2.GenerateBatchRequest.DESCRIPTOR
    decoded = 0

    @classmethod
    def FromString(cls, raw: bytes) -> cascade_pb2.GenerateBatchRequest:  # noqa: N802 - protobuf's name
        cls.decoded += 1
        return cascade_pb2.GenerateBatchRequest.FromString(raw)


class Details:
    method = "/asd.v1.CascadeService/GenerateBatch"
    invocation_metadata = ()


class AbortedError(Exception):
    pass


class Context:
    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        raise AbortedError(code, details)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\x0a\x00" * (4 * _MIB), id="requests of two bytes"),
        pytest.param(delimited(1, delimited(2, b"\x0a\x00" * (4 * _MIB - 20))), id="messages of two bytes"),
        pytest.param(delimited(1, delimited(3, b"\x2a\x00" * (4 * _MIB - 20))), id="empty stop sequences"),
        pytest.param(b"\xa2\x06\x00" * (8 * _MIB // 3), id="unknown fields"),
        pytest.param(
            delimited(1, b"\x3a\x00" * (4 * _MIB - 20) + b"\x3a\x01\xff"), id="text that is not UTF-8"
        ),
    ],
)
async def test_a_message_that_holds_too_much_is_not_decoded(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "decoded", 0)

    async def answer(request: Any, context: Any) -> int:
        return len(request.requests)

    async def handler(_: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(answer, Counted.FromString)

    wrapped = await StatusInterceptor().intercept_service(handler, Details())
    with pytest.raises(AbortedError) as caught:
        await wrapped.unary_unary(raw, Context())
    assert caught.value.args[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert Counted.decoded == 0
    assert await wrapped.unary_unary(delimited(1, b"") * 1000, Context()) == 1000
    assert Counted.decoded == 1


def test_invalid_text_is_found_at_its_place() -> None:
    message = cascade_pb2.GenerateRequest(stage="ok")
    message.sampling.stop.extend(["a", "@@"])
    raw = message.SerializeToString().replace(b"@@", b"\xff\xfe")
    assert find_invalid_text(raw, cascade_pb2.GenerateRequest.DESCRIPTOR) == "sampling.stop[1]"
    assert find_invalid_text(b"\xff\xff", cascade_pb2.GenerateRequest.DESCRIPTOR) == ""


def test_the_search_for_invalid_text_ends_after_so_many_fields_and_bytes() -> None:
    descriptor = common_pb2.Message.DESCRIPTOR
    wrong = delimited(2, b"\xff")
    for before in (delimited(2, b"") * 100, delimited(2, b"x" * 1000) * 100):
        assert find_invalid_text(before + wrong, descriptor) == "content"
    for before in (delimited(2, b"") * (4 * _MIB), delimited(2, b"x" * 100_000) * 20):
        assert find_invalid_text(before + wrong, descriptor) == ""
