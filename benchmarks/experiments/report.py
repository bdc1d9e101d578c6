"""One HTML page of everything, with nothing outside it: it opens offline."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.grid import GROUPS, QUALITY_VALUES, SEEDS, fixed_way, policy_way

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.experiments.grid import ExperimentResult
    from benchmarks.experiments.measure import CurveMark, Measured
    from benchmarks.stats import Interval

# What the research system reported of itself: the largest model for every prompt, whatever the value.
RESEARCH_COST, RESEARCH_LATENCY_S, RESEARCH_R2 = 8.8, 3.9, 0.489

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470; --line: #d8dde3;
  --card: #f4f6f8; --good: #0a6b4f; --bad: #a33a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #15181c; --soft: #a3adb8;
  --line: #363d46; --card: #1f242a; --good: #57cba6; --bad: #ff9d66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.2rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p, li { max-width: 46rem; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; padding: 0; list-style: none; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.25rem; }
.yes { color: var(--good); } .no { color: var(--bad); }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .5rem;
  border: 1px solid var(--line); padding: .5rem; }
figcaption { margin-top: .5rem; max-width: 46rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { color: var(--soft); }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""

_CAPTIONS = {
    "pareto": (
        "Quality against cost and latency",
        "Right answers against mean cost (left) and mean latency (right): up and to the left is better. The "
        "scale of right answers spreads what lies close to 100%. The policy knows no outcome. Thresholds "
        "were chosen with all outcomes known, so they are a hard rival; the oracle takes the cheapest way to "
        "a right answer.",
    ),
    "lambda": (
        "What λ does",
        "The policy over all prompts as λ rises, in cost units below the plots and in answers of the largest "
        "stage above them. Points: the four values of the grid, with the interval over runs.",
    ),
    "stages": (
        "Who answers, by complexity",
        "Share of answers that come from each stage, for each level of complexity. A later stage answers "
        "after an escalation, or because it was asked first.",
    ),
    "levels": (
        "By complexity level",
        "Means over runs; bands are 95% intervals. Grey: the largest stage alone, for simple, medium and "
        "complex prompts.",
    ),
    "reliability": (
        "Whether predictions mean what they say",
        "Predicted and actual share of right answers, for whatever the policy can know when it decides. "
        "On the line, predictions are right; above it, they are too cautious. Bins in which every answer was "
        "right lie on the upper edge.",
    ),
}


def render_report(measured: Measured, plots: Mapping[str, Path], record: Mapping[str, Any]) -> str:
    """Return the page. plots: PNG files by what they show. record: experiments.json."""
    body = [
        "<h1>Does the policy respond to what a right answer is worth?</h1>",
        f'<p class="soft">{len(measured.results)} experiments of {len(SEEDS)} runs each over '
        f"{measured.prompts:,} held-out prompts; policy {escape(measured.policy_version)}.</p>",
        *_explanation(measured),
        "<h2>Beside the research system</h2>",
        *_comparison(measured),
        *(_figure(name, plots[name]) for name in _CAPTIONS),
        "<h2>Tables</h2>",
        *_tables(measured),
        "<h2>How it was measured</h2>",
        *_method(measured),
        _footer(record),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>asd: experiments</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        # A line does not break inside "λ = 1".
        + "\n".join(body).replace("λ = ", "λ\u00a0=\u00a0")
        + "\n</body>\n</html>\n"
    )


def verdicts(measured: Measured) -> list[tuple[str, bool, str]]:
    """Return each check of the response to λ: what, whether it holds, and the figures."""
    response = measured.response
    summaries = [measured.at(value).summary for value in QUALITY_VALUES]
    costs = " → ".join(f"{each.cost.mean:.3f}" for each in summaries)
    accuracies = " → ".join(f"{each.accuracy.mean:.2%}" for each in summaries)
    closest = f"the closest two differ in {response.smallest_distance:.1%} of the answers"
    return [
        ("Cost never falls as λ rises", response.is_non_decreasing("cost"), f"{costs} cost units"),
        ("Quality never falls as λ rises", response.is_non_decreasing("accuracy"), f"{accuracies} right"),
        ("Every λ has its own stage mix", response.is_distinct, closest),
    ]


def _explanation(measured: Measured) -> list[str]:
    largest = measured.cascade[-1]
    cards = "".join(
        f'<li class="card"><span>{escape(what)}</span><b class="{"yes" if holds else "no"}">'
        f"{'yes' if holds else 'no'}</b><small>{escape(figures)}</small></li>"
        for what, holds, figures in verdicts(measured)
    )
    return [
        "<p><b>What was asked.</b> λ says what a right answer is worth. A policy that listens to it spends "
        "more and is right more often as λ rises, and lets other stages answer. The research system did not: "
        "it chose its 70B for every prompt at every λ. The same grid was run here: λ of "
        f"{_listed(f'{value:g}' for value in QUALITY_VALUES)} on 15 levels of complexity, and each stage "
        "alone on simple, medium and complex prompts.</p>",
        f"<p><b>What λ counts.</b> The research grid's λ has no unit. Here it is read in answers of "
        f"<i>{escape(largest)}</i>: at λ = 1 a right answer is worth one answer of {escape(largest)}, "
        f"{measured.unit:g} cost units. The contract's <code>lambda</code> is in cost units; a table below "
        "has it so.</p>",
        "<p><b>What came out.</b></p>",
        f'<ul class="cards">{cards}</ul>',
        f"<p>{escape(_in_words(measured))}</p>",
        f"<p><b>What falls short.</b> {escape(_shortcomings(measured))}</p>",
    ]


def _in_words(measured: Measured) -> str:
    first, last = (measured.at(value).summary for value in (QUALITY_VALUES[0], QUALITY_VALUES[-1]))
    largest = measured.fixed[-1]
    return (
        f"From λ = {QUALITY_VALUES[0]:g} to {QUALITY_VALUES[-1]:g}, right answers go from "
        f"{first.accuracy.mean:.1%} to {last.accuracy.mean:.1%}, the mean cost from {first.cost.mean:.2f} to "
        f"{last.cost.mean:.2f} units and the mean latency from {first.latency_ms.mean:.1f} to "
        f"{last.latency_ms.mean:.1f} ms. {largest.name.capitalize()} is right in {largest.accuracy:.1%}, for "
        f"{largest.cost:.2f} units and {largest.latency_ms:.1f} ms. So λ = {QUALITY_VALUES[-1]:g} keeps "
        f"{last.accuracy.mean / largest.accuracy:.1%} of its quality at {last.cost.mean / largest.cost:.0%} "
        f"of its cost, and {last.early_stop_share.mean:.0%} of the answers come before it."
    )


def _shortcomings(measured: Measured) -> str:
    """Say what does not hold everywhere, and who comes close."""
    sentences = []
    cheapest = measured.fixed[0]
    worthless = [f"{value:g}" for value in QUALITY_VALUES if value < cheapest.cost]
    if len(worthless) > 1:
        sentences.append(
            f"Read in cost units, the λ of the grid are not all distinct: at {_listed(worthless)} a right "
            f"answer is worth less than the cheapest one costs ({cheapest.cost:g}), and all prompts get that."
        )
    for level, response in measured.response_by_level.items():
        for fall in response.falls:
            beyond = "more than" if fall.is_beyond_chance else "no more than"
            sentences.append(
                f"At level {level} {fall.metric} falls from {_figure_of(fall.metric, fall.before)} at "
                f"λ = {fall.low_value:g} to {_figure_of(fall.metric, fall.after)} at "
                f"λ = {fall.high_value:g}, {beyond} chance explains."
            )
    alike = [level for level, response in measured.response_by_level.items() if not response.is_distinct]
    if alike:
        sentences.append(
            f"Taken alone, level{'s' if len(alike) > 1 else ''} {_listed(map(str, alike))} "
            f"{'have' if len(alike) > 1 else 'has'} values of λ whose stage mixes cannot be told apart."
        )
    if measured.response.runs_that_fall:
        seeds = _listed(map(str, measured.response.runs_that_fall))
        sentences.append(f"In the runs of seed {seeds}, cost or quality falls somewhere over all levels.")
    balanced = next(point for point in measured.preferences if point.name == "balanced")
    rivals = [point for point in measured.thresholds if point.accuracy >= balanced.accuracy]
    if rivals:
        sentences.append(
            f"A fixed threshold, chosen with hindsight, comes close: {rivals[0].accuracy:.2%} right for "
            f"{rivals[0].cost:.3f} units, beside {balanced.accuracy:.2%} for {balanced.cost:.3f} of the "
            "balanced preference."
        )
    return " ".join(sentences)


def _figure_of(metric: str, value: float) -> str:
    return f"{value:.2%}" if metric == "accuracy" else f"{value:.3f}"


def _comparison(measured: Measured) -> list[str]:
    rows = [
        [
            group,
            f"{RESEARCH_COST:g}",
            *(_cost_and_mix(by_way[policy_way(value)]) for value in QUALITY_VALUES),
            f"{by_way[fixed_way(measured.cascade[-1])].summary.cost.mean:.2f}",
        ]
        for group, by_way in measured.by_group.items()
    ]
    best = max(measured.reliability, key=lambda view: view.r2)
    prompt = measured.reliability[0]
    return [
        _table(
            "Mean cost, units; below it, the answers by stage: " + ", ".join(measured.cascade) + ".",
            [
                "prompts",
                "research, every λ",
                *(f"λ = {value:g}" for value in QUALITY_VALUES),
                f"always {measured.cascade[-1]}",
            ],
            rows,
        ),
        f"<p>The research system spent {RESEARCH_COST:g} units and about {RESEARCH_LATENCY_S:g} s on every "
        f"prompt, 100% of them with its 70B, at each of the four λ. Its latencies are of other models on "
        "other machines and cannot be compared; that they do not change with λ or complexity can. The R² of "
        f"its predictor was {RESEARCH_R2:g}; here it is {prompt.r2:.3f} from the prompt alone and up to "
        f"{best.r2:.3f} ({escape(best.view)}), on other prompts and other models.</p>",
    ]


def _cost_and_mix(result: ExperimentResult) -> str:
    summary = result.summary
    mix = " / ".join(f"{share.mean:.0%}" for share in summary.mix)
    return f"{summary.cost.mean:.2f}<br><small>{mix}</small>"


def _figure(name: str, path: Path) -> str:
    title, caption = _CAPTIONS[name]
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<h2>{escape(title)}</h2>\n<figure><img alt="{escape(title)}. {escape(caption)}" '
        f'src="data:image/png;base64,{content}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _tables(measured: Measured) -> list[str]:
    stages = list(measured.cascade)
    means = ["right answers", "cost, units", "latency, ms", "early stop", *stages]
    largest = measured.fixed[-1]
    by_value = [
        [
            f"{value:g} <small>({value * measured.unit:g} units)</small>",
            f"{measured.at(value).summary.accuracy.mean / largest.accuracy:.2%}",
            *_interval_cells(measured.at(value)),
        ]
        for value in QUALITY_VALUES
    ]
    groups = [
        [f"{escape(name)}, λ = {value:g}", *_interval_cells(by_way[policy_way(value)])]
        for name, by_way in measured.by_group.items()
        for value in QUALITY_VALUES
    ]
    others = [*measured.preferences, *measured.fixed, measured.oracle]
    views = [
        [
            escape(view.view),
            f"{view.r2:.3f}",
            f"{view.auroc:.3f}",
            f"{view.calibration_error:.4f}",
        ]
        for view in measured.reliability
    ]
    experiments = [[escape(result.experiment.name), *_interval_cells(result)] for result in measured.results]
    return [
        _table(
            "The four λ over all levels: means, 95% intervals over runs. Quality kept: right answers, of "
            f"those of {escape(largest.name)}.",
            ["λ", "quality kept", *means],
            by_value,
        ),
        _table(
            f"λ in cost units, as the contract has it. An answer of {escape(stages[0])} costs "
            f"{measured.fixed[0].cost:g}: below that, a right answer is not worth asking anyone, and the "
            "cheapest is asked.",
            ["λ, cost units", *means],
            [[f"{point.quality_value:g}", *_point_cells(point)] for point in measured.raw],
        ),
        _table(
            "Preferences, with the λ in cost units that was fitted for each, and bounds.",
            ["way", *means],
            [[_point_name(point), *_point_cells(point)] for point in others],
        ),
        _table(
            "Predictions on these prompts.",
            ["P(correct) of", "R²", "AUROC", "calibration error (ECE, 15 bins)"],
            views,
        ),
        f"<details><summary>By group: {', '.join(GROUPS)}</summary>",
        _table("Means, 95% intervals over runs.", ["prompts", *means], groups),
        "</details>",
        f"<details><summary>All {len(experiments)} experiments</summary>",
        _table(
            "Means, 95% intervals over runs. runs.csv has every run.", ["experiment", *means], experiments
        ),
        "</details>",
    ]


def _point_name(point: CurveMark) -> str:
    value = "" if point.quality_value is None else f" <small>(λ {point.quality_value:g})</small>"
    return escape(point.name) + value


def _point_cells(point: CurveMark) -> list[str]:
    return [
        f"{point.accuracy:.2%}",
        f"{point.cost:.3f}",
        f"{point.latency_ms:.2f}",
        f"{point.early_stop_share:.1%}",
        *(f"{share:.1%}" for share in point.mix),
    ]


def _interval_cells(result: ExperimentResult) -> list[str]:
    summary = result.summary
    return [
        _interval(summary.accuracy, 100, 2),
        _interval(summary.cost, 1, 3),
        _interval(summary.latency_ms, 1, 2),
        _interval(summary.early_stop_share, 100, 1),
        *(_interval(share, 100, 1) for share in summary.mix),
    ]


def _interval(interval: Interval, factor: float, decimals: int) -> str:
    mean, low, high = (
        f"{factor * each:.{decimals}f}" for each in (interval.mean, interval.low, interval.high)
    )
    return f"{mean}{'%' if factor == 100 else ''}<br><small>[{low}, {high}]</small>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. header: text. caption, rows: HTML."""
    head = "".join(f"<th>{escape(each)}</th>" for each in header)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _method(measured: Measured) -> list[str]:
    return [
        "<ul>",
        f"<li>Prompts: {measured.prompts:,} of {_listed(measured.suites)}, which neither the models nor the "
        "policy have seen. Every stage answered each of them, and a program graded every answer.</li>",
        "<li>Replay: the policy decides as it would when served, from the prompt and the answers so far, and "
        "gets what the stage really answered. A later stage verifies the answer before it; what that costs "
        "and how long it takes follows from the tokens that it really accepted.</li>",
        f"<li>Runs: in each level, seeds {_listed(map(str, SEEDS))} in turn draw a fifth of the prompts at "
        "random; no prompt is in two runs, and runs at different λ share theirs. The policy itself has no "
        "chance in it. Intervals are 95% by Student's t over the five runs.</li>",
        "<li>Distinct: two mixes are distinct where a stage's share differs, run by run, by more than chance "
        "at 95% for all pairs and stages together (Bonferroni).</li>",
        "<li>Latency: the sum of a request's calls, as measured where the outcomes hold times, else from its "
        "tokens by the times per token in the file of costs. No queue, no network, and nothing of what asd "
        "does ahead of time: no call overlaps another one and no draft is given up early.</li>",
        "</ul>",
    ]


def _footer(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    changed = len(record["changed_files"])
    commit = record["commit"][:12] + (f" and {changed} changed files" if changed else "")
    lines = {
        "command": f"<code>{escape(record['command'])}</code>",
        "commit": f"<code>{escape(commit)}</code>",
        "outcomes": f"<code>{escape(record['outcomes']['file'])}</code>, SHA-256 "
        f"<code>{escape(record['outcomes']['sha256'])}</code>",
        "measured": escape(record["measured_at"]),
        "machine": escape(
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"{machine['system']}, Python {machine['python']}"
        ),
    }
    return "<footer>" + "<br>\n".join(f"{name}: {value}" for name, value in lines.items()) + "</footer>"


def _listed(words: Iterable[str]) -> str:
    """Return words as "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
