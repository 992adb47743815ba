"""Compare backends: train one configuration on two of them, or take two runs, and say whether they are equivalent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from mindprint.api.comparison_tables import CompareResult
from mindprint.api.measured_run import train_measured
from mindprint.api.options import Notices, OnNotice
from mindprint.api.training import Configuration, load_config
from mindprint.config import ConfigFile, merged
from mindprint.errors import BackendError, ConfigError
from mindprint.plugins.entries import BACKENDS, canonical_name
from mindprint.plugins.loading import find_plugin
from mindprint.reports import equivalence, read_run
from mindprint.reports.compared import write_comparison
from mindprint.training.prepare import prepare


def compare(
    config: Configuration | None = None,
    *,
    backends: Sequence[str] | None = None,
    runs: Sequence[str | PathLike[str]] | None = None,
    on_notice: OnNotice | None = None,
    **overrides: Any,
) -> CompareResult:
    """Train one configuration on two backends, or take two runs of it, and say whether they are equivalent.

    They are equivalent if every loss agrees within the tolerances of docs/numerics.md, and the voice scores, where
    there are any, within 0.05 of the scale. Each run is trained in a separate process, so that its memory is its own.

    Args:
        config: What to train, as `train` takes it. Needs `backends`.
        backends: The names of two different backends, such as `["torch", "mlx"]`.
        runs: The folders of two complete runs. Nothing is trained then.
        on_notice: Receives messages about the work as they come.
        **overrides: Sections or settings to merge into the configuration.

    Returns:
        A `CompareResult`. `result.equivalent` is the answer, `result.verdict` says it in words.

    Raises:
        ConfigError: Neither, or both, of `backends` with a configuration and `runs` are given.
        BackendError: `backends` does not name two different installed backends.
        RunError: A run is not complete, or the runs differ in base, data or configuration.

    Example:
        >>> result = mindprint.compare(runs=["my-voice/runs/run-001", "my-voice/runs/run-001"])
        >>> result.equivalent
        True
    """
    # Exactly one of the two ways has to be complete. A configuration belongs to `backends` only.
    if (backends is None) == (runs is None) or (config is None) != (backends is None):
        raise ConfigError("compare: give a configuration and backends=[A, B] to train, or runs=[RUN, RUN]")
    if runs is not None:
        paths = [Path(run) for run in runs]
        if len(paths) != 2:
            raise ConfigError(f"compare: runs names {len(paths)} runs: name two")
        return CompareResult(equivalence.compare(*(read_run(path) for path in paths)))
    assert config is not None
    first, other = _train_both(load_config(config, **overrides), check_backends(backends or ()), Notices(on_notice))
    result = CompareResult(equivalence.compare(read_run(first), read_run(other)))
    page = write_comparison(first.parent, result.comparison, result.document_tables(), result.verdict)
    return CompareResult(result.comparison, page)


def check_backends(backends: Sequence[str]) -> tuple[str, str]:
    """Return the canonical names of two different backends. Raise `BackendError` for anything else."""
    names = [canonical_name(name.strip()) for name in backends if name.strip()]
    if len(names) != 2 or names[0] == names[1]:
        raise BackendError(f"--backends {','.join(backends)!r}: name two different backends, such as torch,mlx")
    # A missing backend has to fail here, and not after the first one has trained for hours.
    for name in names:
        find_plugin(BACKENDS, name)
    return names[0], names[1]


def _train_both(file: ConfigFile, backends: tuple[str, str], notices: Notices) -> tuple[Path, Path]:
    """Train one run after the other under `runs/compare-NNN/`, every stage of a run on the one backend."""
    prepare(file)  # names faults of the data before anything is trained
    folder = _new_folder(file.folder / "runs")
    for name in backends:
        notices(f"training on {name}: {folder / name}")
        # A stage's own backend setting would win over the common one, so it is cleared.
        everywhere = {"backend": {"type": name}, "sft": {"backend": None}, "dpo": {"backend": None}}
        train_measured(merged(file, everywhere), folder / name)
    return folder / backends[0], folder / backends[1]


def _new_folder(parent: Path) -> Path:
    entries = parent.iterdir() if parent.is_dir() else ()
    # Gaps are not filled, so that a higher number is always a later comparison.
    taken = [int(match[1]) for path in entries if (match := re.fullmatch(r"compare-(\d+)", path.name))]
    return parent / f"compare-{max(taken, default=0) + 1:03d}"
