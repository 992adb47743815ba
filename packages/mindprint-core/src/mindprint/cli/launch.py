"""`mindprint launch`: `mindprint train` in several processes, started by the framework's own launcher."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from mindprint.api import load_config
from mindprint.cli.output import json_option
from mindprint.cli.settings import project_and_overrides
from mindprint.cli.train import command as train
from mindprint.errors import BackendError
from mindprint.models.engine import Placements


def torchrun_command(count: int) -> list[str]:
    """Return the command of PyTorch's launcher, before the words that Python gets."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "mindprint", "--"]


def mlx_command(count: int) -> list[str]:
    """Return the command of MLX's launcher, before the words that Mindprint gets."""
    beside_python = Path(sys.executable).with_name("mlx.launch")
    program = str(beside_python) if beside_python.exists() else shutil.which("mlx.launch") or "mlx.launch"
    return [program, "-n", str(count), "--backend", "ring", "--", sys.executable, "-m", "mindprint"]


LAUNCHERS: Mapping[str, Callable[[int], list[str]]] = {"torch": torchrun_command, "mlx": mlx_command}


# The words behind the options of this command are those of `train`, which says what is wrong with them.
@click.command(
    "launch",
    short_help="Train one adapter in several processes.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-n", "--ranks", type=click.IntRange(min=1), required=True, help="The number of processes.")
@click.argument("words", metavar="[OPTIONS OF TRAIN]...", nargs=-1, type=click.UNPROCESSED)
@json_option
def command(*, ranks: int, words: tuple[str, ...], as_json: bool) -> int:
    """Train one adapter in several processes of this machine. Everything behind -n is an option of `mindprint train`.

    This is `torchrun --nproc-per-node N -m mindprint -- train ...` on PyTorch, and
    `mlx.launch -n N --backend ring -- python -m mindprint train ...` on MLX. For several machines, call the launcher
    yourself: docs/scaling.md shows how.
    """
    # Parsed here as well: a misspelt option is told once, and not by every process.
    given = train.make_context("mindprint train", list(words)).params
    path, overrides = project_and_overrides(given["config"])
    if given["backend"]:
        overrides.append(f"backend.type={given['backend']}")
    section = load_config(path, overrides).config.backend
    name = Placements().resolve_training(section).backend.name
    if name not in LAUNCHERS:
        raise BackendError(
            f"backend {name!r} has no launcher that Mindprint knows: start {ranks} processes of `mindprint train` with "
            "the launcher of its framework"
        )
    sys.stdout.flush()
    started = [*LAUNCHERS[name](ranks), "train", *words, *(["--json"] if as_json else [])]
    # In place of this process, so that signals and the exit code are the launcher's.
    os.execvp(started[0], started)  # noqa: S606 (no shell is wanted)
