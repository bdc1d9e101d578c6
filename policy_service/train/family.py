"""Learns the patterns of a policy's prompts (policy_service/family.py), from the prompts alone."""

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

# Largest share of prompts like the calibration prompts that may be marked. Chosen.
MARKED = 0.01
# Smallest threshold. Chosen: if all calibration prompts are made from a few patterns, none of them has any
# novelty, and a single new word would mark a prompt.
LEAST_THRESHOLD = 0.05
# Number of different words from which a position between two tokens counts as open to any word. Chosen: in
# the suites, positions of verbs have 7, those of things, countries and names 12 and more.
_OPEN = 10
# Share of open positions among a word's positions from which it is not a fixed word. Chosen.
_MOSTLY = 0.5
# Fewest prompts with a word or an n-gram: one prompt alone says nothing about other prompts.
_LEAST_PROMPTS = 2
# Most words and n-grams in an artifact; the commonest are kept. Chosen: an n-gram takes 4 bytes, and the
# suites have some thousands.
_MOST_GRAMS = 65_536
_MOST_WORDS = 8_192
# Ends of sentences: a capital letter after one does not make a name.
_ENDS = frozenset((*".?!:\n", FIRST, LATER))


def fit_family(fitted: Sequence[PromptText], calibration: Sequence[PromptText]) -> FamilyEntry:
    """Return the family of prompts. calibration: other prompts, which set the threshold.

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
    # With too few prompts there is no bound, and no prompt is marked.
    bound = novelties[rank - 1] if rank <= len(novelties) else 1.0
    # Rounding up keeps the bound.
    threshold = max(math.ceil(bound * 1e5) / 1e5, LEAST_THRESHOLD)
    return FamilyEntry.of(
        Family(words, family.grams, min(threshold, 1.0)), prompts=len(fitted), calibration=len(calibration)
    )


def with_family(
    document: PolicyDocument, fitted: Sequence[PromptText], calibration: Sequence[PromptText]
) -> PolicyDocument:
    """Return the policy with the family of its prompts, as another version."""
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
    """Return the fixed words of patterns: neither rare ones, nor those mostly in open positions."""
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
    """Yield each word in lower case with the tokens before and after it, abstracted if names or numbers."""
    tokens = split_tokens(text)
    around = [start]
    for token in tokens:
        is_name = token[0].isupper() and len(token) > 1 and around[-1] not in _ENDS
        around.append(NAME if is_name else NUMBER if token[0].isdecimal() else token.lower())
    around.append(END)
    for place, token in enumerate(tokens, 1):
        if token[0].isalpha():
            yield token.lower(), (around[place - 1], around[place + 1])
