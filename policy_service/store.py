"""Artifacts on disk: writing one, and a store of versions, one of which is in force.

    STORE/policies/<version>.zip   an artifact, never changed afterwards unless it is damaged
    STORE/current.json             the version in force and those before it

Each file is created by one rename, after its content is on the disk: if a writer is killed, the version in
force stays. Until 0.3, versions that 0.1 has published are read as well: directories
STORE/policies/<version>/.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from asd.transport.files import DamagedFile, read_content
from policy_service.artifact import (
    ARTIFACT,
    Artifact,
    LoadedArtifact,
    load_usable,
    pack,
    read_artifact,
    read_document,
    tried,
    unpack,
)
from policy_service.document import DOCUMENT, Entry, PolicyDocument, UnfitArtifact
from services.common.disks import alone, replace_file, writing
from services.common.documents import parse_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from policy_service.policy import Policy

logger = logging.getLogger(__name__)

POINTER = "current.json"
POLICIES = "policies"
_LOCK = ".lock"
_SUFFIX = ".zip"
# Largest pointer. Chosen: that of a store that changes every minute for a year.
_MOST_BYTES = 64 << 20
# Seconds since 1970: the end of the year 9999, the last year of datetime.
_LATEST = 253_402_300_799.0
# A version names a file.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class UnfitStore(UnfitArtifact):
    """An operation on the store failed; the message says why and what to do."""


class _InForce(Entry):
    """A version of the history. since: seconds since 1970."""

    version: Annotated[str, Field(pattern=f"^{_VERSION.pattern}$")]
    since: Annotated[float, Field(ge=0, le=_LATEST)]


class _Pointer(Entry):
    """Content of `current.json`. history: the last version is in force."""

    schema_name: Literal["asd.policies"] = Field(alias="schema")
    history: Annotated[tuple[_InForce, ...], Field(min_length=1)]


@dataclass(frozen=True)
class StoredVersion:
    """One version of a store.

    parent: version that it was refitted from, or "". prompts: number of calibration prompts. since: when it
    came into force, seconds since 1970; None: not in the history. problem: why it cannot be read, or "".
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
        """Return the version in force. Raises UnfitStore if there is none."""
        return self._read().history[-1].version

    def history(self) -> tuple[str, ...]:
        """Return the versions in force so far, the current one last. Raises UnfitStore."""
        return tuple(each.version for each in self._read().history)

    def artifact(self, version: str) -> Path:
        """Return the artifact of a version."""
        file = self._file(version)
        of_0_1 = self.directory / POLICIES / version
        return of_0_1 if of_0_1.is_dir() and not file.exists() else file

    def names(self) -> tuple[str, ...]:
        """Return every stored version, sorted by name."""
        folder = self.directory / POLICIES
        if not folder.is_dir():
            return ()
        files = {path.stem for path in folder.glob(f"*{_SUFFIX}")}
        of_0_1 = {path.name for path in folder.iterdir() if path.suffix != _SUFFIX and path.is_dir()}
        return tuple(sorted(filter(_VERSION.fullmatch, files | of_0_1)))

    def versions(self) -> list[StoredVersion]:
        """Return every version: first those of the history by age, then the rest.

        If the pointer is missing or damaged, no version is in force. Raises UnfitStore if there is none.
        """
        history = self._history()
        if not history and not self.names():
            # It raises an error that says why.
            self._read()
        since = {each.version: each.since for each in history}
        listed = []
        for version in (*since, *(name for name in self.names() if name not in since)):
            parent, prompts, problem = "", 0, ""
            try:
                document = read_document(self.artifact(version))
                prompts = document.calibration.prompts
                parent = document.lineage.parent if document.lineage else ""
                load_version(self, version)
            except UnfitArtifact as error:
                problem = str(error)
            is_current = bool(history) and version == history[-1].version
            listed.append(StoredVersion(version, parent, prompts, since.get(version), is_current, problem))
        return listed

    def publish(self, path: Path) -> PolicyDocument:
        """Copy an artifact into the store and put it into force; return its document.

        Raises as put_into_force.
        """
        artifact = read_artifact(path)
        self.put_into_force(artifact, str(path))
        return artifact.document

    def put_into_force(self, artifact: Artifact, where: str = "the new policy") -> None:
        """Keep a policy, and put it into force. where: its path, for messages.

        A stored version that cannot be served is replaced, and so is a damaged pointer. Raises UnfitArtifact
        if the artifact cannot be served, or was made for other stages than the version in force. Raises
        ResourceExhausted on a full disk, PreconditionFailed if the store cannot be written to.
        """
        if any((self.directory / name).exists() for name in (ARTIFACT, DOCUMENT)):
            raise UnfitStore(f"{self.directory} is an artifact, not a store: name another directory")
        if self.directory.exists() and not self.directory.is_dir():
            raise UnfitStore(f"{self.directory} is a file: name a directory")
        tried(artifact, where)
        version = artifact.document.policy_version
        if not _VERSION.fullmatch(version):
            raise UnfitStore(f"{where}: version {version!r} cannot name a file")
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            history = self._history()
            self._check_cascade(artifact.document, history)
            self._keep(artifact)
            if not history or history[-1].version != version:
                self._write((*history, _InForce(version=version, since=self._clock())))

    def _check_cascade(self, document: PolicyDocument, history: tuple[_InForce, ...]) -> None:
        """Check a policy's stages against the newest readable version: a store is for one cascade."""
        for version in (*(each.version for each in reversed(history)), *self.names()):
            try:
                stages = [stage.name for stage in read_document(self.artifact(version)).stages]
            except UnfitArtifact:
                continue
            is_current = bool(history) and version == history[-1].version
            _check_stages(document, stages, "the policy in force" if is_current else f"policy {version}")
            return

    def rollback(self, to: str | None = None) -> str:
        """Put the version before the current one, or a named one, back into force; return it.

        Raises UnfitStore if there is none, or it cannot be served.
        """
        if not self.names():
            # It raises an error that says why.
            self._read()
        with self._locked():
            # A named version needs no history, so this also repairs a damaged pointer.
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
        indexes = [index for index, each in enumerate(history) if each.version == to]
        if indexes:
            return history[: indexes[-1] + 1]
        return (*history, _InForce(version=to, since=self._clock()))

    def _keep(self, artifact: Artifact) -> None:
        """Write the file of a version. It replaces one that cannot be served, or one of 0.1."""
        version = artifact.document.policy_version
        file = self._file(version)
        file.parent.mkdir(exist_ok=True)
        # The lock is held, so no writer is using the partial files here.
        for left_by_a_kill in file.parent.glob(f".*{_SUFFIX}.partial"):
            left_by_a_kill.unlink()
        try:
            load_version(self, version)
            kept = read_artifact(self.artifact(version))
        except UnfitArtifact:
            kept = None
        if kept is not None and _without_names(kept.document) != _without_names(artifact.document):
            raise UnfitStore(
                f"{self.artifact(version)} holds another policy of this version, and a version never "
                "changes: give policy_version another name"
            )
        if kept is None or not file.exists():
            replace_file(file, pack(artifact), is_alone=True)

    def _file(self, version: str) -> Path:
        return self.directory / POLICIES / f"{version}{_SUFFIX}"

    def _read(self) -> _Pointer:
        """Return the pointer. Raises UnfitStore, which says how to repair it."""
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
        """Return the versions in force so far; none if the pointer is missing or damaged."""
        try:
            return self._read().history
        except UnfitStore:
            return ()

    def _write(self, history: tuple[_InForce, ...]) -> None:
        if (self.directory / POINTER).exists() and not self._history():
            # Keep a copy: a later version of asd may have written it, and could still read it.
            shutil.copyfile(self.directory / POINTER, self.directory / f"{POINTER}.damaged")
        content = _Pointer(schema="asd.policies", history=history).model_dump(mode="json", by_alias=True)
        replace_file(self.directory / POINTER, json.dumps(content) + "\n", is_alone=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock for writing. The system releases it with the process.

        An OSError of the block becomes the error of cannot_write: reads in it raise their own errors.
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
    """Follows a store: returns each new policy in force that can be served."""

    def __init__(self, store: PolicyStore, loaded: LoadedArtifact) -> None:
        self._store = store
        self._version = loaded.policy.version
        self._stages = loaded.stages
        self._refused = ""

    def poll(self) -> LoadedArtifact | None:
        """Return the store's policy in force if it is new and can be served; else None.

        A policy that cannot be served is logged once and tried again at each poll; the earlier one stays.
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
    """Pass each new policy of a store to `use`, until cancelled."""
    while True:
        await sleep(poll_seconds)
        loaded = await asyncio.to_thread(watch.poll)
        if loaded is not None:
            use(loaded.policy, loaded.document)


def open_policy(path: Path, cascade: Sequence[str] = ()) -> tuple[LoadedArtifact, PolicyStore | None]:
    """Return the policy of an artifact or a store, and the store, if it is one.

    If a store's version in force cannot be served, the last earlier one that can is returned, with an error
    in the log. cascade: stages that the policy must have been made for; empty: any. Raises UnfitArtifact.
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
    """Return whether a directory is a store, even a damaged one."""
    return (path / POINTER).exists() or (path / POLICIES).is_dir()


def artifact_in(path: Path) -> Path:
    """Return a path to an artifact; for a store, to its version in force.

    Raises UnfitStore if the store has none that can be read.
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


def load_version(store: PolicyStore, version: str, cascade: Sequence[str] = ()) -> LoadedArtifact:
    """Return a version of a store. Raises UnfitArtifact if it cannot be served."""
    loaded = _load_for(store.artifact(version), cascade)
    if loaded.policy.version != version:
        raise UnfitStore(f"{store.artifact(version)} holds policy {loaded.policy.version}: publish it again")
    return loaded


def check_output(path: Path) -> None:
    """Check early that an artifact can be written to a path. Raises UnfitStore."""
    if is_store(path):
        raise UnfitStore(
            f"{path} is a store of versions: write to a file, and publish that with "
            f"`asd-policy publish FILE {path}`"
        )
    target = _output_file(path)
    nearest = next(each for each in target.parents if each.exists())
    if not nearest.is_dir():
        raise UnfitStore(f"{path}: {nearest} is a file: name another file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UnfitStore(f"{path}: no permission to write in {nearest}: name another file")


def write_artifact(artifact: Artifact, path: Path) -> None:
    """Write a policy to a file, or to `policy.zip` in an existing directory, after a trial.

    An earlier policy stays until the new one is on the disk, even if that fails. Missing parent directories
    are made. Raises UnfitArtifact; ResourceExhausted on a full disk, PreconditionFailed if it cannot be
    written.
    """
    check_output(path)
    file = _output_file(path)
    content = pack(artifact)
    # Try the bytes that will be read, and not the values that they were made from.
    tried(unpack(content, str(file)), str(file))
    with writing(path, "name another file"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file.parent):
            replace_file(file, content, is_alone=True)


def _without_names(document: PolicyDocument) -> PolicyDocument:
    """Return a document without the names of its models, in which 0.1 put digests."""
    views = tuple(view.model_copy(update={"model": ""}) for view in document.views)
    return document.model_copy(update={"views": views})


def _output_file(path: Path) -> Path:
    """Return the file to write. An artifact of 0.1 stays beside it, and is no longer read."""
    return (path / ARTIFACT if path.is_dir() else path).resolve()


def _load_for(path: Path, cascade: Sequence[str]) -> LoadedArtifact:
    loaded = load_usable(path)
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
    """Return the descriptor of a lock. Another user's lock is opened for reading, which is enough."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
