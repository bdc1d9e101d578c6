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


def test_loads_are_read_from_pytests_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><properties>"
        '<property name="load" value="{&quot;per_s&quot;: 3}"/><property name="other" value="4"/>'
        '<property name="load" value="{&quot;per_s&quot;: 5}"/>'
        "</properties></testsuite></testsuites>"
    )
    assert clients.loads(report) == [{"per_s": 3}, {"per_s": 5}]
