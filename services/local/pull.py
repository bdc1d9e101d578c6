"""`asd models pull`: downloads a model of the Hugging Face hub, checks it, and puts it in place for a stage.

New files are downloaded beside those that a stage may be serving. They replace those once all of them match
the hub's checksums; files that the revision lacks are then removed. An interrupted download is continued by
the next pull. A record lists the files that this command made and their checks. So a second pull of the same
revision reads nothing, and files that others put into the folder are kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asd.errors import AsdError, InvalidRequest, NotFound, PreconditionFailed, ResourceExhausted, Unavailable
from asd.transport.files import DamagedFile, read_content
from services.common.disks import cannot_write, is_of_disk, replace_file, sync
from services.common.documents import parse_json
from services.common.extras import explain_missing
from services.common.privacy import report_nothing
from services.common.terminal import visible
from services.stage.engines.checkpoint import check_architecture, read_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Files that stages read, and licences. Files in subfolders are other forms of the same weights.
_WANTED = re.compile(
    r"(?!consolidated)[^/]*\.safetensors|[^/]*\.safetensors\.index\.json|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.(?:jinja|json)|(?:README|LICENSE|USE_POLICY|NOTICE)[^/]*"
)
# Weights: a stage reads every such file.
_WEIGHTS = re.compile(r"[^/]*\.safetensors(?:\.index\.json)?")
# Files that change a stage's answers if they exist.
_SERVED = re.compile(rf"(?!README|LICENSE|USE_POLICY|NOTICE)(?:{_WANTED.pattern})|consolidated[^/]*")
# Without this file, a stage does not serve the folder.
_CONFIG = "config.json"
# Disk space to leave free beside the files.
_SPARE_BYTES = 64 << 20
_RECORD = ".asd-pull.json"
# Chosen: a thousand times a real one's.
_MOST_RECORD_BYTES = 16 << 20
# Subfolder for files until all are complete. It is in the target folder, which may be a disk of its own.
_STAGING = ".asd-pull"
# Entries of a new, empty file system.
_NOTHING = {"lost+found"}
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class Pulled:
    """Outcome of a pull. loaded_bytes: downloaded from the network.

    removed: files of an earlier revision that this one lacks.
    """

    model: str
    revision: str
    path: Path
    files: int
    size_bytes: int
    loaded_bytes: int
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _HubFile:
    """A file of the hub. digest: SHA-256 of a large file, git's SHA-1 of a small one."""

    name: str
    size: int
    digest: str
    is_sha256: bool

    @property
    def checksum(self) -> list[Any]:
        """The record's entry for a checked file, without the time of its last change."""
        return [self.size, self.digest]

    def checked_at(self, path: Path) -> list[Any]:
        """The record's entry for a file that was checked at a path."""
        return [*self.checksum, path.stat().st_mtime_ns]


@dataclass(slots=True)
class _PullRecord:
    """What this command did in a folder. revision: "" while files of several revisions are mixed.

    files: names of its files, each with its checks; None: not known. staged: the same for downloaded files
    that are not in place yet.
    """

    model: str = ""
    revision: str = ""
    files: dict[str, list[Any] | None] = field(default_factory=dict)
    staged: dict[str, list[Any] | None] = field(default_factory=dict)


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
    """Download a model of the hub, OWNER/NAME, into `folder`/NAME.

    token None: HF_TOKEN, or the one of `hf auth login`. endpoint None: HF_ENDPOINT, or huggingface.co. say:
    takes a line about each step. Raises InvalidRequest for an invalid name, NotFound for an unknown model or
    revision, ResourceExhausted for a full disk, Unavailable without a network. Raises PreconditionFailed for
    a gated model, an unsupported architecture, a model without safetensors, a file that does not match its
    checksum, and a folder with files of others.
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
        with _locked(target):
            # info.id is the hub's spelling: the hub also takes other spellings and former names.
            record = _own(target, info.id or model, info.sha)
            for name in _strangers(target, record, files):
                say(f"{target / name} is not of {model}: it stays, and a stage reads it")
            missing = _drop_what_is_there(target, record, files)
            if not shows_bars:
                hub.utils.disable_progress_bars()
            # config.json and small files come first, to find a wrong architecture before a large download.
            missing.sort(key=lambda file: (file.name != _CONFIG, file.size))
            _check_space(target, missing)
            loaded = 0
            for index, file in enumerate(missing, start=1):
                say(f"{file.name} ({file.size / 1e6:,.1f} MB, {index} of {len(missing)})")
                _load(hub, model, info.sha, target / _STAGING, file, token, endpoint)
                loaded += file.size
                if file.name == _CONFIG:
                    config = target / _STAGING / _CONFIG
                    check_architecture(read_config(config), config)
                # It must be on the disk before the record lists it as checked.
                sync(target / _STAGING / file.name)
                record.staged[file.name] = file.checked_at(target / _STAGING / file.name)
                _write_record(target, record)
            removed = _place(target, record, files, info.sha)
    return Pulled(
        model, info.sha, target, len(files), sum(file.size for file in files), loaded, tuple(removed)
    )


def _own(target: Path, model: str, commit: str) -> _PullRecord:
    """Return a folder's record, or start one for this model.

    Raises PreconditionFailed if the folder has another model, or files that this command did not make.
    """
    record = _read_record(target)
    if record is None:
        if {path.name for path in target.iterdir()} - _NOTHING:
            raise PreconditionFailed(
                f"{target} was not made by `asd models pull`, which would replace what is there: move it "
                "away, or name another place with --to"
            )
        record = _PullRecord()
    # Records of earlier versions do not name the model.
    elif record.model != model and (record.model or record.revision != commit):
        raise PreconditionFailed(
            f"{target} holds {record.model or 'another model, or another revision of it'}: remove it to have "
            f"{model} there, or name another place with --to"
        )
    record.model = model
    _write_record(target, record)
    return record


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other pulls out of a folder. Raises PreconditionFailed if one is running there."""
    # Lock the folder itself, since files in it are replaced.
    descriptor = os.open(target, os.O_RDONLY)
    try:
        # Some file systems have no locks.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PreconditionFailed(
                    f"another `asd models pull` works in {target}: wait for its end"
                ) from error
        yield
    finally:
        os.close(descriptor)


