"""The site of docs/: links of the repository as the site has them. `make docs` builds it strictly."""

from __future__ import annotations

import re

import pytest
import yaml

from tools.docs_site import ROOT, rewrite_links, site_path


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("README.md", "index.md"),
        ("docs/policy.md", "policy.md"),
        ("k8s/README.md", "repository/k8s/README.md"),
    ],
)
def test_every_file_has_one_place(path: str, wanted: str) -> None:
    assert site_path(path) == wanted


@pytest.mark.parametrize(
    ("source", "link", "wanted"),
    [
        ("README.md", "docs/policy.md#drift", "policy.md#drift"),
        ("README.md", "docs/results/cost-accuracy.png", "results/cost-accuracy.png"),
        ("docs/kubernetes.md", "../k8s/README.md#uninstall", "repository/k8s/README.md#uninstall"),
        ("docs/policy.md", "operations.md", "operations.md"),
        ("k8s/README.md", "../docs/policy.md", "../../policy.md"),
        ("tests/cluster/README.md", "../../tools/node/README.md", "../../tools/node/README.md"),
    ],
)
def test_links_between_files(source: str, link: str, wanted: str) -> None:
    assert rewrite_links(f"See [it]({link}).", source) == f"See [it]({wanted})."


# The last one exists on most machines, outside the repository.
@pytest.mark.parametrize(
    "link", ["https://example.com/a.md", "#drift", "nothing.md", "../services", "../../../../etc/hosts"]
)
def test_what_is_no_file_of_the_repository_is_left(link: str) -> None:
    assert rewrite_links(f"[a]({link})", "docs/policy.md") == f"[a]({link})"


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    pages = re.findall(r"^ +- .+: (\S+\.md)$", text, re.MULTILINE)
    assert sorted(pages) == sorted(["index.md", *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_the_readme_takes_ten_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_every_path_that_the_documentation_names_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    missing = [
        (page.name, path)
        for page in pages
        for path in re.findall(r"`([\w./-]+/[\w./-]*)`", page.read_text(encoding="utf-8"))
        if path.partition("/")[0] in folders - {"build", "dist"} and not (ROOT / path).exists()
    ]
    assert not missing
