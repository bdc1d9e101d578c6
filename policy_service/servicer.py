"""PolicyService over gRPC: converts between messages and values."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from asd.convert import DECISION_REASONS, FINISH_REASONS, PREFERENCES
from asd.errors import InvalidRequest, NotFound, PreconditionFailed
from asd.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from asd.values import Preference
from policy_service.domain import Condition, PolicyObjective, Spent, UnmeetableBudget
from policy_service.features import Draft, DraftVerification, PromptText
from policy_service.reports import OutcomeReport
from policy_service.scoring import Scoring
from policy_service.shadow import ShadowJob
from services.common import telemetry
from services.common.validation import check_enum, check_input, check_objective
from services.common.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    import grpc
    import numpy.typing as npt

    from policy_service.document import PolicyDocument
    from policy_service.domain import Estimate, Judgement, Plan
    from policy_service.drift import DriftMonitor, StageCalibration
    from policy_service.policy import Policy
    from policy_service.reports import ReportLog
    from policy_service.shadow import Shadow

_FINISH_REASONS = frozenset(common_pb2.FinishReason.values())
MAX_REQUEST_ID_BYTES = 256


@dataclass(frozen=True)
class _Live:
    """The policy in force. A call takes it once, so that one policy answers all of the call."""

    policy: Policy
    document: PolicyDocument

    @cached_property
    def names(self) -> list[str]:
        return [stage.name for stage in self.policy.stages]

    @cached_property
    def _indexes(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def index_of(self, name: str, field: str) -> int:
        index = self._indexes.get(name)
        if index is None:
            raise NotFound(f"unknown stage {name!r}: choose one of {', '.join(self.names)}", field=field)
        return index

    def check_cascade(self, cascade: Sequence[str]) -> None:
        if list(cascade) != self.names:
            raise PreconditionFailed(
                f"policy {self.policy.version} was made for the cascade {', '.join(self.names)}, not for "
                f"{', '.join(cascade) or 'none'}: make a policy for it with `asd-policy fit`",
                field="cascade",
            )

    def verification(
        self, request: policy_pb2.DecideRequest, stage: int
    ) -> tuple[int | None, DraftVerification | None]:
        if not request.HasField("verification"):
            return None, None
        evidence = request.verification
        origin = self.index_of(evidence.draft_stage, "verification.draft_stage")
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
        return origin, DraftVerification(evidence.accepted_tokens, np.array(evidence.ranks, np.int64))

    def conditions(self, conditions: Iterable[policy_pb2.StageCondition]) -> dict[int, Condition]:
        return {
            self.index_of(condition.stage, f"conditions[{index}].stage"): Condition(
                condition.available,
                _amount(condition.expected_queue_ms, f"conditions[{index}].expected_queue_ms"),
            )
            for index, condition in enumerate(conditions)
        }

    def estimates(self, estimates: Iterable[Estimate]) -> list[policy_pb2.StageEstimate]:
        return [
            policy_pb2.StageEstimate(
                stage=self.names[each.stage],
                p_correct=each.p_correct,
                p_correct_stderr=each.stderr,
                cost=each.cost,
                latency_ms=each.latency_ms,
            )
            for each in estimates
        ]


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Serves one policy at a time.

    reports: None if the service stores none. monitor: drift detector of the reports, or None. shadow:
    candidate that decides beside the policy, or None. known_versions: returns the store's versions. It is
    called for a report of a version that was not in force here: another replica may have loaded it sooner.
    novelty_threshold: above which a prompt counts as unlike all that a policy was fitted to; None: the
    policy's own.
    """

    def __init__(
        self,
        policy: Policy,
        document: PolicyDocument,
        reports: ReportLog | None,
        *,
        monitor: DriftMonitor | None = None,
        shadow: Shadow | None = None,
        known_versions: Callable[[], Collection[str]] = tuple,
        novelty_threshold: float | None = None,
    ) -> None:
        self._novelty_threshold = novelty_threshold
        self._live = self._made_live(policy, document)
        self._reports = reports
        self._monitor = monitor
        self._shadow = shadow
        self._scoring = Scoring()
        self._known = {policy.version, *known_versions()}
        self._known_versions = known_versions

    def use(self, policy: Policy, document: PolicyDocument) -> None:
        """Put another policy into force. Calls in flight keep the one that they began with."""
        self._known.add(policy.version)
        self._live = self._made_live(policy, document)

    def _made_live(self, policy: Policy, document: PolicyDocument) -> _Live:
        if self._novelty_threshold is not None:
            policy.mark_above(self._novelty_threshold)
        return _Live(policy, document)

    def calibration(self) -> tuple[StageCalibration, ...]:
        """Return the calibration of reported answers of the policy in force, in the order of the stages."""
        live = self._live
        if self._monitor is None:
            return ()
        stages = {each.stage: each for each in self._monitor.of(live.policy.version)}
        return tuple(stages[name] for name in live.names if name in stages)

    async def Plan(  # noqa: N802
        self,
        request: policy_pb2.PlanRequest,
        context: grpc.aio.ServicerContext[policy_pb2.PlanRequest, policy_pb2.PlanResponse],
    ) -> policy_pb2.PlanResponse:
        """Choose the first stage."""
        live = self._live
        check_input(request)
        live.check_cascade(request.cascade)
        _check_id(request.request_id)
        prompt, objective = _prompt(request), _objective(request)
        conditions = live.conditions(request.conditions)

        def ask(policy: Policy, scores: Sequence[float] | None = None) -> Plan:
            return policy.plan(prompt, objective, conditions, scores)

        scores = await self._scoring.scores(live.policy, live.policy.prompt_state(prompt))
        try:
            plan = ask(live.policy, scores.values)
        except UnmeetableBudget as error:
            raise InvalidRequest(str(error), field="objective.max_cost") from error
        if self._shadow is not None:
            self._shadow.offer(_job(ask, plan, live.policy.version, None, request.request_id))
        return policy_pb2.PlanResponse(
            first_stage=live.names[plan.first_stage],
            estimates=live.estimates(plan.estimates),
            p_escalate=plan.p_escalate,
            likely_next_stage="" if plan.likely_next is None else live.names[plan.likely_next],
            abandon=[
                policy_pb2.AbandonRule(tokens=rule.tokens, mean_logprob=rule.mean_logprob)
                for rule in plan.abandon
            ],
            abandon_stage="" if plan.abandon_to is None else live.names[plan.abandon_to],
            policy_version=live.policy.version,
            out_of_family=plan.is_unlike,
        )

    async def Decide(  # noqa: N802
        self,
        request: policy_pb2.DecideRequest,
        context: grpc.aio.ServicerContext[policy_pb2.DecideRequest, policy_pb2.DecideResponse],
    ) -> policy_pb2.DecideResponse:
        """Decide on an answer."""
        live = self._live
        check_input(request)
        live.check_cascade(request.cascade)
        _check_id(request.request_id)
        objective = _objective(request)
        stage = live.index_of(request.stage, "stage")
        if not request.HasField("draft"):
            raise InvalidRequest("draft is required: send the answer to be judged", field="draft")
        draft = _draft(request.draft)
        origin, verification = live.verification(request, stage)
        spent = Spent(_amount(request.spent_cost, "spent_cost"), _amount(request.spent_ms, "spent_ms"))
        prompt, conditions = _prompt(request), live.conditions(request.conditions)

        def ask(policy: Policy, scores: Sequence[float] | None = None) -> Judgement:
            return policy.decide(
                prompt, stage, draft, origin, verification, objective, spent, conditions, scores
            )

        started = time.perf_counter()
        state = live.policy.answer_state(prompt, stage, draft, origin, verification)
        predict_us = (time.perf_counter() - started) * 1e6
        scores = await self._scoring.scores(live.policy, state)
        started = time.perf_counter()
        decision = ask(live.policy, scores.values)
        predict_us += scores.took_us + (time.perf_counter() - started) * 1e6
        if self._shadow is not None:
            self._shadow.offer(_job(ask, decision, live.policy.version, stage, request.request_id))
        stops = decision.next_stage is None
        return policy_pb2.DecideResponse(
            action=policy_pb2.DECISION_ACTION_STOP if stops else policy_pb2.DECISION_ACTION_ESCALATE,
            next_stage="" if decision.next_stage is None else live.names[decision.next_stage],
            reason=DECISION_REASONS.numbers[decision.reason],
            p_correct=decision.p_correct,
            p_correct_stderr=decision.stderr,
            stop_value=decision.stop_value,
            escalate_value=decision.escalate_value,
            estimates=live.estimates(decision.estimates),
            policy_version=live.policy.version,
            predict_us=predict_us,
        )

    async def Report(  # noqa: N802
        self,
        request: policy_pb2.ReportRequest,
        context: grpc.aio.ServicerContext[policy_pb2.ReportRequest, policy_pb2.ReportResponse],
    ) -> policy_pb2.ReportResponse:
        """Store whether an answer was correct."""
        if self._reports is None:
            raise PreconditionFailed(
                "this policy service keeps no reports: set reports_path (ASD_POLICY_REPORTS_PATH)"
            )
        live = self._live
        _check_id(request.request_id, least_bytes=1)
        live.index_of(request.stage, "stage")
        if not request.HasField("p_correct"):
            raise InvalidRequest(
                "p_correct is required: an answer without one, to a prompt unlike all that the policy "
                "was fitted to, has nothing to be compared with and is not reported",
                field="p_correct",
            )
        if not 0.0 <= request.p_correct <= 1.0:
            raise InvalidRequest(f"p_correct must be 0 to 1, not {request.p_correct:g}", field="p_correct")
        if not await self._knows(request.policy_version):
            raise NotFound(
                f"unknown policy_version {request.policy_version!r}: {live.policy.version} is in force",
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
        receipt = await self._reports.add(report)
        return policy_pb2.ReportResponse(reports=receipt.reports, reported_before=receipt.reported_before)

    async def _knows(self, version: str) -> bool:
        if version not in self._known:
            self._known.update(await asyncio.to_thread(self._known_versions))
        return version in self._known

    async def Describe(  # noqa: N802
        self,
        request: policy_pb2.PolicyServiceDescribeRequest,
        context: grpc.aio.ServicerContext[
            policy_pb2.PolicyServiceDescribeRequest, policy_pb2.PolicyServiceDescribeResponse
        ],
    ) -> policy_pb2.PolicyServiceDescribeResponse:
        """Describe the policy in force."""
        live = self._live
        values = live.policy.quality_values
        return policy_pb2.PolicyServiceDescribeResponse(
            policy_version=live.policy.version,
            stages=[
                policy_pb2.PolicyStage(
                    stage=stage.name,
                    cost=stage.cost,
                    latency_ms=stage.latency_ms,
                    accuracy=stage.accuracy,
                    calibration_error=stage.calibration_error,
                )
                for stage in live.policy.stages
            ],
            lambda_fastest=values[Preference.FASTEST],
            lambda_balanced=values[Preference.BALANCED],
            lambda_best=values[Preference.BEST],
            train_prompts=live.document.train.prompts,
            calibration_prompts=live.document.calibration.prompts,
            version=VERSION,
            calibration=[
                policy_pb2.ReportedCalibration(
                    stage=each.stage,
                    reports=each.reports,
                    expected=each.expected,
                    observed=each.observed,
                    calibration_error=each.reported_calibration_error,
                    drift_evidence=each.evidence,
                    drifted=each.alarm_at is not None,
                )
                for each in self.calibration()
            ],
            shadow=self._shadow_status(),
            novelty_threshold=None if live.policy.family is None else live.policy.family.threshold,
        )

    def _shadow_status(self) -> policy_pb2.ShadowStatus | None:
        if self._shadow is None:
            return None
        counts = self._shadow.counts
        return policy_pb2.ShadowStatus(
            policy_version=counts.version,
            decisions=counts.decisions,
            agreements=counts.agreements,
            dropped=counts.dropped,
            failures=counts.failures,
        )


def _job(
    ask: Callable[[Policy], Plan | Judgement],
    answer: Plan | Judgement,
    version: str,
    judged: int | None,
    request_id: str,
) -> ShadowJob:
    return ShadowJob(ask, answer, version, judged, request_id, telemetry.current_trace_id(), time.time())


def _check_id(request_id: str, *, least_bytes: int = 0) -> None:
    size = len(request_id.encode())
    if not least_bytes <= size <= MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(
            f"request_id must have {least_bytes} to {MAX_REQUEST_ID_BYTES} bytes, not {size}",
            field="request_id",
        )


def _prompt(request: policy_pb2.PlanRequest | policy_pb2.DecideRequest) -> PromptText:
    if request.WhichOneof("input") == "prompt":
        return PromptText(request.prompt)
    turns = [turn.content for turn in request.conversation.messages]
    return PromptText(turns[-1], tuple(turns[:-1]))


def _objective(request: policy_pb2.PlanRequest | policy_pb2.DecideRequest) -> PolicyObjective:
    objective = request.objective
    check_objective(objective)
    share = request.min_accuracy_share if request.HasField("min_accuracy_share") else None
    has = objective.HasField
    return PolicyObjective(
        quality_value=getattr(objective, "lambda") if has("lambda") else None,
        max_cost=objective.max_cost if has("max_cost") else math.inf,
        max_latency_ms=objective.max_latency_ms if has("max_latency_ms") else math.inf,
        min_quality=objective.min_quality if has("min_quality") else 0.0,
        preference=PREFERENCES.members[objective.preference] if has("preference") else Preference.BALANCED,
        min_accuracy_share=None if share is None else _amount(share, "min_accuracy_share"),
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
    return Draft(
        evidence.text, signals[0], signals[1], signals[2], FINISH_REASONS.members[evidence.finish_reason]
    )


def _amount(value: float, field: str) -> float:
    if not (math.isfinite(value) and value >= 0.0):
        raise InvalidRequest(f"{field} must be finite and 0 or more, not {value:g}", field=field)
    return value
