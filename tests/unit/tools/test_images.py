"""What is read of the Dockerfile and said of images, without building one."""

from __future__ import annotations

import re

import pytest

from tools.images import build
from tools.images.build import ImageError, base_name, megabytes

DOCKERFILE = build.DOCKERFILE.read_text(encoding="utf-8")


def test_every_target_on_the_base_is_built() -> None:
    assert tuple(re.findall(r"^FROM base AS (\S+)$", DOCKERFILE, re.MULTILINE)) == build.TARGETS


def test_the_base_is_made_under_the_name_that_the_dockerfile_gives_it() -> None:
    assert (
        base_name("ARG OTHER=a\nARG PYTHON_IMAGE=example.org/python:3-slim\n") == "example.org/python:3-slim"
    )
    assert re.fullmatch(r"\S+/python:3\.\d+\.\d+-slim-[a-z]+", base_name(DOCKERFILE))


def test_a_dockerfile_without_a_base_is_refused() -> None:
    with pytest.raises(ImageError, match="PYTHON_IMAGE"):
        base_name("FROM python:3.11\n")


@pytest.mark.parametrize(("text", "size"), [("352 MB", 352.0), ("1.02 GB", 1020.0), ("768 kB", 0.768)])
def test_a_size_is_read(text: str, size: float) -> None:
    assert megabytes(text) == pytest.approx(size)
