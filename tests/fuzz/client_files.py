"""Readers of what the client and connections read: answers, pulled models, certificates, tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import huggingface_hub

from asd.errors import InvalidRequest, NotFound, PreconditionFailed, ResourceExhausted, Unavailable
from asd.transport.tls import watched_channel_credentials
from asd.transport.token import bearer
from services.cli.connecting import Connection
from services.cli.files import read_answer
from services.common.settings import SettingsError
from services.common.tls import ClientTls, ServerTls, server_credentials
from services.local.pull import Pulled, pull
from services.stage.engines.onnx.partial_folders import MANIFEST, find_damage, finish, partial_folder
from tests.fakes import tiny_llama
from tests.integration.common.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What a listing of a hub, or a record, is changed to where names of files stand. No reader may follow them.
HOSTILE_NAMES = (
    "../victim.safetensors",
    "../../victim",
    "/victim/config.json",
    "..",
    "a/../../victim.safetensors",
    "..\\victim.safetensors",
    "config.json/../../victim",
    "README\n\x1b[2J",
    "README\0",
    "README" + "x" * 300,
    ".safetensors",
    ".asd-pull.json",
)
_MODEL, _COMMIT = "owner/model", "0123456789abcdef0123456789abcdef01234567"
_PULL_ERRORS = (InvalidRequest, NotFound, PreconditionFailed, ResourceExhausted, Unavailable)
_VICTIM = b"nobody may touch this"

# A reader's name, its folder of files, what reads it, its errors, and the files that are damaged.
Reader = tuple[str, "Path", "Callable[[Path], object]", tuple[type[Exception], ...], tuple[str, ...]]


class Escaped(Exception):  # noqa: N818 - it says what there is
    """A reader wrote or followed what is outside its folder, or printed what a terminal executes."""


def make_readers(folder: Path) -> list[Reader]:
    """Return the readers, with seeds in a folder."""
    pulled = _pulled(folder / "pulled")
    tls = folder / "tls"
    tls.mkdir()
    Authority(tls).issue("server", "localhost")
    (tls / "token").write_text("0123456789abcdef\n")
    answer = folder / "answer"
    answer.mkdir()
    (answer / "answer.json").write_text(json.dumps(_ANSWER))
    return [
        ("answer", answer, _answer, (InvalidRequest,), ("answer.json",)),
        ("pull record", pulled, _pull, _PULL_ERRORS, (".asd-pull.json",)),
        ("pull listing", pulled, _pull, _PULL_ERRORS, ("listing.json",)),
        ("manifest", _prepared(folder / "prepared"), _check, (), (MANIFEST,)),
        ("server tls", tls, _server, (PreconditionFailed,), ("*.crt", "*.key", "ca.pem")),
        ("client tls", tls, _client, (PreconditionFailed,), ("*.crt", "*.key", "ca.pem")),
        ("token", tls, _token, (SettingsError,), ("token",)),
    ]


_ANSWER = {
    "text": "4",
    "request_id": "r",
    "token_ids": [1, 2],
    "tokenizer_fingerprint": "f",
    "stage_index": 1,
    "policy_ms": 0.5,
    "plan_source": "policy",
    "trace_id": "t",
    "stages": [],
    "stage": "large",
    "policy_version": "v1",
    "cost": 1.5,
    "latency_ms": 12.0,
    "finish_reason": "eos",
    "p_correct": 0.9,
}


def _answer(at: Path) -> None:
    read_answer(at / "answer.json")


def _server(at: Path) -> None:
    server_credentials(
        ServerTls(cert_file=at / "server.crt", key_file=at / "server.key", client_ca_file=at / "ca.pem")
    )


def _client(at: Path) -> None:
    files = ClientTls(ca_file=at / "ca.pem", cert_file=at / "server.crt", key_file=at / "server.key")
    watched_channel_credentials(files)


def _token(at: Path) -> None:
    bearer(Connection(token_file=at / "token").read_token())


def _prepared(folder: Path) -> Path:
    """Write a prepared model's folder, and beside it what is none of its files."""
    folder.mkdir()
    (folder / "victim").write_bytes(_VICTIM)
    target = folder / "form"
    with partial_folder(target) as partial:
        for name in ("model.onnx", "genai_config.json"):
            (partial / name).write_text(name)
        finish(partial, target)
    return folder


def _check(at: Path) -> None:
    damage = find_damage(at / "form")
    if damage is not None and not damage.isprintable():
        raise Escaped(f"it says what is no printable line: {damage!r}")
    if damage is None:
        listed = json.loads((at / "form" / MANIFEST).read_bytes())["files"]
        if not listed or any("/" in name or name.startswith("..") for name in listed):
            raise Escaped(f"a list of others' files passes for whole: {list(listed)}")


def _pulled(folder: Path) -> Path:
    """Pull a model from a listing of its files; both stay there, to be damaged."""
    folder.mkdir()
    hub = folder / "hub"
    tiny_llama.write(hub)
    (hub / "README.md").write_text("A model.")
    (folder / "victim.safetensors").write_bytes(_VICTIM)
    listing = []
    for path in sorted(hub.iterdir()):
        content = path.read_bytes()
        entry: dict[str, Any] = {"rfilename": path.name, "size": len(content), "lfs": None}
        entry["blob_id"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        if path.suffix == ".safetensors":
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest()}
        listing.append(entry)
    (folder / "listing.json").write_text(json.dumps(listing))
    _pull(folder)
    return folder


def _pull(at: Path) -> Pulled:
    """Pull again, with what is listed now. Raises Escaped where anything beside the model changes."""
    model = at / "model"
    before = _files_outside(at, model)

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def model_info(self, *_: Any, **__: Any) -> Any:
            # Damaged, it may have any shape; the hub's library makes its own types of it.
            try:
                listed = json.loads((at / "listing.json").read_bytes())
            except ValueError:
                listed = []
            return SimpleNamespace(id=_MODEL, sha=_COMMIT, siblings=_siblings(listed))

    def load(_: str, name: str, *, local_dir: Path, **__: Any) -> None:
        source = at / "hub" / name
        target = local_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source if source.is_file() else at / "hub" / "README.md", target)

    said: list[str] = []
    with (
        mock.patch.object(huggingface_hub, "HfApi", Api),
        mock.patch.object(huggingface_hub, "hf_hub_download", load),
    ):
        try:
            done = pull(_MODEL, at, say=said.append)
        finally:
            if _files_outside(at, model) != before:
                raise Escaped("it changes files beside its own")
    for line in (*said, *done.removed):
        if not line.isprintable():
            raise Escaped(f"it says what is no printable line: {line!r}")
    return done


def _siblings(listed: Any) -> list[Any]:
    """Return entries as the hub's library makes them: a name and a size, each of its type."""
    siblings = []
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
            continue
        lfs = entry.get("lfs")
        siblings.append(
            SimpleNamespace(
                rfilename=entry["rfilename"],
                size=entry["size"] if type(entry.get("size")) is int else None,
                blob_id=entry["blob_id"] if isinstance(entry.get("blob_id"), str) else None,
                lfs=SimpleNamespace(sha256=str(lfs.get("sha256"))) if isinstance(lfs, dict) else None,
            )
        )
    return siblings


def _files_outside(at: Path, inner: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in at.parent.rglob("*")
        if path.is_file() and path.is_relative_to(at) and not path.is_relative_to(inner)
    } | {str(path): b"" for path in at.parent.iterdir()}
