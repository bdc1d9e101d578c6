"""The content of an artifact's `policy.json`."""

from __future__ import annotations

import base64
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, get_args

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from asd.transport.files import DamagedFile
from asd.values import FinishReason
from asd.visible import OneLineError, one_line
from policy_service.family import Family
from policy_service.features import FEATURES_VERSION, FeatureSpace
from services.common.documents import parse_json, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import SerializerFunctionWrapHandler

DOCUMENT = "policy.json"
MOST_NAME = 256
_DIGEST = re.compile("[0-9a-f]{64}")
# Bounds on the memory that a file can take in a service. Chosen: several times what `fit` writes.
_MOST_FAMILY_WORDS = 65_536
_MOST_GRAM_CHARACTERS = 2**21
_GRAM = np.dtype("<u4")
# Probabilities are stored with six decimals, so the sum of a row may differ from 1 by rounding.
_ROW_TOLERANCE = 1e-3

Probability = Annotated[float, Field(ge=0, le=1)]
# Chosen: beyond any real cost or latency, and low enough that products of a few stay finite.
_MOST = 1e12
Amount = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False)]
# Integers that every JSON reader represents exactly.
Count = Annotated[int, Field(ge=0, le=2**53)]


class UnfitArtifact(OneLineError):  # noqa: N818 - an error is named by its cause
    """An artifact cannot be used; the message says why and what to do."""


class Entry(BaseModel):
    """Part of a document that asd writes and reads.

    Types are strict: neither true nor "1" is read as 1, but 1 is read as 1.0. Every text is printable and on
    one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @field_validator("*")
    @classmethod
    def _check_texts(cls, value: object) -> object:
        # All entries of a list are of one kind.
        is_list = isinstance(value, tuple) and value and isinstance(value[0], str)
        for text in value if is_list else (value,):  # type: ignore[attr-defined]
            if isinstance(text, str) and one_line(text, len(text)) != text:
                raise ValueError(f"{quoted(text)} has characters that cannot be shown: remove them")
        return value


def _check_name(name: str) -> str:
    if not name.isprintable() or len(name) > MOST_NAME:
        raise ValueError(f"a name has 1 to {MOST_NAME} printable characters")
    return name


# Names are shown in logs and tables.
Name = Annotated[str, Field(min_length=1), AfterValidator(_check_name)]


def _check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError("must be a SHA-256: 64 hexadecimal digits, in lower case")
    return digest


Digest = Annotated[str, AfterValidator(_check_digest)]


class MoveEntry(Entry):
    """A `solver.Move`. `to`: stage asked. transition: [bins, bins of the view that it leads to]."""

    to: str
    transition: tuple[tuple[Probability, ...], ...]
    cost: tuple[Amount, ...]
    latency_ms: tuple[Amount, ...]


class HeadEntry(Entry):
    """A `calibration.Calibration`: of `stage`'s head in its view."""

    stage: str
    slope: Annotated[float, Field(gt=0, le=_MOST)]
    offset: Annotated[float, Field(ge=-_MOST, le=_MOST)]
    edges: tuple[Probability, ...]
    counts: tuple[Count, ...]


class CellsEntry(Entry):
    """A `state_cells.StateCells`."""

    heads: tuple[Annotated[int, Field(ge=0)], ...]
    thresholds: tuple[float, ...]
    left: tuple[Annotated[int, Field(ge=0)], ...]
    right: tuple[Annotated[int, Field(ge=0)], ...]
    cells: tuple[Annotated[int, Field(ge=-1)], ...]
    counts: tuple[Count, ...]

    @model_validator(mode="after")
    def _check_tree(self) -> Self:
        nodes = len(self.cells)
        if not nodes or {len(self.heads), len(self.thresholds), len(self.left), len(self.right)} != {nodes}:
            raise ValueError("cells: needs one entry per node")
        ends = sorted(cell for cell in self.cells if cell >= 0)
        if ends != list(range(len(self.counts))):
            raise ValueError("cells: needs every cell once, with its count")
        for node, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            # Children are later nodes, so that every walk ends.
            if self.cells[node] < 0 and not node < min(left, right) <= max(left, right) < nodes:
                raise ValueError(f"cells: node {node} must lead to later nodes")
        return self


class ViewEntry(Entry):
    """A `calibration.CalibratedView`. stage, origin: names, None as there. model: file; sha256: its digest.

    certified: as in `solver.View`. cells: None where the view is cut by its own score.
    """

    stage: str | None
    origin: str | None
    model: Name
    sha256: Digest
    p_correct: Annotated[tuple[Probability, ...], Field(min_length=1)]
    certified: tuple[Probability, ...]
    cells: CellsEntry | None = None
    heads: tuple[HeadEntry, ...]
    moves: tuple[MoveEntry, ...]


