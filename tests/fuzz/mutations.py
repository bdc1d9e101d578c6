"""Damage to bytes, to JSON and to protobuf messages, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_NUMBERS = (0, -1, 1, 1.5, 2**31, 2**63, -(2**63), 10**30, 1e308, 5e-324, float("nan"), float("inf"))
_TEXTS = (
    "",
    "\x1b[2J\r\n",
    "a\u202eb",
    "../../etc/passwd",
    "\0",
    "x" * 5000,
    "é漢😀",
    "\ud800",
    "(a+)+$",
    "{% x %}",
)
_CHUNKS = (
    b"\0",
    b"\xff" * 8,
    b"[" * 300,
    b'{"a":' * 300,
    b"\x1b[2J",
    b"NaN",
    b"1e999",
    b"9" * 400,
    b"\n",
    b"&a *a",
)


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return content with some of its bytes flipped, left out, doubled or replaced."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(made) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[place:]
        elif kind == 2:
            del made[place : place + rng.choice((1, 8, 64))]
        elif kind == 3:
            made[place:place] = rng.choice(_CHUNKS)
        else:
            made[place:place] = made[max(place - rng.choice((1, 16, 256)), 0) : place]
    return bytes(made)


def damage_json(rng: random.Random, content: bytes, names: Sequence[str] = ()) -> bytes:
    """Return a JSON text with a value of another type, size or depth, a key less, more, or twice.

    names: further texts that keys and values become.
    """
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _damage_value(rng, value, (*_TEXTS, *names))
    text = json.dumps(value)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    return text.encode()


def _damage_value(rng: random.Random, value: Any, texts: Sequence[str]) -> Any:
    root = [copy.deepcopy(value)]
    parent: Any = root
    key: Any = 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    kind = rng.randrange(4)
    if kind == 0 and parent is not root:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(texts)] = parent.pop(key)
    else:
        parent[key] = _hostile(rng, parent[key], texts)
    return root[0]


def _hostile(rng: random.Random, value: Any, texts: Sequence[str]) -> Any:
    kind = rng.randrange(8)
    if kind == 0:
        deep: Any = value
        for _ in range(rng.choice((2, 99, 150))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 1:
        return [value] * rng.choice((2, 300))
    if kind == 2:
        return rng.choice(texts)
    if kind == 3:
        return rng.choice((None, True, False, [], {}))
    return rng.choice(_NUMBERS)
