"""Compares a running cascade with always asking its largest stage, on graded tasks, in one run.

`python benchmark.py --target HOST:PORT`: needs asd installed (the tools image has it). Every task is asked
both ways, one after the other; which comes first takes turns, since the second finds the prompt in prefix
caches. The log ends with one line of JSON. `python benchmark.py --render LOG` makes a page of it without asd.

Calls are made as ASD_TLS, ASD_TLS_CA, ASD_TLS_CERT, ASD_TLS_KEY, ASD_TLS_SERVER_NAME, ASD_TOKEN and
ASD_TOKEN_FILE say, as the `asd` command does. With `--through gateway`, tasks are asked by HTTP; the router
is only asked what the cascade is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html
import http.client
import itertools
import json
import math
import os
import random
import ssl
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from asd.client import AsyncClient
    from asd.transport.tls import Tls
    from asd.values import Description
    from suites import Task

    Result = dict[str, Any]
    # Answers a prompt, by a stage or, without its name, by the cascade. Raises CallFailed.
    Ask = Callable[[str, str], Awaitable["Answered"]]

CASCADE, LARGEST = "cascade", "largest"
ROUTER, GATEWAY = "router", "gateway"
# The gateway's names of preferences; without one, the policy's own.
MODELS = {"fastest": "asd-fastest", "best": "asd-best"}
# On a fresh release the router may still be starting.
READY_SECONDS = 60.0
# Chosen: a slow cascade says something within a minute, and a log of 500 tasks stays short.
PROGRESS_LINES = 20
# Of the intervals: enough for two digits.
RESAMPLES = 2000
UNSET = "unset"


@dataclass(frozen=True)
class Outcome:
    """One answer. latency_ms: from the call to the whole answer, seen by the client."""

    is_right: bool
    stage: str
    is_early: bool
    latency_ms: float
    cost: float
    plan_source: str


@dataclass(frozen=True)
class Pair:
    """A task that was answered both ways."""

    suite: str
    level: int
    cascade: Outcome
    largest: Outcome


@dataclass(frozen=True)
class Answered:
    """What is read of an answer."""

    text: str
    stage: str
    stage_index: int
    cost: float
    plan_source: str


class CallFailed(Exception):  # noqa: N818 - an error is named by its cause
    """A call failed; the message names the kind."""


class Refused(Exception):  # noqa: N818 - an error is named by its cause
    """The run cannot be made as it was asked for; the message says why."""


# Asking.


async def measure(
    client: AsyncClient, options: argparse.Namespace, gateway: HttpClient | None = None
) -> Result:
    """Return the result of a run. Raises AsdError where the cascade does not answer at all, Refused.

    gateway: asks the tasks in the client's place.
    """
    from suites import split

    described = await _describe(client)
    stages = [each.stage for each in described.stages]
    baseline = options.baseline or stages[-1]
    if baseline not in stages:
        raise Refused(f"--baseline {baseline}: the cascade has the stages {', '.join(stages)}")
    version = described.policy.policy_version if described.policy else ""
    labels = dict(label.split("=", 1) for label in options.label)
    said = labels.get("policy-version", UNSET)
    if said not in {UNSET, version or "none"}:
        raise Refused(f"the label policy-version says {said}, but the policy in force is {version or 'none'}")
    tasks = list(split("evaluation", options.warmup + options.requests, seed=options.seed))
    way_in = gateway.ask if gateway else _by_grpc(client, options.preference)
    ask = _Asking(way_in, baseline, len(stages), options.concurrency)
    await ask.both_ways(tasks[: options.warmup], "warm-up")
    ask.forget()
    started, at = time.monotonic(), time.time()
    await ask.both_ways(tasks[options.warmup :], "measured")
    seconds = time.monotonic() - started
    if not ask.pairs:
        raise Refused(f"no task was answered both ways: {dict(ask.failures)}")
    return {
        "schema": "asd.benchmark/1",
        "asd_version": described.version,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "labels": labels,
        "stages": [{"name": each.stage, "model": each.model, "cost": each.cost} for each in described.stages],
        "policy_version": version,
        "preference": options.preference or "balanced",
        "through": options.through,
        "baseline": baseline,
        "seed": options.seed,
        "warmup": options.warmup,
        "requests": len(ask.pairs),
        "concurrency": options.concurrency,
        "seconds": seconds,
        "requests_per_second": 2 * len(ask.pairs) / seconds,
        "failures": dict(ask.failures),
        **compare(ask.pairs),
    }


async def _describe(client: AsyncClient) -> Description:
    from asd.errors import Unavailable

    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return await client.describe()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            _say("waiting for the router")
            await asyncio.sleep(1.0)


def _by_grpc(client: AsyncClient, preference: str | None) -> Ask:
    from asd.errors import AsdError
    from asd.transport.status import status_of
    from asd.values import Objective, Request

    objective = Objective(preference=preference)

    async def ask(prompt: str, stage: str) -> Answered:
        request = Request(prompt, stage=stage) if stage else Request(prompt, objective=objective)
        try:
            answer = await client.ask(request)
        except AsdError as error:
            raise CallFailed(status_of(error).name) from error
        return Answered(answer.text, answer.stage, answer.stage_index, answer.cost, answer.plan_source)

    return ask


class HttpClient:
    """Asks the gateway, over one connection for each task under way. Close it.

    address: HOST:PORT. tls: None for plain HTTP; its server name is the router's, and is not used.
    """

    def __init__(self, address: str, options: argparse.Namespace, tls: Tls | None, token: str) -> None:
        self._address = address
        self._model = MODELS.get(options.preference, "asd")
        self._timeout_s = options.timeout_ms / 1000.0
        self._trust = _trust(tls) if tls else None
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._threads = ThreadPoolExecutor(options.concurrency)
        self._idle: list[http.client.HTTPConnection] = []

    async def ask(self, prompt: str, stage: str) -> Answered:
        """Return an answer; see Ask."""
        body = json.dumps({"model": stage or self._model, "prompt": prompt})
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, self._post, body)
        told = found["asd"]
        return Answered(
            found["choices"][0]["text"], told["stage"], told["stage_index"], told["cost"], told["plan_source"]
        )

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        for connection in self._idle:
            connection.close()

    def _post(self, body: str) -> Any:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            connection.request("POST", "/v1/completions", body, self._headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise CallFailed(type(error).__name__) from error
        self._idle.append(connection)
        if response.status != http.HTTPStatus.OK:
            raise CallFailed(f"HTTP {response.status}")
        return json.loads(content)

    def _connect(self) -> http.client.HTTPConnection:
        if self._trust:
            return http.client.HTTPSConnection(self._address, timeout=self._timeout_s, context=self._trust)
        return http.client.HTTPConnection(self._address, timeout=self._timeout_s)


def _trust(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


class _Asking:
    """Asks tasks both ways, several at once."""

    def __init__(self, ask: Ask, baseline: str, stage_count: int, concurrency: int) -> None:
        self.pairs: list[Pair] = []
        self.failures: Counter[str] = Counter()
        self._way_in = ask
        self._baseline = baseline
        self._last = stage_count - 1
        self._concurrency = concurrency

    def forget(self) -> None:
        """Forget what was asked so far."""
        self.pairs.clear()
        self.failures.clear()

    async def both_ways(self, tasks: Sequence[Task], what: str) -> None:
        """Ask each task, and say how far it is. A failed call is counted, and its task left out."""
        step = max(len(tasks) // PROGRESS_LINES, 1)
        done = itertools.count(1)
        waiting: Iterator[tuple[Task, tuple[str, str]]] = zip(
            tasks, itertools.cycle(((CASCADE, LARGEST), (LARGEST, CASCADE))), strict=False
        )

        async def work() -> None:
            for task, ways in waiting:
                outcomes = {way: await self._ask(task, way) for way in ways}
                cascade, largest = outcomes[CASCADE], outcomes[LARGEST]
                if cascade is not None and largest is not None:
                    self.pairs.append(Pair(task.suite, task.level, cascade, largest))
                count = next(done)
                if count % step == 0 or count == len(tasks):
                    failed = f", {self.failures.total()} calls failed" if self.failures else ""
                    _say(f"{what}: {count} of {len(tasks)} tasks{failed}")

        await asyncio.gather(*(work() for _ in range(self._concurrency)))

    async def _ask(self, task: Task, way: str) -> Outcome | None:
        from suites import grade

        started = time.perf_counter()
        try:
            answer = await self._way_in(task.prompt, "" if way == CASCADE else self._baseline)
        except CallFailed as error:
            self.failures[f"{way}: {error}"] += 1
            return None
        return Outcome(
            is_right=grade(task, answer.text),
            stage=answer.stage,
            is_early=answer.stage_index < self._last,
            latency_ms=(time.perf_counter() - started) * 1000.0,
            cost=answer.cost,
            plan_source=answer.plan_source,
        )


def _say(text: str) -> None:
    # To the stream of the result, whose JSON must be a log's last line: two streams might mix.
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# Figures.


def compare(pairs: Sequence[Pair]) -> Result:
    """Return the figures of both ways, and of the cascade as shares of the largest stage's."""
    cascade, largest = [pair.cascade for pair in pairs], [pair.largest for pair in pairs]
    of_cascade, of_largest = _figures(cascade), _figures(largest)
    by_suite: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_suite.setdefault(pair.suite, []).append(pair)
    return {
        CASCADE: of_cascade,
        LARGEST: of_largest,
        "early_stop_share": _mean(each.is_early for each in cascade),
        "ratios": {
            "cost": _ratio(pairs, lambda each: each.cost),
            "mean_latency": _ratio(pairs, lambda each: each.latency_ms),
            "share_right": _ratio(pairs, lambda each: each.is_right),
            "p95_latency": {"value": of_cascade["latency_ms"]["p95"] / of_largest["latency_ms"]["p95"]},
        },
        "suites": {
            suite: {
                "requests": len(some),
                "early_stop_share": _mean(each.cascade.is_early for each in some),
                "share_right": _mean(each.cascade.is_right for each in some),
                "share_right_largest": _mean(each.largest.is_right for each in some),
                "cost_ratio": _mean(each.cascade.cost for each in some)
                / _mean(each.largest.cost for each in some),
            }
            for suite, some in sorted(by_suite.items())
        },
    }


