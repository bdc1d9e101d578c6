"""Targets of channels: their hosts and addresses."""

from __future__ import annotations

import asyncio
import re
import socket

# "host:port" (an IPv6 address in brackets), or a name with its name server: "dns://8.8.8.8/host:port".
_ADDRESS = re.compile(r"(dns://[^\s/]+/)?([^\s:/\[\]]+|\[[0-9a-fA-F:.%]+\]):[0-9]{1,5}")


async def resolve_addresses(name: str) -> list[str]:
    """Return the addresses of a "host:port" as "ip:port". Raises OSError if the name has none."""
    host, _, port = name.rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    ips = {str(address[0]) for *_, address in found}
    return sorted(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips)


def check_target(target: str) -> str:
    """Return a target unchanged. Raises ValueError if one of its addresses has no valid port."""
    scheme, _, rest = target.partition(":")
    if scheme in {"unix", "unix-abstract", "ipv4", "ipv6", "xds"} and rest:
        return target
    for address in target.removeprefix("dns:///").split(","):
        if not _ADDRESS.fullmatch(address.strip(" ")) or not 0 < int(address.rpartition(":")[2]) < 65536:
            raise ValueError(f"{address.strip()!r} is not HOST:PORT, with a port from 1 to 65535")
    return target


def neighbour(target: str) -> str:
    """Return the address one port above a target's. Raises ValueError if it has no single port."""
    address, _, port = target.rpartition(":")
    if not _ADDRESS.fullmatch(target.removeprefix("dns:///")) or int(port) >= 65535:
        raise ValueError(f"nothing is one port above {target}")
    return f"{address}:{int(port) + 1}"
