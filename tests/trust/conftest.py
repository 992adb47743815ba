"""Fixtures of the trust suite, and the table that it prints at its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for artefacts.py and catalogue

import outcomes

if not {"MINDPRINT_SMOLLM2", "MINDPRINT_GEMMA3"} & os.environ.keys():
    collect_ignore_glob = ["test_real.py"]  # `nox -s trust` with the folders of pretrained models


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under pytest-xdist, a worker hands over what it saw."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["trust"] = outcomes.seen()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """... and the process that prints the table takes it over. A worker that died hands over nothing."""
    outcomes.add(getattr(node, "workeroutput", {}).get("trust", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was detected and what was a false alarm, by kind."""
    for line in outcomes.table():
        terminalreporter.write_line(line)
