"""An evaluation harness and a tester of APIs, as programs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

BIN = Path(sys.executable).parent
QUESTIONS = [(left, right) for left in range(11, 21) for right in (7, 12, 30)]
TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Max has {{{{left}}}} beads. Max finds {{{{right}}}} more. How many beads does Max have now?"
doc_to_target: "{{{{left + right}}}}"
generation_kwargs: {{until: [], max_gen_toks: 64, do_sample: false}}
filter_list:
  - name: last-number
    filter: [{{function: regex, regex_pattern: "(-?\\\\d+)", group_select: -1}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""


# Asks the router by asd's own client, which the clients' environment does not have.
BY_GRPC = """
import json, sys
from asd.client import Client
from asd.values import Message
with Client(sys.argv[1]) as client:
    chain = tuple(each.stage for each in client.describe().stages)
    ask = lambda text: client.ask([Message("user", text)], chain=chain, max_new_tokens=64).text
    print(json.dumps([ask(text) for text in json.load(sys.stdin)]))
"""


def accuracy_over_grpc(router):
    """Return the share of right answers over gRPC."""
    texts = [
        f"Max has {a} beads. Max finds {b} more. How many beads does Max have now?" for a, b in QUESTIONS
    ]
    done = subprocess.run(
        [os.environ["ASD_PYTHON"], "-c", BY_GRPC, router],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    answers = [re.findall(r"-?\d+", answer)[-1:] for answer in json.loads(done.stdout)]
    right = [answer == [str(a + b)] for answer, (a, b) in zip(answers, QUESTIONS, strict=True)]
    return sum(right) / len(right)


def test_lm_eval_scores_as_the_grpc_client_does(api, router, tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"left": a, "right": b}) + "\n" for a, b in QUESTIONS))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data))
    arguments = f"model=asd-exact,base_url={api}/chat/completions,num_concurrent=4,tokenized_requests=False"
    done = subprocess.run(
        [
            *(str(BIN / "lm-eval"), "run", "--model", "local-chat-completions", "--model_args", arguments),
            *("--tasks", "sums", "--include_path", str(tmp_path), "--apply_chat_template"),
            *("--output_path", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={
            "OPENAI_API_KEY": "none",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PATH": str(BIN),
            "HOME": str(tmp_path),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    score = json.loads(file.read_text())["results"]["sums"]["exact_match,last-number"]
    assert score == pytest.approx(accuracy_over_grpc(router))
    assert score > 0.5


CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)


def answers(url):
    """Return how many requests the gateway has answered with 200, by path."""
    with urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    counts = [line for line in lines if line.startswith("http_server_request_duration_seconds_count")]
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
    return {
        path: sum(float(line.split()[-1]) for line in counts if f'"{path}"' in line and '"200"' in line)
        for path in paths
    }


def test_schemathesis_finds_no_server_error_and_no_undocumented_answer(url, tmp_path):
    before = answers(url)
    done = subprocess.run(
        [
            *(str(BIN / "schemathesis"), "run", f"{url}/openapi.json", "--checks", CHECKS),
            *("--max-examples", "60", "--seed", "1", "--generation-database", "none"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    # It got as far as the cascade.
    after = answers(url)
    assert all(after[path] > before[path] for path in before), after
