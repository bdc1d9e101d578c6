"""Reads the configuration of a Hugging Face directory, for engines that read the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.errors import PreconditionFailed
from services.common.documents import quoted
from services.stage.model_files import read_json_file

if TYPE_CHECKING:
    from pathlib import Path

# Decoder-only architectures of chat models that both GPU libraries document as supported.
ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)


# The largest size in a config.json. Chosen: a thousand times that of any model.
MOST_COUNT = 1 << 31


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as its directory describes it.

    weight_bytes: size of its weight files, or of bfloat16 weights if there are none. kv_values_per_token:
    numbers that the KV cache holds for a token.
    """

    architecture: str
    vocabulary: int
    context: int
    eos_ids: tuple[int, ...]
    parameters: int
    weight_bytes: int
    kv_values_per_token: int


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json, and generation_config.json if it exists.

    Raises PreconditionFailed if config.json is missing, is not JSON, or describes no model of ARCHITECTURES.
    """
    path = directory / "config.json"
    config = read_config(path)
    architecture = check_architecture(config, path)
    hidden, layers, heads = (
        read_count(config, key, path) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    kv_heads = read_count(config, "num_key_value_heads", path, heads)
    head = read_count(config, "head_dim", path, hidden // heads or 1)
    vocabulary, context = (read_count(config, key, path) for key in ("vocab_size", "max_position_embeddings"))
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    block = attention + 3 * hidden * read_count(config, "intermediate_size", path) + 2 * hidden
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    parameters = layers * block + embeddings + hidden
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return Checkpoint(
        architecture=architecture,
        vocabulary=vocabulary,
        context=context,
        eos_ids=read_eos_ids(directory, config, vocabulary),
        parameters=parameters,
        weight_bytes=weights or 2 * parameters,
        kv_values_per_token=2 * layers * kv_heads * head,
    )


def check_architecture(config: dict[str, Any], path: Path) -> str:
    """Return the architecture of a config.json. Raises PreconditionFailed for one that no engine runs."""
    listed = config.get("architectures") or ["none"]
    named = listed[0] if isinstance(listed, list) else listed
    if not isinstance(named, str) or named not in ARCHITECTURES:
        raise PreconditionFailed(
            f"{path}: architecture {named} is not one of {', '.join(sorted(ARCHITECTURES))}"
        )
    return named


def read_count(config: dict[str, Any], key: str, path: Path, otherwise: int | None = None) -> int:
    """Return an integer of a config.json. otherwise: the default for a missing or null one.

    Raises PreconditionFailed, naming the key.
    """
    value = config.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_COUNT:
        said = f"is {quoted(value)}" if key in config else "is missing"
        raise PreconditionFailed(f"{path}: {key} {said}; it must be a whole number from 1 on")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json. Raises PreconditionFailed if it is missing or no JSON object."""
    config = read_json_file(path, "name a Hugging Face model directory")
    if not isinstance(config, dict):
        raise PreconditionFailed(f"{path} does not hold an object")
    return config


def read_eos_ids(directory: Path, config: dict[str, Any], vocabulary: int) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of config.json, then the rest of generation_config.json.

    Either file may name one or several, or none (missing, null, or an empty list): chat models name their end
    of turn in the second alone. If both name none, the tokenizer's end token is no substitute: a
    model that was trained to end its turns with another token would never end them.
    config: the content of config.json. vocabulary: size in tokens. Raises PreconditionFailed if neither
    names one, and for an id beyond the vocabulary.
    """
    ids: list[int] = []
    file = directory / "generation_config.json"
    path = directory / "config.json"
    for source, content in ((path, config), (file, read_config(file) if file.exists() else {})):
        named = content.get("eos_token_id")
        for each in named if isinstance(named, list) else [] if named is None else [named]:
            if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < vocabulary:
                raise PreconditionFailed(
                    f"{source}: eos_token_id is {quoted(named)}; it must be an id of the vocabulary, "
                    f"0 to {vocabulary - 1}, or a list of such"
                )
            ids.append(each)
    if not ids:
        raise PreconditionFailed(
            f"{path}: eos_token_id is missing, and {file.name} names none either: nothing would end an answer"
        )
    return tuple(dict.fromkeys(ids))
