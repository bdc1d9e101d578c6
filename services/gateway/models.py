"""Models of the gateway: objectives under a model's name, and the cascade's stages. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asd.errors import NotFound, PreconditionFailed
from asd.values import Preference, Request
from services.gateway.request import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asd.values import Description, Message, Sampling
    from services.gateway.objective import Options
    from services.gateway.request import Call

BALANCED, FASTEST, BEST, EXACT = "asd", "asd-fastest", "asd-best", "asd-exact"
# Virtual models, and what they are.
VIRTUAL = {
    BALANCED: "a fair value of quality",
    FASTEST: "low cost and latency first",
    BEST: "quality first",
    EXACT: "the last stage's own answer: each stage drafts, the next one verifies",
}
# Anthropic's bound on entries of a page.
MOST_LISTED = 1000
_PREFERENCES = {FASTEST: Preference.FASTEST, BEST: Preference.BEST}


@dataclass(frozen=True)
class Route:
    """Which stages answer. Without `stage` and `chain`, the policy decides."""

    preference: Preference | None = None
    stage: str = ""
    chain: tuple[str, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether the policy has no say."""
        return bool(self.stage or self.chain)

    def request(
        self, turns: str | tuple[Message, ...], sampling: Sampling, options: Options, prediction: str = ""
    ) -> Request:
        """Return the cascade's request."""
        return Request(
            turns,
            sampling,
            options.objective,
            stage=self.stage,
            chain=self.chain,
            task=options.task,
            session_id=options.session_id,
            prediction=prediction,
            allow_switch=options.allow_switch,
        )


class Models:
    """The models of a cascade. stages: names of its stages, in order. contexts: their lengths, 0 if unknown.

    Raises PreconditionFailed if a stage has the name of a virtual model.
    """

    def __init__(self, stages: Sequence[str], contexts: Sequence[int] = ()) -> None:
        self.stages = tuple(stages)
        self._contexts = dict(zip(stages, contexts, strict=False))
        taken = [name for name in self.stages if name in VIRTUAL]
        if taken:
            raise PreconditionFailed(
                f"the cascade has a stage named {taken[0]}, which is the name of a virtual model "
                f"({', '.join(VIRTUAL)}): rename the stage"
            )

    def __contains__(self, model: object) -> bool:
        return isinstance(model, str) and (model in VIRTUAL or model in self.stages)

    def route(self, model: str) -> Route:
        """Return the stages of a model. Raises NotFound if there is no such model."""
        if model in self.stages:
            return Route(stage=model)
        if model not in VIRTUAL:
            raise NotFound(
                f"model: there is no model {model!r}: GET /v1/models lists those that there are",
                field="model",
            )
        if model != EXACT:
            return Route(preference=_PREFERENCES.get(model))
        # A chain has two stages or more.
        return Route(chain=self.stages) if len(self.stages) > 1 else Route(stage=self.stages[0])

    def check_length(self, call: Call) -> None:
        """Raise InvalidRequest for a call of more tokens than any stage that may answer has room for."""
        request = call.requests[0]
        may_answer = [request.stage] if request.stage else request.chain[-1:] or self.stages
        lengths = [self._contexts.get(name, 0) for name in may_answer]
        tokens = request.sampling.max_new_tokens
        if tokens is not None and all(lengths) and tokens > max(lengths):
            name = call.fields["sampling.max_new_tokens"]
            raise invalid(name, f"must be 1 to {max(lengths)}, the context of the model")


def listed(description: Description, created: int) -> list[dict[str, Any]]:
    """Return the entries of /v1/models, with the fields of both APIs. created: seconds since 1970."""
    virtual = [_entry(name, name, created, {"description": text}) for name, text in VIRTUAL.items()]
    stages = [
        _entry(
            each.stage,
            each.model or each.stage,
            created,
            {
                "stage_index": each.stage_index,
                "model": each.model,
                "engine": each.engine,
                "context_length": each.context_length,
                "cost": each.cost,
                "available": each.available,
                "adapters": list(each.adapters),
                "constrains": each.constrains,
                "takes_tools": each.takes_tools,
                "most_top_logprobs": each.most_top_logprobs,
            },
        )
        for each in description.stages
    ]
    return virtual + stages


def page(entries: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of /v1/models, which both APIs' clients read.

    query: Anthropic's limit, after_id and before_id. Raises InvalidRequest, naming the parameter.
    """
    ids = [each["id"] for each in entries]
    after, before = (_place(ids, query, name) for name in ("after_id", "before_id"))
    limit = query.get("limit", str(len(ids)))
    if not re.fullmatch("[0-9]{1,4}", limit) or not 1 <= int(limit) <= MOST_LISTED:
        raise invalid("limit", f"must be 1 to {MOST_LISTED}")
    start, end = (0 if after is None else after + 1), (len(ids) if before is None else before)
    # Before an id, those that are next to it.
    is_backwards = before is not None and after is None
    shown = entries[start:end][-int(limit) :] if is_backwards else entries[start:end][: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "has_more": len(shown) < len(entries[start:end]),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def _place(ids: Sequence[str], query: Mapping[str, str], name: str) -> int | None:
    """Return the place of a model that a parameter names; None if there is no parameter."""
    if name not in query:
        return None
    if query[name] not in ids:
        raise invalid(name, f"there is no model {query[name]!r}")
    return ids.index(query[name])


def _entry(name: str, shown: str, created: int, about: dict[str, Any]) -> dict[str, Any]:
    from datetime import UTC, datetime

    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "asd",
        "type": "model",
        "display_name": shown,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z"),
        "asd": about,
    }
