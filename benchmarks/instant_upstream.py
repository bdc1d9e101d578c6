"""A server of OpenAI's form that answers at once: what a proxy is measured before.

For benchmarks alone. `python -m benchmarks.instant_upstream HOST:PORT`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import uvicorn

_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "asd",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9},
    }
).encode()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer each request with the same words."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _ANSWER})


async def run(host: str, port: int) -> None:
    """Serve until the process is ended."""
    listening = socket.create_server((host, port))
    # Else the second part of an answer waits for the first one's acknowledgement, 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    address = "{}:{}".format(*listening.getsockname()[:2])
    sys.stdout.write(f"READY upstream {address}\n")
    sys.stdout.flush()
    await server.serve([listening])


if __name__ == "__main__":
    given_host, _, given_port = sys.argv[1].rpartition(":")
    asyncio.run(run(given_host, int(given_port)))
