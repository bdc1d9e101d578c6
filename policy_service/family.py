"""Detects prompts that are unlike all that a policy was fitted to. No gRPC, no protobuf.

A prompt is split into tokens. Numbers, names, and words in positions that many different words take are
abstracted. A token's novelty is the share of the n-grams of one to four tokens ending with it that no fitted
prompt has. A prompt's novelty is the mean over its tokens, 0 to 1: a back-off n-gram model (Katz 1987) that
only tells whether a count is zero. A prompt is marked if its novelty is above a threshold. Hardly any of the
prompts that the policy was calibrated on exceed it (train/family.py).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from policy_service.features import PromptText

# Of a longer question, only the end counts, as for the features; likewise of its history. Chosen: about 1,000
# words, which take a millisecond.
MOST_CHARACTERS = 4096
MOST_MESSAGES = 16
# Tokens of the longest n-gram. Chosen: the fixed words of a pattern have one or two other words in between.
ORDER = 4

# Tokens before the first message of a prompt, before a later one, and after each.
FIRST, LATER, END = "<first>", "<later>", "<end>"
# Tokens for a number, a name, and any other word that varies or is unknown.
NUMBER, NAME, WORD = "<number>", "<name>", "<word>"

# Most words of a name in lower case, whose end is not marked by capitals. Chosen: a first name and a surname,
# as in the suites.
_WORDS_OF_NAME = 2

# Polite words after a question, which do not disturb the embedded models' confident answers. Words before the
# question do, and are kept. Measured (benchmarks/family.py) on the middle model's answers with a P(correct)
# above 0.9: with "Please answer: " before the question, 65% were right (23 answers); with " Thanks!" after
# it, 93% (30 answers).
_CLOSING = re.compile(
    r"(?:(?:[\s,]\s*|(?<=[.?!]))(?:please|thanks|thank\s+you)(?:\s+(?:very\s+much|in\s+advance))?[.!]*)+\Z",
    re.IGNORECASE,
)
# Most characters of such words. Chosen: the search scans white space repeatedly.
_LONGEST_CLOSING = 64
# A message before the question that has only these words, such as a default system message, asks for nothing,
# unless it is longer than _LONGEST_OF_ASSISTANTS characters. Chosen.
_OF_ASSISTANTS = frozenset(
    "you are re a an the and ai helpful useful friendly kind polite respectful honest harmless smart "
    "knowledgeable intelligent capable virtual digital chat large language model bot chatbot "
    "assistant".split()
)
_LONGEST_OF_ASSISTANTS = 200

# A word may contain digits and underscores after its first letter, as names in programs do.
_TOKEN = re.compile(r"[^\W\d]\w*|\d+|\n|[^\w\s]")


@dataclass(frozen=True)
class Family:
    """The patterns of the prompts that a policy was fitted to.

    words: fixed words, in lower case, which are not abstracted. grams: hashes (`gram_hash`) of the n-grams in
    fitted prompts. threshold: novelty above which a prompt is marked.
    """

    words: frozenset[str]
    grams: frozenset[int]
    threshold: float

    def has(self, prompt: PromptText) -> bool:
        """Return whether a prompt is like those that the policy was fitted to."""
        return self.novelty(prompt) <= self.threshold

    def novelty(self, prompt: PromptText) -> float:
        """Return a prompt's novelty, 0 to 1: the larger one of its question and its history.

        A long known history does not hide a new question, nor the reverse.
        """
        *history, question = (self._message(start, text) for start, text in messages(prompt))
        return max(_mean(question), _mean([each for message in history for each in message]))

    def _message(self, start: str, text: str) -> list[float]:
        """Return the novelty of each token of a message and of its end, in lower case if that is less new.

        Case is only a hint: many people write names in lower case.
        """
        written = self._novelties(start, text)
        if not any(written):
            return written
        lower = self._novelties(start, text.lower(), is_folded=True)
        return min(written, lower, key=_mean)

    def _novelties(self, start: str, text: str, *, is_folded: bool = False) -> list[float]:
        """Return the novelty of each token of a message and of its end. start: the token before it.

        A fixed word may also be a name, or fill a position that is open to any word, as "May" and variables
        do. The least new reading counts. is_folded: names have no capitals, so any word may be one.
        """
        novelties = []
        words, grams = self.words, self.grams
        before = (*_PADDING, start)
        in_name = 0
        for token in (*split_tokens(text), END):
            lower = token.lower()
            if lower in words:
                chosen = lower
            else:
                chosen = END if token is END else abstract(token)
                if chosen == NAME == before[-1] or (
                    is_folded and chosen is WORD and before[-1] is NAME and in_name < _WORDS_OF_NAME
                ):
                    in_name += 1
                    continue
            # For most tokens, the longest n-gram is known, and nothing else is looked up.
            if gram_hash(" ".join((*before, chosen))) in grams:
                novelties.append(0.0)
            else:
                novelty = self._novelty(before, chosen)
                others = [abstract(token)] if chosen is lower else []
                if is_folded and token[0].isalpha():
                    others.append(NAME)
                for other in others:
                    if (found := self._novelty(before, other)) < novelty:
                        chosen, novelty = other, found
                novelties.append(novelty)
            in_name = 1
            before = (*before[1:], chosen)
        return novelties

    def _novelty(self, before: tuple[str, ...], token: str) -> float:
        """Return the share of the n-grams ending with a token that are new. before: ORDER - 1 tokens."""
        for count, gram in enumerate(_longest_first(before, token)):
            if gram_hash(gram) in self.grams:
                return count / ORDER
        return 1.0


def messages(prompt: PromptText) -> Iterator[tuple[str, str]]:
    """Yield the start token and text of each message of a prompt; the question last.

    Messages of the history that ask for nothing, such as default system messages, are left out. A long
    history is cut to its latest characters and messages.
    """
    left = MOST_CHARACTERS
    kept: list[tuple[str, str]] = []
    history = [text for text in map(trimmed, prompt.history) if not says_nothing(text)]
    for index in range(len(history) - 1, -1, -1):
        if left <= 0 or len(kept) == MOST_MESSAGES:
            break
        text = history[index][-left:]
        kept.append((LATER if index else FIRST, text))
        left -= len(text)
    yield from reversed(kept)
    yield LATER if history else FIRST, trimmed(prompt.question)


def trimmed(text: str) -> str:
    """Return a text's end with uniform line breaks, without outer white space and polite words after it.

    A text of polite words alone stays.
    """
    text = text.strip()[-MOST_CHARACTERS:].replace("\r\n", "\n").replace("\r", "\n")
    rest = text[:-_LONGEST_CLOSING] + _CLOSING.sub("", text[-_LONGEST_CLOSING:])
    return rest if _TOKEN.search(rest) else text


def says_nothing(text: str) -> bool:
    """Return whether a message asks for nothing, such as "You are a helpful assistant."."""
    if len(text) > _LONGEST_OF_ASSISTANTS:
        return False
    return all(not token[0].isalnum() or token.lower() in _OF_ASSISTANTS for token in _TOKEN.findall(text))


def split_tokens(text: str) -> list[str]:
    """Return a text's words, numbers, line breaks and other characters; of a long text, those at its end."""
    return _TOKEN.findall(text[-MOST_CHARACTERS:])


