"""`asd models pull` against a server that answers as the hub does, through the hub's own library."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asd.errors import AsdError, InvalidRequest, NotFound, PreconditionFailed, ResourceExhausted, Unavailable
from services.local import pull as pulling
from services.local.pull import Pulled, pull
from services.stage.engines.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = Path(__file__).parents[3] / "models" / "small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Hub:
    """A hub with one model. refuses: a status, with an error's name, for everything."""

    def __init__(self) -> None:
        self.model, self.commit = "owner/small", COMMIT
        self.files = {path.name: path.read_bytes() for path in SMALL.iterdir() if path.is_file()}
        self.files["pytorch_model.bin"] = b"the same weights in another form"
        self.files["original/consolidated.safetensors"] = b"once more"
        self.refuses: tuple[int, str] | None = None
        # Bytes after which the next answer with a file breaks off; and what files are damaged, how often.
        self.breaks_after: int | None = None
        self.damages: dict[str, int] = {}
        self.sent: list[tuple[str, str, int]] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.tokens.add(request.headers.get("Authorization"))
        if self.refuses is not None:
            self._send(request, self.refuses[0], b"", {"X-Error-Code": self.refuses[1]})
        elif request.path.startswith(f"/api/models/{self.model}"):
            self._send(request, 200, json.dumps(self._info()).encode(), {"Content-Type": "application/json"})
        elif request.path.startswith(f"/{self.model}/resolve/{self.commit}/"):
            self._send_file(request, request.path.rpartition("/")[2])
        else:
            self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            if name.endswith((".safetensors", ".bin")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
            siblings.append(entry)
        return {"_id": "1", "id": self.model, "sha": self.commit, "siblings": siblings, "tags": []}

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content = self.files[name]
        etag = hashlib.sha256(content).hexdigest()
        if request.command == "GET" and self.damages.get(name):
            self.damages[name] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = request.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if request.command == "GET":
            self.sent.append((name, request.command, len(content) - start))
        self._send(request, 206 if asked else 200, content[start:], headers)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.breaks_after is not None and len(body) > self.breaks_after:
            request.wfile.write(body[: self.breaks_after])
            self.breaks_after = None
            request.wfile.flush()
            request.connection.close()
            request.close_connection = True
        else:
            request.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    server = Hub()
    yield server
    server.close()


def _pull(hub: Hub, folder: Path, **options: Any) -> Pulled:
    return pull(hub.model, folder, endpoint=hub.endpoint, **options)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".asd-pull.json"}


# Of an earlier revision: weights in two files, and what the later one does without.
_EARLIER = {
    "model-00001-of-00002.safetensors": b"old weights",
    "model-00002-of-00002.safetensors": b"more of them",
    "model.safetensors.index.json": b"{}",
    "chat_template.jinja": b"old template",
}


def _pull_earlier(hub: Hub, folder: Path) -> dict[str, bytes]:
    """Pull an earlier revision of the hub's model; return what lies in its folder."""
    later = dict(hub.files)
    hub.files = {name: later[name] for name in ("config.json", "tokenizer.json")} | _EARLIER
    hub.files["tokenizer.json"] += b" "
    hub.commit = "e" * 40
    done = _pull(hub, folder)
    hub.files, hub.commit = later, COMMIT
    hub.sent.clear()
    return _content(done.path)