class AbandonEntry(Entry):
    """A `domain.AbandonThreshold`."""

    tokens: Annotated[int, Field(ge=1)]
    mean_logprob: Annotated[float, Field(le=0)]


class StageEntry(Entry):
    """A `domain.StageFacts`. abandon: thresholds of hopeless drafts, by ascending number of tokens.

    finish_reasons: left out if all answers ended with the end token, as in artifacts of earlier versions.
    """

    name: Name
    cost: Annotated[float, Field(gt=0, le=_MOST)]
    latency_ms: Amount
    accuracy: Probability
    calibration_error: Probability
    abandon: tuple[AbandonEntry, ...] = ()
    # Not in the repr, of which `fit` makes the version: the outcomes, which are in it, say as much.
    finish_reasons: Annotated[tuple[FinishReason, ...], Field(min_length=1, repr=False)] = (FinishReason.EOS,)

    @model_serializer(mode="wrap")
    def _leave_out_the_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = handler(self)
        if self.finish_reasons == (FinishReason.EOS,):
            del content["finish_reasons"]
        return content


class QualityValues(Entry):
    """Value of a right answer for each preference, in cost units."""

    fastest: Amount
    balanced: Amount
    best: Amount


class CurveEntry(Entry):
    """A `domain.CurvePoint`."""

    quality_value: Annotated[float, Field(gt=0, le=_MOST)]
    cost: Amount
    latency_ms: Amount
    accuracy: Probability


class Source(Entry):
    """A file of outcomes that the policy was made from. `file`: its name, for people."""

    file: Annotated[str, Field(min_length=1, max_length=MOST_NAME)]
    sha256: Digest
    prompts: Count


class FamilyEntry(Entry):
    """A `family.Family`. grams: 4 bytes each, little-endian, ascending, in base64.

    prompts, calibration_prompts: whose patterns these are, and that the threshold was chosen by.
    """

    words: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=_MOST_FAMILY_WORDS)]
    grams: Annotated[str, Field(max_length=_MOST_GRAM_CHARACTERS, repr=False)]
    threshold: Probability
    prompts: Annotated[int, Field(ge=0)]
    calibration_prompts: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check_grams(self) -> Self:
        try:
            content = base64.b64decode(self.grams, validate=True)
        except ValueError as error:
            raise ValueError("family: grams is no base64") from error
        if len(content) % _GRAM.itemsize:
            raise ValueError("family: grams needs 4 bytes each")
        return self

    @classmethod
    def of(cls, family: Family, *, prompts: int, calibration: int) -> Self:
        """Return the entry of a family."""
        grams = np.array(sorted(family.grams), _GRAM)
        return cls(
            words=tuple(sorted(family.words)),
            grams=base64.b64encode(grams.tobytes()).decode(),
            threshold=family.threshold,
            prompts=prompts,
            calibration_prompts=calibration,
        )

    def family(self) -> Family:
        """Return what the entry describes."""
        grams = np.frombuffer(base64.b64decode(self.grams), _GRAM)
        return Family(frozenset(self.words), frozenset(grams.tolist()), self.threshold)


class StageLineage(Entry):
    """A stage's correction by a refit: p_correct' = sigmoid(slope * logit(p_correct) + offset)."""

    stage: Name
    reports: Count
    slope: float
    offset: float


class Lineage(Entry):
    """Where a refitted policy comes from. parent: version that it was refitted from."""

    parent: Name
    stages: tuple[StageLineage, ...]


