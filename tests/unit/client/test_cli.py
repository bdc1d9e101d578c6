"""The command line: what is refused before anything is called, and what help costs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.live import Live
from typer.testing import CliRunner

from services.client.client import CascadeClient
from services.client.commands import _stream_live, app
from services.client.values import (
    Acceptance,
    Answer,
    Committed,
    Drafted,
    Message,
    Objective,
    Request,
    Revised,
    Sampling,
    StageStarted,
    Tokens,
)
from services.common.errors import AsdError
from services.common.version import VERSION

_RUNNER = CliRunner()
ANSWER = Answer("r", "right", (2,), "", "eos", "medium", 1, None, 1.0, 1.0, 0.0, "static", "", "", ())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask"], ["prompt"]),
        (["ask", "hi", "--target", "nowhere"], ["HOST:PORT"]),
        (["ask", "hi", "--preference", "cheap"], ["fastest"]),
        *((["ask", "hi", "--timeout-ms", ms], ["--timeout-ms"]) for ms in ("0", "inf", "1e300", "nan")),
        (["describe", "--timeout-ms", "86400001"], ["--timeout-ms"]),
        (["ask", "hi", "--stage", "a", "--chain", "b"], ["--stage and --chain exclude each other"]),
        *(
            (["ask", "hi", *named, *wish], ["--stage and --chain leave nothing to the policy"])
            for named, wish in (
                (["--stage", "a"], ["--preference", "best"]),
                (["--stage", "a"], ["--lambda", "0"]),
                (["--chain", "a", "--chain", "b"], ["--max-cost", "1"]),
                (["--chain", "a", "--chain", "b"], ["--max-latency-ms", "1"]),
                (["--stage", "a"], ["--min-quality", "0.5"]),
            )
        ),
        (["ask", "\udcff"], ["prompt", "UTF-8"]),
        (["ask", "hi", "--max-new-tokens", "-4"], ["sampling.max_new_tokens"]),
        (["demo", "--prompts", "0"], ["--prompts"]),
        (["demo", "--target", "a:1", "--cascade", "b.yaml"], ["exclude"]),
        (["demo", "--json", "/no/such/place/demo.json"], ["/no/such/place"]),
        (["up", "--port-base", "0"], ["--port-base"]),
        (["up", "--cascade", "/no/such.yaml"], ["/no/such.yaml", "No such file"]),
        (["models", "--cascade", "/no/such.yaml"], ["/no/such.yaml"]),
        (["models", "prepare", "--cascade", "/no/such.yaml"], ["/no/such.yaml"]),
        (["models", "--cascade", "/no/such.yaml", "prepare"], ["/no/such.yaml"]),
        (["report", "-", "--policy", "nowhere", "--right"], ["HOST:PORT"]),
        (["report", "-"], ["say --right or --wrong"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(arguments, words):
    result = _RUNNER.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"request_id": 5}', "what?"])
def test_a_report_on_what_is_no_answer_is_refused(text):
    result = _RUNNER.invoke(app, ["report", "-", "--wrong"], input=text)
    assert result.exit_code == 2
    assert "not what `asd ask --json` writes" in result.output


def test_with_json_a_failure_is_an_object_on_standard_error():
    result = _RUNNER.invoke(app, ["ask", "hi", "--seed", "-1", "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    error = json.loads(result.stderr)["error"]
    assert (error["code"], error["field"]) == ("INVALID_ARGUMENT", "sampling.seed")
    assert "seed cannot be -1" in error["message"]


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        (["ask", "--json", "--lambda", "abc", "hi"], "--lambda", "Invalid value for '--lambda'"),
        (["ask", "--json"], "prompt", "Missing argument"),
        (["ask", "hi", "--json", "--nonsense"], "", "No such option"),
        (["ask", "hi", "--json", "--preference", "best", "--stage", "a"], "", "leave nothing to the policy"),
        (["describe", "--json", "--target", "nowhere"], "--target", "'nowhere' is not HOST:PORT"),
        (["report", "-", "--json"], "", "say --right or --wrong"),
        (["models", "nonsense", "--json"], "", "No such command 'nonsense'"),
        (["demo", "--json=-", "--prompts", "0"], "--prompts", "Invalid value for '--prompts'"),
        (["demo", "--json", "-", "--cascade", "/no/such.yaml"], "", "/no/such.yaml"),
    ],
)
def test_with_json_wrong_usage_is_an_object_as_well(arguments, field, words):
    result = _RUNNER.invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    error = json.loads(result.stderr)["error"]
    assert (error["code"], error["field"]) == ("INVALID_ARGUMENT", field)
    assert words in error["message"]


def test_a_prompt_is_no_option():
    result = _RUNNER.invoke(app, ["ask", "--lambda", "abc", "--", "--json"])
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_an_unknown_process_is_refused_with_the_known_ones(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = tmp_path / "cascade.yaml"
    file.write_text("stages: [{name: tiny, path: model, cost: 1}]")
    result = _RUNNER.invoke(app, ["up", "--cascade", str(file), "--only", "policy"])
    assert result.exit_code == 2
    assert "--only policy: this cascade has router, tiny" in result.output
    result = _RUNNER.invoke(app, ["up", "--cascade", str(file), "--port-base", "65530"])
    assert result.exit_code == 2
    assert "port 65541" in result.output


def test_standard_input_that_is_not_text_is_refused():
    result = _RUNNER.invoke(app, ["ask", "-"], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert "standard input is not utf-8 text" in result.output


def test_a_wrong_telemetry_variable_is_named(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    result = _RUNNER.invoke(app, ["ask", "hi"])
    assert result.exit_code == 2
    assert "OTEL_TRACES_EXPORTER=zipkin" in result.output


class _Cascade:
    """Streams a draft that is revised."""

    async def stream(self, request, *, drafts):
        assert drafts
        yield StageStarted("small", 0, "generate")
        yield Drafted(Tokens((1,), "wrong"))
        yield StageStarted("medium", 1, "verify")
        yield Revised(0, 0)
        yield Committed(1, Tokens((2,), "right"))
        if request.input != "cut":
            yield ANSWER


async def test_a_terminal_shows_the_draft_and_keeps_the_answer(monkeypatch):
    shown = []
    monkeypatch.setattr(Live, "update", lambda self, renderable: shown.append(_text(renderable)))
    file = io.StringIO()
    output = Console(file=file, force_terminal=True, width=80)
    assert await _stream_live(_Cascade(), Request("Hi"), output) == ANSWER
    assert shown == [
        "\nsmall writes …\n",
        "wrong\nsmall writes …\n",
        "wrong\nmedium verifies …\n",
        "\nmedium verifies …\n",
        "right\nmedium verifies …\n",
        "right\nmedium verifies …\n",
    ]
    assert file.getvalue().endswith("right\n")
    with pytest.raises(AsdError, match="without an answer"):
        await _stream_live(_Cascade(), Request("cut"), output)


def _text(renderable) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(renderable)
    return file.getvalue()


def test_every_option_of_ask_becomes_part_of_the_request(monkeypatch):
    async def answer(self, request):
        requests.append(request)
        return ANSWER

    requests: list[Request] = []
    monkeypatch.setattr(CascadeClient, "answer", answer)
    options = ["--preference", "best", "--max-cost", "1", "--max-latency-ms", "2", "--min-quality", "0.5"]
    options += ["--max-new-tokens", "3", "--temperature", "0.5", "--top-p", "0.9", "--tolerance", "0.25"]
    options += ["--seed", "7", "--stop", "zz", "--stop", "yy", "--session", "s", "--system", "Be brief."]
    chain = ["--chain", "small", "--chain", "large"]
    result = _RUNNER.invoke(app, ["ask", "--json", "Hi", *options])
    assert (result.exit_code, json.loads(result.stdout)["text"]) == (0, "right")
    assert _RUNNER.invoke(app, ["ask", "--json", "-", "--lambda", "2"], input="Ho\n\n").exit_code == 0
    assert _RUNNER.invoke(app, ["ask", "--json", "Hu", "--stage", "small"]).exit_code == 0
    assert _RUNNER.invoke(app, ["ask", "--json", "Ha", *chain]).exit_code == 0
    assert requests == [
        Request(
            (Message("system", "Be brief."), Message("user", "Hi")),
            Sampling(3, 0.5, 0.9, 7, ("zz", "yy")),
            Objective(None, 1.0, 2.0, 0.5, "best"),
            Acceptance("tolerant", 0.25),
            "s",
        ),
        Request("Ho\n", objective=Objective(quality_value=2.0)),
        Request("Hu", stage="small"),
        Request("Ha", chain=("small", "large")),
    ]


def _completions(line: str) -> set[str]:
    code = "import sys; from services.client.cli import main; sys.argv[0] = 'asd'; main()"
    asked = {
        "_ASD_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    return set(result.stdout.split())


def test_names_are_completed(tmp_path):
    file = tmp_path / "cascade.yaml"
    file.write_text("stages: [{name: tiny, path: nowhere, cost: 1}, {name: big, path: nowhere, cost: 2}]")
    assert _completions("asd ask --stage ") == {"small", "medium", "large"}
    assert _completions("asd ask --chain small --chain l") == {"large"}
    assert _completions("asd up --only ") == {"router", "policy", "small", "medium", "large"}
    assert _completions(f"asd up --cascade {file} --only ") == {"router", "policy", "tiny", "big"}
    assert _completions(f"asd up --cascade {tmp_path / 'none.yaml'} --only ") == {"router", "policy"}


def test_version_and_help():
    assert _RUNNER.invoke(app, ["--version"]).output == f"asd {VERSION}\n"
    text = _RUNNER.invoke(app, ["--help"]).output
    for name in ("ask", "up", "demo", "describe", "models", "report", "--install-completion"):
        assert name in text


def test_help_loads_neither_grpc_nor_pydantic():
    code = "import sys, services.client.commands as _; "
    code += "print({'grpc', 'pydantic', 'numpy', 'asd.v1'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
