"""Every reader of files, given damaged ones: it reads them, or says in one line what is wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import yaml

import policy_service
from asd.errors import PreconditionFailed
from asd.values import Message
from policy_service.artifact import load_usable, read_artifact
from policy_service.document import UnfitArtifact
from policy_service.predictor import OnnxPredictor
from policy_service.predictor_model import UnfitModel, check_model
from policy_service.reports import read_reports
from policy_service.settings import PolicySettings
from policy_service.shadow import read_shadow
from policy_service.store import PolicyStore
from policy_service.train.costs import EMBEDDED as COSTS
from policy_service.train.costs import UnfitCosts, read_costs
from policy_service.train.faults import UnfitOutcomes
from policy_service.train.outcome_table import write_outcomes
from policy_service.train.outcomes import read_rows
from services.common.auth import AuthSettings, TokenInterceptor
from services.common.settings import SettingsError
from services.local.cascade_file import read_cascade
from services.router.settings import RouterSettings
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.onnx.export import prepare
from services.stage.engines.onnx.llama_config import read_shape
from services.stage.generation.tokenizer import ChatTokenizer
from services.stage.settings import StageSettings
from tests.fakes import tiny_llama
from tests.fakes.chat_templates import FAMILIES
from tests.fakes.tiny_tokenizers import write_family
from tests.fuzz.client_files import HOSTILE_NAMES, make_readers
from tests.fuzz.mutations import damage_bytes, damage_json
from tests.unit.policy.tiny_policy import as_of_0_1, make_artifact, write_files

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

_SHIPPED = Path(policy_service.__file__).with_name("policy.zip")
# Processor seconds of a file. No test of speed but of what never ends, on any machine and beside any other
# work: the slowest refusals take a second on an idle core.
MOST_SECONDS = 20.0


@dataclass(frozen=True)
class Loader:
    """A reader, and a folder of files that it reads.

    read: takes a copy of the folder. errors: its documented ones. damaged: names of files that are damaged,
    by pattern. mend: puts right what would hide the damage, such as a checksum. names_file: whether its
    messages name the file, and not what the file was given as.
    """

    name: str
    seed: Path
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    damaged: tuple[str, ...]
    mend: Callable[[Path], None] = field(default=lambda _: None)
    names_file: bool = True


class LoaderFault(Exception):  # noqa: N818 - as MessageFault
    """A reader did other than it should."""


def make_loaders(folder: Path) -> list[Loader]:
    """Return every reader, with seeds in a folder."""
    model = folder / "model"
    tiny_llama.write(model, generation={"eos_token_id": [1, 2]})
    loaders = [
        Loader("config", model, read_shape, (PreconditionFailed,), ("config.json", "generation_config.json")),
        Loader("checkpoint", model, read_checkpoint, (PreconditionFailed,), ("*config.json",)),
        Loader("weights", model, _prepare, (PreconditionFailed,), ("model.safetensors",)),
    ]
    for family in ("llama 3.1", "mistral v0.3", "qwen 3"):
        seed = write_family(folder / f"tokenizer {family}", FAMILIES[family])
        loaders.append(
            Loader(f"tokenizer {family}", seed, _encode, (PreconditionFailed,), ("tokenizer*.json",))
        )
    template = folder / "template"
    shutil.copytree(folder / "tokenizer llama 3.1", template)
    (template / "chat_template.jinja").write_text(FAMILIES["llama 3.1"].template)
    loaders.append(Loader("template", template, _encode, (PreconditionFailed,), ("chat_template.jinja",)))
    artifact = make_artifact(folder / "artifact" / "policy.zip", "v1")
    of_0_1 = as_of_0_1(artifact, folder / "artifact of 0.1")
    loaders += [
        Loader("policy zip", artifact.parent, load_usable, (UnfitArtifact,), ("policy.zip",)),
        Loader("policy", of_0_1, _load_zipped, (UnfitArtifact,), ("policy.json",)),
        Loader("predictor", of_0_1, _load_zipped, (UnfitArtifact,), ("*.onnx",), _rehash),
        Loader("policy of 0.1", of_0_1, load_usable, (UnfitArtifact,), ("policy.json", "*.onnx")),
        Loader("trees", _trees(folder / "trees"), _score, (UnfitModel,), ("model.onnx",), names_file=False),
    ]
    store = PolicyStore(folder / "store")
    store.publish(artifact)
    loaders.append(Loader("store", folder / "store", _follow, (UnfitArtifact,), ("current.json",)))
    loaders += [
        Loader("reports", _reports(folder / "reports"), _reports_of, (PreconditionFailed,), ("*.jsonl",)),
        Loader("costs", _copy(COSTS, folder / "costs"), _costs_of, (UnfitCosts,), ("*.yaml",)),
        Loader("outcomes", _outcomes(folder / "outcomes"), _rows_of, (UnfitOutcomes,), ("*.parquet",)),
        Loader("tokens", _tokens(folder / "tokens"), _guard, (PreconditionFailed,), ("tokens",)),
    ]
    for name, kind, content in (
        ("cascade", None, _cascade(model)),
        ("router", RouterSettings, _ROUTER),
        ("stage", StageSettings, {"default_model": "a", "models": [{"name": "a", "path": "/x"}]}),
        (
            "policy settings",
            PolicySettings,
            {"artifact": "/x", "cascade": ["a", "b"], "drift_tolerance": 0.1},
        ),
    ):
        seed = folder / name
        seed.mkdir()
        (seed / "settings.yaml").write_text(yaml.safe_dump(content))
        read = read_cascade if kind is None else kind.load
        loaders.append(
            Loader(
                name, seed, lambda at, read=read: read(at / "settings.yaml"), (SettingsError,), ("*.yaml",)
            )
        )
    loaders += [
        Loader(name, seed, read, errors, damaged, names_file="pull" not in name)
        for name, seed, read, errors, damaged in make_readers(folder)
    ]
    return loaders


def run_once(loader: Loader, rng: random.Random, at: Path) -> None:
    """Damage a copy of a loader's folder and read it. Raises LoaderFault."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(loader.seed, at)
    files = sorted(path for pattern in loader.damaged for path in at.rglob(pattern))
    file = rng.choice(files)
    file.write_bytes(_damage(rng, file))
    loader.mend(at)
    check(loader, at)


