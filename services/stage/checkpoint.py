"""What a Hugging Face directory says of its model, for engines that read the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.common.errors import PreconditionFailed
from services.stage.model_files import read_json_file

if TYPE_CHECKING:
    from pathlib import Path

# Decoder-only architectures whose chat checkpoints the GPU engines' own documentation lists.
ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as its directory describes it.

    weight_bytes: of its weight files; of bfloat16 weights where there are none. kv_values_per_token: numbers
    that the KV cache holds for a token.
    """

    architecture: str
    vocabulary: int
    context: int
    eos_ids: tuple[int, ...]
    parameters: int
    weight_bytes: int
    kv_values_per_token: int


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json, and generation_config.json where it is there.

    Raises PreconditionFailed if config.json is missing, is not JSON, or describes no model of ARCHITECTURES.
    """
    path = directory / "config.json"
    config = read_config(path)
    architecture = check_architecture(config, path)
    try:
        hidden, layers, heads = (
            int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or hidden // heads)
        vocabulary, context = int(config["vocab_size"]), int(config["max_position_embeddings"])
        attention = hidden * head * (2 * heads + 2 * kv_heads)
        block = attention + 3 * hidden * int(config["intermediate_size"]) + 2 * hidden
        embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    except (KeyError, TypeError, ValueError) as error:
        raise PreconditionFailed(f"{path}: {error} is missing or of the wrong type") from error
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
    named = config.get("architectures") or ["none"]
    if named[0] not in ARCHITECTURES:
        raise PreconditionFailed(
            f"{path}: architecture {named[0]} is not one of {', '.join(sorted(ARCHITECTURES))}"
        )
    return str(named[0])


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json. Raises PreconditionFailed if it is missing or no JSON object."""
    config = read_json_file(path, "name a Hugging Face model directory")
    if not isinstance(config, dict):
        raise PreconditionFailed(f"{path} does not hold an object")
    return config


def read_eos_ids(directory: Path, config: dict[str, Any], vocabulary: int) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of config.json, then more of generation_config.json.

    Either file may name one or several, or none (missing, null, or an empty list): chat models name their end
    of turn in the second alone. Where both name none, the tokenizer's own end token is not taken instead: a
    model that was trained to end its turns with another one would never end them.
    config: the content of config.json. vocabulary: size in tokens. Raises PreconditionFailed where no file
    names one, and for what is no id of the vocabulary.
    """
    ids: list[int] = []
    file = directory / "generation_config.json"
    path = directory / "config.json"
    for source, content in ((path, config), (file, read_config(file) if file.exists() else {})):
        named = content.get("eos_token_id")
        for each in named if isinstance(named, list) else [] if named is None else [named]:
            if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < vocabulary:
                raise PreconditionFailed(
                    f"{source}: eos_token_id is {named!r}; it must be an id of the vocabulary, "
                    f"0 to {vocabulary - 1}, or a list of such"
                )
            ids.append(each)
    if not ids:
        raise PreconditionFailed(
            f"{path}: eos_token_id is missing, and {file.name} names none either: nothing would end an answer"
        )
    return tuple(dict.fromkeys(ids))
