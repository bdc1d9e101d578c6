"""The commands that ask a cascade: ask, describe, report."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.arguments import ASK_OPTIONS, number, whole_number
from services.cli.connecting import Connection, connected, encrypted
from services.cli.ending import run_command
from services.cli.files import read_answer, read_prompt, read_schema
from services.cli.options import (
    DEFAULT_TARGET,
    JsonOption,
    PreferenceChoice,
    TargetOption,
    TimeoutOption,
    check_target_option,
    complete_stage,
)
from services.cli.output import write_json
from services.common.addresses import neighbour
from services.common.terminal import literal, visible

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from rich.console import Console

    from asd.client import AsyncClient
    from asd.values import Answer, Constraint, Request

# As the contract's types hold them.
_MOST_NEW_TOKENS = 2**32 - 1
_LARGEST_SEED = 2**64 - 1
_MOST_TOP_LOGPROBS = 20


def _check_tolerance(tolerance: float | None) -> float | None:
    if tolerance is not None and not 0.0 < tolerance <= 1.0:
        raise typer.BadParameter(f"must be above 0 and at most 1, not {tolerance:g}")
    return tolerance


@connected
def ask(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to ask. Standard input where it is - or left out.",
            show_default=False,
        ),
    ] = None,
    target: TargetOption = DEFAULT_TARGET,
    preference: PreferenceChoice = None,
    quality_value: Annotated[
        float | None,
        typer.Option(
            "--lambda",
            parser=number(),
            metavar="FLOAT",
            help="Value of a right answer, in cost units; instead of --preference.",
        ),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(parser=number(), metavar="FLOAT", help="Budget, in cost units.")
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(
            parser=number(),
            metavar="FLOAT",
            help="The answer should be there by then, in milliseconds; no promise.",
        ),
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(
            parser=number(),
            metavar="FLOAT",
            help="Stop early only where answers are certified to be right this often.",
        ),
    ] = None,
    stage: Annotated[
        str,
        typer.Option(autocompletion=complete_stage, help="The one stage that must answer; no policy."),
    ] = "",
    chain: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=complete_stage,
            help="A stage that works on it; repeat it: the first drafts, later ones verify.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            parser=number(),
            metavar="FLOAT",
            callback=_check_tolerance,
            help="Accept draft tokens this likely beside the likeliest. Default: exact.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1, _MOST_NEW_TOKENS),
            metavar="INTEGER",
            help="Most tokens of the answer. Default: the stage's.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(parser=number(), metavar="FLOAT", help="0 (the likeliest token) to 2.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(parser=number(), metavar="FLOAT", help="Nucleus mass, above 0 to 1.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(0, _LARGEST_SEED),
            metavar="INTEGER",
            help="Seed of the choice at a temperature above 0.",
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    session: Annotated[str, typer.Option(help="Key of the conversation, for prefix reuse.")] = "",
    system: Annotated[str, typer.Option(help="Instructions before the prompt.")] = "",
    task: Annotated[
        str, typer.Option(help="Type of task, such as math: stages with an adapter for it answer with that.")
    ] = "",
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON", help="The answer is JSON of this schema: a file, or the schema itself."
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The whole answer matches this regular expression.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is one of these texts; repeat it.")
    ] = None,
    prediction: Annotated[
        str, typer.Option(help="What the answer is expected to be: the first stage verifies it as a draft.")
    ] = "",
    top_logprobs: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(0, _MOST_TOP_LOGPROBS),
            metavar="INTEGER",
            help="Show how likely each token was, and this many of the likeliest at its place.",
        ),
    ] = None,
    timeout_ms: TimeoutOption = 60_000.0,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Ask a cascade and show the answer as it comes about.

    On a terminal, text that a later stage may still revise is dim.
    The answer goes to standard output. The closing line (stage, predicted
    quality, latency, cost, what each stage did and why) goes to standard error.
    A terminal is shown control characters of an answer as \\x1b and the like;
    a file or a pipe gets them as they are.
    """
    if stage and chain:
        raise typer.BadParameter("--stage and --chain exclude each other")
    if chain and len(chain) == 1:
        raise typer.BadParameter(
            f"--chain names two stages or more: repeat it, or have one answer alone with --stage {chain[0]}"
        )
    if preference is not None and quality_value is not None:
        raise typer.BadParameter("--lambda and --preference exclude each other")
    if (stage or chain) and (
        preference is not None
        or any(value is not None for value in (quality_value, max_cost, max_latency_ms, min_quality))
    ):
        raise typer.BadParameter(
            "--stage and --chain leave nothing to the policy: leave out --preference, --lambda, --max-cost, "
            "--max-latency-ms and --min-quality"
        )

    if [json_schema, regex, choice or None].count(None) < 2:
        raise typer.BadParameter("--json-schema, --regex and --choice exclude each other")

    schema = None if json_schema is None else read_schema(json_schema)

    def work() -> Coroutine[Any, Any, None]:
        from asd.values import Acceptance, Message, Objective, Request, Sampling

        text = read_prompt(prompt)
        request = Request(
            input=(Message("system", system), Message("user", text)) if system else text,
            sampling=Sampling(
                max_new_tokens,
                temperature,
                top_p,
                seed,
                tuple(stop or ()),
                _constraint(schema, regex, choice),
                top_logprobs,
            ),
            objective=Objective(
                quality_value, max_cost, max_latency_ms, min_quality, preference.value if preference else None
            ),
            acceptance=None if tolerance is None else Acceptance("tolerant", tolerance),
            session_id=session,
            stage=stage,
            chain=tuple(chain or ()),
            task=task,
            prediction=prediction,
        )
        show = _write_answer if as_json else _show_answer
        return show(connection.client(target, timeout_ms), request)

    run_command(work, as_json=as_json, shows_result=True, options=ASK_OPTIONS)