def _figures(outcomes: Sequence[Outcome]) -> Result:
    from services.common.stats import percentile

    latencies = sorted(each.latency_ms for each in outcomes)
    return {
        "share_right": _mean(each.is_right for each in outcomes),
        "mean_cost": _mean(each.cost for each in outcomes),
        "latency_ms": {
            "mean": statistics.fmean(latencies),
            **{f"p{share}": percentile(latencies, share / 100) for share in (50, 90, 95, 99)},
            "percentiles": [round(percentile(latencies, share / 100), 3) for share in range(101)],
        },
        "answering_stage": dict(Counter(each.stage for each in outcomes)),
        "plan_source": dict(Counter(each.plan_source for each in outcomes)),
    }


def _mean(values: Iterator[float]) -> float:
    return statistics.fmean(values)


def _ratio(pairs: Sequence[Pair], read: Callable[[Outcome], float]) -> Result:
    """Return the ratio of means, cascade / largest, with a 95% interval from resampled tasks."""
    values = [(read(pair.cascade), read(pair.largest)) for pair in pairs]
    below = sum(right for _, right in values)
    if below == 0.0:
        return {"value": None, "low": None, "high": None}
    draw = random.Random(0)  # noqa: S311 - resampling, not secrecy
    ratios = []
    for _ in range(RESAMPLES):
        left, right = map(sum, zip(*draw.choices(values, k=len(values)), strict=True))
        if right > 0.0:
            ratios.append(left / right)
    ratios.sort()
    low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.025, 0.975))
    return {"value": sum(left for left, _ in values) / below, "low": low, "high": high}


