"""Pages of the site from outside docs/, and links that lead out of docs/: hooks of MkDocs.

A link in the repository leads from file to file. On the site it leads to the page that was made from that file. A file
that is not a page (a program, a folder) is named there without a link. A file that does not exist stops the build.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

MORE_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "packages/mindprint-core/README.md": "packages/mindprint-core.md",
    "packages/mindprint-torch/README.md": "packages/mindprint-torch.md",
    "packages/mindprint-mlx/README.md": "packages/mindprint-mlx.md",
    "packages/mindprint-llamacpp/README.md": "packages/mindprint-llamacpp.md",
    "packages/mindprint-testing/README.md": "packages/mindprint-testing.md",
    "examples/mindprint-hello/README.md": "examples/mindprint-hello.md",
}
"""Files of the repository that become pages, and where on the site."""

_FILE_OF_PAGE = {page: file for file, page in MORE_PAGES.items()}
# Relative links alone: neither a scheme (`https:`) nor an anchor within the page.
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside docs/."""
    for file, page in MORE_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Turn links from file to file into links from page to page."""
    uri = page.file.src_uri
    source = _FILE_OF_PAGE.get(uri, f"docs/{uri}")
    pages = {file.src_uri for file in files.documentation_pages()}

    def relinked(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / file).exists():
            return match[0]  # MkDocs says where it is, and fails
        linked = site_page(file)
        if linked not in pages:
            return text
        return f"[{text}]({posixpath.relpath(linked, posixpath.dirname(uri) or '.')}{anchor})"

    return _LINK.sub(relinked, markdown)


def site_page(file: str) -> str:
    """Return where the site has the page of a file or folder of the repository, whether or not it has one."""
    readme = posixpath.join(file, "README.md")
    return MORE_PAGES.get(file) or MORE_PAGES.get(readme) or os.fspath(file).removeprefix("docs/")
