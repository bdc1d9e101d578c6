"""What the onnx engine derives from a model computes what a Llama written by hand computes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime_genai as og
import pytest

from asd.errors import PreconditionFailed
from services.stage.engines.onnx.export import FORMAT, build_graph, prepare
from services.stage.engines.onnx.llama_config import read_shape
from tests.fakes import tiny_llama
from tests.fakes.tiny_llama import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

# 200 tokens: several times the length that the scaled kinds below call the original one.
IDS = [int(i) for i in np.random.default_rng(3).integers(5, 512, 200)]
# Logits are of size 1 to 10. float32 has 6e-8 of relative rounding, sums of some hundred terms and two layers
# multiply it: measured 2e-5 at most.
TOLERANCE = 2e-4

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# A window far shorter than what is read, and than a pass.
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20}
QWEN_2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": ABSENT}
QWEN_3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "another theta": {"rope_theta": 500_000.0},
    "transformers 5, default": {
        "rope_theta": ABSENT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, transformers 5": {
        "rope_theta": ABSENT,
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 10_000},
    },
    "llama3": {"rope_scaling": LLAMA3},
    "llama3, transformers 5": {
        "rope_theta": ABSENT,
        "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0},
    },
    "both spellings alike": {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 10_000.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn, old spelling": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "finetuned": True,
        }
    },
    "yarn without the original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn by the ratio of lengths": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    },
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.8}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2}},
    "yarn, bounds as they fall": {"rope_scaling": {**YARN, "truncate": False}},
}


def onnx_logits(
    folder: Path, cache: Path, ids: list[int], most_tokens: int | None = None
) -> npt.NDArray[np.float32]:
    """Return what the library gives for the derived form: 150 tokens in a pass, then 7, then one by one."""
    model = og.Model(og.Config(str(prepare(folder, cache, most_tokens))))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids), do_sample=False)
    generator = og.Generator(model, parameters)
    rows = []
    for piece in (ids[:150], ids[150:157], *([token] for token in ids[157:])):
        generator.append_tokens(np.array([piece], np.int32))
        rows.append(np.array(generator.get_output("logits")[0]))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ROPES)
def test_logits_are_those_of_a_llama_by_hand(name: str, tmp_path: Path) -> None:
    tensors = tiny_llama.write(tmp_path / "model", **ROPES[name])
    found = onnx_logits(tmp_path / "model", tmp_path / "cache", IDS)
    shape = tiny_llama.config(**ROPES[name])
    np.testing.assert_allclose(found, tiny_llama.logits(shape, tensors, IDS), atol=TOLERANCE)
    if name != "plain":
        plain = tiny_llama.logits(tiny_llama.config(), tensors, IDS)
        assert np.abs(found - plain).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ROPES)
def test_tables_of_what_is_served_alone_change_no_logit(name: str, tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 1 << 20} | ROPES[name]
    tensors = tiny_llama.write(tmp_path / "model", **changes)
    found = onnx_logits(tmp_path / "model", tmp_path / "cache", IDS, len(IDS))
    wanted = tiny_llama.logits(tiny_llama.config(**changes), tensors, IDS)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    # For a million positions, the tables alone are 128 MiB.
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.data")) < 1 << 20


def test_lengths_alike_share_a_form(tmp_path: Path) -> None:
    tiny_llama.write(tmp_path / "model", max_position_embeddings=3000)
    lengths = (1, 512, 513, 1000, 2049, 3000, 9999, None)
    forms = [prepare(tmp_path / "model", tmp_path / "cache", each).name for each in lengths]
    assert [forms.index(form) for form in forms] == [0, 0, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("most_tokens", [None, 10**9])
def test_tables_that_would_be_huge_are_refused(most_tokens: int | None, tmp_path: Path) -> None:
    tiny_llama.write(tmp_path / "model", max_position_embeddings=10**9)
    with pytest.raises(PreconditionFailed, match=r"max_position_embeddings.*set max_model_len"):
        prepare(tmp_path / "model", tmp_path / "cache", most_tokens)
    prepare(tmp_path / "model", tmp_path / "cache", 512)


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _cut(end: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_pointer, "run `git lfs pull`"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (_directory, "is a directory"),
        (_cut(5), "is cut off"),
        (_cut(100), "is cut off"),
        (_cut(-1), "is cut off"),
        (lambda path: path.write_text("<!DOCTYPE html><p>Not found"), "is no safetensors file"),
        (lambda path: path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5), "deep"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "is damaged"),
        (lambda path: path.write_bytes((7).to_bytes(8, "little") + b'{"a":1}'), "is damaged"),
    ],
)
def test_a_damaged_file_of_weights_is_named_with_what_to_do(
    damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    tiny_llama.write(tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    with pytest.raises(PreconditionFailed, match=rf"model\.safetensors.* {says}"):
        prepare(tmp_path / "model", tmp_path / "cache")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_names_no_files_is_refused(content: str, tmp_path: Path) -> None:
    tiny_llama.write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PreconditionFailed, match="weight_map"):
        prepare(tmp_path / "model", tmp_path / "cache")


@pytest.mark.parametrize(("changes", "family"), [(QWEN_2, "qwen2"), (QWEN_3, "qwen3"), (MISTRAL, "mistral")])
def test_weights_that_lack_what_the_family_has_are_refused_by_its_name(
    changes: dict[str, Any], family: str, tmp_path: Path
) -> None:
    tensors = tiny_llama.write(tmp_path, **changes)
    lacking = {"qwen2": "k_proj.bias", "qwen3": "q_norm.weight", "mistral": "o_proj.weight"}[family]
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(lacking)}
    tiny_llama.save(tmp_path / "model.safetensors", kept)
    with pytest.raises(PreconditionFailed, match=rf"lack .*{lacking}.* {family} has"):
        prepare(tmp_path, tmp_path / "cache")


def test_what_an_interrupted_process_left_is_removed(tmp_path: Path) -> None:
    tiny_llama.write(tmp_path / "model")
    form = prepare(tmp_path / "model", tmp_path / "cache")
    left = form.parent / f"{'0' * 32}.partial-x"
    left.mkdir()
    (left / "model.onnx.data").write_bytes(b"half")
    assert prepare(tmp_path / "model", tmp_path / "cache") == form
    assert [*form.parent.iterdir()] == [form]


def test_rope_kinds_differ_by_far_more_than_the_tolerance() -> None:
    tensors = tiny_llama.weights(tiny_llama.CONFIG)
    distinct = [
        name for name in ROPES if name not in {"both spellings alike", "yarn by the ratio of lengths"}
    ]
    found = [tiny_llama.logits(tiny_llama.config(**ROPES[name]), tensors, IDS[:120]) for name in distinct]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert np.abs(one - other).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 16},
        {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"head_dim": 48, "tie_word_embeddings": True},
        MISTRAL,
        MISTRAL | {"sliding_window": None, "head_dim": 64},
        MISTRAL | {"sliding_window": 1},
        QWEN_2,
        QWEN_2 | {"tie_word_embeddings": True, "rope_scaling": YARN},
        QWEN_3,
        QWEN_3 | {"num_attention_heads": 8, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_shapes_compute_what_they_say(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors = tiny_llama.write(tmp_path / "model", **changes)
    found = onnx_logits(tmp_path / "model", tmp_path / "cache", IDS)
    wanted = tiny_llama.logits(tiny_llama.config(**changes), tensors, IDS)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.layers.0.self_attn.o_proj.bias", "which the onnx engine does not use"),
        ("model.layers.0.self_attn.q_proj.bias", "hold model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.1.self_attn.q_norm.weight", "which the onnx engine does not use"),
    ],
)
def test_weights_that_would_be_left_out_are_refused(name: str, sentence: str, tmp_path: Path) -> None:
    tensors = tiny_llama.write(tmp_path)
    tiny_llama.save(tmp_path / "model.safetensors", {**tensors, name: np.ones(32, np.float32)})
    with pytest.raises(PreconditionFailed, match=sentence):
        prepare(tmp_path, tmp_path / "cache")


def test_what_follows_from_the_configuration_may_stand_among_the_weights(tmp_path: Path) -> None:
    tensors = tiny_llama.write(tmp_path, tie_word_embeddings=True)
    rates = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    tiny_llama.save(tmp_path / "model.safetensors", {**tensors, **rates, **tied})
    prepare(tmp_path, tmp_path / "cache")
    tiny_llama.save(tmp_path / "model.safetensors", {**tensors, "lm_head.weight": 2 * tied["lm_head.weight"]})
    with pytest.raises(PreconditionFailed, match=r"lm_head\.weight"):
        prepare(tmp_path, tmp_path / "cache")


def test_a_derived_form_is_used_again_only_for_the_same_arithmetic_and_ends(tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    tiny_llama.write(folder)
    first = prepare(folder, cache)
    (folder / "config.json").write_text(json.dumps(tiny_llama.config(torch_dtype="bfloat16")))
    assert prepare(folder, cache) == first
    others = []
    for changes in ({"rope_scaling": LLAMA3}, {"rms_norm_eps": 1e-6}, {"eos_token_id": 2}):
        (folder / "config.json").write_text(json.dumps(tiny_llama.config(**changes)))
        others.append(prepare(folder, cache))
    (folder / "config.json").write_text(json.dumps(tiny_llama.config()))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    others.append(prepare(folder, cache))
    ends = json.loads((others[-1] / "genai_config.json").read_text())["model"]["eos_token_id"]
    assert ends == [1, 7]
    assert len({first, *others}) == 5


def test_the_format_is_raised_with_what_is_derived(tmp_path: Path) -> None:
    """Where this fails, raise FORMAT and put the new digest here: forms of before would be served on."""
    digest = hashlib.sha256()
    for changes in ({}, MISTRAL, QWEN_2, QWEN_3):
        tensors = tiny_llama.write(tmp_path, rope_scaling=YARN, **changes)
        graph = build_graph(read_shape(tmp_path), tensors).graph
        for part in (*graph.node, *graph.input, *graph.output):
            digest.update(part.SerializeToString(deterministic=True))
        for constant in graph.initializer:
            values = np.frombuffer(constant.raw_data, np.float32 if constant.data_type == 1 else np.int64)
            digest.update(f"{constant.name} {tuple(constant.dims)}".encode())
            # Cosines differ in their last digit between machines.
            digest.update(np.round(values.astype(np.float64), 3).tobytes())
        digest.update((prepare(tmp_path, tmp_path / "cache") / "genai_config.json").read_bytes())
    assert (FORMAT, digest.hexdigest()[:16]) == (2, "15551689d3be818f")
