"""`mindprint plan`: the memory that a run needs, before anything is loaded."""

from __future__ import annotations

import click

from mindprint.api import load_config, plan
from mindprint.cli.output import json_option, show
from mindprint.cli.settings import SettingsCommand, complete_setting, project_and_overrides


@click.command("plan", cls=SettingsCommand, short_help="State the memory that a run needs.")
@click.argument("config", metavar="[CONFIG] [KEY=VALUE]...", nargs=-1, shell_complete=complete_setting)
@click.option("--backend", help="auto, torch, mlx, or any installed backend: short for backend.type=NAME.")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    help="The number of processes of this machine that train together: the need of each of them.",
)
@json_option
def command(*, config: tuple[str, ...], backend: str | None, ranks: int, as_json: bool) -> int:
    """State the memory that a run needs, the memory that is free, and settings that need less. Nothing is loaded.

    CONFIG is a folder with mindprint.yaml (default: this one) or a YAML file. KEY=VALUE changes a setting:
    `sft.batch_size=1`. Figures are estimates. Exit code 1 if a stage does not fit.
    """
    path, overrides = project_and_overrides(config)
    if backend:
        overrides.append(f"backend.type={backend}")
    result = plan(load_config(path, overrides), ranks=ranks)
    show(result, as_json=as_json)
    return 0 if result.fits else 1
