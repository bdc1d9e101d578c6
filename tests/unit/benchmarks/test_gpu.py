"""`python -m benchmarks.gpu`: the whole run on the stand-in, and what it makes of its figures."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from asd.values import Message
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import exactness, in_engine, projection
from benchmarks.gpu.measure import TINY, Prompts, speculation
from benchmarks.gpu.shapes import SHAPES, make_model
from services.stage.engines.checkpoint import read_checkpoint
from services.stage.engines.scoring import ScoringEngine
from services.stage.engines.vllm.engine import VllmBackend, VllmOptions
from services.stage.generation.tokenizer import ChatTokenizer
from tests.fakes import fake_vllm


def test_a_tiny_run_has_every_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The run puts both in place itself; the test's end takes them away.
    fake_vllm.install(monkeypatch)
    for variable, value in gpu.ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    file = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--out", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["model"], row["engine"], row["device"]) == ("tiny", "vllm (stand-in)", "cpu")
    for name in (
        *("decode_ms_b1", "decode_ms_b2", "floor_ms", "prefill64_ms", "score64_ms"),
        *("generate16_ms", "verify16_ms", "copy_bytes_per_s"),
    ):
        # Some are differences of two times, which may be below zero on a busy machine.
        assert math.isfinite(row[name]), name
    assert row["accepted_of_own"] == 16
    assert len(row["speculation"]) == 2 * 2 * 3
    assert "error" not in row["residency"]["sleep_level_1"]
    assert set(row["records"]) == {"passes", "prefilled", "speculation", "residency"}
    assert row["records"]["passes"]["command"] == f"python -m benchmarks.gpu --tiny --out {file}"


async def test_a_corrupted_draft_agrees_as_far_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_vllm.install(monkeypatch)
    small = Path(__file__).parents[3] / "models" / "small"
    backend = VllmBackend("m", small, read_checkpoint(small), VllmOptions())
    await backend.start()
    for row in await speculation(backend, TINY):
        # The prompt is longer than the one that the draft was written for: the model may leave it sooner.
        assert row["agreed"] <= row["acceptance"] * row["draft_tokens"]
        assert row["speedup"] == row["plain_ms"] / row["verified_ms"]
    assert not library.engines[0].running
    await backend.close()


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As published: Llama 2 13B, Code Llama 34B, Llama 2 70B.
    [("13b", 13_015_864_320), ("34b", 33_743_970_304), ("70b", 68_976_648_192)],
)
def test_shapes_are_the_published_ones(tmp_path: Path, name: str, parameters: int) -> None:
    checkpoint = read_checkpoint(make_model(name, tmp_path))
    assert checkpoint.parameters == parameters
    assert checkpoint.weight_bytes == 2 * parameters
    assert checkpoint.eos_ids == (SHAPES[name].vocabulary - 1,)


def test_a_word_is_a_token_so_that_prompts_have_the_wanted_size(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(make_model("tiny", tmp_path))
    ids = Prompts(TINY)(50)
    assert tokenizer.encode_chat([Message("user", " ".join(f"w{each}" for each in ids))]) == ids


def _row(model: str, device: str = "H100", **figures: Any) -> dict[str, Any]:
    records = {"passes": {"command": f"of {', '.join(figures)}"}}
    row = {"model": model, "engine": "vllm", "device": device, "tensor_parallel": 1, "records": records}
    return row | figures


def test_rows_are_merged_and_the_speedup_is_of_one_device(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    for row in (
        _row("70b", decode_ms_b1=1.0, generate64_ms=2230.0, verify64_ms=83.0),
        _row("70b", decode_ms_b1=34.3),
        _row("13b", "H200", generate64_ms=1.0),
        _row("13b", generate64_ms=680.0),
        _row("13b", residency={}, records={"residency": {"command": "another"}}),
        _row("70b", tensor_parallel=2, decode_ms_b1=18.0),
    ):
        gpu.merge(file, row)
    content = json.loads(file.read_text())["rows"]
    rows = {(each["model"], each["device"], each["tensor_parallel"]): each for each in content}
    assert len(rows) == 4
    large = rows["70b", "H100", 1]
    assert rows["70b", "H100", 2]["decode_ms_b1"] == 18.0
    # A later part neither loses what an earlier one found, nor how.
    small = rows["13b", "H100", 1]
    assert small["generate64_ms"] == 680.0
    assert {part: each["command"] for part, each in small["records"].items()} == {
        "passes": "of generate64_ms",
        "residency": "another",
    }
    assert large["decode_ms_b1"] == 34.3
    # Section 6 of the design: 2.9 times.
    assert large["escalated_speedup"] == pytest.approx(2.92, abs=0.01)
    assert "escalated_speedup" not in small


def test_a_projection_adds_up_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(model: str, generate: float, verify: float, gpus: int = 1) -> dict[str, Any]:
        times = {"generate64_ms": generate, "verify64_ms": verify, "decode_ms_b1": generate / 64}
        return {"model": model, "device": "H", "tensor_parallel": gpus} | times

    rows = [row("13b", 640.0, 50.0), row("70b", 1600.0, 100.0, 4), row("70b", 2560.0, 140.0, 2)]
    rows += [row("34b", 1280.0, 60.0), {"model": "34b", "device": "other", "tensor_parallel": 1}]
    monkeypatch.setattr(projection, "RESULTS", tmp_path)
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": rows}))
    projection.main([])
    lines = capsys.readouterr().out.splitlines()[2:]
    # The fewest GPUs count, and a device without figures has no line.
    assert [line.split(" | ")[1] for line in lines] == [
        "13B → 34B",
        "13B → 70B on 2",
        "34B → 70B on 2",
        "13B → 34B → 70B on 2",
    ]
    # All, and half: 640 + 140; + 32 * 40. Of three, the second one writes: 640 + 60 + 140; + 32 * 20.
    assert "| 2,560 | 780 (3.28 ×) |" in lines[1]
    assert "| 2,060 (1.24 ×) |" in lines[1]
    assert "| 2,560 | 840 (3.05 ×) |" in lines[3]
    assert "| 1,480 (1.73 ×) |" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batches", "1,a"], "--batches: 'a' is not a whole number of 1 or more"),
        (["--speculation-batches", "0"], "'0' is not a whole number"),
        (["--acceptances", "0,1.5"], "--acceptances: '1.5' is not a number from 0 to 1"),
        (["--gpu-memory-utilization", "x"], "'x' is not a number"),
        (["--gpu-memory-utilization", "0"], "'0' is not above 0"),
        (["--top-logprobs", "1"], "--top-logprobs: must be 2 or more"),
        (["--model", "/nowhere"], "config.json is missing"),
        (["--sleep-levels", "1,7"], "--sleep-levels: there are 1 and 2"),
        (["--parts", "pass"], "no part pass: choose of passes"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--tiny", *arguments])
    assert words in capsys.readouterr().err


def test_a_tiny_run_of_verification_inside_has_a_row_for_each_draft_and_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch)
    for variable, value in gpu.ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    file = tmp_path / "rows.json"
    for _ in range(2):
        in_engine.main(["--tiny", "--batches", "2", "--out", str(file)])
    content = json.loads(file.read_text())
    assert [row["draft"] for row in content["rows"]] == [in_engine.PLAIN, *in_engine.DRAFTS]
    assert all(row["same"] == row["batch"] == 2 for row in content["rows"])


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_run_of_exactness_fails_on_an_answer_that_nothing_explains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_exact: bool
) -> None:
    fake_vllm.install(monkeypatch)
    for variable, value in gpu.ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    made = exactness.make_engine

    def make_engine(name: str, directory: Path, options: VllmOptions) -> ScoringEngine:
        engine = made(name, directory, options)
        if options.verify_inside and not is_exact:
            other = (Message("user", "Ardia"),)
            monkeypatch.setattr(
                engine, "generate", lambda _, sampling: ScoringEngine.generate(engine, other, sampling)
            )
        return engine

    monkeypatch.setattr(exactness, "NAMES", ("small", "medium"))
    monkeypatch.setattr(exactness, "make_engine", make_engine)
    file = tmp_path / "exactness.json"
    with nullcontext() if is_exact else pytest.raises(SystemExit) as ended:
        exactness.main(["--tiny", "--prompts", "1", "--out", str(file)])
    assert ended is None or ended.value.code == 1
    rows = json.loads(file.read_text())["rows"]
    # Without a draft, and with the smaller stage's: both beside another engine's answer.
    assert [(row["drafter"], len(row["unexplained"])) for row in rows] == [
        (None, 0 if is_exact else 1),
        ("small", 0 if is_exact else 1),
    ]
