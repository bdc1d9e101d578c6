"""Graded task suites: generators and checkers. Pure Python: no model, no service.

>>> import random
>>> task = generate("arithmetic", 3, random.Random(1))
>>> grade(task, task.solution)
True
"""

from suites.splits import SUITES, Split, generate, generate_follow_up, split, split_of
from suites.task import LEVELS, Task, extract_answer, grade

__all__ = [
    "LEVELS",
    "SUITES",
    "Split",
    "Task",
    "extract_answer",
    "generate",
    "generate_follow_up",
    "grade",
    "split",
    "split_of",
]
