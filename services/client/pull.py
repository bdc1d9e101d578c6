"""`asd models pull`: a model of the Hugging Face hub, whole and checked, where a stage can serve it.

What is half loaded stays and is gone on with. Every file is checked against the hub's checksum, and what was
checked is written down, so that a second pull of the same revision reads nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common.errors import (
    AsdError,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    ResourceExhausted,
    Unavailable,
)
from services.common.privacy import report_nothing
from services.stage.checkpoint import check_architecture, read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What stages read, and what says under which terms. Files in folders are other forms of the same weights.
_WANTED = re.compile(
    r"(?!consolidated)[^/]*\.safetensors|[^/]*\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.(?:jinja|json)|(?:README|LICENSE|USE_POLICY|NOTICE)[^/]*"
)
# What a server needs beside the weights.
_SPARE_BYTES = 64 << 20
_RECORD = ".asd-pull.json"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class Pulled:
    """Outcome: where the model is, and which revision of it. loaded_bytes: that came over the network."""

    model: str
    revision: str
    path: Path
    files: int
    size_bytes: int
    loaded_bytes: int


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the hub. digest: SHA-256 of large ones, git's SHA-1 of others."""

    name: str
    size: int
    digest: str
    is_sha256: bool


def default_folder() -> Path:
    """Return `models` in ASD_CACHE_DIR, or in `asd` in the user's cache directory."""
    own = os.environ.get("ASD_CACHE_DIR")
    cache = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asd"
    return cache / "models"


def pull(
    model: str,
    folder: Path,
    revision: str | None = None,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    shows_bars: bool = False,
) -> Pulled:
    """Load a model of the hub into `folder`/NAME, NAME being what follows the slash.

    token None: HF_TOKEN, or what `hf auth login` keeps. endpoint None: HF_ENDPOINT, or huggingface.co. say:
    takes a line about each step. Raises InvalidRequest for a name that is none, NotFound for an unknown model
    or revision, PreconditionFailed for a gated one, a wrong architecture, one without safetensors, or a file
    that does not match its checksum, ResourceExhausted for a full disk, Unavailable without the network.
    """
    if not _NAME.fullmatch(model):
        raise InvalidRequest(
            f"{model!r} is not OWNER/NAME, as in meta-llama/Llama-2-13b-chat-hf", field="MODEL"
        )
    hub = _hub()
    target = folder / model.partition("/")[2]
    with _explained(hub, model, revision, target):
        api = hub.HfApi(endpoint=endpoint, token=token, library_name="asd")
        info = api.model_info(model, revision=revision, files_metadata=True)
        files = _choose(model, info.siblings)
        target.mkdir(parents=True, exist_ok=True)
        record = _read_record(target, info.sha)
        missing = [file for file in files if not _is_recorded(target, record, file)]
        if not shows_bars:
            hub.utils.disable_progress_bars()
        # The small ones first: a wrong architecture shows before anything large is loaded.
        missing.sort(key=lambda file: (file.name != "config.json", file.size))
        _check_space(target, missing)
        loaded = 0
        for index, file in enumerate(missing, start=1):
            say(f"{file.name} ({file.size / 1e6:,.1f} MB, {index} of {len(missing)})")
            loaded += _load(hub, model, info.sha, target, file, token, endpoint)
            if file.name == "config.json":
                check_architecture(read_config(target / "config.json"), target / "config.json")
            record[file.name] = [file.size, file.digest]
            _write_record(target, info.sha, record)
    return Pulled(model, info.sha, target, len(files), sum(file.size for file in files), loaded)


def _hub() -> Any:
    report_nothing()
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise PreconditionFailed(
            f"{error.name} is not installed: pip install '.[hub]' in asd's directory brings what loads models"
        ) from error
    return huggingface_hub


def _choose(model: str, siblings: Any) -> list[_File]:
    files = [
        _File(
            each.rfilename,
            int(each.size or 0),
            each.lfs.sha256 if each.lfs else (each.blob_id or ""),
            bool(each.lfs),
        )
        for each in siblings or ()
        if _WANTED.fullmatch(each.rfilename)
    ]
    names = {file.name for file in files}
    if "config.json" not in names:
        raise PreconditionFailed(f"{model} has no config.json: it is not a model in Hugging Face's form")
    if not any(name.endswith(".safetensors") for name in names):
        raise PreconditionFailed(
            f"{model} has no safetensors weights, which stages read: choose another form of it"
        )
    return files


