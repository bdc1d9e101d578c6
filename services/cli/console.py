"""How values look on a terminal. Nothing here calls a service."""

from __future__ import annotations

import json
import math
import shlex
from typing import TYPE_CHECKING

from rich.console import Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from services.cli.output import token_text
from services.common.shortfall import gave_up_quality, is_late
from services.common.terminal import LiteralConsole, literal, visible
from suites import extract_answer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType

    from asd.values import (
        Answer,
        Description,
        ReportReceipt,
        StageDescription,
        StageStarted,
        StreamedText,
        Tokens,
    )
    from services.cli.demo import DemoRow, DemoSummary
    from services.local.supervisor import Child

_DOING = {"generate": "writes", "verify": "verifies", "prefill": "reads ahead"}
# What stands in a command for one of the tokens in the router's file.
_TOKEN, _TOKENS_FILE = "TOKEN", "ASD_ROUTER_AUTH__TOKENS_FILE"
_ANSWER_COLUMNS = 14
# Of a table of tokens. Chosen: about a screen.
_MOST_SCORES = 30
# Of a demo's table, for all but the prompt.
_DEMO_COLUMNS = 80


def output() -> Console:
    """Return the console for results. Tables in files and pipes are 120 columns wide."""
    console = LiteralConsole()
    return console if console.is_terminal else LiteralConsole(width=120)


def notes() -> Console:
    """Return the console for everything that is not a result."""
    return LiteralConsole(stderr=True)


