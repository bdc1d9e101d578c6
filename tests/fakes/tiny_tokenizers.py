"""Tokenizers of the two kinds that models have, small: over bytes, and as SentencePiece makes them.

Each is what a tokenizer.json holds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fakes.chat_templates import Family

_WORDS = ("the", "he", "is", "in", "user", "system", "end", "</", "<|", "|>", "im", "INST")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'\"<>|/[]_-+=()"


def byte_level(special: Sequence[str], marks: Sequence[str] = (), **token: bool) -> dict[str, Any]:
    """Return a byte-level BPE tokenizer, as of GPT-2, Llama 3, Qwen. token: flags of its special tokens."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = _merge(vocabulary, (*_WORDS, *(f"Ġ{word}" for word in _WORDS)))
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _tokenizer(
        _added(len(vocabulary), special, marks, **token),
        {"vocab": vocabulary, "merges": merges, "unk_token": None, "fuse_unk": False, "byte_fallback": False},
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": step, "decoder": step},
    )


def pieces(
    special: Sequence[str], marks: Sequence[str] = (), form: str = "legacy", **token: bool
) -> dict[str, Any]:
    """Return a BPE tokenizer with fallback to bytes, as of Llama 2, Mistral and Gemma.

    form: how a text begins. "legacy": every piece of it between special tokens with a blank; "new": the first
    one alone; "bare": as it is. Special tokens are in the model's vocabulary, as SentencePiece has them.
    """
    vocabulary = {mark: index for index, mark in enumerate(special)}
    for each in (*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_LETTERS):
        vocabulary.setdefault(each, len(vocabulary))
    merges = _merge(vocabulary, (*_WORDS, *(f"▁{word}" for word in _WORDS)))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    blanks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders: list[dict[str, Any]] = [blanks, {"type": "ByteFallback"}, {"type": "Fuse"}]
    parts: dict[str, Any] = {"normalizer": replace, "pre_tokenizer": None}
    if form == "legacy":
        prepend = {"type": "Prepend", "prepend": "▁"}
        parts["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    if form == "new":
        step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        parts = {"normalizer": None, "pre_tokenizer": step}
    if form != "bare":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _tokenizer(
        _added(0, special, (), **token) + _added(len(vocabulary), (), marks),
        {
            "vocab": vocabulary,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
        parts | {"decoder": {"type": "Sequence", "decoders": decoders}},
    )


def write_family(directory: Path, family: Family) -> Path:
    """Write a family's tokenizer and chat template into a directory, and return it."""
    make = byte_level(family.special, family.marks)
    if family.pieces:
        make = pieces(family.special, family.marks, family.pieces)
    config = {"bos_token": family.bos, "eos_token": family.eos, "chat_template": family.template}
    return write(directory, make, config)


def write(directory: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> Path:
    """Write tokenizer.json and tokenizer_config.json into a directory, and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _added(first: int, special: Sequence[str], marks: Sequence[str], **flags: bool) -> list[dict[str, Any]]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": first + index, "content": mark, **usual, **flags, "special": index < len(special)}
        for index, mark in enumerate((*special, *marks))
    ]


def _merge(vocabulary: dict[str, int], words: Sequence[str]) -> list[list[str]]:
    merges: list[list[str]] = []
    for word in words:
        whole = word[0]
        for letter in word[1:]:
            pair = [whole, letter]
            whole += letter
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(whole, len(vocabulary))
    return merges


def _tokenizer(added: list[dict[str, Any]], model: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    bare = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        "model": {"type": "BPE", "ignore_merges": False, **bare, **model},
        **parts,
    }
