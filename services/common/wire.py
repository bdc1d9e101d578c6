"""Checks protobuf's wire format before decoding: the decoder bounds nothing, and names no field at fault.

Entries are counted before they are decoded: an empty message in a list has two bytes on the wire, and a
hundred in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor

from asd.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.descriptor import Descriptor

# Most entries of each list in a request, by the list's full name. A test fails if a list of the contract's
# requests is missing here. Chosen: above any sensible use, and low enough that a message at all bounds is
# quickly decoded and checked. The contract states them.
MAX_ENTRIES: Mapping[str, int] = {
    "asd.v1.GenerateBatchRequest.requests": 1024,
    "asd.v1.GenerateRequest.chain": 1024,
    "asd.v1.Conversation.messages": 4096,
    "asd.v1.Sampling.stop": 8,
    "asd.v1.Tools.tools": 128,
    "asd.v1.Message.tool_calls": 128,
    "asd.v1.Choice.texts": 1024,
    "asd.v1.PlanRequest.cascade": 1024,
    "asd.v1.PlanRequest.conditions": 1024,
    "asd.v1.DecideRequest.cascade": 1024,
    "asd.v1.DecideRequest.conditions": 1024,
    # One per token: a context of a million tokens.
    "asd.v1.Draft.token_ids": 1 << 20,
    "asd.v1.DraftChunk.token_ids": 1 << 20,
    "asd.v1.DraftEvidence.logprobs": 1 << 20,
    "asd.v1.DraftEvidence.entropies": 1 << 20,
    "asd.v1.DraftEvidence.top2_margins": 1 << 20,
    "asd.v1.VerificationEvidence.ranks": 1 << 20,
}
_PACKAGE = "asd.v1"
# Size up to which messages are not counted. Entries take at least two bytes, so such a message can break only
# the bounds of `stop`, tools and tool calls, which services.common.validation checks after decoding. Most
# requests are this small.
UNCOUNTED_BYTES = 2048
# Most fields of a message, including those inside its lists. Counting them takes 40 ms. A batch of 1024
# conversations with 100 messages each has fewer.
MAX_FIELDS = 1 << 17
# Limits of the search for text that is not UTF-8. Chosen: a millisecond's work.
_SEARCHED_FIELDS = 500
_SEARCHED_BYTES = 1 << 20

NOT_A_MESSAGE = "the request's bytes are not a message of the method's request type"

_VARINT, _FIXED64, _LENGTH, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_SIZES = {
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
}
_NOT_PACKED = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE}
# The bytes of a varint before its last one.
_CONTINUED = bytes(range(0x80, 0x100))


@dataclass(frozen=True, slots=True)
class _Field:
    """How a field is counted.

    most: entries that it may have; 0: it is not a list. inner: the fields of its messages, if there are lists
    among them. packed: bytes of each number if they are packed; 1: varints; 0: not packed.
    """

    name: str
    most: int
    inner: Mapping[int, _Field] | None
    packed: int


# Counts by field number: of a list's entries, or of the fields in a single message. A single message may come
# in several parts, which are merged.
_Counts = dict[int, Any]


class _TooManyEntriesError(Exception):
    """A list has too many entries. path: the list."""

    def __init__(self, path: str, most: int) -> None:
        super().__init__(path)
        self.path = path
        self.most = most


def check_entries(raw: bytes, descriptor: Descriptor) -> None:
    """Check that no list of an encoded message has too many entries.

    Raises InvalidRequest, naming the list. Also raises it if the message has too many fields, or the bytes
    are not in wire format. Takes 0.3 µs per field; messages of up to UNCOUNTED_BYTES are not counted.
    """
    if len(raw) <= UNCOUNTED_BYTES:
        return
    try:
        _count(raw, 0, len(raw), _counted_fields(descriptor), {}, MAX_FIELDS)
    except _TooManyEntriesError as error:
        raise InvalidRequest(
            f"{error.path} may have {error.most} entries at most: send fewer", field=error.path
        ) from None
    except (IndexError, ValueError):
        raise InvalidRequest(NOT_A_MESSAGE) from None


@cache
def _counted_fields(descriptor: Descriptor) -> Mapping[int, _Field]:
    """Return a type's fields that are bounded lists, or messages with such lists inside, by number.

    Types of other packages are left out: they may be recursive, which no type of the contract is.
    """
    counted: dict[int, _Field] = {}
    if descriptor.file.package != _PACKAGE:
        return counted
    for field in descriptor.fields:
        inner = None if field.message_type is None else _counted_fields(field.message_type)
        most = MAX_ENTRIES.get(field.full_name, 0)
        if not most and not inner:
            continue
        packed = 0 if field.type in _NOT_PACKED else _SIZES.get(field.type, 1)
        counted[field.number] = _Field(field.name, most, inner or None, packed)
    return counted


def _count(
    raw: bytes, position: int, end: int, fields: Mapping[int, _Field], counts: _Counts, left: int
) -> int:
    """Count the entries of a message's lists, and return how many more fields there may be.

    position, end: bounds of the message. left: how many fields there may be. Raises _TooManyEntriesError,
    InvalidRequest for too many fields, ValueError or IndexError for bytes that are not in wire format.
    """
    while position < end:
        left -= 1
        if left < 0:
            raise InvalidRequest(f"the request has more than {MAX_FIELDS} fields: send less at a time")
        tag = raw[position]
        position += 1
        if tag > 0x7F:
            tag, position = _varint(raw, position - 1)
        start, position = _payload(raw, position, tag & 7)
        if position > end:
            raise ValueError("truncated field")
        field = fields.get(tag >> 3)
        if field is None:
            continue
        index = 0
        if field.most:
            index = counts.get(tag >> 3, 0)
            is_packed = field.packed and tag & 7 == _LENGTH
            total = index + (_numbers(raw[start:position], field.packed) if is_packed else 1)
            counts[tag >> 3] = total
            if total > field.most:
                raise _TooManyEntriesError(field.name, field.most)
        if field.inner is not None and tag & 7 == _LENGTH:
            inner_counts = {} if field.most else counts.setdefault(tag >> 3, {})
            try:
                left = _count(raw, start, position, field.inner, inner_counts, left)
            except _TooManyEntriesError as error:
                place = f"{field.name}[{index}]" if field.most else field.name
                raise _TooManyEntriesError(f"{place}.{error.path}", error.most) from None
    return left


def _payload(raw: bytes, position: int, kind: int) -> tuple[int, int]:
    """Return the begin and end of a field's payload. position: the end of its tag."""
    if kind == _LENGTH:
        size, start = raw[position], position + 1
        if size > 0x7F:
            size, start = _varint(raw, position)
        return start, start + size
    if kind == _VARINT:
        return position, _varint(raw, position)[1]
    if kind == _FIXED64:
        return position, position + 8
    if kind == _FIXED32:
        return position, position + 4
    if kind in {_START_GROUP, _END_GROUP}:
        # The contract has no groups. The fields inside a group are counted as the message's own.
        return position, position
    raise ValueError(f"wire type {kind}")


