"""The artifact of a policy: a directory with `policy.json` and one ONNX model per view.

`policy.json` names the models with their SHA-256, so a mixed-up directory is refused at start.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, get_args

import numpy as np
from pydantic import ValidationError

from policy_service.document import (
    DOCUMENT,
    MOST_DOCUMENT_BYTES,
    MOST_NAME,
    PolicyDocument,
    UnfitArtifact,
)
from policy_service.features import FEATURES_VERSION, FeatureSpace
from policy_service.policy import (
    AbandonRule,
    CalibratedView,
    Calibration,
    CurvePoint,
    Policy,
    Predictor,
    Preference,
    StageFacts,
)
from policy_service.predictor import OnnxPredictor
from policy_service.predictor_model import MOST_MODEL_BYTES, UnfitModel, check_model
from policy_service.solver import Move, View
from policy_service.state_cells import StateCells
from services.common.disks import replace_file
from services.common.documents import DamagedFile, parse_json, read_content
from services.common.visible import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_document(directory: Path) -> PolicyDocument:
    """Return the content of an artifact's `policy.json`. Raises UnfitArtifact."""
    path = directory / DOCUMENT
    try:
        content = read_content(path, MOST_DOCUMENT_BYTES)
        _check_schema_version(path, parse_json(content, str(path)))
        document = PolicyDocument.model_validate_json(content)
    except DamagedFile as error:
        raise UnfitArtifact(error.message) from error
    except OSError as error:
        raise UnfitArtifact(
            f"no policy in {directory}: {path.name}: {error.strerror}. Make one with `asd-policy fit`, or "
            "set `artifact` to a directory that holds one"
        ) from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        said = problem["msg"].removeprefix("Value error, ")
        raise UnfitArtifact(f"{path}: {place}: {said}" if place else f"{path}: {said}") from error
    if document.features_version != FEATURES_VERSION:
        raise UnfitArtifact(
            f"{path}: made with features {document.features_version}, this version computes "
            f"{FEATURES_VERSION}: make the policy anew with `asd-policy fit`"
        )
    expected = FeatureSpace(len(document.stages)).size
    if document.features != expected:
        raise UnfitArtifact(f"{path}: features must be {expected} for {len(document.stages)} stages")
    return document


def _check_schema_version(path: Path, content: object) -> None:
    """Raise UnfitArtifact for a document of another version or of none; what is no object is the parser's.

    A Literal of pydantic takes 2.0 for 2.
    """
    if not isinstance(content, dict):
        return
    version = content.get("schema_version")
    (known,) = get_args(PolicyDocument.model_fields["schema_version"].annotation)
    if type(version) is not int or version != known:
        given = json.dumps(version) if "schema_version" in content else "is missing"
        raise UnfitArtifact(
            f"{path}: schema_version {one_line(given, MOST_NAME)}; this version of asd reads {known}: make "
            "the policy anew with `asd-policy fit`"
        )


def load_policy(directory: Path) -> tuple[Policy, PolicyDocument]:
    """Return the policy that a directory holds, and its document. Raises UnfitArtifact."""
    document = read_document(directory)
    return build_policy(document, load_predictor(directory, document)), document


def load_predictor(directory: Path, document: PolicyDocument) -> OnnxPredictor:
    """Return the predictor of a document from the models beside it. Raises UnfitArtifact."""
    models = []
    for view in document.views:
        path = directory / view.model
        try:
            content = read_content(path, MOST_MODEL_BYTES)
        except DamagedFile as error:
            raise UnfitArtifact(error.message) from error
        except OSError as error:
            raise UnfitArtifact(f"{path}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != view.sha256:
            raise UnfitArtifact(f"{path} is not the model that {DOCUMENT} was made with: copy both again")
        try:
            check_model(content, document.features, len(view.heads))
        except UnfitModel as error:
            raise UnfitArtifact(f"{path} is no predictor of `asd-policy fit`: {error}") from error
        models.append(content)
    try:
        return OnnxPredictor(models)
    except Exception as error:
        raise UnfitArtifact(f"{directory}: a model does not load: {error}") from error


def build_policy(document: PolicyDocument, predictor: Predictor) -> Policy:
    """Return the policy that a document describes, with a predictor for its views."""
    names = [stage.name for stage in document.stages]
    places = {(view.stage, view.origin): place for place, view in enumerate(document.views)}
    views = []
    for entry in document.views:
        moves = tuple(
            Move(
                names.index(move.to),
                places[move.to, entry.stage],
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
        views,
        values,
        FeatureSpace(len(names)),
        predictor,
        [CurvePoint(p.quality_value, p.cost, p.latency_ms, p.accuracy) for p in document.curve],
        {
            place: tuple(AbandonRule(rule.tokens, rule.mean_logprob) for rule in stage.abandon)
            for place, stage in enumerate(document.stages)
        },
        None if document.family is None else document.family.family(),
    )


def write_document(document: PolicyDocument, directory: Path) -> None:
    """Write `policy.json`, last of an artifact's files and in one step: a cut-off run leaves no policy."""
    content = document.model_dump(mode="json", by_alias=True)
    text = json.dumps(content, separators=(",", ":")) + "\n"
    replace_file(directory / DOCUMENT, text, is_alone=True)
