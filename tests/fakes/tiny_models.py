"""Model folders of four tokenizer families, small enough to be made in a test.

A scripted model writes a set text: its layers add nothing to the residual stream, so that the next token
depends on the last one alone. A random model has random weights and writes whatever they give: half
characters, special tokens, and seldom an end.
"""

from __future__ import annotations

import itertools
import json
import struct
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

CONTEXT = 256
# A scripted model has a dimension for each token: fewer tokens than that.
_VOCABULARY = 480
_HIDDEN = 512
_HEADS = 8
_INTERMEDIATE = 32

_CORPUS = (
    "The answer is nineteen. Max has nine beads and finds ten more, so that there are nineteen beads.",
    "Three plus twenty-two is more than twenty-four: true. Answer: true, since 25 is more than 24.",
    "What is the colour of the sky? It is blue in the day and black at night. Answer: blue.",
    "def add(a, b):\n    return a + b\n\nprint(add(9, 10))  # 19\n",
    "naïve café, 東京 is a city; 🦊 is a fox. “Quotes” – and dashes…",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25",
)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}<s>[INST] {% if loop.first %}{{ system }}{% endif %}"
    "{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
_GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant:"


def _byte_level() -> tuple[Tokenizer, str, str]:
    """As GPT-2, Llama 3 and Qwen have it: bytes as letters, no unknown text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer, _CHATML, "<|im_end|>"


def _with_byte_fallback(specials: Sequence[str]) -> models.BPE:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(_BYTES), show_progress=False, special_tokens=["<unk>"]
    )
    trained.train_from_iterator([line.replace(" ", " ▁") for line in _CORPUS[:4]], trainer)
    learnt = json.loads(trained.to_str())["model"]
    pieces = dict.fromkeys([*specials, *_BYTES, *sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)])
    merges = [tuple(pair) for pair in learnt["merges"]]
    return models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )


def _add_specials(tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in specials])


def _llama2() -> tuple[Tokenizer, str, str]:
    """As Llama 2 and Mistral v0.1 have it: SentencePiece's BPE, a space before the text, byte fallback."""
    specials = ("<unk>", "<s>", "</s>")
    tokenizer = Tokenizer(_with_byte_fallback(specials))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_specials(tokenizer, specials)
    return tokenizer, _LLAMA2, "</s>"


def _gemma() -> tuple[Tokenizer, str, str]:
    """As Gemma has it: byte fallback, and no space before the text."""
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = Tokenizer(_with_byte_fallback(specials))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_specials(tokenizer, specials)
    return tokenizer, _GEMMA, "<end_of_turn>"


def _unigram() -> tuple[Tokenizer, str, str]:
    """SentencePiece's unigram model with byte fallback, and a space before the first word alone."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=_VOCABULARY - len(_BYTES), show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )
    trained.train_from_iterator(_CORPUS[:4], trainer)
    learnt = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in learnt) - 1.0
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((byte, lowest) for byte in _BYTES), *learnt[1:]]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", "first", split=True), decoders.Fuse()]
    )
    _add_specials(tokenizer, ("<unk>", "<s>", "</s>"))
    return tokenizer, _PLAIN, "</s>"


FAMILIES: dict[str, Callable[[], tuple[Tokenizer, str, str]]] = {
    "byte-level": _byte_level,
    "llama2": _llama2,
    "gemma": _gemma,
    "unigram": _unigram,
}


def make_model(folder: Path, family: str, *, script: str = "", seed: int = 0) -> None:
    """Write a model folder: scripted, or random where there is no script.

    Of a token that the script holds twice, the first is written.
    """
    tokenizer, template, end = FAMILIES[family]()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": end}))
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id(end),
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    weights = _weights(rng, vocabulary, scale=0.0 if script else 0.08)
    if script:
        # What follows a token is one token, so that each is written once.
        ids = dict.fromkeys(tokenizer.encode(script, add_special_tokens=False).ids)
        weights["model.embed_tokens.weight"] = np.eye(vocabulary, _HIDDEN, dtype=np.float32)
        weights["lm_head.weight"] = _following([*ids, tokenizer.token_to_id(end)], vocabulary)
    _save(folder / "model.safetensors", weights)


def _weights(rng: np.random.Generator, vocabulary: int, scale: float) -> dict[str, npt.NDArray[np.float32]]:
    def normal(*shape: int, deviation: float = scale) -> npt.NDArray[np.float32]:
        return rng.normal(0.0, 1.0, shape).astype(np.float32) * np.float32(deviation)

    layer = "model.layers.0."
    projections = {f"{layer}self_attn.{name}_proj.weight": normal(_HIDDEN, _HIDDEN) for name in "qkvo"}
    return {
        "model.embed_tokens.weight": normal(vocabulary, _HIDDEN, deviation=1.0),
        **projections,
        f"{layer}mlp.gate_proj.weight": normal(_INTERMEDIATE, _HIDDEN),
        f"{layer}mlp.up_proj.weight": normal(_INTERMEDIATE, _HIDDEN),
        f"{layer}mlp.down_proj.weight": normal(_HIDDEN, _INTERMEDIATE),
        f"{layer}input_layernorm.weight": np.ones(_HIDDEN, np.float32),
        f"{layer}post_attention_layernorm.weight": np.ones(_HIDDEN, np.float32),
        "model.norm.weight": np.ones(_HIDDEN, np.float32),
        "lm_head.weight": normal(vocabulary, _HIDDEN, deviation=0.1),
    }


def _following(ids: Sequence[int], vocabulary: int) -> npt.NDArray[np.float32]:
    """Return a head, float32 [V, hidden], under which each id of a chain follows the one before it.

    Any other id is followed by the first of the chain.
    """
    head = np.zeros((vocabulary, _HIDDEN), np.float32)
    follows = dict(itertools.pairwise(ids))
    for token in range(vocabulary):
        head[follows.get(token, ids[0]), token] = 1.0
    return head


def _save(path: Path, weights: dict[str, npt.NDArray[np.float32]]) -> None:
    """Write safetensors: the header's length, the header, the values."""
    header, start = {}, 0
    for name, values in weights.items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [start, start + values.nbytes]}
        start += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for v in weights.values()))