class PolicyDocument(Entry):
    """Content of `policy.json`.

    family: None in artifacts without one; no prompt is then marked as unlike. lineage: None if the policy was
    fitted to outcomes.
    """

    # These have no defaults: a file without them could be of any version.
    schema_name: Literal["asd.policy"] = Field(alias="schema")
    schema_version: Literal[2]
    policy_version: Name
    features_version: Count
    features: Count
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    stages: Annotated[tuple[StageEntry, ...], Field(min_length=1)]
    quality_values: QualityValues
    curve: tuple[CurveEntry, ...]
    train: Source
    calibration: Source
    views: Annotated[tuple[ViewEntry, ...], Field(min_length=1)]
    family: FamilyEntry | None = None
    lineage: Lineage | None = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = handler(self)
        return {key: value for key, value in content.items() if value is not None}

    @model_validator(mode="after")
    def _check_curve(self) -> Self:
        if any(a.quality_value >= b.quality_value for a, b in itertools.pairwise(self.curve)):
            raise ValueError("curve: quality_value must increase")
        return self

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        names = [stage.name for stage in self.stages]
        indexes = {(view.stage, view.origin): index for index, view in enumerate(self.views)}
        if len(set(names)) < len(names) or len(indexes) < len(self.views):
            raise ValueError("a stage, or a view, is there twice")
        if self.views[0].stage is not None:
            raise ValueError("views[0] must be the prompt's")
        for index, view in enumerate(self.views):
            where = f"views[{index}]"
            if unknown := {view.stage, view.origin} - {None, *names}:
                raise ValueError(f"{where}: {quoted(unknown.pop())} is none of the stages")
            if Path(view.model).name != view.model or "\0" in view.model:
                raise ValueError(f"{where}: {quoted(view.model)} is not the name of a file")
            first = names.index(view.stage) if view.stage is not None else 0
            if [head.stage for head in view.heads] != names[first:]:
                raise ValueError(f"{where}: needs one head per stage from its own on")
            for head in view.heads:
                if len(head.counts) != len(head.edges) + 1:
                    raise ValueError(f"{where}: head {head.stage}: counts and edges do not fit")
            if problem := _problem_of_bins(view):
                raise ValueError(f"{where}: {problem}")
            self._check_moves(index, view, indexes)
        return self

    def _check_moves(
        self, index: int, view: ViewEntry, indexes: Mapping[tuple[str | None, str | None], int]
    ) -> None:
        where = f"views[{index}]"
        for move in view.moves:
            target = indexes.get((move.to, view.stage))
            if target is None:
                raise ValueError(f"{where}: no view of {move.to} verifying {view.stage}")
            # Moves lead to later views, so that every path ends.
            if target <= index:
                raise ValueError(f"{where}: move to {move.to}: must lead to a later view")
            bins, onward = len(view.p_correct), len(self.views[target].p_correct)
            rows = [len(row) for row in move.transition]
            if rows != [onward] * bins or len(move.cost) != bins or len(move.latency_ms) != bins:
                raise ValueError(f"{where}: move to {move.to}: shapes do not fit the views")
            if any(abs(sum(row) - 1) > _ROW_TOLERANCE for row in move.transition):
                raise ValueError(f"{where}: move to {move.to}: a row of transition does not sum to 1")


def _problem_of_bins(view: ViewEntry) -> str:
    """Return the fault of a view's bins, or ""."""
    if any(a >= b for a, b in itertools.pairwise(view.p_correct)):
        return "p_correct must increase"
    counts = view.cells.counts if view.cells else view.heads[0].counts
    if len({len(view.p_correct), len(view.certified), len(counts)}) > 1:
        return "p_correct, certified and the cells, or else the first head, must have as many bins"
    if view.cells and max(view.cells.heads) >= len(view.heads):
        return "cells look at a head that is not there"
    return "" if list(view.certified) == sorted(view.certified) else "certified must not decrease"


def parse_document(content: bytes, where: str) -> PolicyDocument:
    """Return the document of a `policy.json`. where: its name for messages. Raises UnfitArtifact."""
    try:
        _check_schema_version(where, parse_json(content, where))
        document = PolicyDocument.model_validate_json(content)
    except DamagedFile as error:
        raise UnfitArtifact(error.message) from error
    except ValidationError as error:
        raise UnfitArtifact(f"{where}: {first_problem(error)}") from error
    if document.features_version != FEATURES_VERSION:
        raise UnfitArtifact(
            f"{where}: made with features {document.features_version}, this version computes "
            f"{FEATURES_VERSION}: make the policy anew with `asd-policy fit`"
        )
    expected = FeatureSpace(len(document.stages)).size
    if document.features != expected:
        raise UnfitArtifact(f"{where}: features must be {expected} for {len(document.stages)} stages")
    return document


def document_text(document: PolicyDocument) -> str:
    """Return a document as `policy.json`."""
    return json.dumps(document.model_dump(mode="json", by_alias=True), separators=(",", ":")) + "\n"


def first_problem(error: ValidationError) -> str:
    """Return the first wrong entry, and why it is wrong."""
    problem = error.errors(include_url=False)[0]
    entry = ".".join(str(part) for part in problem["loc"])
    said = problem["msg"].removeprefix("Value error, ")
    return f"{entry}: {said}" if entry else said


def _check_schema_version(where: str, content: object) -> None:
    """Raise UnfitArtifact for a document of another version, or without one.

    The parser refuses content that is not an object. pydantic's Literal alone would take 2.0 for 2.
    """
    if not isinstance(content, dict):
        return
    version = content.get("schema_version")
    (known,) = get_args(PolicyDocument.model_fields["schema_version"].annotation)
    if type(version) is not int or version != known:
        given = json.dumps(version) if "schema_version" in content else "is missing"
        raise UnfitArtifact(
            f"{where}: schema_version {one_line(given, MOST_NAME)}; this version of asd reads {known}: make "
            "the policy anew with `asd-policy fit`"
        )
