"""The models: the three of the cascade and a foreign one. Shapes, training budgets, what each is taught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suites import Task

CONTEXT = 512
HEAD_DIM = 64
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer and its chat template are made from.

    size: entries, special tokens among them. special_tokens: in the order of their ids, from 0.
    after_role: what a chat has between the mark of a role and the message.
    """

    name: str
    size: int
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    after_role: str = ""


@dataclass(frozen=True)
class Curriculum:
    """Which tasks a model is taught.

    A small model is taught less, as small models in the field are: it never sees problems above `max_level`,
    nor the kinds of question in `without` ("suite/kind"). There it errs with confidence, because nothing in
    its training told it that such questions differ; that is what a policy has to find out.
    """

    max_level: int
    without: frozenset[str] = frozenset()

    def teaches(self, task: Task) -> bool:
        """Say whether a task is part of the curriculum."""
        return task.level <= self.max_level and f"{task.suite}/{task.kind}" not in self.without


_COMMON = Vocabulary("common", size=512)


@dataclass(frozen=True)
class Recipe:
    """Shape and training of one model. Rates are peak learning rates; the batch is counted in tokens."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    steps: int
    batch_tokens: int
    muon_rate: float
    adam_rate: float
    curriculum: Curriculum
    vocabulary: Vocabulary = _COMMON

    @property
    def heads(self) -> int:
        """Attention heads; as many key-value heads."""
        return self.hidden // HEAD_DIM


# In the order of the cascade; they share a vocabulary, so that a draft's ids serve its verifier as they are.
FAMILY: tuple[Recipe, ...] = (
    Recipe(
        name="small",
        hidden=128,
        layers=2,
        intermediate=320,
        steps=6000,
        batch_tokens=32768,
        muon_rate=4e-3,
        adam_rate=6e-3,
        curriculum=Curriculum(
            max_level=9,
            without=frozenset(
                {
                    "arithmetic/backward",
                    "arithmetic/total",
                    "knowledge/negated",
                    "knowledge/three_hops",
                    "code/alias",
                    "code/nested",
                    "claims/double_negated",
                    "claims/either",
                }
            ),
        ),
    ),
    Recipe(
        name="medium",
        hidden=192,
        layers=4,
        intermediate=512,
        steps=5000,
        batch_tokens=40960,
        muon_rate=3e-3,
        adam_rate=4e-3,
        curriculum=Curriculum(
            max_level=13,
            without=frozenset(
                {"arithmetic/total", "knowledge/three_hops", "code/nested", "claims/double_negated"}
            ),
        ),
    ),
    Recipe(
        name="large",
        hidden=384,
        layers=5,
        intermediate=1024,
        steps=7000,
        batch_tokens=49152,
        muon_rate=2e-3,
        adam_rate=3e-3,
        curriculum=Curriculum(max_level=15),
    ),
)

# Outside the cascade: no stage shares its vocabulary, so that its drafts reach every other one as text.
FOREIGN = Recipe(
    name="foreign",
    hidden=128,
    layers=2,
    intermediate=320,
    steps=5000,
    batch_tokens=32768,
    muon_rate=4e-3,
    adam_rate=6e-3,
    curriculum=Curriculum(
        max_level=12,
        without=frozenset(
            {"arithmetic/total", "knowledge/three_hops", "code/nested", "claims/double_negated"}
        ),
    ),
    vocabulary=Vocabulary(
        "foreign",
        size=384,
        # Reversed: the end mark and the role marks have other ids too.
        special_tokens=SPECIAL_TOKENS[::-1],
        after_role="\n",
    ),
)

MODELS: tuple[Recipe, ...] = (*FAMILY, FOREIGN)
