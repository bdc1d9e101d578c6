"""A policy small enough to calculate by hand.

Prompts all look the same. In every view the score of stage s's head is 2 + s, plus 4 times the draft's mean
log-probability where there is a draft; `offset` shifts the calibration of all heads.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from policy_service.artifact import Artifact, pack
from policy_service.document import PolicyDocument
from policy_service.features import FEATURES_VERSION, FeatureSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

COSTS = {"small": 1.0, "medium": 2.0, "large": 3.0}
CENTRES = (0.2, 0.5, 0.8)


def make_artifact(
    path: Path, version: str, *, stages: tuple[str, ...] = ("small", "large"), offset: float = 0.0
) -> Path:
    """Write a policy for some stages to a file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(make_policy(version, stages=stages, offset=offset)))
    return path


def make_policy(
    version: str, *, stages: tuple[str, ...] = ("small", "large"), offset: float = 0.0, note: str = ""
) -> Artifact:
    """Return a policy for some stages. note: stands in its models, and changes their bytes alone."""
    models: dict[str, bytes] = {}
    content = _content(models, version, stages, offset, note)
    return Artifact(PolicyDocument.model_validate_json(json.dumps(content)), models)


def files_of(artifact: Path) -> dict[str, bytes]:
    """Return the files in an artifact, by their names."""
    with zipfile.ZipFile(artifact) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_files(artifact: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an artifact with these files in it, whatever they are."""
    with zipfile.ZipFile(artifact, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def change_file(artifact: Path, name: str, content: bytes | None) -> None:
    """Replace a file in an artifact. None: take it out."""
    files: dict[str, bytes | None] = {**files_of(artifact), name: content}
    write_files(artifact, {each: kept for each, kept in files.items() if kept is not None})


def change_document(artifact: Path, change: Callable[[Any], Any]) -> None:
    """Replace the document of an artifact by what a function makes of it."""
    document = change(json.loads(files_of(artifact)["policy.json"]))
    change_file(artifact, "policy.json", json.dumps(document).encode())


def as_of_0_1(artifact: Path, directory: Path) -> Path:
    """Write the files of an artifact as asd 0.1 did, and return the directory.

    They were beside each other, and the names of models had digests in them.
    """
    directory.mkdir(parents=True)
    files = files_of(artifact)
    document = json.loads(files["policy.json"])
    for view in document["views"]:
        content = files[view["model"]]
        view["model"] = f"{view['model'].removesuffix('.onnx')}.{view['sha256'][:12]}.onnx"
        (directory / view["model"]).write_bytes(content)
    (directory / "policy.json").write_text(json.dumps(document))
    return directory


def _content(
    models: dict[str, bytes], version: str, stages: tuple[str, ...], offset: float, note: str
) -> dict[str, Any]:
    size = FeatureSpace(len(stages)).size
    keys: list[tuple[int | None, int | None]] = [(None, None)]
    keys += [(s, o) for s in range(len(stages)) for o in (None, *range(s))]
    views = []
    for stage, origin in keys:
        heads = stages[stage or 0 :]
        name = f"{stage}-{origin}.onnx"
        model = models[name] = _model(size, len(heads), stage, stages, note)
        moves = [
            {
                "to": later,
                "transition": [[0.1, 0.1, 0.8]] * 3,
                "cost": [COSTS[later]] * 3,
                "latency_ms": [COSTS[later]] * 3,
            }
            for index, later in enumerate(stages)
            if stage is None or index > stage
        ]
        head = {"slope": 1.0, "offset": offset, "edges": [0.35, 0.65], "counts": [100, 100, 100]}
        views.append(
            {
                "stage": None if stage is None else stages[stage],
                "origin": None if origin is None else stages[origin],
                "model": name,
                "sha256": hashlib.sha256(model).hexdigest(),
                "p_correct": CENTRES,
                "certified": (0.0, 0.4, 0.7),
                "heads": [{"stage": each, **head} for each in heads],
                "moves": moves,
            }
        )
    source = {"file": "x", "sha256": "0" * 64, "prompts": 300}
    return {
        "schema": "asd.policy",
        "schema_version": 2,
        "policy_version": version,
        "features_version": FEATURES_VERSION,
        "features": size,
        "seed": 0,
        "stages": [
            {"name": name, "cost": COSTS[name], "latency_ms": 1.0, "accuracy": 0.5, "calibration_error": 0.1}
            for name in stages
        ],
        "quality_values": {"fastest": 2.0, "balanced": 10.0, "best": 100.0},
        "curve": [
            {"quality_value": value, "cost": value, "latency_ms": value, "accuracy": value / 200}
            for value in (1.0, 10.0, 100.0)
        ],
        "train": source,
        "calibration": source,
        "views": views,
    }


def _model(size: int, heads: int, stage: int | None, stages: tuple[str, ...], note: str) -> bytes:
    """Return features @ weights + places."""
    weights = np.zeros((size, heads), np.float32)
    if stage is not None:
        weights[FeatureSpace(len(stages)).names.index("draft_logprob_mean"), :] = 4.0
    places = 2 + np.arange(stage or 0, (stage or 0) + heads, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["features", "weights", "places"], ["scores"])],
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", heads])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(places, "places")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, doc_string=note
    )
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
