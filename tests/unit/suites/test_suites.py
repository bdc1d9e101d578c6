"""The suites ask what they say they ask: answers are recomputed here by other means."""

from __future__ import annotations

import contextlib
import hashlib
import io
import operator
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from suites import LEVELS, SUITES, Task, extract_answer, generate, generate_follow_up, grade, split, split_of
from suites.world import world

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def _sample(suite: str, kind: str | None = None, count: int = 200) -> list[Task]:
    rng = random.Random(11)
    tasks: list[Task] = []
    while len(tasks) < count:
        task = generate(suite, rng.choice(LEVELS), rng)
        if kind in (None, task.kind):
            tasks.append(task)
    return tasks


@pytest.mark.parametrize("suite", SUITES)
def test_every_solution_is_graded_right_and_a_changed_answer_wrong(suite: str) -> None:
    for task in _sample(suite):
        assert grade(task, task.solution)
        assert not grade(task, task.solution + "x")
        assert not grade(task, task.solution.replace("Answer:", "Result:"))


@pytest.mark.parametrize("suite", SUITES)
def test_the_same_seed_gives_the_same_task_and_another_seed_another(suite: str) -> None:
    first, again, other = (generate(suite, 9, random.Random(seed)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_printed_programs_print_the_answer_when_python_runs_them() -> None:
    for task in _sample("code", count=400):
        if task.kind == "complete":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(task.prompt.split("\n", 1)[1], {})
        output = printed.getvalue().strip()
        assert task.answer == ("-".join(output) if task.kind == "string" and not output.isdigit() else output)


def test_exactly_one_sign_completes_a_program() -> None:
    for task in _sample("code", "complete"):
        question, program = task.prompt.split("\n", 1)
        wanted = re.search(r"to print (-?\d+)\?", question)
        assert wanted
        fitting = []
        for sign in "+-*":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program.replace("?", sign), {})
            if printed.getvalue().strip() == wanted[1]:
                fitting.append(sign)
        assert fitting == [task.answer]


def test_worked_steps_of_arithmetic_are_true_equations() -> None:
    for task in _sample("arithmetic"):
        for left, sign, right, result in re.findall(r"(\d+)([+*/-])(\d+)=(\d+)", task.solution):
            assert _OPERATORS[sign](int(left), int(right)) == int(result)


def _follow_story(task: Task) -> int:
    """Read a story sentence by sentence, by rules of its own."""
    person, start, thing = re.match(r"(\w+) has (\d+) (\w+)\.", task.prompt).groups()  # type: ignore[union-attr]
    value = int(start)
    for sentence in task.prompt.split(". ")[1:]:
        words = sentence.split()
        if words[0] != person or "also" in words:
            continue
        if "twice" in words:
            value *= 2
        elif "three" in words:
            value *= 3
        elif "half" in words:
            value //= 2
        elif words[1] in ("buys", "finds", "gets"):
            value += int(words[2])
        elif words[1] in ("gives", "sells", "loses"):
            value -= int(words[3] if words[1] == "gives" else words[2])
    assert task.prompt.endswith(f"How many {thing} does {person} have now?")
    return value


@pytest.mark.parametrize("kind", ["plain", "distractor"])
def test_stories_end_with_the_number_that_reading_them_gives(kind: str) -> None:
    for task in _sample("arithmetic", kind):
        assert _follow_story(task) == int(task.answer)


def test_options_hold_one_fact_of_the_world_and_the_answer_names_it() -> None:
    facts = world()
    for task in _sample("knowledge", "direct"):
        options = dict(re.findall(r"([A-E])\) (.+?)(?= [A-E]\)|$)", task.prompt))
        subject = re.match(
            r"(?:In which country is|On which river does|What is|What was|Where was) "
            r"(.+?)(?: lie| known for| born)?\?",
            task.prompt,
        )
        assert subject
        tables = (
            facts.country_of, facts.river_of, facts.craft_of, facts.birthplace_of, facts.profession_of
        )  # fmt: skip
        values = {table[subject[1]] for table in tables if subject[1] in table}
        assert options[task.answer] in values
        assert sum(option in values for option in options.values()) == 1


def test_claims_about_lists_hold_when_their_numbers_say_so() -> None:
    for task in _sample("claims", "every"):
        numbers = [int(n) for n in re.findall(r"\d+", task.prompt)]
        wanted = 0 if "even" in task.prompt else 1
        assert task.answer == str(all(n % 2 == wanted for n in numbers)).lower()


def test_double_negations_follow_pythons_logic() -> None:
    for task in _sample("claims", "double_negated"):
        checked = re.search(r": (true|false)\.", task.solution)
        assert checked
        value = checked[1] == "true"
        for _ in range(len(re.findall(r"\bnot true\b|\bis false\b|\bnot false\b", task.prompt))):
            value = not value
        flips = (
            task.prompt.count("is false") + task.prompt.count("not true") + 2 * task.prompt.count("not false")
        )
        expected = (checked[1] == "true") ^ bool(flips % 2)
        assert task.answer == str(expected).lower()


@pytest.mark.parametrize("suite", SUITES)
def test_higher_levels_take_longer_solutions(suite: str) -> None:
    def mean_length(level: int) -> float:
        rng = random.Random(2)
        return sum(len(generate(suite, level, rng).solution) for _ in range(300)) / 300

    assert mean_length(1) < mean_length(8) < mean_length(15)


@pytest.mark.parametrize("suite", SUITES)
def test_follow_ups_carry_the_first_turn_and_are_graded(suite: str) -> None:
    rng = random.Random(3)
    for _ in range(50):
        task = generate_follow_up(suite, 8, rng)
        ((question, reply),) = task.history
        assert question
        assert extract_answer(reply) is not None
        assert grade(task, task.solution)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("7+5=12. Answer: 12", True),
        ("Answer: 12.", True),
        ("answer: 12", False),
        ("Answer: 11. No. Answer: 12", True),
        ("Answer: 12. No. Answer: 11", False),
        ("12", False),
        ("", False),
    ],
)
def test_only_the_last_answer_line_counts(text: str, is_right: bool) -> None:
    task = Task("arithmetic", 1, "plain", "?", "Answer: 12", "12")
    assert grade(task, text) is is_right


