"""`mindprint migrate`: a configuration from the single-repository pipeline's `training_pipeline.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from mindprint import atomic
from mindprint.cli.migration import migrate
from mindprint.cli.output import emit, json_option, notice, say
from mindprint.config import FILE_NAME, make_config
from mindprint.errors import ConfigError, first_line
from mindprint.input_files import read_text
from mindprint.yaml_files import parse_yaml_value


@click.command("migrate", short_help="Translate a training_pipeline.yaml.")
@click.argument("old", metavar="OLD.yaml", type=click.Path(path_type=Path))
@json_option
def command(*, old: Path, as_json: bool) -> None:
    """Write mindprint.yaml next to OLD.yaml, and name every setting without a counterpart."""
    target = old.parent / FILE_NAME
    if target.exists():
        raise ConfigError(f"{target}: exists already; move it away to have it written again")
    migration = migrate(_read(old))
    try:
        # The result is checked before it is written, so that no file is left that cannot be loaded.
        make_config(migration.values, old.parent)
    except ConfigError as error:
        raise ConfigError(f"{old}: translates to settings that are refused: {error}") from error
    # Unsorted, the sections keep the order in which they were translated.
    atomic.write_text(target, yaml.safe_dump(migration.values, sort_keys=False, allow_unicode=True))
    if as_json:
        emit({"config": str(target), "without_counterpart": list(migration.without_counterpart)})
        return
    say(f"written: {target}")
    for name in migration.without_counterpart:
        notice(f"{old}: {name} has no counterpart and was left out", warning=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml_value(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `backend:` and `sft:`, found {type(values).__name__}")
    return values
