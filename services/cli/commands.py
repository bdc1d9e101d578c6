"""The commands of `asd`.

Imports at the top are what `asd --help` needs; each command imports the rest when it runs.
"""

from __future__ import annotations

import json
import sys
from contextlib import aclosing, suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from services.cli.arguments import ASK_OPTIONS, CheckedCommand, in_options, number, option_of, whole_number
from services.cli.connecting import Connection, connected, encrypted, in_tls_options
from services.cli.interrupts import INTERRUPTED, Unwinding
from services.common.addresses import check_target, neighbour
from services.common.terminal import escape_unseen, literal, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from rich.console import Console

    from asd.client import AsyncClient
    from asd.values import Answer, Request
    from services.cli.demo import DemoRow
    from services.local.cascade_file import CascadeFile

FAILED, MISUSED = 1, 2
_DEFAULT_TARGET = "127.0.0.1:50050"
_DEFAULT_PORT_BASE = 50_050
_HIGHEST_PORT = 65_535
# A day. gRPC cannot tell a time far above it from none.
_LONGEST_TIMEOUT_MS = 86_400_000
# As the contract's types hold them.
_MOST_NEW_TOKENS = 2**32 - 1
_LARGEST_SEED = 2**64 - 1
# A demo keeps its rows in memory. Chosen.
_MOST_DEMO_PROMPTS = 100_000
# Of what `asd ask --json` wrote. Chosen: a thousand times a long answer's.
_MOST_ANSWER_BYTES = 64 << 20

_EPILOG = (
    "Exit codes: 0 success, 1 failure, 2 wrong usage or a refused request, 130 interrupted, "
    "143 terminated (`asd up`: before it serves; 0 after). With --json, a "
    'failure is one JSON object on standard error: {"error": {"code", "message", "field"}}.'
)

# Its base in typer.core lies elsewhere in versions that bring click along.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


class _Commands(TyperGroup):
    """Commands that refuse a wrong command line with JSON where --json is on it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        is_json = standalone_mode and _wants_json(arguments)
        try:
            code = super().main(
                args, prog_name, complete_var, standalone_mode and not is_json, windows_expand_args, **extra
            )
        except _UsageError as error:
            if not is_json:
                raise
            sys.stderr.write(_json_text(_json_error("INVALID_ARGUMENT", *_usage(error)), sys.stderr.encoding))
            code = MISUSED
        return sys.exit(code or 0) if is_json else code


def _wants_json(arguments: Sequence[str]) -> bool:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(each.partition("=")[0] == "--json" for each in options)


def _usage(error: Any) -> tuple[str, str]:
    """Return what is wrong with a command line, and the option or argument that it is about, or ""."""
    parameter = getattr(error, "param", None)
    if parameter is None and getattr(error, "param_hint", None):
        return error.format_message(), error.param_hint
    if parameter is None:
        return error.message or error.format_message(), ""
    is_option = parameter.param_type_name == "option"
    return error.format_message(), max(parameter.opts, key=len) if is_option else parameter.name


app = typer.Typer(
    name="asd",
    cls=_Commands,
    help="Adaptive speculative decoding: ask a cascade of language models, or run one on this machine.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(
    help="The models of a cascade on this machine. Alone it lists them.", invoke_without_command=True
)
app.add_typer(models_app, name="models")


class PreferenceOption(StrEnum):
    """As the contract's Preference."""

    FASTEST = "fastest"
    BALANCED = "balanced"
    BEST = "best"


def _check_target(target: str | None) -> str | None:
    if target is not None:
        try:
            check_target(target)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return target


def _check_tolerance(tolerance: float | None) -> float | None:
    if tolerance is not None and not 0.0 < tolerance <= 1.0:
        raise typer.BadParameter(f"must be above 0 and at most 1, not {tolerance:g}")
    return tolerance


def _stages_of(file: Path) -> list[str]:
    """Return the names of a cascade file's stages for completion; nothing where it cannot be used."""
    from services.common.settings import SettingsError
    from services.local.cascade_file import CascadeFile

    with suppress(SettingsError):
        return [stage.name for stage in CascadeFile.load(file).stages]
    return []


