"""A load report of streamed chats by aiperf, a load tester."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from suites import split

BIN = Path(sys.executable).parent
MODELS = Path(__file__).parents[2] / "models"
CONCURRENCIES = (1, 8, 32)
REQUESTS = 240
STATISTICS = {"mean": "avg", "p50": "p50", "p95": "p95", "p99": "p99"}
TIMES = ("time_to_first_token", "inter_token_latency", "inter_chunk_latency", "request_latency")


@pytest.fixture
def folder():
    """A folder with a short path: aiperf's sockets are in it."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.mark.parametrize("model", ["asd", "large"])
@pytest.mark.parametrize("at_a_time", CONCURRENCIES)
def test_aiperf_counts_the_tokens_that_usage_says(url, folder, record_testsuite_property, at_a_time, model):
    # No prompt is asked at two concurrencies: stages cache prompts.
    first = CONCURRENCIES.index(at_a_time) * REQUESTS
    tasks = list(split("evaluation", first + REQUESTS))[first:]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": task.prompt}) + "\n" for task in tasks))
    done = subprocess.run(
        [
            *(str(BIN / "aiperf"), "profile", "--url", url, "--model", model),
            *("--endpoint-type", "chat", "--streaming"),
            *("--tokenizer", str(MODELS / "large"), "--apply-chat-template"),
            *("--input-file", str(prompts), "--custom-dataset-type", "single_turn"),
            *("--concurrency", str(at_a_time), "--request-count", str(REQUESTS)),
            *("--warmup-request-count", "20", "--artifact-dir", str(folder)),
            *("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={
            "PATH": f"{BIN}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            # Nothing is to be fetched. Under HF_HUB_OFFLINE, aiperf reads no tokenizer from a folder.
            "HF_ENDPOINT": "http://127.0.0.1:9",
        },
    )
    written = folder / "profile_export_aiperf.json"
    # Its status is 0 as well if it could not start.
    assert written.exists(), done.stdout[-3000:] + done.stderr[-1000:]
    report = json.loads(written.read_text())
    assert report["error_summary"] == []
    assert report["request_count"]["avg"] == REQUESTS
    assert report["usage_prompt_tokens_diff_pct"]["max"] == 0
    assert report["usage_completion_tokens_diff_pct"]["max"] == 0
    record_testsuite_property("load", json.dumps(_figures(report, model, at_a_time)))


def _figures(report, model, at_a_time):
    completed = report["completed_request_count"]["avg"]
    return {
        "model": model,
        "at_a_time": at_a_time,
        "requests": completed,
        "errors": completed - report["request_count"]["avg"],
        "per_s": report["request_throughput"]["avg"],
        "output_tokens_per_s": report["output_token_throughput"]["avg"],
        **{
            f"{name}_ms": {ours: report[name][theirs] for ours, theirs in STATISTICS.items()}
            for name in TIMES
        },
    }
