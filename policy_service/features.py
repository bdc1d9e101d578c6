"""Features of a prompt, an answer and its verification: one float32 vector per state. No gRPC, no protobuf.

Training and serving both call `FeatureSpace.of`, so they cannot differ. A change here makes every artifact
unfit: raise FEATURES_VERSION, which an artifact records and the policy service checks.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from asd.values import FinishReason

FEATURES_VERSION = 1

# Buckets of the hashed words and word pairs of a prompt. Chosen.
HASH_BUCKETS = 256

# Text beyond this many characters changes only the length features, so that a decision's time is bounded.
_MOST_CHARACTERS = 8192

# Outcome files keep token signals to this many decimals; serving rounds likewise.
_DECIMALS = 3

_TOKEN = re.compile(r"[a-z]+|\d+|[^\sa-z\d]")
_EQUATION = re.compile(r"(?<![\d.])(-?\d{1,9})\s*([-+*/x×])\s*(-?\d{1,9})\s*=\s*(-?\d{1,12})(?!\d|\.\d)")
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[A-Za-z]+")

_PROMPT_NAMES = (
    "prompt_characters",
    "prompt_words",
    "prompt_numbers",
    "prompt_longest_number",
    "prompt_largest_number",
    "prompt_lines",
    "prompt_questions",
    "prompt_sentences",
    "prompt_options",
    "prompt_operators",
    "prompt_indents",
    "prompt_negations",
    "prompt_non_ascii",
    "prompt_capitals",
    "prompt_distinct_words",
    "turns",
    "history_characters",
)
_DRAFT_NAMES = (
    "draft_tokens",
    "draft_logprob_sum",
    "draft_logprob_mean",
    "draft_logprob_min",
    "draft_logprob_second",
    "draft_logprob_third",
    "draft_logprob_last",
    "draft_logprob_last4_min",
    "draft_entropy_mean",
    "draft_entropy_max",
    "draft_entropy_second",
    "draft_entropy_last4_max",
    "draft_margin_mean",
    "draft_margin_min",
    "draft_margin_last4_min",
    "draft_unsure_50",
    "draft_unsure_90",
    "draft_unsure_99",
    "draft_first_unsure",
    "draft_least_sure_position",
    "draft_is_eos",
    "draft_is_length",
    "draft_characters",
    "draft_repetition",
    "draft_equations",
    "draft_false_equations",
    "draft_number_overlap",
    "draft_word_overlap",
    "draft_tokens_per_prompt_word",
)
_VERIFICATION_NAMES = (
    "verify_tokens",
    "verify_accepted_share",
    "verify_is_whole",
    "verify_rejects",
    "verify_reject_share",
    "verify_rank_max",
    "verify_rank_mean",
    "verify_rank_of_first_reject",
)

_NEGATIONS = frozenset(
    ("not", "no", "never", "none", "without", "except", "neither", "nor", "false", "wrong")
)
# Smaller log-probabilities are raised to this.
_LEAST_LOGPROB = -20.0
# Log-probabilities of tokens of probability 0.5, 0.9 and 0.99.
_LOG_50, _LOG_90, _LOG_99 = math.log(0.5), math.log(0.9), math.log(0.99)


@dataclass(frozen=True)
class PromptText:
    """A prompt. `history`: the earlier messages, oldest first."""

    question: str
    history: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A finished answer. logprobs, entropies (nats), top2_margins: float [tokens], as in TokenChunk."""

    text: str
    logprobs: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    top2_margins: npt.NDArray[np.float32]
    finish_reason: FinishReason


@dataclass(frozen=True)
class DraftVerification:
    """The verdict on an earlier stage's draft. ranks: int [proposed]; 0 means that the target agrees."""

    accepted: int
    ranks: npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureSpace:
    """Vectors for the states of a cascade with `stages` stages.

    In a state, either no stage has answered yet, or stage i has: it generated the answer, or verified a draft
    of an earlier stage k.
    """

    stages: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each element of a vector."""
        return (
            *(f"stage_is_{index}" for index in range(self.stages)),
            *(f"origin_is_{index}" for index in range(self.stages - 1)),
            *_PROMPT_NAMES,
            *_DRAFT_NAMES,
            *_VERIFICATION_NAMES,
            *(f"hash_{bucket}" for bucket in range(HASH_BUCKETS)),
        )

    @property
    def size(self) -> int:
        """Length of a vector."""
        return len(self.names)

    def prompt(self, prompt: PromptText) -> npt.NDArray[np.float32]:
        """Return the vector of a prompt without an answer: float32 [size]."""
        vector = np.zeros(self.size, np.float32)
        start = 2 * self.stages - 1
        tokens = _tokens(prompt)
        vector[start : start + len(_PROMPT_NAMES)] = _prompt_features(prompt, tokens)
        buckets = _hashed(tokens)
        counts = np.bincount(buckets, minlength=HASH_BUCKETS) if buckets else np.zeros(HASH_BUCKETS)
        vector[-HASH_BUCKETS:] = np.sqrt(counts)
        return vector

    def answer(
        self,
        prompt_vector: npt.NDArray[np.float32],
        prompt: PromptText,
        stage: int,
        draft: Draft,
        origin: int | None = None,
        verification: DraftVerification | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the vector of an answer: float32 [size].

        prompt_vector: the result of `prompt`. origin: stage of the draft that was verified; None if the stage
        generated the answer.
        """
        vector = prompt_vector.copy()
        vector[stage] = 1.0
        start = 2 * self.stages - 1 + len(_PROMPT_NAMES)
        vector[start : start + len(_DRAFT_NAMES)] = _draft_features(draft, prompt)
        if origin is not None and verification is not None:
            vector[self.stages + origin] = 1.0
            start += len(_DRAFT_NAMES)
            vector[start : start + len(_VERIFICATION_NAMES)] = _verification_features(verification)
        return vector


