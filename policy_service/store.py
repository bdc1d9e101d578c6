"""Versions of a policy in one directory, of which one is in force.

    STORE/policies/<version>/   an artifact, never changed once it is there
    STORE/current.json          the version in force and those before it

Both come into being by one rename, after their content is on the disk: whoever dies at whatever moment leaves
the version that was in force.
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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policy_service.artifact import DOCUMENT, PolicyDocument, UnfitArtifact, load_policy, read_document
from policy_service.features import Draft, PromptText, Verification
from policy_service.policy import Objective, Policy, Preference, Spent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

POINTER = "current.json"
POLICIES = "policies"
# Beside policy.json where a policy was made from another one.
LINEAGE = "lineage.json"
_LOCK = ".lock"
_PARTIAL = ".partial-"
# A version names a directory.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class UnfitStore(UnfitArtifact):
    """The store cannot do what was asked; the message says why and what to do."""


class LoadedPolicy(NamedTuple):
    """A policy that can be served, and its document."""

    policy: Policy
    document: PolicyDocument

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the cascade's stages."""
        return tuple(stage.name for stage in self.policy.stages)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageLineage(_Entry):
    """What refitting changed of one stage: p_correct' = sigmoid(slope * logit(p_correct) + offset)."""

    stage: str
    reports: int
    slope: float
    offset: float


class Lineage(_Entry):
    """Where a policy comes from. parent: version that it was refitted from."""

    parent: str
    stages: tuple[StageLineage, ...]


class _InForce(_Entry):
    """since: seconds since 1970."""

    version: Annotated[str, Field(pattern=_VERSION.pattern)]
    since: float


class _Pointer(_Entry):
    """Content of `current.json`. history: the last one is in force."""

    schema_name: Literal["asd.policies"] = Field("asd.policies", alias="schema")
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
        """Return every version: those of the history by their age, then the others. Raises UnfitStore."""
        pointer = self._read()
        since = {each.version: each.since for each in pointer.history}
        listed = []
        for version in (*since, *(name for name in self.names() if name not in since)):
            parent, prompts, problem = "", 0, ""
            try:
                prompts = read_document(self.artifact(version)).calibration.prompts
                lineage = read_lineage(self.artifact(version))
                parent = lineage.parent if lineage else ""
            except UnfitArtifact as error:
                problem = str(error)
            is_current = version == pointer.history[-1].version
            listed.append(StoredVersion(version, parent, prompts, since.get(version), is_current, problem))
        return listed

    def publish(self, artifact: Path) -> PolicyDocument:
        """Copy an artifact into the store and put it into force; return its document.

        Raises UnfitArtifact where it cannot be served, or was made for other stages than the one in force.
        """
        if (self.directory / DOCUMENT).exists():
            raise UnfitStore(f"{self.directory} is an artifact, not a store: name another directory")
        document = read_document(artifact)
        version = document.policy_version
        if not _VERSION.fullmatch(version):
            raise UnfitStore(f"{artifact}: version {version!r} cannot name a directory")
        with self._locked():
            has_pointer = (self.directory / POINTER).exists()
            history = self._read().history if has_pointer else ()
            if history:
                stages = [stage.name for stage in read_document(self.artifact(history[-1].version)).stages]
                _check_stages(document, stages, "the policy in force")
            self._copy(artifact, document)
            if not history or history[-1].version != version:
                self._write((*history, _InForce(version=version, since=self._clock())))
        return document

    def rollback(self, to: str | None = None) -> str:
        """Put the version before the present one, or a named one, back into force; return it.

        Raises UnfitStore where there is none, UnfitArtifact where it cannot be served.
        """
        with self._locked():
            history = self._read().history
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
            load_usable(self.artifact(version))
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
        """Make the version's directory, whole or not at all."""
        target = self.artifact(document.policy_version)
        if target.exists():
            if (target / DOCUMENT).read_bytes() != (artifact / DOCUMENT).read_bytes():
                raise UnfitStore(
                    f"{target} holds another policy of this version, and a version never changes: give "
                    "policy_version another name"
                )
            load_usable(target)
            return
        for left_over in target.parent.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left_over)
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
                raise UnfitStore(f"{artifact / name}: {error.strerror}") from error
            _sync(partial / name)
        # The copy, not what was copied: it is what will be served.
        load_usable(partial)
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)

    def _read(self) -> _Pointer:
        path = self.directory / POINTER
        try:
            return _Pointer.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UnfitStore(
                f"no policy was published in {self.directory}: {POINTER}: {error.strerror}. Publish one with "
                "`asd-policy publish ARTIFACT DIRECTORY`"
            ) from error
        except ValidationError as error:
            raise UnfitStore(
                f"{path} does not name a version: {error.errors(include_url=False)[0]['msg']}"
            ) from error

    def _write(self, history: tuple[_InForce, ...]) -> None:
        content = _Pointer(schema="asd.policies", history=history).model_dump(mode="json", by_alias=True)
        partial = self.directory / f"{POINTER}.partial"
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        _sync(partial)
        partial.replace(self.directory / POINTER)
        _sync(self.directory)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store for writing. The lock ends with the process, however that ends."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UnfitStore(
                    f"{self.directory}: another process is changing this store: try again when it is done"
                ) from error
            yield


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
    if not (path / POINTER).exists() and not (path / POLICIES).is_dir():
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


def load_version(store: PolicyStore, version: str, cascade: Sequence[str] = ()) -> LoadedPolicy:
    """Return a version of a store. Raises UnfitArtifact where it cannot be served."""
    loaded = _load_for(store.artifact(version), cascade)
    if loaded.policy.version != version:
        raise UnfitStore(f"{store.artifact(version)} holds policy {loaded.policy.version}: publish it again")
    return loaded


def load_usable(directory: Path) -> LoadedPolicy:
    """Return the policy of an artifact after it planned and decided once in every view.

    Raises UnfitArtifact where it did not. What it solved is kept, so that its first request does not wait.
    """
    policy, document = load_policy(directory)
    prompt = PromptText("?")
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
    return LoadedPolicy(policy, document)


def read_lineage(artifact: Path) -> Lineage | None:
    """Return where an artifact comes from; None where it was fitted to outcomes. Raises UnfitStore."""
    path = artifact / LINEAGE
    try:
        return Lineage.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise UnfitStore(f"{path}: {error}") from error


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


def _sync(path: Path) -> None:
    """Have a file's or directory's content written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