def test_a_model_comes_whole_and_only_what_a_stage_reads(hub: Hub, tmp_path: Path) -> None:
    lines: list[str] = []
    done = _pull(hub, tmp_path, token="hf_secret", say=lines.append)
    assert done.path == tmp_path / "small"
    there = {path.name for path in done.path.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert there == {path.name for path in SMALL.iterdir()}
    assert all((done.path / name).read_bytes() == hub.files[name] for name in there)
    assert (done.revision, done.files) == (COMMIT, len(there))
    assert done.loaded_bytes == done.size_bytes == sum(len(hub.files[name]) for name in there)
    assert read_checkpoint(done.path).parameters > 300_000
    assert hub.tokens == {"Bearer hf_secret"}
    assert lines[0].startswith("config.json (")
    assert lines[-1].endswith(f"{len(there)} of {len(there)})")


def test_a_second_pull_reads_nothing(hub: Hub, tmp_path: Path) -> None:
    weights = _pull(hub, tmp_path).path / WEIGHTS
    hub.sent.clear()
    # Of the size and the time that were checked: only reading it would show what changed.
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(bytes(weights.stat().st_size))
    os.utime(weights, ns=times)
    assert _pull(hub, tmp_path).loaded_bytes == 0
    assert hub.sent == []


def test_a_pull_that_broke_off_goes_on_where_it_stopped(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # The library keeps what came in steps of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.breaks_after = 300_000
    try:
        _pull(hub, tmp_path)
    except Unavailable:
        _pull(hub, tmp_path)
    weights = [size for name, _, size in hub.sent if name == WEIGHTS]
    whole = len(hub.files[WEIGHTS])
    assert weights[0] == whole
    assert len(weights) == 2
    assert weights[1] < whole
    assert (tmp_path / "small" / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_damaged_file_is_loaded_again(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.damages[name] = 1
    _pull(hub, tmp_path)
    assert (tmp_path / "small" / name).read_bytes() == hub.files[name]
    assert [each for each, _, _ in hub.sent].count(name) == 2


def test_a_file_that_stays_damaged_is_not_left_there(hub: Hub, tmp_path: Path) -> None:
    hub.damages[WEIGHTS] = 2
    with pytest.raises(PreconditionFailed, match=r"model\.safetensors of owner/small came twice"):
        _pull(hub, tmp_path)
    assert not (tmp_path / "small" / WEIGHTS).exists()


def test_a_file_that_was_changed_here_is_loaded_anew(hub: Hub, tmp_path: Path) -> None:
    _pull(hub, tmp_path)
    path = tmp_path / "small" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    hub.sent.clear()
    _pull(hub, tmp_path)
    assert [name for name, _, _ in hub.sent] == [WEIGHTS]
    assert path.read_bytes() == hub.files[WEIGHTS]


def test_a_file_that_was_damaged_here_is_loaded_anew_though_its_size_is_the_same(
    hub: Hub, tmp_path: Path
) -> None:
    pulled = _pull(hub, tmp_path)
    config = pulled.path / "config.json"
    whole = config.read_bytes()
    os.utime(config, ns=(0, 0))
    assert _pull(hub, tmp_path).loaded_bytes == 0
    config.write_bytes(whole[:-1] + b" ")
    assert _pull(hub, tmp_path).loaded_bytes == len(whole)
    assert config.read_bytes() == whole


def test_a_wrong_architecture_is_known_before_the_weights_are_loaded(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = json.dumps({"architectures": ["T5ForConditionalGeneration"]}).encode()
    with pytest.raises(PreconditionFailed, match="T5ForConditionalGeneration"):
        _pull(hub, tmp_path)
    assert [name for name, _, _ in hub.sent] == ["config.json"]


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (
            403,
            "GatedRepo",
            PreconditionFailed,
            "is gated: accept its terms at https://huggingface.co/owner/small",
        ),
        (401, "GatedRepo", PreconditionFailed, "then set HF_TOKEN"),
        (401, "RepoNotFound", NotFound, "the hub has no model owner/small, or it is private"),
        (404, "RevisionNotFound", NotFound, "has no revision 'v9'"),
        (503, "", Unavailable, "the hub answered 503 for owner/small: try again later"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(
    hub: Hub, tmp_path: Path, status: int, code: str, kind: type[AsdError], words: str
) -> None:
    hub.refuses = (status, code)
    with pytest.raises(kind) as caught:
        _pull(hub, tmp_path, revision="v9")
    assert words in caught.value.message


def test_a_disk_that_cannot_hold_it_is_told_before_anything_is_loaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceExhausted, match=r"0\.0 GB free"):
        _pull(hub, tmp_path)
    assert hub.sent == []


def test_a_disk_that_fills_up_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ResourceExhausted, match="disk is full"):
        _pull(hub, tmp_path)


def test_no_network_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    with pytest.raises(Unavailable, match="cannot be reached"):
        _pull(hub, tmp_path)


def test_a_model_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    del hub.files[WEIGHTS]
    with pytest.raises(PreconditionFailed, match="safetensors"):
        _pull(hub, tmp_path)


def test_a_file_whose_name_a_terminal_would_execute_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["\x1b]0;title\x07.safetensors"] = b""
    with pytest.raises(PreconditionFailed, match=r"name: \\x1b\]0;title\\x07\.safetensors$"):
        _pull(hub, tmp_path)
    assert hub.sent == []


def test_a_name_that_is_none_is_refused_without_a_call(hub: Hub, tmp_path: Path) -> None:
    for name in ("small", "../../etc/passwd", "owner/../x", "../small", "owner/..", "./small", ""):
        with pytest.raises(InvalidRequest, match="is not OWNER/NAME"):
            pull(name, tmp_path, endpoint=hub.endpoint)
    assert not hub.tokens


def test_what_a_revision_lacks_goes_and_what_a_user_added_stays(hub: Hub, tmp_path: Path) -> None:
    _pull_earlier(hub, tmp_path)
    folder = tmp_path / "small"
    added = {"notes.txt": b"mine", "training_args.bin": b"mine too"}
    for name, content in added.items():
        (folder / name).write_bytes(content)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"mine as well")
    done = _pull(hub, tmp_path)
    assert done.removed == tuple(sorted(_EARLIER))
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == b"mine as well"
    shutil.rmtree(folder / "adapter")
    assert _content(folder) == added | {path.name: path.read_bytes() for path in SMALL.iterdir()}
    # What both revisions have did not come again.
    assert "config.json" not in {name for name, _, _ in hub.sent}
    assert _pull(hub, tmp_path).removed == ()


def test_a_pull_that_broke_off_leaves_the_earlier_revision_whole(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _pull_earlier(hub, tmp_path)
    folder = tmp_path / "small"

    def load(*arguments: Any, **options: Any) -> Any:
        if arguments[1] == WEIGHTS:
            raise ConnectionResetError("the network went away")
        return original(*arguments, **options)

    import huggingface_hub

    original = huggingface_hub.hf_hub_download
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", load)
        with pytest.raises(Unavailable):
            _pull(hub, tmp_path)
    shutil.copytree(folder, tmp_path / "seen", ignore=shutil.ignore_patterns(".asd-pull"))
    assert _content(tmp_path / "seen") == before
    hub.sent.clear()
    _pull(hub, tmp_path)
    assert [name for name, _, _ in hub.sent] == [WEIGHTS]
    assert _content(folder) == {path.name: path.read_bytes() for path in SMALL.iterdir()}


def test_wherever_a_pull_ends_the_folder_holds_a_whole_model_or_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = {"config.json": hub.files["config.json"], "tokenizer.json": b"{}", WEIGHTS: b"new weights"}
    hub.files = dict(later)
    before = _pull_earlier(hub, tmp_path / "earlier")
    without_model = 0
    for changes in itertools.count():
        place, copy = tmp_path / str(changes), tmp_path / f"{changes} again"
        shutil.copytree(tmp_path / "earlier", place)
        folder = place / "small"
        with monkeypatch.context() as patch:
            left = itertools.count(changes, -1)
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, _ending(getattr(Path, name), folder, left))
            try:
                _pull(hub, place)
            except KeyboardInterrupt:
                is_whole = False
            else:
                is_whole = True
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before | later}
        if "config.json" in found:
            assert found in (before, later)
        else:
            without_model += 1
        if is_whole:
            break
        shutil.copytree(place, copy)
        _pull(hub, place)
        assert _content(folder) == later
        assert _pull_earlier(hub, copy) == before
    # Files went and files came, one by one.
    assert without_model > len(_EARLIER)


def _ending(change: Any, folder: Path, left: Iterator[int]) -> Any:
    """Return a change of files that no longer takes place in a folder after some, as where a process ends."""

    def changed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent in {folder, folder / ".asd-pull"} and next(left) <= 0:
            raise KeyboardInterrupt
        return change(path, *arguments, **options)

    return changed


def test_a_folder_of_another_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    before = _content(_pull(hub, tmp_path).path)
    hub.model = "other/small"
    hub.files[WEIGHTS] += b"other"
    with pytest.raises(PreconditionFailed, match=r"owner/small: .* other/small"):
        _pull(hub, tmp_path)
    assert _content(tmp_path / "small") == before


def test_a_folder_that_others_made_is_refused(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(PreconditionFailed, match="not made by"):
        _pull(hub, tmp_path)
    assert _content(folder) == {"model.safetensors": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(PreconditionFailed, match="file"):
        _pull(hub, tmp_path / "file")


def test_an_empty_disk_or_a_link_to_a_folder_is_taken(hub: Hub, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small").symlink_to(disk)
    _pull(hub, tmp_path / "models")
    assert (tmp_path / "models" / "small").is_symlink()
    assert (disk / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_what_a_link_leads_to_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    _pull_earlier(hub, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"on another disk")
    for name in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / "small" / name).unlink()
        (tmp_path / "small" / name).symlink_to(elsewhere)
    _pull(hub, tmp_path)
    assert elsewhere.read_bytes() == b"on another disk"
    assert _content(tmp_path / "small") == {path.name: path.read_bytes() for path in SMALL.iterdir()}


def test_weights_that_others_put_there_are_refused_and_other_files_are_told(hub: Hub, tmp_path: Path) -> None:
    folder = _pull(hub, tmp_path).path
    (folder / "chat_template.jinja").write_text("mine")
    lines: list[str] = []
    _pull(hub, tmp_path, say=lines.append)
    assert len(lines) == 1
    assert str(folder / "chat_template.jinja") in lines[0]
    (folder / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(PreconditionFailed, match=r"holds adapter_model\.safetensors, which"):
        _pull(hub, tmp_path)
    assert (folder / "adapter_model.safetensors").exists()


def test_a_folder_in_the_place_of_a_file_is_refused(hub: Hub, tmp_path: Path) -> None:
    before = _pull_earlier(hub, tmp_path)
    (tmp_path / "small" / WEIGHTS / "mine").mkdir(parents=True)
    with pytest.raises(PreconditionFailed, match=r"model\.safetensors is a folder"):
        _pull(hub, tmp_path)
    shutil.rmtree(tmp_path / "small" / WEIGHTS)
    assert _content(tmp_path / "small") == before


def test_a_record_that_is_damaged_or_names_other_files_removes_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = _pull(hub, tmp_path).path
    (tmp_path / "precious.safetensors").write_text("mine")
    record = json.loads((folder / ".asd-pull.json").read_text())
    names = ("../precious.safetensors", "README\0", "README\n\x1b[2J")
    for text in ("{", *(json.dumps(record | {"files": {name: None}}) for name in names)):
        (folder / ".asd-pull.json").write_text(text)
        with pytest.raises(PreconditionFailed, match=r"\.asd-pull\.json is damaged"):
            _pull(hub, tmp_path)
    assert (tmp_path / "precious.safetensors").exists()


def test_a_record_without_a_model_holds_for_its_revision(hub: Hub, tmp_path: Path) -> None:
    folder = _pull(hub, tmp_path).path
    record = json.loads((folder / ".asd-pull.json").read_text())
    earlier_form = {key: record[key] for key in ("revision", "files")}
    (folder / ".asd-pull.json").write_text(json.dumps(earlier_form))
    hub.commit = "f" * 40
    with pytest.raises(PreconditionFailed, match="another revision"):
        _pull(hub, tmp_path)
    hub.commit = COMMIT
    assert _pull(hub, tmp_path).loaded_bytes == 0


def test_two_pulls_do_not_work_in_one_folder(hub: Hub, tmp_path: Path) -> None:
    refused = []

    def pull_again(_: str) -> None:
        with pytest.raises(PreconditionFailed, match="works in"):
            _pull(hub, tmp_path)
        refused.append(True)

    _pull(hub, tmp_path, say=pull_again)
    assert refused
