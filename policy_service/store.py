"""Artifacts on the disk: one that is written in place of another, and versions of which one is in force.

    STORE/policies/<version>/   an artifact, never changed once it is there unless it is damaged
    STORE/current.json          the version in force and those before it

Everything comes into being by one rename, after its content is on the disk: whoever dies at whatever moment
leaves what was in force.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from policy_service.artifact import build_policy, load_predictor, read_document, write_document
from policy_service.document import (
    DOCUMENT,
    MOST_DOCUMENT_BYTES,
    Count,
    Entry,
    Name,
    PolicyDocument,
    UnfitArtifact,
)
from policy_service.features import Draft, PromptText, Verification
from policy_service.policy import Objective, Policy, Preference, Spent
from services.common.disks import alone, is_full, replace_file, sync, writing
from services.common.documents import DamagedFile, parse_json, read_content
from services.common.settings import explain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from policy_service.predictor import OnnxPredictor

logger = logging.getLogger(__name__)

POINTER = "current.json"
POLICIES = "policies"
# Beside policy.json where a policy was made from another one.
LINEAGE = "lineage.json"
_LOCK = ".lock"
_PARTIAL = ".partial-"
# Of the pointer and of a lineage. Chosen: a store that changes each minute for a year names as much.
_MOST_BYTES = 64 << 20
# Seconds since 1970: the year 9999, which dates end with.
_LATEST = 253_402_300_799.0
# A version names a directory.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Digits of a model's SHA-256 in the name of its file.
_DIGEST = 12
_MODEL_WITH_DIGEST = re.compile(rf".+\.[0-9a-f]{{{_DIGEST}}}\.onnx")
# Writing an artifact takes seconds: what is older was left by a process that was killed. Chosen.
_ABANDONED_SECONDS = 3600.0


class UnfitStore(UnfitArtifact):
    """The store cannot do what was asked; the message says why and what to do."""


class LoadedArtifact(NamedTuple):
    """An artifact's policy, its document, and the predictor that it asks."""

    policy: Policy
    document: PolicyDocument
    predictor: OnnxPredictor


class LoadedPolicy(NamedTuple):
    """A policy that can be served, and its document."""

    policy: Policy
    document: PolicyDocument

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the cascade's stages."""
        return tuple(stage.name for stage in self.policy.stages)


class StageLineage(Entry):
    """What refitting changed of one stage: p_correct' = sigmoid(slope * logit(p_correct) + offset)."""

    stage: Name
    reports: Count
    slope: float
    offset: float


class Lineage(Entry):
    """Where a policy comes from. parent: version that it was refitted from."""

    parent: Name
    stages: tuple[StageLineage, ...]


class _InForce(Entry):
    """since: seconds since 1970."""

    version: Annotated[str, Field(pattern=f"^{_VERSION.pattern}$")]
    since: Annotated[float, Field(ge=0, le=_LATEST)]


class _Pointer(Entry):
    """Content of `current.json`. history: the last one is in force."""

    schema_name: Literal["asd.policies"] = Field(alias="schema")
    history: Annotated[tuple[_InForce, ...], Field(min_length=1)]


@dataclass(frozen=True)
class StoredVersion:
    """One version of a store.

    parent: what it was refitted from; "": nothing. prompts: that it was calibrated on. since: when it came
    into force, seconds since 1970; None: not in the history. problem: why it cannot be read; "": it can.
    """

    version: str
    parent: str
    prompts: int
    since: float | None
    is_current: bool
    problem: str


