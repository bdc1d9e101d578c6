"""Targets of channels: their hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def host_of(target: str) -> str:
    """Return the host of a target such as "dns:///host:port" or "host:port"; "" if it has no single host."""
    address = target.removeprefix("dns:///")
    if "," in address or "://" in address or address.startswith(("unix:", "ipv4:", "ipv6:")):
        return ""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(target: str) -> bool:
    """Return whether a target is on this machine."""
    scheme, _, rest = target.partition(":")
    if scheme in {"unix", "unix-abstract"}:
        return True
    addresses: Iterable[str] = (rest if scheme in {"ipv4", "ipv6"} else target).split(",")
    hosts = [host_of(address.strip()) for address in addresses]
    return all(host in {"localhost", "::1"} or host.startswith("127.") for host in hosts)
