"""Thirty faults in words, each with the edit that puts it into the router.

before: of the code before the loop was rebuilt. present: of the code since. An edit's text occurs once.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUTER = "services/router"


@dataclass(frozen=True)
class Edit:
    """Text of a file of the router, and what stands there instead."""

    file: str
    find: str
    replace: str


@dataclass(frozen=True)
class Fault:
    """A fault in words, and how each of the two forms of the code gets it."""

    words: str
    before: Edit
    present: Edit


FAULTS = (
    # What the caller is shown.
    Fault(
        "another stage is asked after final tokens were sent",
        Edit(
            "planner.py",
            "if progress.has_committed or not self.may_be_replaced(progress, error):",
            "if not self.may_be_replaced(progress, error):",
        ),
        Edit(
            "planning/planner.py",
            "if self._state.has_committed or not self._may_be_replaced(error):",
            "if not self._may_be_replaced(error):",
        ),
    ),
    Fault(
        "a caller who asked for final tokens alone is shown drafts",
        Edit(
            "delivery.py",
            "if self._view is View.OUTCOME or (self._view is View.COMMITTED and not self._is_final):",
            "if self._view is View.OUTCOME:",
        ),
        Edit(
            "stream.py",
            "if self._view is Visibility.OUTCOME or ("
            "self._view is Visibility.COMMITTED and not self._is_final):",
            "if self._view is Visibility.OUTCOME:",
        ),
    ),
    Fault(
        "what a failed stage wrote is not taken back",
        Edit(
            "delivery.py",
            "        yield from self._drop_after(self._agreed_with_earlier())",
            "        yield from ()",
        ),
        Edit(
            "stream.py",
            "        yield from self._drop_after(self._agreed_with_earlier())",
            "        yield from ()",
        ),
    ),
    Fault(
        "one token more than was accepted stands",
        Edit(
            "delivery.py",
            "kept = self._boundary(accepted_tokens)",
            "kept = self._boundary(accepted_tokens + 1)",
        ),
        Edit(
            "stream.py",
            "kept = self._boundary(accepted_tokens)",
            "kept = self._boundary(accepted_tokens + 1)",
        ),
    ),
    Fault(
        "accepted tokens of another tokenizer count as those that the caller holds",
        Edit("progress.py", "event.accepted_tokens if event.ids_used else 0", "event.accepted_tokens"),
        Edit("request.py", "event.accepted_tokens if event.ids_used else 0", "event.accepted_tokens"),
    ),
    Fault(
        "an earlier answer replaces committed text that disagrees with it",
        Edit("delivery.py", "return self._committed <= self._agreed_with_earlier()", "return True"),
        Edit("stream.py", "return self._committed <= self._agreed_with_earlier()", "return True"),
    ),
    Fault(
        "a draft that a later stage still verifies is committed",
        Edit("planner.py", "            return not progress.chain\n", "            return True\n"),
        Edit(
            "planning/planner.py",
            "            return not self._fixed.following\n",
            "            return True\n",
        ),
    ),
    Fault(
        "the end of an answer is never committed",
        Edit("delivery.py", "if self._committed < len(self._token_bounds) - 1:", "if False:"),
        Edit("stream.py", "if self._committed < len(self._token_bounds) - 1:", "if False:"),
    ),
    # Time.
    Fault(
        "a stage's call has no deadline but the stage's own",
        Edit(
            "planner.py",
            "return min(left_ms, self._timeout_of(stage))",
            "return self._timeout_of(stage)",
        ),
        Edit(
            "planning/time_budget.py",
            "return min(left_ms, self._knowledge.timeout_ms(stage))",
            "return self._knowledge.timeout_ms(stage)",
        ),
    ),
    Fault(
        "a stage's own limit is dropped",
        Edit("planner.py", "return min(left_ms, self._timeout_of(stage))", "return left_ms"),
        Edit(
            "planning/time_budget.py",
            "return min(left_ms, self._knowledge.timeout_ms(stage))",
            "return left_ms",
        ),
    ),
    Fault(
        "an escalation begins that the policy expects to end after the deadline",
        Edit(
            "planner.py",
            "elif left_ms <= 0 or (decision.expected_ms or 0.0) > left_ms:",
            "elif left_ms <= 0:",
        ),
        Edit(
            "planning/planner.py",
            "if left_ms <= 0 or (decision.expected_ms or 0.0) > left_ms:",
            "if left_ms <= 0:",
        ),
    ),
    Fault(
        "a request leaves a stage that is writing its only answer",
        Edit(
            "progress.py",
            "is_silent = self.plan_source is not PlanSource.FIXED and not self.has_heard",
            "is_silent = self.plan_source is not PlanSource.FIXED",
        ),
        Edit(
            "request.py",
            "return not (is_fixed or self.has_heard) or self.has_earlier_answer()",
            "return not is_fixed or self.has_earlier_answer()",
        ),
    ),
    Fault(
        "max_latency_ms is compared the wrong way round before an escalation",
        Edit(
            "planner.py",
            "if self._expected_ms(following) > self._left_of_budget_ms(progress):",
            "if self._expected_ms(following) < self._left_of_budget_ms(progress):",
        ),
        Edit(
            "planning/planner.py",
            "if self._knowledge.expected_ms(stage) > self._time.left_of_latency_ms():",
            "if self._knowledge.expected_ms(stage) < self._time.left_of_latency_ms():",
        ),
    ),
    # What is under way.
    Fault(
        "a prefill that nobody needs any longer is not cancelled",
        Edit("ahead.py", "        self._task.cancel()\n", ""),
        Edit("prefill.py", "        self._task.cancel()\n", ""),
    ),
    Fault(
        "drafters are not cancelled when the last stage has answered",
        Edit("pipeline.py", "            task.cancel()\n", "            pass\n"),
        Edit("chain.py", "            task.cancel()\n", "            pass\n"),
    ),
    Fault(
        "a verification does not wait for the prefill at its stage",
        Edit("cascade.py", "                await ahead.settle(stage)\n", ""),
        Edit("running.py", "        await prefill.wait_for(step.stage)\n", ""),
    ),
    Fault(
        "a drafter that dies never ends its draft",
        Edit("pipeline.py", "written.add(FinishReason.LENGTH)", "pass"),
        Edit("chain.py", "written.add(FinishReason.LENGTH)", "pass"),
    ),
    Fault(
        "a prefill is not counted as a call under way",
        Edit("ahead.py", "        counted.enter_context(self._calling(client.stage))\n", ""),
        Edit("prefill.py", "        counted.enter_context(self._load.calling(self._stage))\n", ""),
    ),
    Fault(
        "a cache is filled ahead at a stage that is at work",
        Edit(
            "planner.py",
            "is_busy = self._load.own_calls(stage) or self._is_crowded(stage)",
            "is_busy = self._is_crowded(stage)",
        ),
        Edit(
            "planning/planner.py",
            "is_busy = self._knowledge.load.own_calls(index) or self._knowledge.is_busy(stage)",
            "is_busy = self._knowledge.is_busy(stage)",
        ),
    ),
    # Drafts.
    Fault(
        "a draft is verified twice by the last stage of a chain",
        Edit(
            "planner.py",
            "            progress.upstream = tuple(kept[:-1])\n",
            "            progress.upstream = tuple(kept[:-1])\n            progress.chain = (kept[-1],)\n",
        ),
        Edit(
            "planning/fixed_plan.py",
            "            self.drafters = tuple(kept[:-1])\n",
            "            self.drafters = tuple(kept[:-1])\n            self.following = (kept[-1],)\n",
        ),
    ),
    Fault(
        "a draft without text is given to another stage to verify",
        Edit(
            "progress.py",
            "return self._answer.result if self._answer.result.text else None",
            "return self._answer.result",
        ),
        Edit(
            "request.py",
            "return self._answer.result if self._answer.result.text else None",
            "return self._answer.result",
        ),
    ),
    Fault(
        "an abandoned draft counts as an answer",
        Edit(
            "progress.py",
            "return not (is_fixed or self._is_fragment) and bool(self._records)",
            "return not is_fixed and bool(self._records)",
        ),
        Edit(
            "request.py",
            "return self.has_answer and not is_fixed and not self._is_fragment and",
            "return self.has_answer and not is_fixed and",
        ),
    ),
    Fault(
        "what an answer cost is forgotten",
        Edit(
            "progress.py",
            "append(answer)\n        self.spent_cost += answer.cost\n        return answer\n",
            "append(answer)\n        return answer\n",
        ),
        Edit("request.py", "        self._spent_cost += answer.cost\n", ""),
    ),
    # Decisions.
    Fault(
        "the outcome does not say that the deadline was why an earlier answer stands",
        Edit("progress.py", "if isinstance(error, BudgetSpent | Overloaded)\n", "if False\n"),
        Edit(
            "planning/planner.py",
            "is_late = isinstance(error, BudgetSpent | Overloaded)",
            "is_late = False",
        ),
    ),
    Fault(
        "a decision that is made again is recorded beside the first one",
        Edit(
            "progress.py",
            "        if self._records and self._records[-1].answer is self.answer:\n"
            "            del self._records[-1]\n",
            "",
        ),
        Edit(
            "request.py",
            "        if self._records and self._records[-1].answer is self.answer:\n"
            "            del self._records[-1]\n",
            "",
        ),
    ),
    Fault(
        "a policy that was away is asked again by the same request",
        Edit(
            "planner.py",
            '                self._observer.static_plan_used("decide")\n'
            "                progress.follows_policy = False\n",
            '                self._observer.static_plan_used("decide")\n',
        ),
        Edit(
            "planning/planner.py",
            '                self._observer.static_plan_used("decide")\n'
            "                self._follows_policy = False\n",
            '                self._observer.static_plan_used("decide")\n',
        ),
    ),
    Fault(
        "the static plan escalates beyond max_cost",
        Edit(
            "planner.py",
            "        if max_cost is not None and is_above(cost, max_cost):\n            return decision",
            "        if False:\n            return decision",
        ),
        Edit(
            "planning/planner.py",
            "        if max_cost is not None and is_above(cost, max_cost):\n            return decision",
            "        if False:\n            return decision",
        ),
    ),
    # Failures.
    Fault(
        "a stage that answers others while one call runs out of time is avoided, and one that hangs is not",
        Edit(
            "planner.py", "if not answers and self._hangs(failure):", "if answers and self._hangs(failure):"
        ),
        Edit(
            "planning/knowledge.py",
            "if not self._works_for_others(failure) and self._hangs(failure):",
            "if self._works_for_others(failure) and self._hangs(failure):",
        ),
    ),
    Fault(
        "a request that is refused as malformed is sent to the next stage",
        Edit(
            "planner.py",
            "return not isinstance(error, InvalidRequest) or isinstance(error, ModelRefusal)",
            "return True",
        ),
        Edit(
            "planning/planner.py",
            "return not isinstance(error, InvalidRequest) or isinstance(error, ModelRefusal)",
            "return True",
        ),
    ),
    Fault(
        "a request that asks for quality goes on with less where there is no room for better",
        Edit(
            "cascade.py",
            "if isinstance(error, Overloaded) and self._planner.may_be_refused(progress):",
            "if False:",
        ),
        Edit(
            "planning/planner.py",
            "if isinstance(error, Overloaded) and self._may_be_refused():",
            "if False:",
        ),
    ),
)