# Showing.


def summary(result: Result) -> str:
    """Return a result as text for a log."""
    rows: list[tuple[str, ...]] = [("", CASCADE, f"always {result['baseline']}", "ratio")]
    rows += _table(result)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in cells)
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    return "\n".join([*lines, "", *_remarks(result)])


def _table(result: Result) -> list[tuple[str, ...]]:
    left, right, ratios = result[CASCADE], result[LARGEST], result["ratios"]
    latency = left["latency_ms"], right["latency_ms"]
    return [
        (
            "right answers",
            *(f"{each['share_right']:.1%}" for each in (left, right)),
            _interval(ratios["share_right"]),
        ),
        (
            "mean cost, units",
            *(f"{each['mean_cost']:.2f}" for each in (left, right)),
            _interval(ratios["cost"]),
        ),
        ("mean latency, ms", *(f"{each['mean']:.1f}" for each in latency), _interval(ratios["mean_latency"])),
        *(
            (
                f"{name} latency, ms",
                *(f"{each[name]:.1f}" for each in latency),
                f"{latency[0][name] / latency[1][name]:.2f}",
            )
            for name in ("p50", "p95", "p99")
        ),
    ]


def _interval(ratio: Result) -> str:
    if ratio["value"] is None:
        return "–"
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _remarks(result: Result) -> list[str]:
    answered = result[CASCADE]["answering_stage"]
    mix = ", ".join(f"{stage['name']} {answered.get(stage['name'], 0)}" for stage in result["stages"])
    lines = [
        f"{result['early_stop_share']:.1%} of the answers came before the last stage ({mix})",
        f"{result['requests']} tasks, each asked both ways in turn, {result['concurrency']} at once, "
        f"seed {result['seed']}; policy {result['policy_version'] or 'none'}; 95% intervals in brackets",
    ]
    static = result[CASCADE]["plan_source"].get("static", 0)
    if static:
        lines.append(
            f"{static} of {result['requests']} answers followed the static plan: the policy was away, "
            "or later than the chart's policy.timeoutMs (100 by default): raise it on a busy node"
        )
    if result["failures"]:
        told = ", ".join(f"{count} × {name}" for name, count in sorted(result["failures"].items()))
        lines.append(f"FAILED calls: {told}; their tasks are left out of every figure")
    return lines


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; max-width: 860px; margin: 2.5rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr + tr { border-top: 1px solid #dde3ea }
.cards { display: flex; gap: 1rem; flex-wrap: wrap } .card { flex: 1; min-width: 9rem; background: #f2f5f8;
border-radius: .5rem; padding: .8rem 1rem } .card b { display: block; font-size: 1.6rem }
.failed { background: #fde8e4; padding: .6rem 1rem; border-radius: .5rem } small { color: #5a6775 }
svg text { font: 12px system-ui, sans-serif; fill: #5a6775 }
@media (prefers-color-scheme: dark) { body { background: #12171d; color: #dde5ee }
.card { background: #1d252e }
tr + tr { border-color: #2a343f } .failed { background: #4a211b } }
"""
_COLOURS = {CASCADE: "#1273c4", LARGEST: "#c4571d"}


def page(result: Result) -> str:
    """Return a result as one HTML page that loads nothing."""
    escape = html.escape
    ratios, labels = result["ratios"], result["labels"]
    cost, latency = ratios["cost"]["value"], ratios["mean_latency"]["value"]
    cards = [
        (f"{result['early_stop_share']:.0%}", "answered before the last stage"),
        (f"{cost:.0%}", f"of the cost of always asking {result['baseline']}"),
        (f"{1 / latency:.2f} ×", "as fast, by the mean latency"),
        (
            f"{result[CASCADE]['share_right']:.1%}",
            f"right answers ({result['baseline']}: {result[LARGEST]['share_right']:.1%})",
        ),
    ]
    shown = "".join(f"<div class=card><b>{escape(big)}</b>{escape(small)}</div>" for big, small in cards)
    head = _html_row(("", CASCADE, f"always {result['baseline']}", "ratio (95% interval)"), "th")
    suites = [
        (
            name,
            str(each["requests"]),
            f"{each['share_right']:.1%}",
            f"{each['share_right_largest']:.1%}",
            f"{each['early_stop_share']:.1%}",
            f"{each['cost_ratio']:.2f}",
        )
        for name, each in result["suites"].items()
    ]
    suite_head = _html_row(
        ("suite", "tasks", "right", f"{result['baseline']} right", "early stops", "cost ratio"), "th"
    )
    facts = {
        "started": result["started"],
        "asd": result["asd_version"],
        "policy": result["policy_version"] or "none",
        "stages": " → ".join(f"{each['name']} ({each['model'] or 'away'})" for each in result["stages"]),
        "preference": result["preference"],
        "asked through": result.get("through", ROUTER),
        "warm-up tasks": result["warmup"],
        **labels,
    }
    remarks = "".join(
        f"<p{' class=failed' if line.startswith('FAILED') else ''}>{escape(line)}</p>"
        for line in _remarks(result)
    )
    # A page may hold "</script>" in a name.
    data = json.dumps(result).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>asd benchmark, {escape(result["started"])}</title><style>{_STYLE}</style></head><body>
<h1>asd benchmark: cascade against always {escape(result["baseline"])}</h1>
<div class="cards">{shown}</div>
{remarks}
<h2>Both ways</h2><table>{head}{"".join(_html_row(row) for row in _table(result))}</table>
<h2>Latency: share of answers within a time</h2>{_plot(result)}
<h2>Answering stage</h2>{_bars(result)}
<h2>By suite</h2><table>{suite_head}{"".join(_html_row(row) for row in suites)}</table>
<h2>The run</h2><table>{"".join(_html_row((name, str(value))) for name, value in facts.items())}</table>
<script type="application/json" id="result">{data}</script>
</body></html>
"""


def _html_row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _plot(result: Result) -> str:
    """Return the two distributions of latencies; the axis of times is logarithmic."""
    width, height, left, bottom = 820, 280, 45, 30
    curves = {way: result[way]["latency_ms"]["percentiles"] for way in (CASCADE, LARGEST)}
    low = math.log10(max(min(curve[0] for curve in curves.values()), 0.01))
    high = max(math.log10(max(curve[-1] for curve in curves.values())), low + 0.1)

    def x(milliseconds: float) -> float:
        place = (math.log10(max(milliseconds, 0.01)) - low) / (high - low)
        return left + place * (width - left - 10)

    def y(share: float) -> float:
        return 10 + (1 - share) * (height - bottom - 10)

    parts = []
    for share in (0.0, 0.5, 0.95, 1.0):
        parts.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#8892" />'
        )
        parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    ticks = [
        factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)
    ]
    for tick in ticks:
        if low <= math.log10(tick) <= high:
            parts.append(
                f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="10" y2="{y(0):.1f}" stroke="#8892" />'
            )
            parts.append(f'<text x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{tick:g} ms</text>')
    for place, (way, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(value):.1f},{y(share / 100):.1f}" for share, value in enumerate(curve))
        parts.append(f'<polyline fill="none" stroke="{_COLOURS[way]}" stroke-width="2" points="{points}" />')
        name = way if way == CASCADE else f"always {result['baseline']}"
        style = f'style="fill:{_COLOURS[way]}"'
        parts.append(f'<text x="{left + 12}" y="{28 + 18 * place}" {style}>{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="100%" role="img">{"".join(parts)}</svg>'


def _bars(result: Result) -> str:
    answered = result[CASCADE]["answering_stage"]
    parts, most = [], max(answered.values())
    for place, stage in enumerate(result["stages"]):
        count, top = answered.get(stage["name"], 0), 26 * place
        width, share = 560 * count / most, count / result["requests"]
        box = f'y="{top + 2}" width="{width:.1f}" height="20" fill="{_COLOURS[CASCADE]}"'
        parts.append(f'<text x="110" y="{top + 16}" text-anchor="end">{html.escape(stage["name"])}</text>')
        parts.append(f'<rect x="120" {box} />')
        parts.append(f'<text x="{128 + width:.1f}" y="{top + 16}">{share:.1%}</text>')
    return (
        f'<svg viewBox="0 0 820 {26 * len(result["stages"])}" width="100%" role="img">{"".join(parts)}</svg>'
    )


def write_files(result: Result, folder: Path) -> None:
    """Write result.json and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(result), encoding="utf-8")


def read_result(file: Path) -> Result:
    """Return the result in a result.json, or at the end of a log."""
    text = file.read_text(encoding="utf-8").strip()
    result: Result = json.loads(text if text.startswith("{") else text.splitlines()[-1])
    return result


# The command.


async def _run(options: argparse.Namespace) -> Result:
    from services.cli.connecting import Connection

    files = {
        name: os.environ.get(f"ASD_{name.upper()}")
        for name in ("tls_ca", "tls_cert", "tls_key", "token_file")
    }
    connection = Connection(
        tls=os.environ.get("ASD_TLS", "").lower() in {"1", "true", "yes", "on"},
        tls_server_name=os.environ.get("ASD_TLS_SERVER_NAME", ""),
        token=os.environ.get("ASD_TOKEN", ""),
        **{name: Path(value) for name, value in files.items() if value},
    )
    async with connection.client(options.target, options.timeout_ms) as client:
        if options.through == ROUTER:
            return await measure(client, options)
        tls, token = connection.client_tls(), connection.read_token()
        with contextlib.closing(HttpClient(options.gateway, options, tls, token)) as gateway:
            return await measure(client, options, gateway)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument(
        "--target", default="", help="the router: HOST:PORT, or dns:///HOST:PORT for all of its pods"
    )
    parser.add_argument("--gateway", default="", help="the gateway: HOST:PORT")
    parser.add_argument(
        "--through", choices=(ROUTER, GATEWAY), default=ROUTER, help="what is asked the tasks: default router"
    )
    parser.add_argument("--requests", type=int, default=500, help="tasks measured, each asked both ways")
    parser.add_argument("--warmup", type=int, default=50, help="tasks before, not measured")
    parser.add_argument("--concurrency", type=int, default=4, help="tasks under way at once")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--baseline", default="", help="stage to compare with; default: the last one")
    parser.add_argument("--preference", choices=("fastest", "balanced", "best"), help="default: the policy's")
    parser.add_argument("--timeout-ms", type=float, default=60_000.0, help="deadline of one call")
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME=VALUE", help="kept in the result"
    )
    parser.add_argument("--out", type=Path, help="folder for result.json and report.html")
    parser.add_argument("--render", type=Path, metavar="LOG", help="write the page of a log or result")
    options = parser.parse_args(arguments)
    if bool(options.target) == bool(options.render):
        parser.error("give either --target or --render")
    if options.through == GATEWAY and not options.gateway:
        parser.error("--through gateway wants --gateway")
    if min(options.requests, options.concurrency) < 1 or options.warmup < 0 or not options.timeout_ms > 0:
        parser.error(
            "--requests and --concurrency must be 1 or more, --warmup 0 or more, --timeout-ms above 0"
        )
    if any("=" not in label for label in options.label):
        parser.error("--label wants NAME=VALUE")
    return options


def main() -> None:
    """Measure, and print what came of it. Ends with 1 where a call failed: the figures are then partial."""
    options = parse()
    if options.render:
        sys.stdout.write(page(read_result(options.render)))
        return
    from asd.errors import AsdError, Unavailable
    from services.common.settings import SettingsError

    try:
        result = asyncio.run(_run(options))
    except Unavailable as error:
        # Of a Job the target is made of a name that may be another release's.
        hint = "; is RELEASE in parameters.env your release?" if "RELEASE" in os.environ else ""
        sys.exit(f"{options.target}: {error}{hint}")
    except (AsdError, Refused, SettingsError, OSError) as error:
        sys.exit(f"{options.target}: {error}")
    if options.out:
        write_files(result, options.out)
    sys.stdout.write(f"{summary(result)}\n\n{json.dumps(result)}\n")
    if result["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
