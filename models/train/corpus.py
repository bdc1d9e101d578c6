"""Training data: worked solutions, generated and encoded on every core."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from models.train.family import ASSISTANT, END, MODELS, USER, Vocabulary
from suites import LEVELS, SUITES, Split, Task, generate, generate_follow_up, split, split_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Share of the samples that are second turns of a conversation.
_FOLLOW_UPS = 0.06
_CHUNK = 20_000


@dataclass(frozen=True)
class Corpus:
    """Encoded conversations, one after the other.

    tokens: uint16 [all tokens]. starts: int64 [samples + 1]. answers: int32 [samples], the place in each
    sample where the last answer begins. taught: bool [samples, models], in the order of MODELS.
    """

    tokens: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int32]
    taught: npt.NDArray[np.bool_]


def conversation(task: Task, vocabulary: Vocabulary) -> tuple[str, str]:
    """Return the text before the answer and the answer with its end mark, as the chat template has them."""
    user, assistant = f"{USER}{vocabulary.after_role}", f"{ASSISTANT}{vocabulary.after_role}"
    before = "".join(f"{user}{question}{assistant}{reply}{END}" for question, reply in task.history)
    return f"{before}{user}{task.prompt}{assistant}", f"{task.solution}{END}"


def build_corpus(tokenizer: Tokenizer, vocabulary: Vocabulary, samples: int, seed: int = 0) -> Corpus:
    """Generate and encode `samples` tasks of the split `models`, on every core."""
    counts = [min(_CHUNK, samples - start) for start in range(0, samples, _CHUNK)]
    description = tokenizer.to_str()
    jobs = [(description, vocabulary, count, f"corpus/{seed}/{index}") for index, count in enumerate(counts)]
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = []
        for part in pool.map(_encode_chunk, jobs):
            parts.append(part)
            print(f"\rcorpus: {len(parts)} of {len(jobs)} parts", end="", flush=True)
    print()
    lengths = np.concatenate([lengths for _, lengths, _, _ in parts])
    return Corpus(
        tokens=np.concatenate([tokens for tokens, _, _, _ in parts]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        answers=np.concatenate([answers for _, _, answers, _ in parts]),
        taught=np.concatenate([taught for _, _, _, taught in parts]),
    )


def save_corpus(corpus: Corpus, path: Path) -> None:
    """Write a corpus to an uncompressed .npz file."""
    np.savez(path, tokens=corpus.tokens, starts=corpus.starts, answers=corpus.answers, taught=corpus.taught)


def load_corpus(path: Path) -> Corpus:
    """Read what `save_corpus` wrote."""
    with np.load(path) as arrays:
        return Corpus(**{name: arrays[name] for name in ("tokens", "starts", "answers", "taught")})


def _encode_chunk(
    job: tuple[str, Vocabulary, int, str],
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    description, vocabulary, count, seed = job
    tokenizer = Tokenizer.from_str(description)
    tasks = list(itertools.islice(_tasks(random.Random(seed)), count))
    pairs = [conversation(task, vocabulary) for task in tasks]
    before = [encoding.ids for encoding in tokenizer.encode_batch([text for text, _ in pairs])]
    after = [encoding.ids for encoding in tokenizer.encode_batch([text for _, text in pairs])]
    samples = [b + a for b, a in zip(before, after, strict=True)]
    return (
        np.fromiter(itertools.chain.from_iterable(samples), np.uint16),
        np.array([len(sample) for sample in samples], np.int64),
        np.array([len(b) for b in before], np.int32),
        np.array([[recipe.curriculum.teaches(task) for recipe in MODELS] for task in tasks]),
    )


def draw_tasks(split_name: Split, prompts: int, conversations: int, share: float) -> list[Task]:
    """Return a share of so many single questions and second turns of a split, for outcomes."""
    tasks = list(split(split_name, round(prompts * share)))
    return [*tasks, *split(split_name, round(conversations * share), follow_ups=True)]


def _tasks(rng: random.Random) -> Iterator[Task]:
    while True:
        maker = generate_follow_up if rng.random() < _FOLLOW_UPS else generate
        task = maker(rng.choice(SUITES), rng.choice(LEVELS), rng)
        if split_of(task) == "models":
            yield task