def _complete_stage(incomplete: str) -> list[str]:
    from services.local.cascade_file import EMBEDDED

    return [name for name in _stages_of(EMBEDDED) if name.startswith(incomplete)]


def _complete_process(context: typer.Context, incomplete: str) -> list[str]:
    from services.local.cascade_file import EMBEDDED, POLICY, ROUTER

    names = (ROUTER, POLICY, *_stages_of(context.params.get("cascade") or EMBEDDED))
    return [name for name in names if name.startswith(incomplete)]


TargetOption = Annotated[
    str,
    typer.Option(
        envvar="ASD_TARGET", metavar="HOST:PORT", callback=_check_target, help="The router of a cascade."
    ),
]
CascadeOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Cascade to run (YAML). Default: the embedded family.", dir_okay=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
TimeoutOption = Annotated[
    float,
    typer.Option(
        parser=number(1, _LONGEST_TIMEOUT_MS),
        metavar="FLOAT",
        help="Deadline of a call, in milliseconds; a day at most.",
    ),
]
PreferenceChoice = Annotated[
    PreferenceOption | None,
    typer.Option(help="What matters: speed or quality. Default: balanced.", show_default=False),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from services.common.version import VERSION

        typer.echo(f"asd {VERSION}")
        raise typer.Exit


@app.callback()
def _asd(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    pass


# Commands that ask a cascade.


@app.command(cls=CheckedCommand, epilog=_EPILOG)
@connected
def ask(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to ask. Standard input where it is - or left out.",
            show_default=False,
        ),
    ] = None,
    target: TargetOption = _DEFAULT_TARGET,
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
        typer.Option(autocompletion=_complete_stage, help="The one stage that must answer; no policy."),
    ] = "",
    chain: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=_complete_stage,
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

    def work() -> Coroutine[Any, Any, None]:
        from asd.values import Acceptance, Message, Objective, Request, Sampling

        text = _read_prompt(prompt)
        request = Request(
            input=(Message("system", system), Message("user", text)) if system else text,
            sampling=Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ())),
            objective=Objective(
                quality_value, max_cost, max_latency_ms, min_quality, preference.value if preference else None
            ),
            acceptance=None if tolerance is None else Acceptance("tolerant", tolerance),
            session_id=session,
            stage=stage,
            chain=tuple(chain or ()),
            task=task,
        )
        show = _write_answer if as_json else _show_answer
        return show(connection.client(target, timeout_ms), request)

    _run(work, as_json=as_json, shows_result=True, options=ASK_OPTIONS)


