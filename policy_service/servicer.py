"""PolicyService: proto to domain types and back."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from asd.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from policy_service.features import Draft, PromptText, Verification
from policy_service.policy import (
    Condition,
    Objective,
    Preference,
    Reason,
    Spent,
    UnmeetableBudget,
)
from policy_service.reports import OutcomeReport
from services.common.errors import InvalidRequest, NotFound, PreconditionFailed
from services.common.validation import check_enum, check_input, check_objective
from services.common.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import grpc
    import numpy.typing as npt

    from policy_service.artifact import PolicyDocument
    from policy_service.features import FinishReason
    from policy_service.policy import Estimate, Policy
    from policy_service.reports import ReportLog

_PREFERENCES = {
    common_pb2.PREFERENCE_FASTEST: Preference.FASTEST,
    common_pb2.PREFERENCE_BALANCED: Preference.BALANCED,
    common_pb2.PREFERENCE_BEST: Preference.BEST,
}
_FINISH: dict[int, FinishReason] = {
    common_pb2.FINISH_REASON_EOS: "eos",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_STOP: "stop",
}
_FINISH_REASONS = frozenset(common_pb2.FinishReason.values())
_REASONS = {
    Reason.VALUE: policy_pb2.DECISION_REASON_VALUE,
    Reason.LAST_STAGE: policy_pb2.DECISION_REASON_LAST_STAGE,
    Reason.MAX_COST: policy_pb2.DECISION_REASON_MAX_COST,
    Reason.MAX_LATENCY: policy_pb2.DECISION_REASON_MAX_LATENCY,
    Reason.MIN_QUALITY: policy_pb2.DECISION_REASON_MIN_QUALITY,
}
MAX_REQUEST_ID_BYTES = 256


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Serves one policy. reports: None where the service keeps none."""

    def __init__(self, policy: Policy, document: PolicyDocument, reports: ReportLog | None) -> None:
        self._policy = policy
        self._document = document
        self._reports = reports
        self._names = [stage.name for stage in policy.stages]
        self._places = {name: place for place, name in enumerate(self._names)}

    async def Plan(  # noqa: N802
        self,
        request: policy_pb2.PlanRequest,
        context: grpc.aio.ServicerContext[policy_pb2.PlanRequest, policy_pb2.PlanResponse],
    ) -> policy_pb2.PlanResponse:
        """Choose the first stage."""
        check_input(request)
        self._check_cascade(request.cascade)
        objective = _objective(request.objective)
        try:
            plan = self._policy.plan(_prompt(request), objective, self._conditions(request.conditions))
        except UnmeetableBudget as error:
            raise InvalidRequest(str(error), field="objective.max_cost") from error
        return policy_pb2.PlanResponse(
            first_stage=self._names[plan.first_stage],
            estimates=self._estimates(plan.estimates),
            p_escalate=plan.p_escalate,
            likely_next_stage="" if plan.likely_next is None else self._names[plan.likely_next],
            abandon=[
                policy_pb2.AbandonRule(tokens=rule.tokens, mean_logprob=rule.mean_logprob)
                for rule in plan.abandon
            ],
            abandon_stage="" if plan.abandon_to is None else self._names[plan.abandon_to],
            policy_version=self._policy.version,
        )

    async def Decide(  # noqa: N802
        self,
        request: policy_pb2.DecideRequest,
        context: grpc.aio.ServicerContext[policy_pb2.DecideRequest, policy_pb2.DecideResponse],
    ) -> policy_pb2.DecideResponse:
        """Decide on an answer."""
        check_input(request)
        self._check_cascade(request.cascade)
        objective = _objective(request.objective)
        stage = self._place(request.stage, "stage")
        if not request.HasField("draft"):
            raise InvalidRequest("draft is required: send the answer to be judged", field="draft")
        draft = _draft(request.draft)
        origin, verification = self._verification(request, stage)
        spent = Spent(_spent(request.spent_cost, "spent_cost"), _spent(request.spent_ms, "spent_ms"))
        conditions = self._conditions(request.conditions)
        started = time.perf_counter()
        decision = self._policy.decide(
            _prompt(request), stage, draft, origin, verification, objective, spent, conditions
        )
        predict_us = (time.perf_counter() - started) * 1e6
        stops = decision.next_stage is None
        return policy_pb2.DecideResponse(
            action=policy_pb2.DECISION_ACTION_STOP if stops else policy_pb2.DECISION_ACTION_ESCALATE,
            next_stage="" if decision.next_stage is None else self._names[decision.next_stage],
            reason=_REASONS[decision.reason],
            p_correct=decision.p_correct,
            p_correct_stderr=decision.stderr,
            stop_value=decision.stop_value,
            escalate_value=decision.escalate_value,
            estimates=self._estimates(decision.estimates),
            policy_version=self._policy.version,
            predict_us=predict_us,
        )

    async def Report(  # noqa: N802
        self,
        request: policy_pb2.ReportRequest,
        context: grpc.aio.ServicerContext[policy_pb2.ReportRequest, policy_pb2.ReportResponse],
    ) -> policy_pb2.ReportResponse:
        """Keep how an answer turned out."""
        if self._reports is None:
            raise PreconditionFailed(
                "this policy service keeps no reports: set reports_path (ASD_POLICY_REPORTS_PATH)"
            )
        size = len(request.request_id.encode())
        if not 0 < size <= MAX_REQUEST_ID_BYTES:
            raise InvalidRequest(
                f"request_id must have 1 to {MAX_REQUEST_ID_BYTES} bytes, not {size}", field="request_id"
            )
        self._place(request.stage, "stage")
        if not 0.0 <= request.p_correct <= 1.0:
            raise InvalidRequest(f"p_correct must be 0 to 1, not {request.p_correct:g}", field="p_correct")
        if request.policy_version != self._policy.version:
            raise NotFound(
                f"unknown policy_version {request.policy_version!r}: {self._policy.version} is in force",
                field="policy_version",
            )
        report = OutcomeReport(
            request.request_id,
            request.stage,
            request.p_correct,
            request.policy_version,
            request.correct,
            time.time(),
        )
        return policy_pb2.ReportResponse(reports=await self._reports.add(report))

    async def Describe(  # noqa: N802
        self,
        request: policy_pb2.PolicyServiceDescribeRequest,
        context: grpc.aio.ServicerContext[
            policy_pb2.PolicyServiceDescribeRequest, policy_pb2.PolicyServiceDescribeResponse
        ],
    ) -> policy_pb2.PolicyServiceDescribeResponse:
        """Say which policy is in force."""
        values = self._policy.quality_values
        return policy_pb2.PolicyServiceDescribeResponse(
            policy_version=self._policy.version,
            stages=[
                policy_pb2.PolicyStage(
                    stage=stage.name,
                    cost=stage.cost,
                    latency_ms=stage.latency_ms,
                    accuracy=stage.accuracy,
                    calibration_error=stage.calibration_error,
                )
                for stage in self._policy.stages
            ],
            lambda_fastest=values[Preference.FASTEST],
            lambda_balanced=values[Preference.BALANCED],
            lambda_best=values[Preference.BEST],
            train_prompts=self._document.train.prompts,
            calibration_prompts=self._document.calibration.prompts,
            version=VERSION,
        )

    def _check_cascade(self, cascade: Sequence[str]) -> None:
        if list(cascade) != self._names:
            raise PreconditionFailed(
                f"policy {self._policy.version} was made for the cascade {', '.join(self._names)}, not for "
                f"{', '.join(cascade) or 'none'}: make a policy for it with `asd-policy fit`",
                field="cascade",
            )

    def _place(self, name: str, field: str) -> int:
        place = self._places.get(name)
        if place is None:
            raise NotFound(f"unknown stage {name!r}: choose one of {', '.join(self._names)}", field=field)
        return place

    def _verification(
        self, request: policy_pb2.DecideRequest, stage: int
    ) -> tuple[int | None, Verification | None]:
        if not request.HasField("verification"):
            return None, None
        evidence = request.verification
        origin = self._place(evidence.draft_stage, "verification.draft_stage")
        if origin >= stage:
            raise InvalidRequest(
                f"{evidence.draft_stage} is not an earlier stage than {request.stage}",
                field="verification.draft_stage",
            )
        if len(evidence.ranks) != evidence.proposed_tokens:
            raise InvalidRequest(
                f"ranks needs {evidence.proposed_tokens} entries, one per proposed token, not "
                f"{len(evidence.ranks)}",
                field="verification.ranks",
            )
        if evidence.accepted_tokens > evidence.proposed_tokens:
            raise InvalidRequest(
                f"accepted_tokens must be 0 to {evidence.proposed_tokens}, not {evidence.accepted_tokens}",
                field="verification.accepted_tokens",
            )
        return origin, Verification(evidence.accepted_tokens, np.array(evidence.ranks, np.int64))

    def _conditions(self, conditions: Iterable[policy_pb2.StageCondition]) -> dict[int, Condition]:
        return {
            self._place(condition.stage, f"conditions[{index}].stage"): Condition(
                condition.available,
                _spent(condition.expected_queue_ms, f"conditions[{index}].expected_queue_ms"),
            )
            for index, condition in enumerate(conditions)
        }

    def _estimates(self, estimates: Iterable[Estimate]) -> list[policy_pb2.StageEstimate]:
        return [
            policy_pb2.StageEstimate(
                stage=self._names[each.stage],
                p_correct=each.p_correct,
                p_correct_stderr=each.stderr,
                cost=each.cost,
                latency_ms=each.latency_ms,
            )
            for each in estimates
        ]


