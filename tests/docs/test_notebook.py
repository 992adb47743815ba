"""The notebook of the examples is executed as a person would run it: from top to bottom, in an empty folder."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_voice.ipynb"
SECONDS_A_CELL = 300


@pytest.fixture(scope="module")
def source() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with warnings.catch_warnings():
        # Jupyter's own: it says that its next version looks for its files elsewhere.
        warnings.filterwarnings("ignore", "Jupyter is migrating its paths", DeprecationWarning)
        from nbclient import NotebookClient

        copy = nbformat.from_dict(source)
        folder = tmp_path_factory.mktemp("notebook")
        NotebookClient(copy, timeout=SECONDS_A_CELL, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "my-model" / "config.json").is_file()
    return copy


def test_the_notebook_is_committed_without_outputs(source: Any) -> None:
    code = [cell for cell in source.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []


def test_the_notebook_imports_mindprint_alone(source: Any) -> None:
    code = "\n".join(cell.source for cell in source.cells if cell.cell_type == "code")
    imported = re.findall(r"^\s*(?:from|import) (\S+)", code, re.MULTILINE)
    assert imported == ["matplotlib.pyplot", "mindprint"]


def test_the_notebook_trains_plots_generates_evaluates_verifies_and_merges(executed: Any) -> None:
    shown = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    pages = [output.data["text/html"] for output in shown if "text/html" in output.get("data", {})]
    text = "\n".join(pages)
    assert [word for word in ("SFT", "without the adapter", "reward accuracy") if word not in text] == []
    assert text.count("verified: it does what it did where it was trained") == 2
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    assert "my dear" in text
    assert [output for output in shown if output.output_type == "error"] == []
    # Progress is one picture that is replaced. Nothing is written to standard output or standard error.
    assert [output.text for output in shown if output.output_type == "stream"] == []
