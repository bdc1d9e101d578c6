"""Sentence vectors of prompts, by a small pretrained encoder that a package brings (docs/routing.md)."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from policy_service.train.faults import UnfitOutcomes
from policy_service.train.threads import usable_cores
from services.common.privacy import report_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

# The encoder's own limit is 512; what follows 256 changes little and takes twice the time.
_MOST_TOKENS = 256
_BATCH = 16


def cached_vectors(prompts: Sequence[str], model: Path, progress: Callable[[str], None]) -> Floats:
    """Return embed_prompts, kept for the next call: it takes minutes for ten thousand prompts.

    The file lies in asd/embeddings of the user's cache directory and is named by its inputs.
    """
    digest = hashlib.sha256(model.read_bytes())
    for prompt in prompts:
        digest.update(hashlib.sha256(prompt.encode()).digest())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asd" / "embeddings"
    file = folder / f"{digest.hexdigest()[:32]}.npy"
    if file.exists():
        kept: Floats = np.load(file)
        return kept
    vectors = embed_prompts(prompts, model, progress)
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.partial.npy")
    np.save(partial, vectors)
    partial.replace(file)
    return vectors


def embed_prompts(prompts: Sequence[str], model: Path, progress: Callable[[str], None]) -> Floats:
    """Return unit vectors of prompts, means over their tokens: [n, size].

    model: a zip (a .jar is one) that holds one .onnx with the inputs input_ids, attention_mask and
    token_type_ids, and one tokenizer.json. Raises UnfitOutcomes.
    """
    report_nothing()
    import onnxruntime

    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnfitOutcomes("--embeddings needs the package tokenizers: pip install tokenizers") from error
    try:
        with zipfile.ZipFile(model) as archive:
            names = archive.namelist()
            graph = archive.read(next(name for name in names if name.endswith(".onnx")))
            tokenizer_json = archive.read(next(name for name in names if name.endswith("tokenizer.json")))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UnfitOutcomes(f"{model}: holds no .onnx and tokenizer.json in a zip") from error
    options = onnxruntime.SessionOptions()
    # By default its threads spin while they wait, each bound to one core, which another program may have.
    options.intra_op_num_threads = usable_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MOST_TOKENS)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    vectors: dict[int, Floats] = {}
    # Of like length together, so that little is padded.
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    for start in range(0, len(order), _BATCH):
        progress(f"embedding {start} of {len(order)} prompts")
        rows = order[start : start + _BATCH]
        longest = max(len(tokens[row]) for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(tokens[row])] = tokens[row]
            mask[index, : len(tokens[row])] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = session.run(None, inputs)[0]
        means = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        vectors.update(zip(rows.tolist(), means.astype(float), strict=True))
    return np.stack([vectors[row] for row in range(len(tokens))])
