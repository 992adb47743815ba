"""Fixtures of the trust suite, and the table that it prints at its end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for artefacts.py and catalogue.py

import outcomes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was detected and what was a false alarm, by kind."""
    for line in outcomes.table():
        terminalreporter.write_line(line)
