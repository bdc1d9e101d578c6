"""Costs and latencies of a cascade's stages, read from YAML for fitting and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from asd.transport.files import DamagedFile, read_content
from asd.visible import OneLineError
from services.common.documents import MOST_YAML_BYTES, parse_yaml
from services.common.settings import Section

if TYPE_CHECKING:
    from policy_service.train.outcomes import StageOutcome, VerificationOutcome

# Chosen: as in policy.json.
_MOST = 1e12
Amount = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False)]

EMBEDDED = Path(__file__).with_name("embedded.yaml")


class UnfitCosts(OneLineError):  # noqa: N818 - an error is named by its cause
    """The file of costs cannot be used; the message says why."""


class StageCosts(Section):
    """One stage. cost: of a whole answer, in cost units. Times are used if outcomes have no latency_ms.

    prefill_ms: of a prompt. score_token_ms: of each further token of a draft in the same pass. token_ms: of
    each token written.
    """

    name: str
    cost: Annotated[float, Field(gt=0, le=_MOST, allow_inf_nan=False)]
    prefill_ms: Amount = 0.0
    score_token_ms: Amount = 0.0
    token_ms: Amount = 0.0

    def generate_ms(self, outcome: StageOutcome) -> float:
        """Return the latency of generating an answer."""
        if outcome.latency_ms is not None:
            return outcome.latency_ms
        return self.prefill_ms + self.token_ms * len(outcome.logprobs)

    def verify_ms(self, outcome: VerificationOutcome) -> float:
        """Return the latency of verifying a draft and continuing it."""
        if outcome.latency_ms is not None:
            return outcome.latency_ms
        further = max(outcome.forward_passes - 1, 0)
        return (
            self.prefill_ms
            + self.score_token_ms * (outcome.proposed + outcome.proposed_again)
            + self.token_ms * further
        )


class CascadeCosts(Section):
    """The stages of a cascade, in order."""

    stages: Annotated[tuple[StageCosts, ...], Field(min_length=1)]


def read_costs(path: Path) -> tuple[StageCosts, ...]:
    """Return the stages that a file describes, in order. Raises UnfitCosts."""
    try:
        content = parse_yaml(read_content(path, MOST_YAML_BYTES, is_pipe_fine=True), str(path))
        return CascadeCosts.model_validate(content).stages
    except OSError as error:
        raise UnfitCosts(f"{path}: {error.strerror}") from error
    except DamagedFile as error:
        raise UnfitCosts(error.message) from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        said = problem["msg"].removeprefix("Value error, ")
        raise UnfitCosts(f"{path}: {'.'.join(map(str, problem['loc']))}: {said}") from error
