"""Chooses a stage's replica: the one that holds the conversation's prefix, unless it is busy. Pure."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Load of a replica, relative to the mean, above which a conversation goes elsewhere. Chosen, as in the
# paper's evaluation: more keeps prefixes longer, less keeps queues shorter.
_LOAD_FACTOR = 1.25


def choose_replica(key: str, loads: Mapping[str, int]) -> str:
    """Return the address to call for a key. loads: calls in flight by address, at least one address.

    A key prefers the same address while other addresses come and go. An address above its fair share of the
    calls is passed over. Source: rendezvous hashing, Thaler and Ravishankar 1998; bounded loads, Mirrokni,
    Thorup and Zadimoghaddam 2018.
    """
    most = math.ceil(_LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads))
    preferred = sorted(loads, key=lambda address: _weight(key, address), reverse=True)
    return next(address for address in preferred if loads[address] < most)


def _weight(key: str, address: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{address}".encode(), digest_size=8).digest()
