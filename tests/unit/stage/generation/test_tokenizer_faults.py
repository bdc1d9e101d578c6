"""A tokenizer.json whose patterns take for ever, or at which the library panics, is refused in a sentence."""

import json

import pytest

from asd.errors import PreconditionFailed
from services.stage.generation.tokenizer import ChatTokenizer
from services.stage.generation.tokenizer_faults import check_patterns
from tests.fakes.tiny_tokenizers import byte_level, write

_CONFIG = {"chat_template": "{{ messages[-1].content }}"}


def _with_pattern(pattern):
    tokenizer = byte_level(["<s>"])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = dict(tokenizer["pre_tokenizer"], use_regex=False)
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    return tokenizer


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(x|xx)+y", r"(\s|\n)+\d"])
def test_a_pattern_that_takes_for_ever_is_refused_as_the_model_is_read(pattern, tmp_path):
    with pytest.raises(PreconditionFailed, match=r"tokenizer\.json: a pattern") as refused:
        ChatTokenizer(write(tmp_path, _with_pattern(pattern), _CONFIG))
    assert str(refused.value).isprintable()


def test_a_pattern_that_slows_down_with_the_length_is_refused_before_the_longest_text(tmp_path):
    class Slow:
        now = 0.0

        def encode(self, text, add_special_tokens):
            self.now += (len(text) / 500) ** 3

    slow = Slow()
    with pytest.raises(PreconditionFailed, match="512 times"):
        check_patterns(slow, _with_pattern("b+"), tmp_path / "tokenizer.json", clock=lambda: slow.now)


def test_patterns_of_known_models_are_taken(tmp_path):
    llama_3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert ChatTokenizer(write(tmp_path, _with_pattern(llama_3), _CONFIG)).encode_text("a b")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {}, "merges": [7]}},
        {"added_tokens": [{"id": 10**9, "content": "", "special": True}]},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [7]}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {"normalizer": "\x1b[2J\n"},
        {"version": "\ud800"},
    ],
)
def test_a_description_that_is_none_is_one_sentence_with_the_file(change, tmp_path):
    folder = write(tmp_path, byte_level(["<s>"]) | change, _CONFIG)
    with pytest.raises(PreconditionFailed, match=r"tokenizer\.json") as refused:
        ChatTokenizer(folder)
    assert str(refused.value).isprintable()


def test_a_key_that_is_there_twice_is_named(tmp_path):
    folder = write(tmp_path, byte_level(["<s>"]), _CONFIG)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"version"', '"truncation": 1, "version"', 1))
    assert json.loads(path.read_text())
    with pytest.raises(PreconditionFailed, match="truncation"):
        ChatTokenizer(folder)
