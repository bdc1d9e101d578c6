"""A port of the machine's 127.0.0.1 that leads to a node's API server: `python -m tools.node.gate PID FILE`.

PID: of the node's process 1, as the machine numbers it. The port is written to FILE.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from pathlib import Path

from tools.node.config import API_PORT, NODE_ADDRESS


def serve(pid: int, port_file: Path) -> None:
    """Forward a port of the machine's 127.0.0.1 to the node's API server, until the node is gone."""
    listener = socket.create_server(("127.0.0.1", 0))
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    # A socket stays in the namespace in which it was made. Python has os.setns from 3.12 on.
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    port_file.write_text(f"{listener.getsockname()[1]}\n", encoding="ascii")
    asyncio.run(_forward(listener, pid))


async def _forward(listener: socket.socket, pid: int) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection(NODE_ADDRESS, API_PORT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))
        to_writer.close()
        writer.close()

    # The namespace would live on with this process.
    end = asyncio.Event()
    watch = os.pidfd_open(pid)
    asyncio.get_running_loop().add_reader(watch, end.set)
    server = await asyncio.start_server(answer, sock=listener)
    await end.wait()
    server.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