def abstract(token: str) -> str:
    """Return the abstract token for a token that is not a fixed word."""
    first = token[0]
    if first.isupper():
        return NAME
    if first.isalpha():
        return WORD
    return NUMBER if first.isdecimal() else token


def abstract_text(text: str, words: frozenset[str]) -> list[str]:
    """Return a text's tokens. All but fixed words are abstracted, and adjacent names become one."""
    result: list[str] = []
    for token in split_tokens(text):
        lower = token.lower()
        chosen = lower if lower in words else abstract(token)
        if chosen != NAME or result[-1:] != [NAME]:
            result.append(chosen)
    return result


def grams_of(start: str, tokens: Sequence[str]) -> Iterator[str]:
    """Yield the n-grams of one to ORDER tokens ending with each token of a message, and with its end."""
    before = (*_PADDING, start)
    for token in (*tokens, END):
        yield from _longest_first(before, token)
        before = (*before[1:], token)


def gram_hash(gram: str) -> int:
    """Return the hash of an n-gram: 0 to 2**32 - 1."""
    return zlib.crc32(gram.encode("utf-8", "replace"))


# Empty tokens before the start of a message.
_PADDING = ("",) * (ORDER - 2)


def _longest_first(before: tuple[str, ...], token: str) -> Iterator[str]:
    """Yield the n-grams ending with a token, from ORDER tokens down to one. before: ORDER - 1 tokens."""
    for start in range(ORDER):
        yield " ".join((*before[start:], token))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