def _numbers(packed: bytes, size: int) -> int:
    """Return how many numbers are packed together. size: bytes of each; 1: varints."""
    return len(packed) // size if size > 1 else len(packed.translate(None, _CONTINUED))


def find_invalid_text(raw: bytes, descriptor: Descriptor) -> str:
    """Return the path of the first string field that is not UTF-8 ("conversation.messages[1].content"), or
    "".

    Also returns "" if the bytes are not in wire format, and if the search would take more than about a
    millisecond: it covers only the first fields, and the first mebibyte of text.
    """
    try:
        return _Search().find(raw, descriptor)
    except (IndexError, ValueError):
        return ""


class _Search:
    """Searches a limited number of fields and bytes for text that is not UTF-8."""

    def __init__(self) -> None:
        self._fields = _SEARCHED_FIELDS
        self._bytes = _SEARCHED_BYTES

    def find(self, raw: bytes, descriptor: Descriptor) -> str:
        """Return the path of the first such text, or "". Raises ValueError or IndexError if the bytes are not
        in wire format, or the limits are reached."""
        seen: dict[str, int] = {}
        for number, payload in self._length_delimited(raw):
            field = descriptor.fields_by_number.get(number)
            if field is None or field.type not in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE}:
                continue
            index = seen.get(field.name, 0)
            seen[field.name] = index + 1
            path = f"{field.name}[{index}]" if field.is_repeated else field.name
            if field.message_type is not None:
                inner = self.find(payload, field.message_type)
                if inner:
                    return f"{path}.{inner}"
                continue
            self._bytes -= len(payload)
            if self._bytes < 0:
                raise ValueError("too many bytes to look at")
            try:
                payload.decode("utf-8")
            except UnicodeDecodeError:
                return path
        return ""

    def _length_delimited(self, raw: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield number and payload of each length-delimited field. Raises ValueError or IndexError if the
        bytes are not in wire format."""
        position = 0
        while position < len(raw):
            self._fields -= 1
            if self._fields < 0:
                raise ValueError("too many fields to look at")
            tag, position = _varint(raw, position)
            kind = tag & 7
            if kind == _VARINT:
                _, position = _varint(raw, position)
            elif kind == _FIXED64:
                position += 8
            elif kind == _FIXED32:
                position += 4
            elif kind == _LENGTH:
                size, position = _varint(raw, position)
                payload = raw[position : position + size]
                if len(payload) < size:
                    raise ValueError("truncated field")
                yield tag >> 3, payload
                position += size
            else:
                raise ValueError(f"wire type {kind}")


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Return the varint at a position and the position after it."""
    value = shift = 0
    while shift < 70:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("varint too long")