def check(loader: Loader, at: Path) -> None:
    """Read a folder. Raises LoaderFault where the reader does other than it should."""
    begin = time.process_time()
    logging.disable(logging.CRITICAL)
    try:
        loader.read(at)
    except loader.errors as error:
        lines = str(error).split("\n") if isinstance(error, SettingsError) else [str(error)]
        if not all(line.isprintable() for line in lines):
            raise LoaderFault(f"{loader.name}: its message is not one printable line: {error!r}") from error
        if loader.names_file and str(at) not in str(error):
            raise LoaderFault(f"{loader.name}: its message names no file: {error}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise LoaderFault(f"{loader.name}: raised {type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    took = time.process_time() - begin
    if took > MOST_SECONDS:
        raise LoaderFault(f"{loader.name}: took {took:.1f} s of processor time")


def _damage(rng: random.Random, file: Path) -> bytes:
    content = file.read_bytes()
    if rng.random() < 0.7:
        if file.suffix == ".json":
            return damage_json(rng, content, HOSTILE_NAMES)
        if file.suffix == ".jsonl":
            lines = content.splitlines()
            place = rng.randrange(len(lines))
            lines[place] = damage_json(rng, lines[place])
            return b"\n".join(lines)
        if file.suffix == ".yaml":
            # YAML takes all of JSON.
            return damage_json(rng, json.dumps(yaml.safe_load(content)).encode())
        if file.suffix == ".zip":
            # Its directory: the rest is the files in it.
            start = content.index(b"PK\x01\x02")
            return content[:start] + damage_bytes(rng, content[start:])
        if file.suffix == ".safetensors":
            size = int.from_bytes(content[:8], "little")
            header = damage_json(rng, content[8 : 8 + size])
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
    return damage_bytes(rng, content)


def _encode(at: Path) -> None:
    tokenizer = ChatTokenizer(at)
    turns = (Message("user", "Hello <|eot_id|> [INST] \n\n 123 aaaaaaaaaaaaaaaaaaaaaaaa!"),)
    try:
        ids = tokenizer.encode_chat(turns)
    except PreconditionFailed as error:
        raise PreconditionFailed(f"{at}: {error}") from error
    except Exception as error:
        if type(error).__name__ != "ConversationRefused":
            raise
        return
    stream = tokenizer.stream()
    stream.push(ids[:50])
    stream.finish()


def _prepare(at: Path) -> None:
    try:
        prepare(at, at / "cache")
    finally:
        shutil.rmtree(at / "cache", ignore_errors=True)


def _load_zipped(at: Path) -> None:
    """Read files as the artifact that they make, whose zip is sound."""
    zipped = at / "policy.zip"
    write_files(zipped, {path.name: path.read_bytes() for path in at.iterdir()})
    load_usable(zipped)


def _rehash(at: Path) -> None:
    document = json.loads((at / "policy.json").read_bytes())
    for view in document["views"]:
        view["sha256"] = hashlib.sha256((at / view["model"]).read_bytes()).hexdigest()
    (at / "policy.json").write_text(json.dumps(document))


def _trees(folder: Path) -> Path:
    folder.mkdir()
    shipped = read_artifact(_SHIPPED)
    view = min(shipped.document.views, key=lambda view: len(shipped.models[view.model]))
    (folder / "model.onnx").write_bytes(shipped.models[view.model])
    (folder / "sizes.json").write_text(json.dumps([shipped.document.features, len(view.heads)]))
    return folder


def _score(at: Path) -> None:
    size, heads = json.loads((at / "sizes.json").read_text())
    content = (at / "model.onnx").read_bytes()
    check_model(content, size, heads)
    try:
        predictor = OnnxPredictor([content])
    except Exception as error:
        # As policy_service.artifact does.
        raise UnfitModel("a model does not load") from error
    scores = predictor.score_rows(0, np.zeros((2, size), np.float32))
    if scores.shape != (2, heads):
        raise LoaderFault(f"trees: scores of shape {scores.shape}")


def _follow(at: Path) -> None:
    store = PolicyStore(at)
    store.versions()
    store.history()


def _reports(folder: Path) -> Path:
    folder.mkdir()
    report = {"request_id": "r", "stage": "a", "p_correct": 0.5, "policy_version": "v", "correct": True}
    lines = [
        json.dumps(report | {"request_id": f"r{place}", "reported_at": 1e9 + place}) for place in range(9)
    ]
    (folder / "reports.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _reports_of(at: Path) -> None:
    list(read_reports(at / "reports.jsonl"))
    list(read_shadow(at / "reports.jsonl"))


def _copy(file: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(file, folder / "costs.yaml")
    return folder


def _costs_of(at: Path) -> None:
    read_costs(at / "costs.yaml")


def _outcomes(folder: Path) -> Path:
    folder.mkdir()
    signals: dict[str, Any] = {"logprobs": [-0.5], "entropies": [0.1], "top2_margins": [0.2]}
    answer = {"text": "a", "finish_reason": "eos", "correct": True, "latency_ms": 1.0} | signals
    check_ = {"proposed": 1, "accepted": 1, "ranks": [0], "forward_passes": 1, "proposed_again": 0}
    row = {
        "prompt": "p",
        "history": [],
        "suite": "s",
        "level": 1,
        "kind": "k",
        "split": "train",
        "stages": {"a": answer, "b": answer},
        "verifications": {"a>b": check_ | {"latency_ms": 1.0}},
    }
    write_outcomes(folder / "outcomes.parquet", ("a", "b"), [row] * 5)
    return folder


def _rows_of(at: Path) -> None:
    list(read_rows(at / "outcomes.parquet"))
    pa.default_memory_pool().release_unused()


def _tokens(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokens").write_text("# who may call\nann:0123456789abcdef\nfedcba9876543210\n")
    return folder


def _guard(at: Path) -> None:
    TokenInterceptor(AuthSettings(tokens_file=at / "tokens"))


def _cascade(model: Path) -> dict[str, Any]:
    stage = {"path": str(model), "engine": "onnx", "threads": 1, "max_model_len": 64}
    return {
        "stages": [{"name": name, "cost": cost, **stage} for name, cost in (("small", 1.0), ("large", 4.0))],
        "static_plan": ["small", "large"],
    }


_ROUTER = {
    "listen": "127.0.0.1:0",
    "stages": [
        {"name": "a", "target": "127.0.0.1:1", "cost": 1.0},
        {"name": "b", "target": "127.0.0.1:2", "cost": 2},
    ],
    "policy": {"target": "127.0.0.1:3", "timeout_ms": 50},
    "static_plan": ["a"],
}