def progress(console: Console) -> Progress:
    """Return a progress bar that counts prompts."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def streamed(text: StreamedText, started: StageStarted | None) -> RenderableType:
    """Return an answer that is being written: final text, draft after it, and who works on it."""
    shown = literal(text.final)
    shown.append(visible(text.draft), style="dim")
    if started is None:
        return shown
    doing = _DOING.get(started.action, started.action)
    return Group(shown, literal(f"{started.stage} {doing} …", "cyan"))


def answer_line(
    answer: Answer, task: str = "", max_latency_ms: float | None = None, min_quality: float | None = None
) -> Text:
    """Return one line: who answered, how good it is thought to be, what it took, and why each stage ended.

    task, max_latency_ms, min_quality: of the request.
    """
    line = Text()
    line.append(visible(answer.stage), style="bold green")
    if answer.out_of_family:
        line.append(" · no predicted quality: unlike what the policy was fitted to", style="yellow")
    else:
        line.append(f" · predicted quality {quality(answer.p_correct)}")
    if gave_up_quality(answer, min_quality):
        line.append(f", not known to be right {min_quality:.0%} of the time", style="yellow")
    line.append(f" · {answer.latency_ms:.1f} ms")
    if is_late(answer, max_latency_ms):
        line.append(f", over the {max_latency_ms:g} ms asked for", style="yellow")
    line.append(f" · cost {answer.cost:.2f}")
    if answer.finish_reason != "eos":
        line.append(visible(f" · ended by {answer.finish_reason}"), style="yellow")
    steps = []
    asked = [record for record in answer.stages if record.action != "prefill"]
    for record in asked:
        has_draft = record.action == "verify" and record.proposed_tokens > 0
        # Where the drafter refused there is nothing to verify. No passes: the stage failed.
        is_alone = record.action == "verify" and record.forward_passes > 0 and not has_draft
        action = "generate" if is_alone else record.action
        step = f"{record.stage} {_DOING.get(action, action)}"
        if has_draft:
            step += f" ({record.accepted_tokens} of {record.proposed_tokens} draft tokens accepted)"
        if task and record.model:
            step += f" with{'' if record.adapted else 'out'} an adapter for {task}"
        steps.append(f"{step}, {record.decision}: {record.reason.replace('_', ' ')}")
    line.append(visible(f" · {' → '.join(steps)}"), style="dim")
    for record in answer.stages:
        if record.action == "prefill":
            # It went on beside the steps, and pays only where the stage verified after it.
            is_used = any(each.stage == record.stage for each in asked)
            ahead = f" · {record.stage} read the prompt ahead{'' if is_used else ', unused'}"
            line.append(visible(ahead), style="dim")
    if answer.trace_id:
        line.append(visible(f" · trace {answer.trace_id}"), style="dim")
    return line


def scores(tokens: Tokens) -> RenderableType:
    """Return how likely each of the first tokens was, and the likeliest at its place."""
    table = Table("token", "probability", "likeliest")
    details = tokens.details[:_MOST_SCORES]
    for detail, logprob in zip(details, tokens.logprobs, strict=False):
        likeliest = ", ".join(
            f"{_token(each.text)} {math.exp(each.logprob):.3f}" for each in detail.likeliest
        )
        table.add_row(literal(_token(detail.text)), f"{math.exp(logprob):.3f}", literal(likeliest))
    left = len(tokens.details) - len(details)
    return Group(table, f"and {count(left, 'token')} more: see --json") if left else table


def _token(text: bytes) -> str:
    return repr(token_text(text))


def _state(stage: StageDescription) -> Text:
    if stage.asleep:
        return Text("asleep", style="yellow")
    return Text("available", style="green") if stage.available else Text("away", style="red")


def _abilities(stage: StageDescription) -> tuple[str, ...]:
    return (
        "while it writes" if stage.verifies_inside else "in passes of their own",
        "yes" if stage.constrains else "no",
        "yes" if stage.takes_tools else "no",
        str(stage.most_top_logprobs or "none"),
    )


def description(value: Description) -> RenderableType:
    """Return the stages of a cascade, and the policy in force."""
    table = Table("stage", "model", "engine", "parameters", "context", "cost", "queue", "state")
    for stage in value.stages:
        table.add_row(
            stage.stage,
            " + ".join((stage.model or "–", *stage.adapters)),
            stage.engine or "–",
            f"{stage.parameters:,}" if stage.parameters else "–",
            str(stage.context_length or "–"),
            f"{stage.cost:g}",
            str(stage.queue_depth),
            _state(stage),
        )
    can = Table("stage", "verifies drafts", "constraints", "tools", "top log-probabilities")
    for stage in value.stages:
        can.add_row(stage.stage, *(_abilities(stage) if stage.available else ["–"] * 4))
    plan = f"Static plan, while the policy is away: {' → '.join(value.static_plan)}"
    policy = value.policy
    if policy is None:
        return Group(table, can, Text("Policy: none answers, so the static plan holds", style="yellow"), plan)
    judged = Table("stage", "cost", "latency ms", "accuracy", "calibration error")
    for each in policy.stages:
        judged.add_row(
            each.stage,
            f"{each.cost:g}",
            f"{each.latency_ms:.1f}",
            f"{each.accuracy:.1%}",
            f"{each.calibration_error:.3f}",
        )
    return Group(
        table,
        can,
        f"Policy {policy.policy_version}: fitted on {count(policy.train_prompts, 'prompt')}, calibrated on "
        f"{count(policy.calibration_prompts, 'other')}",
        judged,
        f"Value of a right answer (lambda): fastest {policy.quality_value_fastest:g}, "
        f"balanced {policy.quality_value_balanced:g}, best {policy.quality_value_best:g}",
        plan,
    )


def processes(children: Sequence[Child], seconds: float) -> RenderableType:
    """Return what `asd up` started."""
    table = Table("process", "address", "speaks", "id")
    for child in children:
        table.add_row(child.service.name, child.service.address, child.service.speaks, str(child.pid))
    return Group(table, f"Ready after {seconds:.1f} s. Logs: {children[0].log.parent}")


def ask_line(target: str, prompt: str, variables: Mapping[str, str]) -> str:
    """Return a command that asks a router. target: "" for the usual one. variables: of the router."""
    target = f" --target {target}" if target else ""
    trusted = _trusted("--tls-ca", variables.get("ASD_ROUTER_TLS__CERT_FILE"))
    token = f" --token {_TOKEN}" if variables.get(_TOKENS_FILE) else ""
    return f'  asd ask{target}{trusted}{token} "{prompt}"'


def curl_line(port: int, prompt: str, variables: Mapping[str, str]) -> str:
    """Return a command that asks a gateway on this machine. variables: of gateway and router."""
    body = json.dumps({"model": "asd", "messages": [{"role": "user", "content": prompt}]})
    trusted = _trusted("--cacert", variables.get("ASD_GATEWAY_TLS__CERT_FILE"))
    scheme = "https" if trusted else "http"
    token = f" -H 'authorization: Bearer {_TOKEN}'" if variables.get(_TOKENS_FILE) else ""
    return (
        f"  curl{trusted} {scheme}://127.0.0.1:{port}/v1/chat/completions -H 'content-type: application/json'"
        f"{token} -d {shlex.quote(body)}"
    )


def _trusted(option: str, cert_file: str | None) -> str:
    """Return the option that trusts a server's certificate; "" if it has none."""
    return f" {option} {shlex.quote(cert_file)}" if cert_file else ""