def _tokens(prompt: PromptText) -> list[str]:
    text = "\n".join((*prompt.history, prompt.question)) if prompt.history else prompt.question
    # Keep the end: the question itself comes last.
    return _TOKEN.findall(text[-_MOST_CHARACTERS:].lower())


def _prompt_features(prompt: PromptText, tokens: Sequence[str]) -> list[float]:
    length = len(prompt.question)
    question = prompt.question[-_MOST_CHARACTERS:]
    numbers = [token for token in tokens if token.isdigit()]
    words = [token for token in tokens if token.isalpha()]
    longest = max(map(len, numbers), default=0)
    # The number of digits replaces numbers that are too large for a float.
    largest = max((float(number[:300]) for number in numbers), default=0.0)
    return [
        math.log1p(length),
        math.log1p(len(words)),
        math.log1p(len(numbers)),
        longest,
        math.log1p(largest),
        math.log1p(question.count("\n")),
        question.count("?"),
        math.log1p(question.count(".")),
        question.count(")"),
        math.log1p(sum(map(question.count, "+-*/%="))),
        math.log1p(question.count("\n ") + question.count("\t")),
        sum(token in _NEGATIONS for token in words),
        math.log1p(len(question.encode()) - len(question)),
        math.log1p(sum(map(str.isupper, question))),
        len(set(words)) / max(len(words), 1),
        len(prompt.history),
        math.log1p(sum(map(len, prompt.history))),
    ]


def _hashed(tokens: Sequence[str]) -> list[int]:
    """Return the buckets of words and pairs; only the length of a number counts."""
    plain = [f"#{len(token)}" if token.isdigit() else token for token in tokens]
    return [_bucket(gram) for gram in plain] + [
        _bucket(f"{first} {second}") for first, second in itertools.pairwise(plain)
    ]


def _bucket(gram: str) -> int:
    return zlib.crc32(gram.encode()) % HASH_BUCKETS


def _draft_features(draft: Draft, prompt: PromptText) -> list[float]:
    count = len(draft.logprobs)
    # Plain lists are faster than a dozen array operations at some tens of tokens.
    logprobs = [min(max(x, _LEAST_LOGPROB), 0.0) for x in round_signals(draft.logprobs)] or [_LEAST_LOGPROB]
    entropies = round_signals(draft.entropies) or [0.0]
    margins = round_signals(draft.top2_margins) or [0.0]
    text, question = draft.text[-_MOST_CHARACTERS:], prompt.question[-_MOST_CHARACTERS:]
    length = len(logprobs)
    lowest = sorted(logprobs)
    widest = sorted(entropies)
    unsure = bisect.bisect_left(lowest, _LOG_90)
    first_unsure = next((index for index, x in enumerate(logprobs) if x < _LOG_90), length) / length
    equations, false_equations = _check_equations(text)
    return [
        math.log1p(count),
        sum(logprobs),
        sum(logprobs) / length,
        lowest[0],
        lowest[min(1, length - 1)],
        lowest[min(2, length - 1)],
        logprobs[-1],
        min(logprobs[-4:]),
        sum(entropies) / len(entropies),
        widest[-1],
        widest[max(-2, -len(widest))],
        max(entropies[-4:]),
        sum(margins) / len(margins),
        min(margins),
        min(margins[-4:]),
        bisect.bisect_left(lowest, _LOG_50),
        unsure,
        bisect.bisect_left(lowest, _LOG_99),
        first_unsure,
        logprobs.index(lowest[0]) / length,
        draft.finish_reason == "eos",
        draft.finish_reason == "length",
        math.log1p(len(draft.text)),
        _repetition(text),
        equations,
        false_equations,
        _overlap(_NUMBER.findall(text), _NUMBER.findall(question)),
        _overlap(_WORD.findall(text.lower()), _WORD.findall(question.lower())),
        count / (1 + question.count(" ")),
    ]


def round_signals(signals: npt.NDArray[np.float32]) -> list[float]:
    """Return token signals rounded as in outcome files and features: [tokens].

    It computes in float32: in double precision, one value in some thousands would round differently.
    """
    values: list[float] = np.round(signals, _DECIMALS).tolist()
    return values


def _check_equations(text: str) -> tuple[int, int]:
    """Return how many equations of two integers the text holds, and how many of them are false."""
    found = _EQUATION.findall(text)
    return len(found), sum(not _holds(int(a), op, int(b), int(c)) for a, op, b, c in found)


def _holds(left: int, operator: str, right: int, result: int) -> bool:
    match operator:
        case "+":
            return left + right == result
        case "-":
            return left - right == result
        case "/":
            return right != 0 and left / right == result
        case _:
            return left * right == result


def _repetition(text: str) -> float:
    """Return the share of word triples that occurred before in the text: 0 to 1."""
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def _overlap(of: Sequence[str], among: Sequence[str]) -> float:
    """Return the share of distinct items of `of` that are in `among`; 1 if `of` is empty."""
    items = set(of)
    return len(items & set(among)) / len(items) if items else 1.0


def _verification_features(verification: DraftVerification) -> list[float]:
    ranks = verification.ranks
    proposed = len(ranks)
    if proposed == 0:
        return [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rejected = ranks > 0
    rejects = int(np.count_nonzero(rejected))
    first = float(ranks[np.argmax(rejected)]) if rejects else 0.0
    return [
        math.log1p(proposed),
        verification.accepted / proposed,
        verification.accepted == proposed,
        math.log1p(rejects),
        rejects / proposed,
        math.log1p(float(ranks.max())),
        math.log1p(float(ranks.mean())),
        math.log1p(first),
    ]
