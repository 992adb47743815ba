"""Every file and module that a page names in code exists."""

from __future__ import annotations

import importlib
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for place in ("", "docs/", "packages/*/", "examples/*/") for page in ROOT.glob(f"{place}*.md"))
FOLDERS = ("benchmarks/", "docs/", "examples/", "packages/", "tests/")

OF_OTHERS = {"train.jsonl", "valid.jsonl"}
"""Files of mlx-lm."""

HISTORY = "CHANGELOG.md"
"""This page may name what is no longer there."""


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def repository_files() -> frozenset[str]:
    """Return every file that belongs to the repository, as a path from its root."""
    folders = [ROOT / folder for folder in FOLDERS]
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    return frozenset(
        file.relative_to(ROOT).as_posix() for file in (*files, *ROOT.glob("*")) if "__pycache__" not in file.parts
    )


@cache
def source_text() -> str:
    """Return the sources of all distributions, in which the files that programs write are named."""
    folders = [folder for pattern in ("packages/*/src", "examples/*/src") for folder in ROOT.glob(pattern)]
    return "\n".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py"))


def words_in_code(page: Path) -> list[str]:
    """Return the words of the page's inline code, without the code blocks, which are tested by running them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [word.strip(",;:\"'()") for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]


def file_exists(name: str, page: Path) -> bool:
    """Return whether the repository has the file.

    A package's README names files of that package, or from the root.
    """
    if name in repository_files():
        return True
    package = relative(page.parent) + "/" if page.parent.parent.name in ("packages", "examples") else ""
    return any(file.startswith(package) and f"/{file}".endswith(f"/{name}") for file in repository_files())


def module_exists(name: str) -> bool:
    """Return whether the dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=relative)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    missing = []
    for word in words_in_code(page):
        if word.startswith(FOLDERS):
            exists = any(ROOT.glob(word)) or (page.parent / word).exists() or file_exists(word, page)
        elif word.endswith(".py"):
            exists = file_exists(word, page)
        elif re.fullmatch(r"[\w.-]+\.(json|jsonl|yaml|toml|md|html|txt|css|safetensors)", word):
            # Programs write these as well, and some are the reader's own.
            exists = file_exists(word, ROOT / "page") or word in source_text() or word in OF_OTHERS
        else:
            continue
        if not exists:
            missing.append(word)
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=relative)
def test_the_modules_that_a_page_names_exist(page: Path) -> None:
    projects = [file for file in repository_files() if file.endswith("pyproject.toml")]
    groups = {
        group
        for file in projects
        for group in tomllib.loads((ROOT / file).read_text(encoding="utf-8")).get("project", {}).get("entry-points", {})
    }
    names = {word.split("(")[0] for word in words_in_code(page)}
    modules = {name for name in names if re.fullmatch(r"mindprint(_\w+)?(\.\w+)+", name)} - groups
    files = {name for name in modules if name.endswith((".json", ".yaml"))}
    assert {name for name in modules - files if not module_exists(name)} == set()
