"""`mindprint convert`: an adapter in the format of another tool."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.adapter.formats import TargetFormat
from mindprint.api import convert
from mindprint.cli.options import model_option
from mindprint.cli.output import json_option, show, tell_notice


@click.command("convert", short_help="Convert an adapter.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["peft", "mlx-lm", "gguf"]), required=True, help="Whose format to write.")
@model_option
@click.option("--fix-config", is_flag=True, help="Also write the base's config.json as mlx-lm needs it.")
@json_option
def command(*, adapter: Path, out: Path, to: TargetFormat, model: str | None, fix_config: bool, as_json: bool) -> None:
    """Write ADAPTER in the format of PEFT, mlx-lm or llama.cpp (gguf) to the new folder OUT.

    ADAPTER is a project (its newest complete run), a run, or an adapter of Mindprint's, PEFT's or mlx-lm's. Anything
    that the format cannot hold is refused by name.
    """
    show(convert(adapter, out, to, fix_config=fix_config, model=model, on_notice=tell_notice), as_json=as_json)