def test_letter_case_does_not_count() -> None:
    task = Task("claims", 1, "plain", "?", "Answer: true", "true")
    assert grade(task, "Answer: True")


def test_splits_are_disjoint_even_between_seeds() -> None:
    taken = [{t.prompt for t in split(name, 600)} for name in ("train", "calibration", "evaluation", "demo")]
    taken.append({t.prompt for t in split("models", 600, seed=9)})
    assert sum(map(len, taken)) == 3000
    assert len(set().union(*taken)) == 3000


def test_split_ignores_letter_case_and_blanks_but_not_history() -> None:
    task = next(split("evaluation", 1))
    assert split_of(replace(task, prompt=f"  {task.prompt.upper()}\n")) == "evaluation"
    homes = {split_of(replace(task, history=((str(n), "Answer: 1"),))) for n in range(300)}
    assert len(homes) > 1


def test_conversations_of_a_split_are_its_own() -> None:
    tasks = list(split("calibration", 300, follow_ups=True))
    assert all(task.history and split_of(task) == "calibration" for task in tasks)
    assert len({(task.history, task.prompt) for task in tasks}) == 300


def test_a_split_covers_all_suites_and_levels_evenly() -> None:
    counts = Counter((task.suite, task.level) for task in split("demo", 120))
    assert set(counts.values()) == {2}
    assert len(counts) == len(SUITES) * len(LEVELS)


def test_a_split_is_the_same_in_another_process() -> None:
    program = "from suites import split; print(*(t.prompt for t in split('demo', 40)), sep='\\x00')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.rstrip("\n").split("\0") == [task.prompt for task in split("demo", 40)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate("poetry", 1, random.Random(0)), "unknown suite 'poetry': choose one of arithmetic"),
        (lambda: generate("code", 16, random.Random(0)), "level 16 is not in 1..15"),
        (lambda: generate_follow_up("code", 0, random.Random(0)), "level 0 is not in 1..15"),
        (lambda: next(split("test", 1)), "unknown split 'test': choose one of models"),  # type: ignore[arg-type]
    ],
)
def test_wrong_names_are_refused_with_the_choices(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_world_is_the_one_that_the_models_learnt() -> None:
    facts = world()
    text = repr([sorted(getattr(facts, name).items()) for name in vars(facts) if name.endswith("_of")])
    # Changes only when the models are trained anew: their knowledge is of this world.
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2721ca66fb50c878"
