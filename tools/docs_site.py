"""Hooks of mkdocs (mkdocs.yml): the README is the front page, and links into the repository are checked.

A page of docs/ may link to any file of the repository, as GitHub shows it: `../benchmarks/results/load.json`.
Such a file becomes a part of the site. The strict build so knows every link, and the site needs no address of
the repository. A link to a file that is not there is left as it is, and mkdocs refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_FRONT = "README.md"
_REPOSITORY = "repository"
# The target of a link or an image: neither an address nor an anchor of the same page.
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and the files outside docs/ that pages link to, directly or through one another."""
    from mkdocs.structure.files import File, InclusionLevel

    found = {_FRONT}
    waiting = [_FRONT, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    while waiting:
        for target in _linked(waiting.pop()):
            if not target.startswith("docs/") and target not in found:
                found.add(target)
                waiting.append(target)
    for path in sorted(found):
        inclusion = InclusionLevel.INCLUDED if path == _FRONT else InclusionLevel.NOT_IN_NAV
        files.append(
            File.generated(config, site_path(path), abs_src_path=str(ROOT / path), inclusion=inclusion)
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a page's links to where the site has their files."""
    return rewrite_links(markdown, _repository_path(page.file.src_uri))


def rewrite_links(markdown: str, source: str) -> str:
    """Return the text of a file with its links as the site needs them.

    source: the file, relative to the repository.
    """

    def rewrite(match: re.Match[str]) -> str:
        target = _target(source, match[0])
        if target is None:
            return match[0]
        return os.path.relpath(site_path(target), PurePosixPath(site_path(source)).parent)

    return _LINK.sub(rewrite, markdown)


def site_path(path: str) -> str:
    """Return where the site has a file of the repository."""
    if path == _FRONT:
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{_REPOSITORY}/{path}"


def _repository_path(src_uri: str) -> str:
    if src_uri == "index.md":
        return _FRONT
    inside = src_uri.removeprefix(f"{_REPOSITORY}/")
    return inside if inside != src_uri else f"docs/{src_uri}"


def _linked(source: str) -> Iterator[str]:
    if source.endswith(".md"):
        for link in _LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            target = _target(source, link)
            if target is not None:
                yield target


def _target(source: str, link: str) -> str | None:
    """Return the file that a link means, or None where there is none."""
    target = os.path.normpath(PurePosixPath(source).parent / link)
    inside = not target.startswith("..")
    return target if inside and (ROOT / target).is_file() else None