def _strangers(target: Path, record: _PullRecord, files: list[_HubFile]) -> list[str]:
    """Return files that this command did not make and that a stage reads.

    Raises PreconditionFailed if they are weights, or if a folder has the name of one of the model's files.
    """
    ours = {file.name for file in files} | record.files.keys()
    for name in sorted(ours):
        if (target / name).is_dir():
            raise PreconditionFailed(f"{target / name} is a folder, and a file comes there: move it away")
    names = sorted(
        path.name for path in target.iterdir() if path.name not in ours and _SERVED.fullmatch(path.name)
    )
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if weights:
        raise PreconditionFailed(
            f"{target} holds {', '.join(weights)}, which `asd models pull` did not put there, and a stage "
            "would read it as part of the model: move it away, or name another place with --to"
        )
    return names


def _drop_what_is_there(target: Path, record: _PullRecord, files: list[_HubFile]) -> list[_HubFile]:
    """Return the files to download, and remove downloaded ones of another revision."""
    staging = target / _STAGING
    staging.mkdir(exist_ok=True)
    wanted = {file.name: file for file in files}
    for path in staging.iterdir():
        file = wanted.get(path.name)
        if not path.is_dir() and (file is None or not _is_there(path, record.staged, file)):
            path.unlink()
    return [
        file
        for file in files
        if not (staging / file.name).exists() and not _is_there(target / file.name, record.files, file)
    ]


def _place(target: Path, record: _PullRecord, files: list[_HubFile], commit: str) -> list[str]:
    """Move downloaded files into place and remove files that the revision lacks; return the latter's names.

    A stage that starts meanwhile finds no config.json, and therefore never a mix of two models. If this is
    interrupted, the next pull does the rest.
    """
    staging = target / _STAGING
    wanted = {file.name for file in files}
    stale = sorted(record.files.keys() - wanted)
    waiting = [file.name for file in files if (staging / file.name).exists()]
    if waiting or stale:
        record.revision = ""
        record.files.update(dict.fromkeys((*waiting, _CONFIG)))
        _write_record(target, record)
        if _CONFIG in waiting:
            (target / _CONFIG).unlink(missing_ok=True)
        else:
            (target / _CONFIG).replace(staging / _CONFIG)
        # Without a sync in between, a disk may write renames in another order.
        sync(target)
        for name in stale:
            (target / name).unlink(missing_ok=True)
        for name in {*waiting, _CONFIG} - {_CONFIG}:
            (staging / name).replace(target / name)
        sync(target)
        (staging / _CONFIG).replace(target / _CONFIG)
        sync(target)
    done = _PullRecord(
        record.model, commit, {file.name: file.checked_at(target / file.name) for file in files}
    )
    if done != _read_record(target):
        _write_record(target, done)
    shutil.rmtree(staging)
    return stale


def _hub() -> Any:
    report_nothing()
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise explain_missing(error, "hub") from error
    return huggingface_hub


