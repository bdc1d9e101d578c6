"""Learns what a policy's prompts look like (policy_service/family.py), from the prompts alone."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from policy_service.document import FamilyEntry
from policy_service.family import (
    END,
    FIRST,
    LATER,
    NAME,
    NUMBER,
    Family,
    abstract_text,
    gram_hash,
    grams_of,
    messages,
    split_tokens,
)
from policy_service.features import PromptText
from suites import split

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from policy_service.document import PolicyDocument
    from suites import Split

# Share of prompts like the calibration prompts that may be marked, at most. Chosen.
MARKED = 0.01
# Novelty up to which no prompt is marked, whatever the calibration prompts show. Chosen: where they are all
# made from a few patterns, none has anything new, and one new word would mark a prompt.
LEAST_THRESHOLD = 0.05
# Different words from which on a place between two tokens is taken as open to any word. Chosen: of the
# suites' places, those of verbs have 7, those of things, countries and names 12 and more.
_OPEN = 10
# Share of a word's places that are open from which on it stands for no more than a word. Chosen.
_MOSTLY = 0.5
# Prompts that a word or a run of tokens must be in: what is in one alone says nothing of others.
_LEAST_PROMPTS = 2
# Words and runs of tokens that are kept, the commonest, so that an artifact stays small. Chosen: runs take 4
# bytes each, and the suites have some thousands.
_MOST_GRAMS = 65_536
_MOST_WORDS = 8_192
# What ends a sentence: a capital letter behind it makes no name.
_ENDS = frozenset((*".?!:\n", FIRST, LATER))


def fit_family(fitted: Sequence[PromptText], calibration: Sequence[PromptText]) -> FamilyEntry:
    """Return what prompts look like. calibration: other prompts, to choose the threshold by.

    The threshold is the ceil((1 - MARKED) (n + 1))-th lowest novelty of the n calibration prompts, so a
    prompt that is drawn like them is marked with probability MARKED at most. Source: split conformal
    prediction, Vovk et al. 2005, section 4; Angelopoulos and Bates 2021.
    """
    words = fixed_words(fitted)
    counts: Counter[str] = Counter()
    for prompt in fitted:
        found = (grams_of(start, abstract_text(text, words)) for start, text in messages(prompt))
        counts.update({gram for grams in found for gram in grams})
    kept = [gram for gram, count in counts.most_common(_MOST_GRAMS) if count >= _LEAST_PROMPTS]
    family = Family(words, frozenset(map(gram_hash, kept)), 1.0)
    novelties = sorted(map(family.novelty, calibration))
    rank = math.ceil((1.0 - MARKED) * (len(novelties) + 1))
    # Too few prompts bound nothing: none is marked.
    bound = novelties[rank - 1] if rank <= len(novelties) else 1.0
    # Rounded up: what is stored still bounds.
    threshold = max(math.ceil(bound * 1e5) / 1e5, LEAST_THRESHOLD)
    return FamilyEntry.of(
        Family(words, family.grams, min(threshold, 1.0)), prompts=len(fitted), calibration=len(calibration)
    )


def with_family(
    document: PolicyDocument, fitted: Sequence[PromptText], calibration: Sequence[PromptText]
) -> PolicyDocument:
    """Return a policy that knows what its prompts look like, as another version."""
    family = fit_family(fitted, calibration)
    # The version names the content: the same policy and the same prompts make the same version.
    content = f"{document.policy_version} {family.model_dump_json()}"
    version = hashlib.sha256(content.encode()).hexdigest()[:12]
    return document.model_copy(update={"family": family, "policy_version": version})


def suite_prompts(name: Split, count: int, seed: int) -> list[PromptText]:
    """Return prompts of a split of the suites; one in five is the second turn of a conversation."""
    second_turns = count // 5
    tasks = itertools.chain(
        split(name, count - second_turns, seed), split(name, second_turns, seed, follow_ups=True)
    )
    return [PromptText(task.prompt, tuple(itertools.chain.from_iterable(task.history))) for task in tasks]


def fixed_words(prompts: Iterable[PromptText]) -> frozenset[str]:
    """Return the words that make up patterns: not rare ones, nor those that mostly stand where many may."""
    fillers: dict[tuple[str, str], set[str]] = defaultdict(set)
    places: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    prompt_counts: Counter[str] = Counter()
    for prompt in prompts:
        found = [place for start, text in messages(prompt) for place in _places(start, text)]
        for word, place in found:
            fillers[place].add(word)
            places[word][place] += 1
        prompt_counts.update({word for word, _ in found})
    fixed = []
    for word, count in prompt_counts.most_common(_MOST_WORDS):
        if count < _LEAST_PROMPTS:
            break
        of_word = places[word]
        open_places = sum(number for place, number in of_word.items() if len(fillers[place]) >= _OPEN)
        if open_places < _MOSTLY * of_word.total():
            fixed.append(word)
    return frozenset(fixed)


def _places(start: str, text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each word in lower case with what stands before and behind it, names and numbers abstracted."""
    tokens = split_tokens(text)
    around = [start]
    for token in tokens:
        is_name = token[0].isupper() and len(token) > 1 and around[-1] not in _ENDS
        around.append(NAME if is_name else NUMBER if token[0].isdecimal() else token.lower())
    around.append(END)
    for place, token in enumerate(tokens, 1):
        if token[0].isalpha():
            yield token.lower(), (around[place - 1], around[place + 1])
