"""What is said of the last trial of real clients."""

from __future__ import annotations

import json
import subprocess

from tests.clients import __main__ as clients


def test_it_is_said_where_clients_are_to_be_tried_again(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=60)
    covered = tmp_path / "tests" / "clients"
    covered.mkdir(parents=True)
    (covered / "one.py").write_text("1")
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True, timeout=60)
    monkeypatch.setattr(clients, "ROOT", tmp_path)
    monkeypatch.setattr(clients, "RESULTS", tmp_path)
    assert "never" in clients.state()
    (tmp_path / "clients.json").write_text(json.dumps({"covers": clients.covered()}, indent=2))
    assert "make clients" not in clients.state()
    (covered / "one.py").write_text("2")
    assert "make clients" in clients.state()
