"""`mindprint compare`: say whether two backends, or two runs of one configuration, are equivalent."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.api import compare, load_config
from mindprint.api.comparison import check_backends
from mindprint.cli.output import json_option, show, tell_notice
from mindprint.cli.settings import SettingsCommand, complete_setting, project_and_overrides


@click.command("compare", cls=SettingsCommand, short_help="Are two backends' runs equivalent?")
@click.argument("config", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1, shell_complete=complete_setting)
@click.option("--backends", metavar="A,B", help="Train CONFIG on both, each in a separate process.")
@click.option(
    "--runs", nargs=2, metavar="RUN RUN", type=click.Path(path_type=Path), help="Take these runs; nothing is trained."
)
@json_option
def command(*, config: tuple[str, ...], backends: str | None, runs: tuple[Path, Path] | None, as_json: bool) -> int:
    """Train one configuration on two backends, or take two runs of it, and say whether they are equivalent.

    They are if every loss agrees within the tolerances of docs/numerics.md (|a - b| / (1 + a): 1e-5 in SFT, 1e-3 from
    the first preference step on) and the voice scores, where there are any, within 0.05 of the scale. Exit code 0 if
    so, 1 if not.
    """
    if (backends is None) == (runs is None):
        raise click.UsageError("give either --backends A,B to train, or --runs RUN RUN to compare what is there")
    if runs is not None and config:
        raise click.UsageError("--runs takes no CONFIG: each run has its own")
    if runs is not None:
        result = compare(runs=runs)
    else:
        names = (backends or "").split(",")
        # Wrong names are reported before the configuration is read.
        check_backends(names)
        path, overrides = project_and_overrides(config)
        result = compare(load_config(path, overrides), backends=names, on_notice=tell_notice)
    show(result, as_json=as_json)
    return 0 if result.equivalent else 1
