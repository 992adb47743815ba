"""`mindprint report`: report.md and report.html of a run, written again."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.cli.output import emit, json_option, say
from mindprint.config import FILE_NAME
from mindprint.reports import write_reports
from mindprint.runs.folder import RunFolder
from mindprint.runs.opened import newest_complete


@click.command("report", short_help="Write a run's report again.")
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def command(*, run: Path, as_json: bool) -> None:
    """Write report.md and report.html into RUN from what lies there, complete or not.

    RUN is the folder of a run, or a project: its newest complete run. report.html opens in any browser and asks the
    network for nothing.
    """
    if (run / FILE_NAME).is_file() and not RunFolder(run).holds_run:
        run = newest_complete(run).path
    markdown, page = write_reports(run)
    if as_json:
        emit({"run": str(run.resolve()), "markdown": str(markdown), "html": str(page)})
        return
    say(f"{markdown}\n{page}")
