"""The error of a request that no stage has answered. No gRPC, no protobuf."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asd.errors import AsdError, BudgetSpent, ModelRefusal, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.router.domain import Stage


def failure_of_all(stages: Sequence[Stage], failed: Mapping[int, AsdError]) -> AsdError:
    """Return the one error for a request that every stage has failed or refused.

    The request is at fault only if every stage says so. failed: by index; at least one.
    """
    errors = list(failed.values())
    if len(errors) == 1:
        return errors[0]
    refusals = [error for error in errors if isinstance(error, ModelRefusal)]
    counted = [error for error in errors if error not in refusals] or errors
    kinds = {type(error) for error in counted}
    kind: type[AsdError] = AsdError
    if len(kinds) == 1:
        kind = kinds.pop()
    elif all(isinstance(error, ModelRefusal) for error in counted):
        kind = ModelRefusal
    elif any(isinstance(error, Unavailable | BudgetSpent | ResourceExhausted) for error in counted):
        kind = Unavailable
    # Refusals do not name the stage: a single one is about the caller's own input.
    texts = [
        f"stage {stages[index].name}: {error.message}" if error in refusals else error.message
        for index, error in failed.items()
    ]
    texts = list(dict.fromkeys(texts))
    fields = {error.field for error in counted}
    return kind("; ".join(texts), field=fields.pop() if len(fields) == 1 else "")