def _prompt(request: policy_pb2.PlanRequest | policy_pb2.DecideRequest) -> PromptText:
    if request.WhichOneof("input") == "prompt":
        return PromptText(request.prompt)
    turns = [turn.content for turn in request.conversation.messages]
    return PromptText(turns[-1], tuple(turns[:-1]))


def _objective(objective: common_pb2.Objective) -> Objective:
    check_objective(objective)
    has = objective.HasField
    return Objective(
        quality_value=getattr(objective, "lambda") if has("lambda") else None,
        max_cost=objective.max_cost if has("max_cost") else math.inf,
        max_latency_ms=objective.max_latency_ms if has("max_latency_ms") else math.inf,
        min_quality=objective.min_quality if has("min_quality") else 0.0,
        preference=_PREFERENCES[objective.preference] if has("preference") else Preference.BALANCED,
    )


def _draft(evidence: policy_pb2.DraftEvidence) -> Draft:
    check_enum(common_pb2.FinishReason, _FINISH_REASONS, evidence.finish_reason, "draft.finish_reason")
    count = len(evidence.logprobs)
    signals = []
    for name in ("logprobs", "entropies", "top2_margins"):
        values: npt.NDArray[np.float32] = np.array(getattr(evidence, name), np.float32)
        if len(values) != count:
            raise InvalidRequest(
                f"{name} needs {count} entries, one per token as in logprobs, not {len(values)}",
                field=f"draft.{name}",
            )
        if not np.isfinite(values).all():
            raise InvalidRequest(f"{name} must be finite", field=f"draft.{name}")
        signals.append(values)
    return Draft(evidence.text, signals[0], signals[1], signals[2], _FINISH[evidence.finish_reason])


def _spent(value: float, field: str) -> float:
    if not (math.isfinite(value) and value >= 0.0):
        raise InvalidRequest(f"{field} must be finite and 0 or more, not {value:g}", field=field)
    return value
