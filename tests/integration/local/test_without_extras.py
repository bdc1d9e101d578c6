"""Every program of a base install ends with what to install, and not with a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.extras import EXTRAS
from tests.integration.local.conftest import MODELS
from tests.limits import PROCESS_S

_MISSING = sorted({name for modules in EXTRAS.values() for name in modules} | {"psutil", "torch"})


@pytest.fixture(scope="module")
def base_install(tmp_path_factory):
    """Return variables with which Python finds nothing of any extra, in child processes too."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({_MISSING}))\n")
    temporary = folder / "temporary"
    temporary.mkdir()
    return {**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(temporary)}


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("services.cli.__main__", ["up"], "[gateway,policy,stage]"),
        ("services.cli.__main__", ["up"], "--no-gateway"),
        ("services.cli.__main__", ["up", "--no-gateway"], "[policy,stage]"),
        ("services.cli.__main__", ["up", "--only", "gateway"], "[gateway]"),
        ("services.cli.__main__", ["up", "--only", "policy"], "[policy]"),
        ("services.cli.__main__", ["up", "--only", "small"], "[stage]"),
        ("services.cli.__main__", ["demo"], "[policy,stage]"),
        ("services.cli.__main__", ["models"], "[stage]"),
        ("services.cli.__main__", ["models", "prepare"], "[stage]"),
        ("services.cli.__main__", ["models", "pull", "owner/name"], "[hub]"),
        ("services.stage", ["--config", "stage.yaml"], "[stage]"),
        ("services.gateway", ["--config", "stage.yaml"], "[gateway]"),
        ("services.stage.engines.check", ["check", str(MODELS / "small"), "--engine", "onnx"], "[stage]"),
        ("policy_service", [], "[policy]"),
        ("policy_service.train.cli", ["versions", "store"], "[policy]"),
        ("policy_service.train.cli", ["shadow", "file"], "[policy]"),
        ("policy_service.train.cli", ["collect", "o.parquet"], "[policy-train]"),
        ("policy_service.train.cli", ["price", "--mean-cost", "1"], "[policy-train]"),
    ],
)
def test_a_program_says_what_to_install(base_install, tmp_path, module, arguments, extra):
    model = f"{{name: small, path: {MODELS / 'small'}}}"
    (tmp_path / "stage.yaml").write_text(f"listen: 127.0.0.1:0\ndefault_model: small\nmodels: [{model}]\n")
    program = module if module.endswith((".cli", ".check", ".__main__")) else f"{module}.__main__"
    result = subprocess.run(
        [sys.executable, "-c", f"from {program} import main; main()", *arguments],
        cwd=tmp_path,
        env=base_install,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert extra in result.stderr
    assert "not installed" in result.stderr
    assert not list(Path(base_install["TMPDIR"]).iterdir())


def test_asking_needs_no_extra(base_install, up):
    result = subprocess.run(
        [sys.executable, "-m", "services.cli", "ask", "--target", up.target, "What is 2 plus 3?"],
        env=base_install,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert (result.returncode, result.stdout[-2:-1].isprintable()) == (0, True)
