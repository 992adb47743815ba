"""What a run came to, to look at: report.md and a report.html that needs nothing but itself."""

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
    """Write `RUN/report.md` and `RUN/report.html` from what lies in the run's folder; their paths.

    Raises `RunError` where the folder holds no run, or cannot be written.
    """
    folder = run.path if isinstance(run, RunFolder) else run
    document = contents(read_run(folder))
    markdown, page = folder / "report.md", folder / "report.html"
    atomic.write_text(markdown, as_markdown(document))
    atomic.write_text(page, as_page(document))
    return markdown, page