class PolicyStore:
    """The versions in a directory. clock: seconds since 1970."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory
        self._clock = clock

    def current(self) -> str:
        """Return the version in force. Raises UnfitStore where there is none."""
        return self._read().history[-1].version

    def history(self) -> tuple[str, ...]:
        """Return the versions in force so far, the present one last. Raises UnfitStore."""
        return tuple(each.version for each in self._read().history)

    def artifact(self, version: str) -> Path:
        """Return the directory of a version."""
        return self.directory / POLICIES / version

    def names(self) -> tuple[str, ...]:
        """Return every version that is kept, in the order of their names."""
        folder = self.directory / POLICIES
        if not folder.is_dir():
            return ()
        return tuple(sorted(path.name for path in folder.iterdir() if _VERSION.fullmatch(path.name)))

    def versions(self) -> list[StoredVersion]:
        """Return every version: those of the history by their age, then the others.

        None is in force where the pointer is missing or damaged. Raises UnfitStore where nothing is kept.
        """
        history = self._history()
        if not history and not self.names():
            # Says why.
            self._read()
        since = {each.version: each.since for each in history}
        listed = []
        for version in (*since, *(name for name in self.names() if name not in since)):
            parent, prompts, problem = "", 0, ""
            try:
                prompts = read_document(self.artifact(version)).calibration.prompts
                lineage = read_lineage(self.artifact(version))
                parent = lineage.parent if lineage else ""
                load_version(self, version)
            except UnfitArtifact as error:
                problem = str(error)
            is_current = bool(history) and version == history[-1].version
            listed.append(StoredVersion(version, parent, prompts, since.get(version), is_current, problem))
        return listed

    def publish(self, artifact: Path) -> PolicyDocument:
        """Copy an artifact into the store and put it into force; return its document.

        A version that is there but cannot be served is replaced, and so is a damaged pointer. Raises
        UnfitArtifact where the artifact cannot be served, or was made for other stages than the one in force,
        ResourceExhausted on a full disk, PreconditionFailed where the store cannot be written to.
        """
        if (self.directory / DOCUMENT).exists():
            raise UnfitStore(f"{self.directory} is an artifact, not a store: name another directory")
        if self.directory.exists() and not self.directory.is_dir():
            raise UnfitStore(f"{self.directory} is a file: name a directory")
        before = _content(artifact)
        try:
            return self._publish(artifact)
        except UnfitArtifact:
            if _content(artifact) == before:
                raise
            # It was replaced while it was copied.
            return self._publish(artifact)

    def _publish(self, artifact: Path) -> PolicyDocument:
        document = load_usable(artifact).document
        version = document.policy_version
        if not _VERSION.fullmatch(version):
            raise UnfitStore(f"{artifact}: version {version!r} cannot name a directory")
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked(), self._tidied():
            history = self._history()
            self._check_cascade(document, history)
            self._copy(artifact, document)
            if not history or history[-1].version != version:
                self._write((*history, _InForce(version=version, since=self._clock())))
        return document

    def _check_cascade(self, document: PolicyDocument, history: tuple[_InForce, ...]) -> None:
        """Check a policy against the newest one that can be read; all of a store are of one cascade."""
        for version in (*(each.version for each in reversed(history)), *self.names()):
            try:
                stages = [stage.name for stage in read_document(self.artifact(version)).stages]
            except UnfitArtifact:
                continue
            is_current = bool(history) and version == history[-1].version
            _check_stages(document, stages, "the policy in force" if is_current else f"policy {version}")
            return

    def rollback(self, to: str | None = None) -> str:
        """Put the version before the present one, or a named one, back into force; return it.

        Raises UnfitStore where there is none, or where it cannot be served.
        """
        if not self.names():
            # Says why.
            self._read()
        with self._locked():
            # A named version needs no history, and so mends a damaged pointer.
            history = self._read().history if to is None else self._history()
            if to is None:
                if len(history) < 2:
                    raise UnfitStore(
                        f"{self.directory}: there is no version before {history[-1].version}: publish "
                        "another one, or name one of `asd-policy versions` with --to"
                    )
                history = history[:-1]
            else:
                history = self._back_to(history, to)
            version = history[-1].version
            try:
                load_version(self, version)
            except UnfitArtifact as error:
                raise UnfitStore(
                    f"{error}. Name another one of `asd-policy versions` with --to, or publish {version} "
                    "again"
                ) from error
            self._write(history)
        return version

    def _back_to(self, history: tuple[_InForce, ...], to: str) -> tuple[_InForce, ...]:
        if to not in self.names():
            raise UnfitStore(
                f"{self.directory} holds no version {to!r}: choose one of {', '.join(self.names())}"
            )
        places = [place for place, each in enumerate(history) if each.version == to]
        if places:
            return history[: places[-1] + 1]
        return (*history, _InForce(version=to, since=self._clock()))

    def _copy(self, artifact: Path, document: PolicyDocument) -> None:
        """Make the version's directory, whole or not at all; one that cannot be served gives way."""
        target = self.artifact(document.policy_version)
        if self._is_usable(document.policy_version):
            if _content(target) != _content(artifact):
                raise UnfitStore(
                    f"{target} holds another policy of this version, and a version never changes: give "
                    "policy_version another name"
                )
            return
        partial = target.parent / f"{_PARTIAL}{document.policy_version}"
        partial.mkdir(parents=True)
        files = {*(view.model for view in document.views), DOCUMENT}
        if (artifact / LINEAGE).exists():
            files.add(LINEAGE)
        for name in sorted(files):
            if Path(name).name != name:
                raise UnfitStore(f"{artifact}: {name!r} is not the name of a file beside {DOCUMENT}")
            try:
                shutil.copyfile(artifact / name, partial / name)
            except OSError as error:
                if is_full(error) or str(error.filename) == str(partial / name):
                    raise
                raise UnfitStore(f"{artifact / name}: {error.strerror}") from error
            sync(partial / name)
        # The copy, not what was copied: it is what will be served.
        if load_usable(partial).document != document:
            raise UnfitStore(f"{artifact} was changed while it was copied: publish it again")
        sync(partial)
        if target.exists() or target.is_symlink():
            # Damaged, so nothing is lost if a kill leaves neither: publishing again goes on from there.
            target.rename(target.parent / f"{_PARTIAL}{uuid.uuid4().hex}")
        partial.rename(target)
        sync(target.parent)
        _remove_partial(target.parent)

    def _is_usable(self, version: str) -> bool:
        try:
            load_version(self, version)
        except UnfitArtifact:
            return False
        return True

    def _read(self) -> _Pointer:
        """Return what the pointer says. Raises UnfitStore, which says how to mend it."""
        path = self.directory / POINTER
        try:
            content = read_content(path, _MOST_BYTES)
            parse_json(content, str(path))
            return _Pointer.model_validate_json(content)
        except DamagedFile as error:
            problem = error.message
            cause: Exception = error
        except OSError as error:
            problem = f"no policy was published in {self.directory}: {POINTER}: {error.strerror}"
            cause = error
        except ValidationError as error:
            problem = f"{path} does not name a version: {error.errors(include_url=False)[0]['msg']}"
            cause = error
        kept = self.names()
        if kept:
            raise UnfitStore(
                f"{problem}. Put one of {', '.join(kept)} into force with `asd-policy rollback "
                f"{self.directory} --to VERSION`, or publish one with `asd-policy publish ARTIFACT "
                f"{self.directory}`"
            ) from cause
        raise UnfitStore(
            f"{problem}. Publish one with `asd-policy publish ARTIFACT {self.directory}`"
        ) from cause

    def _history(self) -> tuple[_InForce, ...]:
        """Return the versions in force so far; none where the pointer is missing or damaged."""
        try:
            return self._read().history
        except UnfitStore:
            return ()

    def _write(self, history: tuple[_InForce, ...]) -> None:
        if (self.directory / POINTER).exists() and not self._history():
            # It may be of a later version of asd, which could still read it.
            shutil.copyfile(self.directory / POINTER, self.directory / f"{POINTER}.damaged")
        content = _Pointer(schema="asd.policies", history=history).model_dump(mode="json", by_alias=True)
        replace_file(self.directory / POINTER, json.dumps(content) + "\n", is_alone=True)

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        """Remove what earlier writers left half done, and what the block leaves where it fails.

        Whoever made it held the lock, so nobody writes it now.
        """
        _remove_partial(self.directory / POLICIES)
        try:
            yield
        except BaseException:
            # On a full disk, it is in the way of the next attempt.
            with suppress(OSError):
                _remove_partial(self.directory / POLICIES)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store for writing. The lock ends with the process, however that ends.

        An OSError of the block becomes what cannot_write returns: all that it reads has errors of its own.
        """
        with writing(self.directory, "name another store"):
            descriptor = _open_lock(self.directory / _LOCK)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise UnfitStore(
                        f"{self.directory}: another process is changing this store: try again when it is done"
                    ) from error
                yield
            finally:
                os.close(descriptor)


class PolicyWatch:
    """Follows a store: what is newly in force there, if it can be served in place of what is."""

    def __init__(self, store: PolicyStore, loaded: LoadedPolicy) -> None:
        self._store = store
        self._version = loaded.policy.version
        self._stages = loaded.stages
        self._refused = ""

    def poll(self) -> LoadedPolicy | None:
        """Return the policy that the store names if it is another one than before and can be served.

        One that cannot is logged once and tried again each time; what is in force stays.
        """
        try:
            version = self._store.current()
            if version == self._version:
                self._refused = ""
                return None
            loaded = load_version(self._store, version)
            _check_stages(loaded.document, self._stages, "this service")
        except Exception as error:
            message = str(error)
            if message != self._refused:
                logger.error("policy %s stays in force: %s", self._version, message)
            self._refused = message
            return None
        logger.info("policy %s is in force, after %s", version, self._version)
        self._version, self._refused = version, ""
        return loaded


async def follow(
    watch: PolicyWatch,
    use: Callable[[Policy, PolicyDocument], None],
    poll_seconds: float,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Hand over what a store newly names, until cancelled."""
    while True:
        await sleep(poll_seconds)
        loaded = await asyncio.to_thread(watch.poll)
        if loaded is not None:
            use(*loaded)


