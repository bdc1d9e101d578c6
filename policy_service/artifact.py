"""The artifact of a policy: one zip file of `policy.json` and one ONNX model per view.

Why a zip: one rename replaces one file, the standard library reads it and checks every byte (CRC-32), and
`unzip` lists its content. It is not compressed, so its content is never larger than the file. No entry has a
time or an owner, so the same policy always makes the same bytes. `policy.json` names the models with their
SHA-256.

A path to a directory means the `policy.zip` in it, as a Kubernetes volume needs. Without one, the directory
is read in the form of 0.1: `policy.json`, its models, and perhaps `lineage.json`.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from pydantic import ValidationError

from asd.transport.files import DamagedFile, read_content
from asd.values import FinishReason, Preference
from policy_service.calibration import CalibratedView, Calibration
from policy_service.document import (
    DOCUMENT,
    Lineage,
    PolicyDocument,
    UnfitArtifact,
    document_text,
    first_problem,
    parse_document,
)
from policy_service.domain import AbandonThreshold, CurvePoint, PolicyObjective, Predictor, Spent, StageFacts
from policy_service.features import Draft, DraftVerification, FeatureSpace, PromptText
from policy_service.policy import Policy
from policy_service.predictor import OnnxPredictor
from policy_service.predictor_model import MOST_MODEL_BYTES, UnfitModel, check_model
from policy_service.solver import Move, View
from policy_service.state_cells import StateCells
from services.common.documents import parse_json, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ARTIFACT = "policy.zip"
# Beside policy.json in an artifact of 0.1 that was refitted.
_LINEAGE = "lineage.json"
# Chosen: sixty and a hundred times the shipped one's.
_MOST_BYTES = 256 << 20
_MOST_DOCUMENT_BYTES = 16 << 20
# Chosen: a cascade of 44 stages has about that many views.
_MOST_FILES = 1024
# The first bytes of each entry in a zip's directory.
_ENTRY = b"PK\x01\x02"
# The earliest time that a zip can store.
_NO_TIME = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
# Errors that zipfile raises for content that is no zip, or not one that it can read.
_NO_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error)


@dataclass(frozen=True)
class Artifact:
    """A stored policy. models: ONNX, by their names in the document's views."""

    document: PolicyDocument
    models: Mapping[str, bytes]


class LoadedArtifact(NamedTuple):
    """An artifact's policy, its document, and the policy's predictor."""

    policy: Policy
    document: PolicyDocument
    predictor: OnnxPredictor

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the cascade's stages."""
        return tuple(stage.name for stage in self.policy.stages)


class _Files(Protocol):
    """The files of an artifact."""

    def name(self, file: str) -> str:
        """Return the name of a file for messages."""

    def read(self, file: str, most_bytes: int) -> bytes:
        """Return the content of a file. Raises DamagedFile, OSError."""


class _ZipFiles:
    """The files of a zip. where: its path, for messages. Raises DamagedFile."""

    def __init__(self, content: bytes, where: str) -> None:
        self._where = where
        # Count the entries before zipfile makes an object of each.
        if content.count(_ENTRY) > _MOST_FILES:
            raise DamagedFile(f"{where} has more than {_MOST_FILES} files in it: copy it again")
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(content))
        except _NO_ZIP as error:
            raise DamagedFile(f"{where} is no policy of `asd-policy fit`: {error}: copy it again") from error
        entries = self._archive.infolist()
        self.names = {entry.filename for entry in entries}
        if len(self.names) < len(entries):
            raise DamagedFile(f"{where} has a file twice: copy it again")
        packed = [each for each in entries if each.compress_type or each.compress_size != each.file_size]
        if packed:
            raise DamagedFile(f"{where}: {quoted(packed[0].filename)} is compressed: pack it with `zip -0`")
        # Overlapping entries would be read as many copies.
        if sum(entry.file_size for entry in entries) > len(content):
            raise DamagedFile(f"{where} says that it holds more than its size: copy it again")

    def name(self, file: str) -> str:
        return f"{self._where}: {file}"

    def read(self, file: str, most_bytes: int) -> bytes:
        if file not in self.names:
            raise DamagedFile(f"{self._where} holds no {file}: copy it again")
        if self._archive.getinfo(file).file_size > most_bytes:
            raise DamagedFile(f"{self.name(file)} is larger than {most_bytes >> 20} MiB: copy it again")
        try:
            return self._archive.read(file)
        except _NO_ZIP as error:
            raise DamagedFile(f"{self.name(file)} is damaged: {error}: copy it again") from error


