"""What documentation shows works: the cascades of docs/examples, and programs in Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.local import cascade_file
from services.local.cascade_file import CascadeFile, Ports, services_of
from services.router.settings import RouterSettings
from services.stage.settings import StageSettings

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yaml"))
# Without what `make` leaves in build, such as the libraries of `make clients`.
TEXTS = sorted([*ROOT.glob("*.md"), *(set(ROOT.glob("[!.]*/**/*.md")) - set(ROOT.glob("build/**/*.md")))])


def python_in(text: Path) -> list[str]:
    """Return the examples in Python of a text."""
    return re.findall(r"^```python\n(.*?)^```$", text.read_text(), re.MULTILINE | re.DOTALL)


def test_examples_in_python_are_programs() -> None:
    examples = {text: python_in(text) for text in TEXTS}
    assert examples[ROOT / "README.md"]
    for text, codes in examples.items():
        for code in codes:
            compile(code, str(text), "exec")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_cascade(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The models are not here.
    monkeypatch.setattr(cascade_file.Path, "is_file", lambda _: True)
    cascade = cascade_file.read_cascade(file)
    router, *stages = services_of(cascade, Ports.from_base(7000, len(cascade.stages)), tmp_path)
    assert RouterSettings(**router.config).static_plan == cascade.static_plan
    for index, (service, stage) in enumerate(zip(stages, cascade.stages, strict=True)):
        (model,) = StageSettings(**service.config).models
        assert (model.engine, model.max_batch, model.path) == ("vllm", 64, stage.path)
        assert stage.vllm is not None
        assert model.vllm is not None
        assert model.vllm.model_dump() == stage.vllm.model_dump() | {"verify_inside": index > 0}
        # What `asd models pull OWNER/NAME --to /models` makes of it.
        assert f"{stage.path.name}" in file.read_text().partition("stages:")[0]


def test_adapters_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    file = tmp_path / "cascade.yaml"
    file.write_text(
        "stages: [{name: a, path: m, cost: 1, engine: vllm, vllm: {lora: {math: adapters/math}}}]"
    )
    assert isinstance(CascadeFile.load(file), CascadeFile)
    (_, stage) = services_of(cascade_file.read_cascade(file), Ports.from_base(7000, 1), tmp_path)
    assert stage.config["models"][0]["vllm"]["lora"] == {"math": str(tmp_path / "adapters" / "math")}
