"""Answers as the Hugging Face hub does, with the models of a folder: nothing outside is reached from pods.

Runs in a pod of the stage's image, which holds asd's own models; they are called asd/NAME here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The two calls that a download consists of."""

    protocol_version = "HTTP/1.1"
    models = Path("/models")

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # /api/models/asd/NAME/revision/REVISION, or /asd/NAME/resolve/COMMIT/FILE
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "models", "asd"] and (self.models / parts[3]).is_dir():
            self._send(json.dumps(self._info(parts[3])).encode(), {"Content-Type": "application/json"})
        elif len(parts) == 5 and parts[2] == "resolve" and (self.models / parts[1] / parts[4]).is_file():
            content = (self.models / parts[1] / parts[4]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._send(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self._send(b"", {"X-Error-Code": "RepoNotFound"}, status=404)

    def _info(self, name: str) -> dict[str, object]:
        siblings = []
        for path in sorted(path for path in (self.models / name).iterdir() if path.is_file()):
            content = path.read_bytes()
            entry: dict[str, object] = {"rfilename": path.name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
            siblings.append(entry)
        return {"_id": "1", "id": f"asd/{name}", "sha": COMMIT, "siblings": siblings, "tags": []}

    def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(sys.argv[1])), Hub).serve_forever()
