"""Reads protobuf's wire format where the decoder only says that a message does not decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.descriptor import FieldDescriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def find_invalid_text(raw: bytes, descriptor: Descriptor) -> str:
    """Return the path of the first string field that is not UTF-8 ("conversation.messages[1].content"), or
    "".

    Returns "" as well where the bytes are not in wire format at all.
    """
    seen: dict[str, int] = {}
    try:
        for number, payload in _length_delimited(raw):
            field = descriptor.fields_by_number.get(number)
            if field is None or field.type not in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE}:
                continue
            index = seen.get(field.name, 0)
            seen[field.name] = index + 1
            path = f"{field.name}[{index}]" if field.is_repeated else field.name
            if field.message_type is not None:
                inner = find_invalid_text(payload, field.message_type)
                if inner:
                    return f"{path}.{inner}"
                continue
            try:
                payload.decode("utf-8")
            except UnicodeDecodeError:
                return path
    except (IndexError, ValueError):
        return ""
    return ""


def _length_delimited(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and payload of each length-delimited field. Raises ValueError or IndexError on other
    bytes."""
    position = 0
    while position < len(raw):
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