def _choose(model: str, siblings: Any) -> list[_HubFile]:
    files = [
        _HubFile(
            each.rfilename,
            int(each.size or 0),
            each.lfs.sha256 if each.lfs else (each.blob_id or ""),
            bool(each.lfs),
        )
        for each in siblings or ()
        if _WANTED.fullmatch(each.rfilename)
    ]
    names = {file.name for file in files}
    for name in sorted(names):
        # The hub's library shows them on the terminal.
        if not name.isprintable():
            raise PreconditionFailed(
                f"{model} has a file with control characters in its name: {visible(name)}"
            )
    if "config.json" not in names:
        raise PreconditionFailed(f"{model} has no config.json: it is not a model in Hugging Face's form")
    if not any(name.endswith(".safetensors") for name in names):
        raise PreconditionFailed(
            f"{model} has no safetensors weights, which stages read: choose another form of it"
        )
    return files


def _check_space(target: Path, missing: list[_HubFile]) -> None:
    partial = target / _STAGING / ".cache" / "huggingface" / "download"
    half = sum(each.stat().st_size for each in partial.glob("*.incomplete")) if partial.exists() else 0
    needed = sum(file.size for file in missing) - half
    free = shutil.disk_usage(target).free
    if missing and needed + _SPARE_BYTES > free:
        raise ResourceExhausted(
            f"{target} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be loaded: make room, "
            "or name another place with --to"
        )


def _load(
    hub: Any, model: str, commit: str, staging: Path, file: _HubFile, token: str | None, endpoint: str | None
) -> None:
    """Download a file and check it; a second time if it is damaged."""
    path = staging / file.name
    for is_again in (False, True):
        hub.hf_hub_download(
            model,
            file.name,
            revision=commit,
            local_dir=staging,
            token=token,
            endpoint=endpoint,
            library_name="asd",
            force_download=is_again,
        )
        if _matches(path, file):
            return
        path.unlink(missing_ok=True)
    raise PreconditionFailed(
        f"{file.name} of {model} came twice with another checksum than the hub's: something between here and "
        "the hub changes it"
    )


def _matches(path: Path, file: _HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.is_sha256 else hashlib.sha1(usedforsecurity=False)
    if not file.is_sha256:
        # git hashes a blob with this header.
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as content:
        while part := content.read(1 << 22):
            digest.update(part)
    return digest.hexdigest() == file.digest


def _read_record(target: Path) -> _PullRecord | None:
    """Return the record of a folder; None if there is none. Raises PreconditionFailed if it is damaged."""
    path = target / _RECORD
    try:
        record = parse_json(read_content(path, _MOST_RECORD_BYTES), str(path))
        files, staged = dict(record["files"]), dict(record.get("staged", {}))
        # Files are removed by these names, and the terminal shows them.
        if not all(_WANTED.fullmatch(name) and name.isprintable() for name in (*files, *staged)):
            raise ValueError("a name is not of a model")
        return _PullRecord(str(record.get("model", "")), str(record["revision"]), files, staged)
    except FileNotFoundError:
        return None
    except (DamagedFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreconditionFailed(
            f"{path} is damaged ({error}), so that nobody knows whose files are there: remove {target}, or "
            "name another place with --to"
        ) from error


def _write_record(target: Path, record: _PullRecord) -> None:
    replace_file(target / _RECORD, json.dumps(asdict(record), indent=1) + "\n", is_alone=True)


def _is_there(path: Path, checked: dict[str, list[Any] | None], file: _HubFile) -> bool:
    """Return whether a file is complete. Its content is read if it has changed since its last check."""
    if not path.exists() or path.stat().st_size != file.size:
        return False
    # Records of earlier versions have no times.
    return checked.get(file.name) in (file.checked_at(path), file.checksum) or _matches(path, file)


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
    """Return an error that says what to do about an error of the hub's library."""
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
    if isinstance(error, OSError) and is_of_disk(error):
        reason = cannot_write(target, error, "name another place with --to")
        return type(reason)(f"{reason.message}; what has come stays, and the next pull goes on")
    # Errors of a file name it; those of the network name none.
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return PreconditionFailed(f"{error.filename}: {error.strerror.lower()}: name another place with --to")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unavailable("HF_HUB_OFFLINE is set, so nothing is loaded: unset it to pull")
    if isinstance(error, errors.HfHubHTTPError):
        return Unavailable(f"the hub answered {status or 'with an error'} for {model}: try again later")
    # Versions of the library use different HTTP clients.
    if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests")):
        return Unavailable(
            f"the hub cannot be reached ({type(error).__name__}): check the network and HTTPS_PROXY"
        )
    return AsdError(f"{model} cannot be loaded: {type(error).__name__}: {error}")
