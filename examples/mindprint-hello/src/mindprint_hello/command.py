"""The command `mindprint hello FOLDER`, which writes a base model for this backend."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.cli.output import emit, json_option, say
from mindprint.errors import ModelError


@click.command("hello", short_help="Write a base model for the hello backend.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="Its weights follow from it.")
@json_option
def command(*, folder: Path, seed: int, as_json: bool) -> None:
    """Write a random base model into FOLDER, small enough to train in seconds."""
    from mindprint_hello.model_folder import write_model  # noqa: PLC0415 (NumPy, when the command runs)

    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder}: is not empty; name a new folder")
    write_model(folder, seed)
    if as_json:
        emit({"model": str(folder)})
    else:
        say(f"a base for the hello backend: {folder}")