def open_policy(path: Path, cascade: Sequence[str] = ()) -> tuple[LoadedPolicy, PolicyStore | None]:
    """Return the policy to serve from an artifact or a store, and the store where it is one.

    A store whose version in force cannot be served gives the last one before it that can, with an error in
    the log. cascade: stages that the policy must have been made for; empty: any. Raises UnfitArtifact.
    """
    if not is_store(path):
        return _load_for(path, cascade), None
    store = PolicyStore(path)
    *earlier, current = store.history()
    try:
        return load_version(store, current, cascade), store
    except UnfitArtifact as error:
        for version in dict.fromkeys(reversed(earlier)):
            try:
                loaded = load_version(store, version, cascade)
            except UnfitArtifact:
                continue
            logger.error("policy %s is served in place of %s: %s", version, current, error)
            return loaded, store
        raise


def is_store(path: Path) -> bool:
    """Say whether a directory holds versions, whatever state they are in."""
    return (path / POINTER).exists() or (path / POLICIES).is_dir()


def artifact_in(path: Path) -> Path:
    """Return a path to an artifact, or the directory of a store's version in force.

    Raises UnfitStore where the store has none that can be read.
    """
    if not is_store(path):
        return path
    store = PolicyStore(path)
    version = store.current()
    try:
        read_document(store.artifact(version))
    except UnfitArtifact as error:
        raise UnfitStore(
            f"version {version}, which is in force in {path}, is damaged: {error}. Publish it again, or put "
            f"another one into force with `asd-policy rollback {path}`"
        ) from error
    return store.artifact(version)


