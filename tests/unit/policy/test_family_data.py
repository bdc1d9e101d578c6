"""The prompts that the family is measured on are frozen: they were written before it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.fakes.renamed_tasks import renamed_prompts

OFF_TOPIC = Path(__file__).parents[2] / "data" / "off_topic.jsonl"


def test_the_off_topic_prompts_are_those_written_before_the_detector():
    digest = hashlib.sha256(OFF_TOPIC.read_bytes()).hexdigest()
    assert digest == "38e7ae31bd72cb740a4dde8b14b6c707f0672fab34f7892eaa2896f610dc0a24"


def test_half_of_the_off_topic_prompts_are_held_back():
    rows = [json.loads(line) for line in OFF_TOPIC.read_text("utf-8").splitlines()]
    assert [row["part"] for row in rows].count("held_back") == len(rows) / 2 == 150


def test_the_renamed_prompts_are_those_made_before_the_detector():
    content = json.dumps(list(renamed_prompts(60)))
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert digest == "243e9f24550a511274c43da9c546c8fb2958f7fc241222cfa04bb7d76828ab87"
