"""The description of a tokenizer in tokenizer.json. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asd.errors import PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

# Decoders under which a token's text depends on later tokens only as
# services.stage.generation.text_stream handles it.
_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})
# Normalizers that drop no text, and how many characters they join at most: composing Unicode joins a letter
# with up to three marks.
_NORMALIZERS = {"Prepend": 1, "Lowercase": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation"})


class TextLimit:
    """The most text that one token stands for.

    swallows_blanks: whether a special token includes the blanks beside it.
    """

    def __init__(self, description: dict[str, Any], longest: int, swallows_blanks: bool) -> None:
        self._swallows_blanks = swallows_blanks
        pre_tokenizers = list(steps(description.get("pre_tokenizer"), "pretokenizers"))
        self._counts_bytes = any(each["type"] == "ByteLevel" for each in pre_tokenizers)
        self._longest: float | None = longest
        model = description["model"]
        # A model with no token for a character drops it, or has one for any number of them.
        knows_all = self._counts_bytes or model.get("byte_fallback")
        splits_only = all(
            each["type"] in _PRE_TOKENIZERS and each.get("behavior") != "Removed" for each in pre_tokenizers
        )
        if model.get("type") not in {"BPE", "Unigram"} or not knows_all or not splits_only:
            self._longest = None
        for each in steps(description.get("normalizer"), "normalizers"):
            shrinks = _shrinks_by(each)
            self._longest = self._longest * shrinks if self._longest and shrinks else None

    def least_tokens(self, text: str) -> int:
        """Return a lower bound on the number of a text's tokens; 0 if there is none."""
        if self._longest is None:
            return 0
        if self._swallows_blanks:
            text = "".join(text.split())
        size = len(text.encode()) if self._counts_bytes else len(text)
        return int(size / self._longest)


def as_is(description: Any) -> dict[str, Any]:
    """Return a tokenizer's description without its settings for training.

    Fine-tuned models save them: truncation, padding, and merges dropped at random. They do not change what an
    id means, so fingerprints leave them out.
    """
    if not isinstance(description, dict):
        raise TypeError("it holds no object")
    description |= {"truncation": None, "padding": None}
    model = description.get("model")
    if isinstance(model, dict) and model.get("dropout") is not None:
        model["dropout"] = None
    return description


def renamed(description: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a tokenizer's description with its special tokens renamed."""
    added = [
        token | {"content": names.get(token["content"], token["content"])}
        for token in description["added_tokens"]
    ]
    model = dict(description["model"])
    # Merges name tokens by their text; the tokens that they make are text, and keep their names too.
    merged = {
        part
        for merge in model.get("merges") or ()
        for pair in (merge.split(" ", 1) if isinstance(merge, str) else merge,)
        for part in (*pair, "".join(pair))
        if part in names
    }
    names = {mark: name for mark, name in names.items() if mark not in merged}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return description | {"added_tokens": added, "model": model, "post_processor": None}


def steps(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of a tokenizer's description, with sequences flattened."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for each in part[inner]:
            yield from steps(each, inner)
    else:
        yield part


def check_decoders(decoders: Sequence[dict[str, Any]], path: Path) -> None:
    """Raise PreconditionFailed for a decoder in which any later token may change a token's text."""
    is_fused = False
    for decoder in decoders:
        kind = decoder["type"]
        is_fused |= kind in {"Fuse", "ByteLevel"}
        is_local = not is_fused or (
            (kind != "Strip" or not decoder["stop"])
            and (kind != "Replace" or len(decoder["pattern"].get("String", "..")) == 1)
        )
        if kind not in _DECODERS or not is_local:
            raise PreconditionFailed(
                f"{path}: the decoder {kind}, where it stands, needs the whole answer to know its text; "
                f"known are {', '.join(sorted(_DECODERS))}"
            )


def _shrinks_by(normalizer: dict[str, Any]) -> float:
    """Return how many characters a normalizer joins at most; 0 if there is no bound."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String", "")
        return max(1.0, len(pattern) / len(normalizer["content"])) if pattern and normalizer["content"] else 0
    return _NORMALIZERS.get(normalizer["type"], 0)


def patterns(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield all regular expressions of a tokenizer's description."""
    waiting: list[Any] = [description.get("normalizer"), description.get("pre_tokenizer")]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if isinstance(each.get("Regex"), str):
                yield each["Regex"]
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
