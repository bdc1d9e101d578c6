"""Tells prompts that are unlike all that a policy was fitted to. No gRPC, no protobuf.

A prompt is read as tokens in which what varies from prompt to prompt is abstracted: numbers, names, and words
in places that many different words take. Each token is looked up together with the three before it, as far as
fitted prompts have them in this order. Its novelty is the share of the runs of one to four tokens that end
with it and are in no fitted prompt. The mean over the tokens is the prompt's novelty, 0 to 1: a back-off
n-gram model (Katz 1987) in which only counts of zero count. A prompt is marked whose novelty is above a
threshold that hardly any of the prompts exceeds that the policy was calibrated on (train/family.py).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from policy_service.features import PromptText

# A longer question counts by its end, as for the features, and so does what came before it. Chosen: about
# 1,000 words, which take a millisecond.
MOST_CHARACTERS = 4096
MOST_MESSAGES = 16
# Tokens of the longest run that is looked up. Chosen: fixed words of a pattern have one or two others in
# between.
ORDER = 4

# What stands before the first message of a prompt, before a later one, and behind each.
FIRST, LATER, END = "<first>", "<later>", "<end>"
# What stands for a number, a name, and another word that varies or is not known.
NUMBER, NAME, WORD = "<number>", "<name>", "<word>"

# Words in a row that one name may have in lower case, where nothing else tells its end. Chosen: a name and a
# surname, as the suites have.
_WORDS_OF_NAME = 2

# Words of politeness behind a question, which the embedded models read over where they are sure. What stands
# in front of it stays. Measured (benchmarks/family.py): with "Please answer: " before it, 65% of the middle
# one's answers with a P(correct) above 0.9 were right (23 answers); with " Thanks!" behind it, 93% (30).
_CLOSING = re.compile(
    r"(?:(?:[\s,]\s*|(?<=[.?!]))(?:please|thanks|thank\s+you)(?:\s+(?:very\s+much|in\s+advance))?[.!]*)+\Z",
    re.IGNORECASE,
)
# Characters of it, at most. Chosen: the search looks at all that is white space again and again.
_LONGEST_CLOSING = 64
# A message before the question that has no other words, as systems' default ones, asks for nothing. Longer
# than so many characters it does. Chosen.
_OF_ASSISTANTS = frozenset(
    "you are re a an the and ai helpful useful friendly kind polite respectful honest harmless smart "
    "knowledgeable intelligent capable virtual digital chat large language model bot chatbot "
    "assistant".split()
)
_LONGEST_OF_ASSISTANTS = 200

# A word may go on with digits and underscores, as names in programs do.
_TOKEN = re.compile(r"[^\W\d]\w*|\d+|\n|[^\w\s]")


@dataclass(frozen=True)
class Family:
    """What the prompts look like that a policy was fitted to.

    words: lower-case, that stand for themselves. grams: hashes (`gram_hash`) of the runs of tokens that
    fitted prompts have. threshold: novelty above which a prompt is marked.
    """

    words: frozenset[str]
    grams: frozenset[int]
    threshold: float

    def has(self, prompt: PromptText) -> bool:
        """Return whether a prompt is like those that the policy was fitted to."""
        return self.novelty(prompt) <= self.threshold

    def novelty(self, prompt: PromptText) -> float:
        """Return how new a prompt is, 0 to 1: its question, or what came before where that is newer.

        A long history does not hide a new question, nor the reverse.
        """
        *history, question = (self._message(start, text) for start, text in messages(prompt))
        return max(_mean(question), _mean([each for message in history for each in message]))

    def _message(self, start: str, text: str) -> list[float]:
        """Return the novelty of each token of a message and of its end, in lower case where it is less new.

        Case is a hint and no more: many write names without it.
        """
        written = self._novelties(start, text)
        if not any(written):
            return written
        lower = self._novelties(start, text.lower(), is_folded=True)
        return min(written, lower, key=_mean)

    def _novelties(self, start: str, text: str, *, is_folded: bool = False) -> list[float]:
        """Return the novelty of each token of a message and of its end. start: what stands before.

        A fixed word may also be a name, or take a place that is open to any word, as "May" and variables do:
        it counts as what is less new. is_folded: names have no capital letters, so that any word may be one.
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
            # Of most tokens the longest run is known: nothing else is looked up.
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
        """Return the share of the runs that end with a token that are new. before: ORDER - 1 tokens."""
        for count, gram in enumerate(_longest_first(before, token)):
            if gram_hash(gram) in self.grams:
                return count / ORDER
        return 1.0


def messages(prompt: PromptText) -> Iterator[tuple[str, str]]:
    """Yield what stands before each message of a prompt, and the message; the question last.

    Of the history, messages that say nothing are left out, such as systems' default ones. A long history is
    cut to its latest characters and messages.
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
    """Return a text's end with one kind of line break, without white space around and politeness behind it.

    What is nothing but politeness stays.
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
    """Return words, numbers, line breaks and other characters of a text, of a long one those at its end."""
    return _TOKEN.findall(text[-MOST_CHARACTERS:])


def abstract(token: str) -> str:
    """Return what stands for a token that is no fixed word."""
    first = token[0]
    if first.isupper():
        return NAME
    if first.isalpha():
        return WORD
    return NUMBER if first.isdecimal() else token


def abstract_text(text: str, words: frozenset[str]) -> list[str]:
    """Return a text's tokens, abstracted where they are no fixed words; adjacent names are one."""
    result: list[str] = []
    for token in split_tokens(text):
        lower = token.lower()
        chosen = lower if lower in words else abstract(token)
        if chosen != NAME or result[-1:] != [NAME]:
            result.append(chosen)
    return result


def grams_of(start: str, tokens: Sequence[str]) -> Iterator[str]:
    """Yield the runs of one to ORDER tokens that end with each token of a message, and with its end."""
    before = (*_PADDING, start)
    for token in (*tokens, END):
        yield from _longest_first(before, token)
        before = (*before[1:], token)


def gram_hash(gram: str) -> int:
    """Return the hash of a run of tokens: 0 to 2**32 - 1."""
    return zlib.crc32(gram.encode("utf-8", "replace"))


# Before the start of a message there is nothing, in every run alike.
_PADDING = ("",) * (ORDER - 2)


def _longest_first(before: tuple[str, ...], token: str) -> Iterator[str]:
    """Yield the runs that end with a token, from ORDER tokens down to one. before: ORDER - 1 tokens."""
    for start in range(ORDER):
        yield " ".join((*before[start:], token))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