def demo_rows(rows: Sequence[DemoRow], width: int) -> Table:
    """Return one line per question, for a terminal of `width` columns."""
    table = Table("suite", "level", "prompt", "answer", "", "stage", "quality", "ms", "cost", pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for name in (1, 6, 7, 8):
        table.columns[name].justify = "right"
    prompt_width = max(width - _DEMO_COLUMNS, 20)
    for row in rows:
        outcome = row.cascade
        table.add_row(
            row.suite,
            str(row.level),
            literal(_shorten(row.prompt, prompt_width)),
            literal(_shorten(extract_answer(outcome.text) or f"? {outcome.text}", _ANSWER_COLUMNS)),
            Text("right", style="green") if outcome.is_right else Text("wrong", style="red"),
            outcome.stage,
            quality(outcome.p_correct),
            f"{outcome.latency_ms:.1f}",
            f"{outcome.cost:.2f}",
        )
    return table


def demo_summary(summary: DemoSummary) -> RenderableType:
    """Return the cascade beside its largest stage."""
    table = Table("", "cascade", f"always {summary.largest_stage}")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("right answers", f"{summary.accuracy:.1%}", f"{summary.accuracy_largest:.1%}")
    table.add_row("mean latency, ms", f"{summary.latency_ms:.1f}", f"{summary.latency_largest_ms:.1f}")
    table.add_row(
        "95th percentile, ms", f"{summary.latency_p95_ms:.1f}", f"{summary.latency_largest_p95_ms:.1f}"
    )
    table.add_row("mean cost, units", f"{summary.cost:.2f}", f"{summary.cost_largest:.2f}")
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in summary.stage_shares.items())
    policy = f"policy {summary.policy_version}" if summary.policy_version else "the static plan, no policy"
    lines = [
        literal(
            f"{summary.speedup:.2f} × as fast as always asking {summary.largest_stage}, at "
            f"{summary.cost / summary.cost_largest:.0%} of its cost",
            style="bold",
        ),
        literal(f"{summary.early_stop_share:.0%} of the answers came before the last stage ({shares})"),
        literal(
            f"{count(summary.prompts, 'prompt')}, {'each ' if summary.prompts > 1 else ''}asked both ways in "
            f"turn, one at a time; decided by {policy}"
        ),
    ]
    if "static" in summary.plan_sources and summary.policy_version:
        lines.append(
            Text("The policy was away for some of them: those followed the static plan", style="yellow")
        )
    return Group(table, *lines)


def quality(p_correct: float | None) -> str:
    """Return a predicted quality, or a dash where there is none."""
    return "–" if p_correct is None else f"{p_correct:.2f}"


def receipt(value: ReportReceipt) -> str:
    """Return what became of a report."""
    held = f"the policy service holds {count(value.reports, 'report')} for its policy."
    if not value.reported_before:
        return f"Reported; {held}"
    order = "The first verdict counts; a refit takes the last."
    return f"Reported before, so it is not counted again: {held} {order}"


def count(number: int, what: str) -> str:
    """Return a number of things that end in -s where they are several: "1 prompt", "1,200 prompts"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _shorten(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
