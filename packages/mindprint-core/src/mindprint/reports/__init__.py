"""Reports of runs: report.md, and a report.html that is one file without a script."""

from __future__ import annotations

from pathlib import Path

from mindprint import atomic
from mindprint.reports.content import contents
from mindprint.reports.markdown import as_markdown
from mindprint.reports.page import as_page
from mindprint.runs.folder import RunFolder
from mindprint.runs.reading import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "write_reports"]


def write_reports(run: RunFolder | Path) -> tuple[Path, Path]:
    """Write `RUN/report.md` and `RUN/report.html` from the files in the run's folder.

    Args:
        run: The run, or the path of its folder.

    Returns:
        The paths of the two files.

    Raises:
        RunError: The folder holds no run, or the run's manifest cannot be read.
    """
    folder = run.path if isinstance(run, RunFolder) else run
    document = contents(read_run(folder))
    markdown, page = folder / "report.md", folder / "report.html"
    # Each file replaces the old one whole, so that a reader never sees half a report.
    atomic.write_text(markdown, as_markdown(document))
    atomic.write_text(page, as_page(document))
    return markdown, page
