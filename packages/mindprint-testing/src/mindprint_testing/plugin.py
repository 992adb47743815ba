"""A pytest plugin that shows, with each failed conformance test, the meaning of the failure and where to look."""

from __future__ import annotations

import inspect
from collections.abc import Generator

import pytest

TITLE = "meaning of this failure"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the docstring of a failed conformance test to its report."""
    report = yield
    if report.failed and isinstance(item, pytest.Function) and hasattr(item.cls, "__conformance_tests__"):
        inherited = item.cls.__conformance_tests__.get(item.originalname)
        if inherited is not None and inherited.__doc__:
            report.sections.append((TITLE, inspect.cleandoc(inherited.__doc__)))
    return report
