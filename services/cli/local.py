"""The commands that run a cascade on this machine, and prepare what it needs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.arguments import whole_number
from services.cli.connecting import Connection, connected
from services.cli.ending import run_command
from services.cli.files import check_file, write_file
from services.cli.options import (
    CascadeOption,
    JsonOption,
    PreferenceChoice,
    PreferenceOption,
    TimeoutOption,
    check_target_option,
    complete_process,
    is_typed,
)
from services.cli.output import json_text, say, write_json

if TYPE_CHECKING:
    from asd.client import AsyncClient
    from services.cli.demo import DemoRow
    from services.local.cascade_file import CascadeFile, Ports

_DEFAULT_PORT_BASE = 50_050
_DEFAULT_GATEWAY_PORT = 8000
_HIGHEST_PORT = 65_535
# A demo keeps its rows in memory. Chosen.
_MOST_DEMO_PROMPTS = 100_000


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
    gateway_port: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1, _HIGHEST_PORT),
            metavar="INTEGER",
            help="Port of the HTTP gateway. Default: the cascade file's, or 8000, or with another "
            "--port-base 2 above it.",
        ),
    ] = None,
    no_gateway: Annotated[bool, typer.Option("--no-gateway", help="Start no HTTP gateway.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PROCESS",
            autocompletion=complete_process,
            help="Run one process: router, policy, gateway or a stage's name.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a cascade on this machine until Ctrl-C: router, policy, HTTP gateway and one process per stage.

    A process that dies is started again.
    """
    if no_gateway and gateway_port is not None:
        raise typer.BadParameter("--gateway-port and --no-gateway exclude each other")
    run_command(
        lambda: _up(cascade, port_base, gateway_port, only, has_gateway=not no_gateway, as_json=as_json),
        as_json=as_json,
        is_service=True,
    )


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
            callback=check_target_option,
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
        if is_typed(context, "target"):
            raise typer.BadParameter("--target and --cascade exclude each other")
        # What was typed wins over the variable.
        target = None
    if json_file is not None and json_file != Path("-"):
        check_file(json_file)
    run_command(
        lambda: _demo(prompts, json_file, cascade, target, preference, timeout_ms, connection),
        as_json=json_file is not None,
        shows_result=json_file in {None, Path("-")},
    )


def models(context: typer.Context, cascade: CascadeOption = None, as_json: JsonOption = False) -> None:
    """List the models of a cascade: parameters, size on disk, place."""
    if context.invoked_subcommand is not None:
        context.obj = cascade, as_json
        return

    def work() -> None:
        entries = _models(cascade)
        if as_json:
            write_json({"models": entries})
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

    run_command(work, as_json=as_json, shows_result=True)


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
            write_json({"prepared": prepared})
        else:
            for name, place in prepared.items():
                say(f"{name}: {place}")

    run_command(work, as_json=as_json)


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

        tell = (lambda line: None) if as_json else say
        done = pull.pull(model, to or pull.default_folder(), revision, say=tell, shows_bars=not as_json)
        if as_json:
            write_json(asdict(done) | {"path": str(done.path)})
        else:
            size = f"{done.size_bytes / 1e9:.2f} GB, {done.loaded_bytes / 1e9:.2f} GB loaded now"
            removed = f"; removed, since this revision lacks them: {', '.join(done.removed)}"
            say(
                f"{done.path}: {done.files} files, {size}, revision {done.revision[:12]}"
                f"{removed if done.removed else ''}"
            )

    run_command(work, as_json=as_json)


async def _up(
    file: Path | None,
    port_base: int,
    gateway_port: int | None,
    only: str | None,
    *,
    has_gateway: bool,
    as_json: bool,
) -> None:
    import asyncio
    import os
    import time

    from services.cli import console
    from services.cli.demo import EXAMPLE_PROMPTS
    from services.local.running import TELL_EVERY_S, running

    started = time.monotonic()
    cascade = _cascade(file)
    ports = _ports(cascade, port_base, gateway_port, has_gateway=has_gateway)
    notes = console.notes()
    if not as_json:
        for warning in cascade.warnings():
            notes.print(f"warning: {warning}", soft_wrap=True)
    # With --json, standard error holds nothing but a failure.
    tell_every_s = None if as_json else TELL_EVERY_S
    async with running(cascade, ports, notes, only=only, tell_every_s=tell_every_s) as supervisor:
        seconds = time.monotonic() - started
        children = supervisor.children
        if as_json:
            write_json(
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
                target = "" if port_base == _DEFAULT_PORT_BASE else children[0].service.address
                # Another cascade's models and policy know other questions.
                examples = EXAMPLE_PROMPTS if file is None else EXAMPLE_PROMPTS[:1]
                output.print("To try, in another terminal:")
                for prompt in examples:
                    output.print(console.ask_line(target, prompt, os.environ), soft_wrap=True)
                if ports.gateway is not None:
                    line = console.curl_line(ports.gateway, examples[0], os.environ)
                    output.print(line, soft_wrap=True)
            output.print("Ctrl-C stops everything.")
            output.file.flush()
        await asyncio.Event().wait()


def _ports(cascade: CascadeFile, base: int, gateway_port: int | None, *, has_gateway: bool) -> Ports:
    """Return the ports of `asd up`. Raises SettingsError for those that do not fit."""
    from services.common.settings import SettingsError
    from services.local.cascade_file import Ports

    ports = Ports.from_base(base, len(cascade.stages))
    if ports.highest > _HIGHEST_PORT:
        raise SettingsError(
            f"--port-base {base}: the last stage would get port {ports.highest}, above {_HIGHEST_PORT}"
        )
    if not has_gateway:
        return ports
    # A second cascade, which has another base, does not meet the first one's gateway.
    usual = _DEFAULT_GATEWAY_PORT if base == _DEFAULT_PORT_BASE else base + 2
    port = gateway_port or cascade.gateway.port or usual
    if port in {ports.router, ports.policy, *ports.stages}:
        raise SettingsError(
            f"port {port}, for the gateway, is another process's: choose another with --gateway-port"
        )
    return replace(ports, gateway=port)


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
    from services.local.running import TELL_EVERY_S, running
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
        ports = free_ports(len(cascade.stages))
        tell_every_s = TELL_EVERY_S if json_file is None else None
        async with running(cascade, ports, notes, tell_every_s=tell_every_s) as supervisor:
            # What it starts itself listens on this machine, plainly.
            address = supervisor.children[0].service.address
            rows = await collect(Connection().client(address, timeout_ms))
    summary = summarise(rows)
    figures = {**asdict(summary), "rows": [asdict(row) for row in rows]}
    if json_file == Path("-"):
        write_json(figures)
        return
    output = console.output()
    output.print(console.demo_rows(rows, output.width))
    output.print(console.demo_summary(summary))
    if json_file is not None:
        write_file(json_file, json_text(figures))


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