class _DirectoryFiles:
    """The files of an artifact of 0.1. To be removed with 0.3."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def name(self, file: str) -> str:
        return str(self._directory / file)

    def read(self, file: str, most_bytes: int) -> bytes:
        return read_content(self._directory / file, most_bytes)

    def lineage(self) -> Lineage | None:
        """Return `lineage.json`; None if there is none. Raises UnfitArtifact, DamagedFile, OSError."""
        where = self.name(_LINEAGE)
        try:
            content = self.read(_LINEAGE, _MOST_DOCUMENT_BYTES)
            parse_json(content, where)
            return Lineage.model_validate_json(content)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise UnfitArtifact(f"{where}: {first_problem(error)}") from error


def artifact_file(path: Path) -> Path:
    """Return the file of an artifact, or the directory of one of 0.1. path: as the user gives it."""
    if not path.is_dir() or (not (path / ARTIFACT).exists() and (path / DOCUMENT).exists()):
        return path
    return path / ARTIFACT


def read_document(path: Path) -> PolicyDocument:
    """Return the document of an artifact, without reading its models. Raises UnfitArtifact."""
    return _document(_open(path))


def read_artifact(path: Path) -> Artifact:
    """Return an artifact: its document, and the models that the document names. Raises UnfitArtifact."""
    return _artifact(_open(path))


def unpack(content: bytes, where: str) -> Artifact:
    """Return the artifact in a file's content, like read_artifact. where: its path, for messages."""
    try:
        files = _ZipFiles(content, where)
    except DamagedFile as error:
        raise UnfitArtifact(error.message) from error
    return _artifact(files)


def pack(artifact: Artifact) -> bytes:
    """Return the content of an artifact's file: always the same bytes for the same policy."""
    content = io.BytesIO()
    models = {view.model: artifact.models[view.model] for view in artifact.document.views}
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in {DOCUMENT: document_text(artifact.document).encode(), **models}.items():
            entry = zipfile.ZipInfo(name, _NO_TIME)
            entry.create_system = _UNIX
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return content.getvalue()


def load_artifact(path: Path) -> LoadedArtifact:
    """Return the policy of an artifact, ready to plan. Raises UnfitArtifact."""
    return _load(read_artifact(path), str(path))


def load_usable(path: Path) -> LoadedArtifact:
    """Return the policy of an artifact after a trial, like `tried`. Raises UnfitArtifact."""
    return tried(read_artifact(path), str(path))


def tried(artifact: Artifact, where: str) -> LoadedArtifact:
    """Return a policy after it has planned and decided once in every view. where: its path, for messages.

    Raises UnfitArtifact if that fails. The solutions are cached, so that the first request does not wait.
    """
    loaded = _load(artifact, where)
    policy = loaded.policy
    prompt = PromptText("?")
    # The trial's prompt may be unlike the fitted ones, so switch that check off: the predictor must run.
    family = policy.family
    policy.use_family(None)
    signals = np.zeros(1, np.float32)
    draft = Draft("", signals, signals, signals, FinishReason.EOS)
    verification = DraftVerification(0, np.zeros(1, np.int64))
    try:
        for preference in Preference:
            policy.plan(prompt, PolicyObjective(preference=preference), {})
        for each in policy.views:
            stage, origin = each.view.stage, each.view.origin
            if stage is not None:
                check = None if origin is None else verification
                policy.decide(prompt, stage, draft, origin, check, PolicyObjective(), Spent(), {})
    except Exception as error:
        raise UnfitArtifact(f"{where}: the policy loads but does not decide: {error}") from error
    policy.use_family(family)
    return loaded


def _open(path: Path) -> _Files:
    try:
        file = artifact_file(path)
        if file.is_dir():
            return _DirectoryFiles(file)
        return _ZipFiles(read_content(file, _MOST_BYTES), str(file))
    except DamagedFile as error:
        raise UnfitArtifact(error.message) from error
    except OSError as error:
        raise UnfitArtifact(
            f"no policy in {error.filename}: {error.strerror}. Make one with `asd-policy fit`, or set "
            "`artifact` to one"
        ) from error