@connected
def describe(
    target: TargetOption = DEFAULT_TARGET,
    timeout_ms: TimeoutOption = 5_000.0,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Show the stages of a cascade, what they cost, and the policy in force."""

    async def work() -> None:
        from services.cli import console

        async with connection.client(target, timeout_ms) as cascade:
            description = await cascade.describe()
        if as_json:
            write_json(asdict(description))
        else:
            console.output().print(console.description(description))

    run_command(work, as_json=as_json, shows_result=True)


@encrypted
def report(
    answer: Annotated[
        Path,
        typer.Argument(
            help="What `asd ask --json` or the gateway wrote; - reads standard input.",
            allow_dash=True,
            dir_okay=False,
        ),
    ],
    is_right: Annotated[bool, typer.Option("--right", help="The answer was right.")] = False,
    is_wrong: Annotated[bool, typer.Option("--wrong", help="The answer was wrong.")] = False,
    policy: Annotated[
        str | None,
        typer.Option(
            envvar="ASD_POLICY",
            metavar="HOST:PORT",
            callback=check_target_option,
            help="The policy service of the cascade. Default: one port above --target, as `asd up` has it.",
        ),
    ] = None,
    target: TargetOption = DEFAULT_TARGET,
    timeout_ms: TimeoutOption = 5_000.0,
    as_json: JsonOption = False,
    *,
    connection: Connection,
) -> None:
    """Tell the policy service whether an answer was right, so that it can watch its predictions.

    The router that answered takes no reports: they go to the policy service itself.
    Of an answer that is reported twice the first verdict counts; a refit takes
    the last one.
    """
    if is_right == is_wrong:
        exclude = "--right and --wrong exclude each other"
        raise typer.BadParameter(exclude if is_right else "say --right or --wrong")
    try:
        policy_target = policy or neighbour(target)
    except ValueError as error:
        raise typer.BadParameter(f"{error}: name the policy service with --policy") from error

    async def send(reported: Answer, *, correct: bool) -> None:
        from services.cli import console

        async with connection.client(target, timeout_ms) as cascade:
            receipt = await cascade.report(
                reported, correct=correct, policy_target=policy_target, timeout_ms=timeout_ms
            )
        if as_json:
            write_json({"request_id": reported.request_id} | asdict(receipt))
        else:
            typer.echo(console.receipt(receipt))

    run_command(lambda: send(read_answer(answer), correct=is_right), as_json=as_json)


def _constraint(json_schema: str | None, regex: str | None, choice: list[str] | None) -> Constraint | None:
    """Return what was typed of the answer's form; None if nothing was."""
    from asd.values import Constraint

    if json_schema is None and regex is None and not choice:
        return None
    return Constraint(json_schema, regex, tuple(choice) if choice else None)


async def _write_answer(client: AsyncClient, request: Request) -> None:
    from services.common.shortfall import missed

    async with client as cascade:
        answer = await cascade.ask(request)
    write_json(asdict(answer) | missed(answer, request.objective))


async def _show_answer(client: AsyncClient, request: Request) -> None:
    from services.cli import console

    output = console.output()
    async with client as cascade:
        show = stream_live if output.is_terminal else stream_plain
        answer = await show(cascade, request, output)
    objective = request.objective
    line = console.answer_line(answer, request.task, objective.max_latency_ms, objective.min_quality)
    console.notes().print(line, soft_wrap=True)
    if answer.scored_tokens is not None:
        console.notes().print(console.scores(answer.scored_tokens))


async def stream_live(cascade: AsyncClient, request: Request, output: Console) -> Answer:
    """Show drafts and what becomes of them; leave the answer on the terminal."""
    from rich.live import Live

    from asd.values import Answer, StageStarted, StreamedText
    from services.cli import console

    text, started = StreamedText(), None
    answer: Answer | None = None
    with Live(console=output, transient=True) as live:
        async with aclosing(cascade.stream(request, drafts=True)) as events:
            async for event in events:
                if isinstance(event, StageStarted):
                    started = event
                elif isinstance(event, Answer):
                    answer = event
                text = text.after(event)
                live.update(console.streamed(text, started))
    answer = _last(answer)
    output.print(literal(answer.text))
    return answer


async def stream_plain(cascade: AsyncClient, request: Request, output: Console) -> Answer:
    """Write final text as it comes: as it is into files and pipes, with its controls shown to people."""
    from asd.values import Answer, Committed

    # A console can be told that a terminal is none (TTY_COMPATIBLE=0).
    shown = visible if output.file.isatty() else str
    answer: Answer | None = None
    async with aclosing(cascade.stream(request)) as events:
        async for event in events:
            if isinstance(event, Committed):
                output.file.write(shown(event.tokens.text))
                output.file.flush()
            elif isinstance(event, Answer):
                answer = event
    output.file.write("\n")
    return _last(answer)


def _last(answer: Answer | None) -> Answer:
    from asd.errors import AsdError

    if answer is None:
        raise AsdError("the cascade ended the stream without an answer")
    return answer