def load_version(store: PolicyStore, version: str, cascade: Sequence[str] = ()) -> LoadedPolicy:
    """Return a version of a store. Raises UnfitArtifact where it cannot be served."""
    loaded = _load_for(store.artifact(version), cascade)
    if loaded.policy.version != version:
        raise UnfitStore(f"{store.artifact(version)} holds policy {loaded.policy.version}: publish it again")
    return loaded


def load_artifact(directory: Path) -> LoadedArtifact:
    """Return what an artifact holds, also while `write_artifact` puts another one there.

    Raises UnfitArtifact.
    """
    try:
        return _load(directory)
    except UnfitArtifact:
        # The models that the document names may have gone in between.
        return _load(directory)


def _load(directory: Path) -> LoadedArtifact:
    document = read_document(directory)
    predictor = load_predictor(directory, document)
    return LoadedArtifact(build_policy(document, predictor), document, predictor)


def check_output(directory: Path) -> None:
    """Check that an artifact can be written to a directory, before what takes long. Raises UnfitStore."""
    if is_store(directory):
        raise UnfitStore(
            f"{directory} is a store of versions: write to another directory, and publish that with "
            f"`asd-policy publish DIRECTORY {directory}`"
        )
    if directory.exists() and not directory.is_dir():
        raise UnfitStore(f"{directory} is a file: name a directory")
    target = directory.resolve()
    nearest = next(each for each in (target, *target.parents) if each.exists())
    if not nearest.is_dir():
        raise UnfitStore(f"{directory}: {nearest} is a file: name another directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UnfitStore(f"{directory}: no permission to write in {nearest}: name another directory")


def write_artifact(
    document: PolicyDocument, models: Mapping[str, bytes], directory: Path, lineage: Lineage | None = None
) -> PolicyDocument:
    """Put a policy into a directory, in place of one that is there; return its document as written.

    models: by the names in the document's views. Their files get names with their digest, so that old and new
    ones lie side by side until `policy.json` is replaced, in one rename: at every moment, also after a kill,
    the directory holds the old policy or the new one. All of it is written to a hidden directory and tried
    first. Directories above are made. A failure leaves the old policy, and no new directory. Raises
    UnfitArtifact; ResourceExhausted on a full disk, PreconditionFailed where it cannot be written.
    """
    check_output(directory)
    files = {name: _name_with_digest(name, content) for name, content in models.items()}
    views = tuple(view.model_copy(update={"model": files[view.model]}) for view in document.views)
    document = document.model_copy(update={"views": views})
    contents = {file: models[name] for name, file in files.items()}
    with writing(directory, "name another directory"):
        _write_whole(document, contents, directory.resolve(), lineage)
    return document


def _write_whole(
    document: PolicyDocument, models: Mapping[str, bytes], target: Path, lineage: Lineage | None
) -> None:
    """Write an artifact as write_artifact does. models: by the names of their files. Raises OSError."""
    missing = [each for each in target.parents if not each.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside one that is there, which may be all that can be written to, or a file system of its own.
    folder = target if target.exists() else target.parent
    hidden = f".{target.name}{_PARTIAL}"
    _remove_abandoned(folder, hidden)
    partial = folder / f"{hidden}{uuid.uuid4().hex}"
    try:
        partial.mkdir()
        for file, content in models.items():
            (partial / file).write_bytes(content)
        if lineage is not None:
            write_lineage(lineage, partial)
        write_document(document, partial)
        for path in partial.iterdir():
            sync(path)
        load_usable(partial)
        sync(partial)
        if folder == target or not _rename_new(partial, target):
            _merge(partial, set(models), target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise
    shutil.rmtree(partial, ignore_errors=True)


def _rename_new(partial: Path, target: Path) -> bool:
    """Rename a directory to a name that was free; return False where another writer was faster."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    sync(target.parent)
    return True


def _merge(partial: Path, models: set[str], target: Path) -> None:
    """Move an artifact into a directory that holds another one, so that it is always one of the two."""
    # Without locks, one writer at a time is up to the user.
    with alone(target):
        try:
            for name in sorted(models):
                (partial / name).replace(target / name)
            sync(target)
            before = _models_of(target)
            # Removed before and written after: it never stands beside another policy than its own.
            (target / LINEAGE).unlink(missing_ok=True)
            (partial / DOCUMENT).replace(target / DOCUMENT)
            sync(target)
            if (partial / LINEAGE).exists():
                (partial / LINEAGE).replace(target / LINEAGE)
        except BaseException:
            _remove_models(target, set())
            raise
        _remove_models(target, before)


def _models_of(directory: Path) -> set[str]:
    """Return the files of the models that a document names beside it; none where it cannot be read."""
    try:
        named = {view.model for view in read_document(directory).views}
    except UnfitArtifact:
        return set()
    return {name for name in named if Path(name).name == name}


def _remove_models(directory: Path, before: set[str]) -> None:
    """Remove models that an artifact does not name: those of the one before, and what a kill left."""
    kept = _models_of(directory)
    if not kept:
        return
    for path in directory.iterdir():
        if path.name not in kept and (path.name in before or _MODEL_WITH_DIGEST.fullmatch(path.name)):
            with suppress(OSError):
                path.unlink()


def _remove_partial(policies: Path) -> None:
    """Remove what is no version. The caller holds the store."""
    for path in policies.glob(f"{_PARTIAL}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_abandoned(folder: Path, hidden: str) -> None:
    """Remove what killed writers left. Younger directories may be another writer's."""
    for path in [each for each in folder.iterdir() if each.name.startswith(hidden)]:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path)


def _name_with_digest(name: str, content: bytes) -> str:
    stem = name.removesuffix(".onnx")
    if _MODEL_WITH_DIGEST.fullmatch(name):
        stem = stem[: -_DIGEST - 1]
    return f"{stem}.{hashlib.sha256(content).hexdigest()[:_DIGEST]}.onnx"


def _content(artifact: Path) -> bytes:
    """Return an artifact's document as it is; nothing where it cannot be read."""
    try:
        return read_content(artifact / DOCUMENT, MOST_DOCUMENT_BYTES)
    except (OSError, DamagedFile):
        return b""


def load_usable(directory: Path) -> LoadedPolicy:
    """Return the policy of an artifact after it planned and decided once in every view.

    Raises UnfitArtifact where it did not. What it solved is kept, so that its first request does not wait.
    """
    policy, document, _ = load_artifact(directory)
    prompt = PromptText("?")
    # The predictor is tried on it, whether or not it is a prompt that the policy would predict anything for.
    family = policy.family
    policy.use_family(None)
    signals = np.zeros(1, np.float32)
    draft = Draft("", signals, signals, signals, "eos")
    verification = Verification(0, np.zeros(1, np.int64))
    try:
        for preference in Preference:
            policy.plan(prompt, Objective(preference=preference), {})
        for each in policy.views:
            stage, origin = each.view.stage, each.view.origin
            if stage is not None:
                check = None if origin is None else verification
                policy.decide(prompt, stage, draft, origin, check, Objective(), Spent(), {})
    except Exception as error:
        raise UnfitArtifact(f"{directory}: the policy loads but does not decide: {error}") from error
    policy.use_family(family)
    return LoadedPolicy(policy, document)


def read_lineage(artifact: Path) -> Lineage | None:
    """Return where an artifact comes from; None where it was fitted to outcomes. Raises UnfitStore."""
    path = artifact / LINEAGE
    try:
        content = read_content(path, _MOST_BYTES)
        parse_json(content, str(path))
        return Lineage.model_validate_json(content)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        raise UnfitStore(error.message) from error
    except OSError as error:
        raise UnfitStore(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise UnfitStore(f"{path}: {explain(error)}") from error


def write_lineage(lineage: Lineage, artifact: Path) -> None:
    """Write where an artifact comes from."""
    (artifact / LINEAGE).write_text(lineage.model_dump_json() + "\n", encoding="utf-8")


def _load_for(directory: Path, cascade: Sequence[str]) -> LoadedPolicy:
    loaded = load_usable(directory)
    if cascade:
        _check_stages(loaded.document, cascade, "this service's `cascade`")
    return loaded


def _check_stages(document: PolicyDocument, stages: Sequence[str], whose: str) -> None:
    names = [stage.name for stage in document.stages]
    if names != list(stages):
        raise UnfitStore(
            f"policy {document.policy_version} was made for the cascade {', '.join(names)}, but {whose} is "
            f"for {', '.join(stages)}: make a policy for it with `asd-policy fit`"
        )


def _open_lock(path: Path) -> int:
    """Return the descriptor of a lock; of one that another user has made, for reading: that does."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