def _check_space(target: Path, missing: list[_File]) -> None:
    def have(file: _File) -> int:
        path = target / file.name
        return min(path.stat().st_size, file.size) if path.exists() else 0

    partial = target / ".cache" / "huggingface" / "download"
    half = sum(each.stat().st_size for each in partial.glob("*.incomplete")) if partial.exists() else 0
    needed = sum(file.size - have(file) for file in missing) - half
    free = shutil.disk_usage(target).free
    if missing and needed + _SPARE_BYTES > free:
        raise ResourceExhausted(
            f"{target} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be loaded: make room, "
            "or name another place with --to"
        )


def _load(
    hub: Any, model: str, commit: str, target: Path, file: _File, token: str | None, endpoint: str | None
) -> int:
    """Load a file and check it, a second time if it is damaged; return the bytes that came."""
    path = target / file.name
    if path.exists() and _matches(path, file):
        return 0
    for is_again in (False, True):
        hub.hf_hub_download(
            model,
            file.name,
            revision=commit,
            local_dir=target,
            token=token,
            endpoint=endpoint,
            library_name="asd",
            # What lies there is not the file: the hub's library would take it for one.
            force_download=is_again or path.exists(),
        )
        if _matches(path, file):
            return file.size
        path.unlink(missing_ok=True)
    raise PreconditionFailed(
        f"{file.name} of {model} came twice with another checksum than the hub's: something between here and "
        "the hub changes it"
    )


def _matches(path: Path, file: _File) -> bool:
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.is_sha256 else hashlib.sha1(usedforsecurity=False)
    if not file.is_sha256:
        # As git names a blob.
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while part := content.read(1 << 22):
            digest.update(part)
    return digest.hexdigest() == file.digest


def _read_record(target: Path, commit: str) -> dict[str, list[Any]]:
    try:
        record = json.loads((target / _RECORD).read_text(encoding="utf-8"))
        return dict(record["files"]) if record["revision"] == commit else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_record(target: Path, commit: str, record: dict[str, list[Any]]) -> None:
    partial = target / f"{_RECORD}.partial"
    partial.write_text(json.dumps({"revision": commit, "files": record}, indent=1) + "\n", encoding="utf-8")
    partial.replace(target / _RECORD)


def _is_recorded(target: Path, record: dict[str, list[Any]], file: _File) -> bool:
    path = target / file.name
    return (
        record.get(file.name) == [file.size, file.digest]
        and path.exists()
        and path.stat().st_size == file.size
    )


@contextmanager
def _explained(hub: Any, model: str, revision: str | None, target: Path) -> Iterator[None]:
    try:
        yield
    except AsdError:
        raise
    except Exception as error:
        raise _explain(hub, error, model, revision, target) from error


def _explain(  # noqa: PLR0911 - a table, most specific first
    hub: Any, error: Exception, model: str, revision: str | None, target: Path
) -> AsdError:
    """Return what a person can do about an error of the hub's library."""
    errors = hub.errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return PreconditionFailed(
            f"{model} is gated: accept its terms at https://huggingface.co/{model}, then set HF_TOKEN to a "
            "token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{model} has no revision {revision!r}", field="--revision")
    if isinstance(error, errors.RepositoryNotFoundError) or status in {401, 404}:
        return NotFound(
            f"the hub has no model {model}, or it is private: check the name, and set HF_TOKEN to a token "
            "that may read it",
            field="MODEL",
        )
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ResourceExhausted(
            f"{target}: the disk is full; what has come stays, and the next pull goes on"
        )
    if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
        return PreconditionFailed(f"{target} cannot be written: name another place with --to")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unavailable("HF_HUB_OFFLINE is set, so nothing is loaded: unset it to pull")
    if isinstance(error, errors.HfHubHTTPError):
        return Unavailable(f"the hub answered {status or 'with an error'} for {model}: try again later")
    # The library's client has had several names.
    if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests")):
        return Unavailable(
            f"the hub cannot be reached ({type(error).__name__}): check the network and HTTPS_PROXY"
        )
    return AsdError(f"{model} cannot be loaded: {type(error).__name__}: {error}")
