"""Numbers in settings are numbers: Python, and so pydantic, would take true for 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from policy_service.settings import PolicySettings
from policy_service.train.costs import CascadeCosts, UnfitCosts, read_costs
from services.common.settings import Section, SettingsError
from services.local.cascade_file import CascadeFile
from services.router.settings import RouterSettings, SpeculationSettings
from services.scaler.settings import ScalerSettings
from services.stage.engines.settings import VllmSettings
from services.stage.settings import StageSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic import BaseModel

DOCUMENTS = (PolicySettings, CascadeFile, ScalerSettings, RouterSettings, StageSettings, CascadeCosts)


class Rates(Section):
    """Numbers within others."""

    by_name: dict[str, tuple[float, ...]]
    either: bool | int = 0


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a model, and those in its fields."""
    yield model
    waiting: list[Any] = [field.annotation for field in model.model_fields.values()]
    while waiting:
        each = waiting.pop()
        waiting.extend(getattr(each, "__args__", ()))
        if isinstance(each, type) and hasattr(each, "model_fields"):
            yield from _sections(each)


SECTIONS = {each for top in DOCUMENTS for each in _sections(top)} - {SpeculationSettings}  # Only switches.


@pytest.mark.parametrize("model", sorted(SECTIONS, key=repr))
def test_true_is_taken_by_no_setting_that_is_not_a_switch(model: type[BaseModel]) -> None:
    others = [name for name, field in model.model_fields.items() if "bool" not in str(field.annotation)]
    for wrong in (True, False, [True]):
        with pytest.raises(ValidationError) as caught:
            model.model_validate(dict.fromkeys(others, wrong))
        assert {problem["loc"][0] for problem in caught.value.errors()} == set(others)


def test_numbers_in_lists_are_checked_and_switches_are_left_alone() -> None:
    assert Rates.model_validate({"by_name": {"a": [1, 2.5]}, "either": True}).either is True
    with pytest.raises(ValidationError, match=r"by_name\s+.*not true"):
        Rates.model_validate({"by_name": {"a": [1, True]}})
    assert VllmSettings.model_validate({"prefix_caching": False}).prefix_caching is False


def test_a_refusal_names_file_and_entry_and_variables_are_numbers_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text("models: [{name: m, path: /m, threads: yes}]\n")
    with pytest.raises(SettingsError) as caught:
        StageSettings.load(file)
    assert f"{file}: models.0.threads: must be a number, not true" in str(caught.value)
    file.write_text("models: [{name: m, path: /m}]\n")
    monkeypatch.setenv("ASD_STAGE_MAX_QUEUE", "7")
    assert StageSettings.load(file).max_queue == 7


def test_costs_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "costs.yaml"
    file.write_text("stages: [{name: a, cost: true}]\n")
    with pytest.raises(UnfitCosts) as caught:
        read_costs(file)
    assert str(caught.value).startswith(f"{file}: stages.0.cost: ")