def _document(files: _Files) -> PolicyDocument:
    document = parse_document(_read(files, DOCUMENT, _MOST_DOCUMENT_BYTES), files.name(DOCUMENT))
    if isinstance(files, _DirectoryFiles):
        try:
            return document.model_copy(update={"lineage": files.lineage()})
        except DamagedFile as error:
            raise UnfitArtifact(error.message) from error
        except OSError as error:
            raise UnfitArtifact(f"{files.name(_LINEAGE)}: {error.strerror}") from error
    return document


def _artifact(files: _Files) -> Artifact:
    document = _document(files)
    models = {}
    for view in document.views:
        where = files.name(view.model)
        content = models[view.model] = _read(files, view.model, MOST_MODEL_BYTES)
        if hashlib.sha256(content).hexdigest() != view.sha256:
            raise UnfitArtifact(f"{where} is not the model that {DOCUMENT} was made with: copy both again")
        try:
            check_model(content, document.features, len(view.heads))
        except UnfitModel as error:
            raise UnfitArtifact(f"{where} is no predictor of `asd-policy fit`: {error}") from error
    if isinstance(files, _ZipFiles) and (unknown := files.names - {DOCUMENT, *models}):
        raise UnfitArtifact(f"{files.name(quoted(min(unknown)))} belongs to no view: remove it")
    return Artifact(document, models)


def _read(files: _Files, file: str, most_bytes: int) -> bytes:
    try:
        return files.read(file, most_bytes)
    except DamagedFile as error:
        raise UnfitArtifact(error.message) from error
    except OSError as error:
        raise UnfitArtifact(f"{files.name(file)}: {error.strerror}") from error


def _load(artifact: Artifact, where: str) -> LoadedArtifact:
    document = artifact.document
    try:
        predictor = OnnxPredictor([artifact.models[view.model] for view in document.views])
    except Exception as error:
        raise UnfitArtifact(f"{where}: a model does not load: {error}") from error
    return LoadedArtifact(build_policy(document, predictor), document, predictor)


def build_views(document: PolicyDocument) -> list[CalibratedView]:
    """Return the views that a document describes."""
    names = [stage.name for stage in document.stages]
    indexes = {(view.stage, view.origin): index for index, view in enumerate(document.views)}
    views = []
    for entry in document.views:
        moves = tuple(
            Move(
                names.index(move.to),
                indexes[move.to, entry.stage],
                np.array(move.transition),
                np.array(move.cost),
                np.array(move.latency_ms),
            )
            for move in entry.moves
        )
        view = View(
            None if entry.stage is None else names.index(entry.stage),
            None if entry.origin is None else names.index(entry.origin),
            np.array(entry.p_correct),
            np.array(entry.certified),
            moves,
        )
        heads = {
            names.index(head.stage): Calibration(head.slope, head.offset, head.edges, head.counts)
            for head in entry.heads
        }
        cells = None if entry.cells is None else StateCells(**entry.cells.model_dump())
        views.append(CalibratedView(view, heads, cells))
    return views


def build_policy(document: PolicyDocument, predictor: Predictor) -> Policy:
    """Return the policy that a document describes, with a predictor for its views."""
    values: Mapping[Preference, float] = {
        Preference.FASTEST: document.quality_values.fastest,
        Preference.BALANCED: document.quality_values.balanced,
        Preference.BEST: document.quality_values.best,
    }
    return Policy(
        document.policy_version,
        [
            StageFacts(s.name, s.cost, s.latency_ms, s.accuracy, s.calibration_error, s.finish_reasons)
            for s in document.stages
        ],
        build_views(document),
        values,
        FeatureSpace(len(document.stages)),
        predictor,
        [CurvePoint(p.quality_value, p.cost, p.latency_ms, p.accuracy) for p in document.curve],
        {
            index: tuple(AbandonThreshold(rule.tokens, rule.mean_logprob) for rule in stage.abandon)
            for index, stage in enumerate(document.stages)
        },
        None if document.family is None else document.family.family(),
    )
