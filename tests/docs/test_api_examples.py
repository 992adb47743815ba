"""The examples in the API's docstrings run, on one project, in the order of the documentation."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
from sample_rows import cut_sample_rows

import mindprint
from mindprint.cli import main

FUNCTIONS = ("load_config", "train", "open_adapter", "generate", "evaluate", "verify", "merge", "convert", "compare")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my-voice", "--backend", "torch"]) == 0
    cut_sample_rows(tmp_path / "my-voice" / "data")
    said: list[str] = []
    names: dict[str, Any] = {"mindprint": mindprint}
    for name in FUNCTIONS:
        doc = inspect.getdoc(getattr(mindprint, name)) or ""
        example = doctest.DocTestParser().get_doctest(doc, names, name, None, None)
        assert example.examples, f"{name} has no example"
        failed, _ = doctest.DocTestRunner().run(example, out=said.append)
        assert failed == 0, "".join(said)
