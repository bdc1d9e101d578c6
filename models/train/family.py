"""The three models of the family: shapes, training budgets and what each one is taught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suites import Task

VOCABULARY = 512
CONTEXT = 512
HEAD_DIM = 64


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

    @property
    def heads(self) -> int:
        """Attention heads; as many key-value heads."""
        return self.hidden // HEAD_DIM


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