@app.command(cls=CheckedCommand, epilog=_EPILOG)
@connected
def describe(
    target: TargetOption = _DEFAULT_TARGET,
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
            _write_json(asdict(description))
        else:
            console.output().print(console.description(description))

    _run(work, as_json=as_json, shows_result=True)


@app.command(cls=CheckedCommand, epilog=_EPILOG)
@encrypted
def report(
    answer: Annotated[
        Path,
        typer.Argument(
            help="What `asd ask --json` wrote; - reads standard input.", allow_dash=True, dir_okay=False
        ),
    ],
    is_right: Annotated[bool, typer.Option("--right", help="The answer was right.")] = False,
    is_wrong: Annotated[bool, typer.Option("--wrong", help="The answer was wrong.")] = False,
    policy: Annotated[
        str | None,
        typer.Option(
            envvar="ASD_POLICY",
            metavar="HOST:PORT",
            callback=_check_target,
            help="The policy service of the cascade. Default: one port above --target, as `asd up` has it.",
        ),
    ] = None,
    target: TargetOption = _DEFAULT_TARGET,
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
            _write_json({"request_id": reported.request_id} | asdict(receipt))
        else:
            typer.echo(console.receipt(receipt))

    _run(lambda: send(read_answer(answer), correct=is_right), as_json=as_json)


# Commands that run a cascade.


@app.command(cls=CheckedCommand, epilog=_EPILOG)
def up(
    cascade: CascadeOption = None,
    port_base: Annotated[
        int,
        typer.Option(
            parser=whole_number(1, _HIGHEST_PORT),
            metavar="INTEGER",
            help="Port of the router; the policy takes the next one, stages start 11 above.",
        ),
    ] = _DEFAULT_PORT_BASE,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PROCESS",
            autocompletion=_complete_process,
            help="Run one process: router, policy or a stage's name.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a cascade on this machine until Ctrl-C: router, policy and one process per stage.

    A process that dies is started again.
    """
    _run(lambda: _up(cascade, port_base, only, as_json=as_json), as_json=as_json, is_service=True)


@app.command(cls=CheckedCommand, epilog=_EPILOG)
@connected
def demo(
    context: typer.Context,
    prompts: Annotated[
        int,
        typer.Option(
            parser=whole_number(1, _MOST_DEMO_PROMPTS), metavar="INTEGER", help="How many prompts to send."
        ),
    ] = 60,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            allow_dash=True,
            dir_okay=False,
            help="Write the figures there as JSON; - for standard output, without the tables.",
        ),
    ] = None,
    cascade: CascadeOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            envvar="ASD_TARGET",
            metavar="HOST:PORT",
            callback=_check_target,
            help="Ask a running cascade instead of starting one.",
        ),
    ] = None,
    preference: PreferenceChoice = None,
    timeout_ms: TimeoutOption = 60_000.0,
    *,
    connection: Connection,
) -> None:
    """Ask a cascade and its largest stage graded prompts of every suite and level, and compare them."""
    if target is not None and cascade is not None:
        if _is_typed(context, "target"):
            raise typer.BadParameter("--target and --cascade exclude each other")
        # What was typed wins over the variable.
        target = None
    if json_file is not None and json_file != Path("-"):
        _check_file(json_file)
    _run(
        lambda: _demo(prompts, json_file, cascade, target, preference, timeout_ms, connection),
        as_json=json_file is not None,
        shows_result=json_file in {None, Path("-")},
    )


@models_app.callback(epilog=_EPILOG)
def models(context: typer.Context, cascade: CascadeOption = None, as_json: JsonOption = False) -> None:
    """List the models of a cascade: parameters, size on disk, place."""
    if context.invoked_subcommand is not None:
        context.obj = cascade, as_json
        return

    def work() -> None:
        entries = _models(cascade)
        if as_json:
            _write_json({"models": entries})
            return
        from rich.table import Table

        from services.cli import console

        table = Table("model", "parameters", "size", "place")
        for entry in entries:
            table.add_row(
                entry["name"],
                f"{entry['parameters']:,}",
                f"{entry['size_bytes'] / 1e6:.1f} MB",
                entry["path"],
            )
        console.output().print(table)

    _run(work, as_json=as_json, shows_result=True)


@models_app.command(cls=CheckedCommand, epilog=_EPILOG)
def prepare(context: typer.Context, cascade: CascadeOption = None, as_json: JsonOption = False) -> None:
    """Derive what the engine runs from each model, so that the first start need not. Done once per model."""
    before, is_json = context.obj
    as_json = as_json or is_json
    if cascade is not None and before is not None:
        raise typer.BadParameter("--cascade is there twice: give it once")

    def work() -> None:
        from services.common.extras import check_extras

        check_extras(["stage"])
        onnx_export = _onnx_export()
        prepared = {
            stage.name: str(onnx_export.prepare(stage.path)) for stage in _cascade(cascade or before).stages
        }
        if as_json:
            _write_json({"prepared": prepared})
        else:
            for name, place in prepared.items():
                _say(f"{name}: {place}")

    _run(work, as_json=as_json)


@models_app.command(name="pull", cls=CheckedCommand, epilog=_EPILOG)
def pull_model(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="OWNER/NAME, as the hub has it.")],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIRECTORY", help="Where NAME is put. Default: the cache's `models`."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: the newest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Load a model of the Hugging Face hub and check it. Goes on where it stopped.

    An earlier revision of the model is replaced once the new one is there whole.
    A gated model asks for a token in HF_TOKEN. Needs the extra `hub`.
    """
    cascade, is_json = context.obj
    as_json = as_json or is_json
    if cascade is not None:
        raise typer.BadParameter("--cascade says nothing of what is pulled: leave it out")

    def work() -> None:
        from services.local import pull

        say = (lambda line: None) if as_json else _say
        done = pull.pull(model, to or pull.default_folder(), revision, say=say, shows_bars=not as_json)
        if as_json:
            _write_json(asdict(done) | {"path": str(done.path)})
        else:
            size = f"{done.size_bytes / 1e9:.2f} GB, {done.loaded_bytes / 1e9:.2f} GB loaded now"
            removed = f"; removed, since this revision lacks them: {', '.join(done.removed)}"
            _say(
                f"{done.path}: {done.files} files, {size}, revision {done.revision[:12]}"
                f"{removed if done.removed else ''}"
            )

    _run(work, as_json=as_json)


# What the commands do.


async def _write_answer(client: AsyncClient, request: Request) -> None:
    from services.cli.console import gave_up_quality, is_late

    async with client as cascade:
        answer = await cascade.ask(request)
    objective = request.objective
    missed = {
        "missed_max_latency": is_late(answer, objective.max_latency_ms),
        "missed_min_quality": gave_up_quality(answer, objective.min_quality),
    }
    _write_json(asdict(answer) | missed)


async def _show_answer(client: AsyncClient, request: Request) -> None:
    from services.cli import console

    output = console.output()
    async with client as cascade:
        show = stream_live if output.is_terminal else stream_plain
        answer = await show(cascade, request, output)
    objective = request.objective
    line = console.answer_line(answer, request.task, objective.max_latency_ms, objective.min_quality)
    console.notes().print(line, soft_wrap=True)


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


async def _up(file: Path | None, port_base: int, only: str | None, *, as_json: bool) -> None:
    import asyncio
    import time

    from services.cli import console
    from services.cli.demo import EXAMPLE_PROMPTS
    from services.common.settings import SettingsError
    from services.local.cascade_file import Ports
    from services.local.running import running

    started = time.monotonic()
    cascade = _cascade(file)
    ports = Ports.from_base(port_base, len(cascade.stages))
    if ports.highest > _HIGHEST_PORT:
        raise SettingsError(
            f"--port-base {port_base}: the last stage would get port {ports.highest}, above {_HIGHEST_PORT}"
        )
    async with running(cascade, ports, console.notes(), only=only) as supervisor:
        seconds = time.monotonic() - started
        children = supervisor.children
        if as_json:
            _write_json(
                {
                    "cold_start_s": seconds,
                    "processes": [
                        {
                            "name": child.service.name,
                            "address": child.service.address,
                            "pid": child.pid,
                            "log": str(child.log),
                        }
                        for child in children
                    ],
                }
            )
        else:
            output = console.output()
            output.print(console.processes(children, seconds))
            if only is None:
                target = "" if port_base == _DEFAULT_PORT_BASE else f" --target {children[0].service.address}"
                # Another cascade's models and policy know other questions.
                examples = EXAMPLE_PROMPTS if file is None else EXAMPLE_PROMPTS[:1]
                output.print("To try, in another terminal:")
                for prompt in examples:
                    output.print(f'  asd ask{target} "{prompt}"', soft_wrap=True)
            output.print("Ctrl-C stops everything.")
            output.file.flush()
        await asyncio.Event().wait()


async def _demo(
    prompts: int,
    json_file: Path | None,
    file: Path | None,
    target: str | None,
    preference: PreferenceOption | None,
    timeout_ms: float,
    connection: Connection,
) -> None:
    from asd.values import Objective
    from services.cli import console
    from services.cli.demo import ask_both_ways, choose_tasks, summarise
    from services.local.running import running
    from services.local.supervisor import free_ports

    objective = Objective(preference=preference.value if preference else None)
    notes = console.notes()

    async def collect(asked: AsyncClient) -> list[DemoRow]:
        rows = []
        async with asked as client:
            with console.progress(notes) as bar:
                counting = bar.add_task("asking", total=prompts)
                async for row in ask_both_ways(client, choose_tasks(prompts), objective):
                    rows.append(row)
                    bar.advance(counting)
        return rows

    if target is not None:
        notes.print(f"asking the cascade at {target}")
        rows = await collect(connection.client(target, timeout_ms))
    else:
        cascade = _cascade(file)
        async with running(cascade, free_ports(len(cascade.stages)), notes) as supervisor:
            # What it starts itself listens on this machine, plainly.
            address = supervisor.children[0].service.address
            rows = await collect(Connection().client(address, timeout_ms))
    summary = summarise(rows)
    figures = {**asdict(summary), "rows": [asdict(row) for row in rows]}
    if json_file == Path("-"):
        _write_json(figures)
        return
    output = console.output()
    output.print(console.demo_rows(rows, output.width))
    output.print(console.demo_summary(summary))
    if json_file is not None:
        _write_file(json_file, _json_text(figures))


def _models(file: Path | None) -> list[dict[str, Any]]:
    onnx_export = _onnx_export()
    return [
        {
            "name": stage.name,
            "parameters": onnx_export.read_shape(stage.path).parameters,
            "size_bytes": sum(each.stat().st_size for each in stage.path.glob("*.safetensors")),
            "path": str(stage.path),
        }
        for stage in _cascade(file).stages
    ]


def _onnx_export() -> Any:
    from services.common.extras import explain_missing

    try:
        from services.stage.engines.onnx import export as onnx_export
    except ModuleNotFoundError as error:
        raise explain_missing(error, "stage") from error
    return onnx_export


def _cascade(file: Path | None) -> CascadeFile:
    from services.local.cascade_file import EMBEDDED, read_cascade

    return read_cascade(file or EMBEDDED)


# Input, output and how a command ends.


def _run(
    work: Callable[[], Coroutine[Any, Any, None] | None],
    *,
    as_json: bool = False,
    shows_result: bool = False,
    is_service: bool = False,
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Do a command's work, in an event loop where it is a coroutine; end with a message and a code if it
    fails.

    shows_result: whether the work is in vain where standard output is closed.
    is_service: whether SIGTERM is how the work ends well, once it serves.
    options: from fields of the contract to what was typed.
    """
    import asyncio

    from asd.errors import AsdError
    from services.common import telemetry
    from services.common.settings import SettingsError
    from services.local.running import Signalled
    from services.local.supervisor import LaunchError

    try:
        if shows_result and sys.__stdout__ is None:
            raise AsdError("standard output is closed, so the result would be lost: leave it open")
        _set_up_telemetry()
        runner = asyncio.Runner()
        # Made before Ctrl-C unwinds: half a loop cannot be closed.
        runner.get_loop()
        with Unwinding(), runner:
            coroutine = work()
            if coroutine is not None:
                try:
                    runner.run(coroutine)
                finally:
                    coroutine.close()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Signalled as signalled:
        ends_well = is_service and signalled.has_served and not signalled.is_interrupt
        raise typer.Exit(0 if ends_well else signalled.code) from None
    except BrokenPipeError:
        # Whoever reads our output has seen enough; typer ends quietly.
        raise
    except (AsdError, SettingsError, LaunchError, OSError) as error:
        _fail(error, as_json=as_json, options=options)
    finally:
        telemetry.shutdown_telemetry()


def _set_up_telemetry() -> None:
    from services.common import telemetry
    from services.common.settings import SettingsError

    try:
        telemetry.setup_telemetry("asd-client")
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _fail(error: Exception, *, as_json: bool, options: Mapping[str, str]) -> NoReturn:
    from asd.errors import AsdError, InvalidRequest, NotFound
    from services.common.settings import SettingsError
    from services.common.status import status_of

    is_misuse = isinstance(error, InvalidRequest | NotFound | SettingsError)
    field = error.field if isinstance(error, AsdError) else ""
    message = in_options(_explain(error), field, options)
    option = option_of(field, options)
    if as_json:
        if isinstance(error, AsdError):
            code = status_of(error).name
        else:
            code = "INVALID_ARGUMENT" if is_misuse else "FAILED_PRECONDITION"
        failure = _json_error(code, message, option or field)
        if isinstance(error, AsdError) and error.retry_after_s is not None:
            failure["error"]["retry_after_s"] = error.retry_after_s
        sys.stderr.write(_json_text(failure, sys.stderr.encoding))
    else:
        sys.stderr.write(
            f"asd: {visible(message)}{visible(f' (field {field})') if field and not option else ''}\n"
        )
    raise typer.Exit(MISUSED if is_misuse else FAILED)


def _json_error(code: str, message: str, field: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "field": field}}


def _explain(error: Exception) -> str:
    from asd.errors import Away
    from services.common.disks import explain

    if isinstance(error, OSError):
        return explain(error)
    advice = ": start one with `asd up`, or name another with --target" if isinstance(error, Away) else ""
    return in_tls_options(str(error)) + advice


def _is_typed(context: typer.Context, name: str) -> bool:
    """Return whether a parameter is on the command line, and not from a variable or a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _read_prompt(prompt: str | None) -> str:
    """Return what was typed, or standard input. Raises InvalidRequest where there is neither."""
    from asd.errors import InvalidRequest
    from services.common.validation import MAX_REQUEST_BYTES

    if prompt is not None and prompt != "-":
        return prompt
    missing = InvalidRequest("say what to ask, or send it to standard input", field="prompt")
    if prompt is None and sys.stdin.isatty():
        raise missing
    try:
        # No more than could be asked, however much comes.
        text = sys.stdin.read(MAX_REQUEST_BYTES + 1)
    except UnicodeError as error:
        # A missing byte order mark is a UnicodeError that names no encoding.
        raise InvalidRequest(f"standard input is not {sys.stdin.encoding} text", field="prompt") from error
    if len(text) > MAX_REQUEST_BYTES:
        raise InvalidRequest(
            f"prompt is too long: {MAX_REQUEST_BYTES:,} bytes are the most that a request may have",
            field="prompt",
        )
    if prompt is None and not text:
        raise missing
    return text.removesuffix("\n")


def read_answer(file: Path) -> Answer:
    """Return what `asd ask --json` wrote; -: to standard input. Raises InvalidRequest for anything else."""
    from pydantic import TypeAdapter, ValidationError

    from asd.errors import InvalidRequest
    from asd.values import Answer
    from services.common.documents import read_content

    content = (
        sys.stdin.buffer.read()
        if file == Path("-")
        else read_content(file, _MOST_ANSWER_BYTES, is_pipe_fine=True)
    )
    try:
        return TypeAdapter(Answer).validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise InvalidRequest(
            f"{'standard input' if file == Path('-') else file} is not what `asd ask --json` writes: "
            f"{problem['msg']}",
            field=field,
        ) from error


def _check_file(file: Path) -> None:
    """Refuse a file that cannot be written, before the work whose figures go there."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a directory", param_hint="--json")
    is_new = not file.exists()
    # Opening a pipe would wait for its reader.
    if is_new or file.is_file():
        try:
            file.open("ab").close()
        except OSError as error:
            raise typer.BadParameter(
                f"{file} cannot be written: {(error.strerror or str(error)).lower()}", param_hint="--json"
            ) from error
        if is_new:
            file.unlink()


def _write_file(file: Path, text: str) -> None:
    from services.common.disks import replace_file, writing

    with writing(file, "name another file"):
        replace_file(file, text)


def _say(line: str) -> None:
    typer.echo(visible(line))


def _write_json(value: object) -> None:
    sys.stdout.write(_json_text(value, sys.stdout.encoding))
    sys.stdout.flush()


def _json_text(value: object, encoding: str | None = "utf-8") -> str:
    """Return a value as JSON that a terminal shows and every reader takes for the same value.

    encoding: of where it goes. JSON is UTF-8; in others everything but ASCII is escaped.
    """
    is_utf8 = (encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf8)
    # Of these JSON escapes by itself only the oldest.
    return escape_unseen(text) + "\n"
