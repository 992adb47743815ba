"""The project that rows are written into, and which of its files may be replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mindprint import atomic
from mindprint.config import FILE_NAME, BackendConfig, ModelConfig, load_config
from mindprint.errors import ConfigError, RunError
from mindprint.input_files import read_object

RECORD = "prepare.json"
"""The digests of the files that were written, so that files which somebody else wrote or changed are not replaced."""

REPORT = "report.html"
FORMAT = 1


@dataclass(frozen=True)
class PreparedProject:
    """A project to write rows into. `exists` says whether it has a configuration already."""

    folder: Path
    model: ModelConfig
    backend: BackendConfig
    exists: bool

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def refuse_others_files(self, names: Sequence[str]) -> None:
        """Raise `RunError` if a file that would be replaced was not written here, or was changed since."""
        record = self.data / RECORD
        written = read_object(record, RunError).get("files", {}) if record.is_file() else {}
        for name in names:
            file = self.data / name
            if file.exists() and written.get(name) != _digest(file.read_bytes()):
                raise RunError(
                    f"{file}: exists, and was not written by this command or was changed since: move it away, or name "
                    "another project"
                )

    def write(self, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write files into the data folder, each whole, and a record with their digests and with `facts`.

        An empty file is not written: training would refuse it. One that an earlier call wrote is removed.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        digests = {name: _digest(content) for name, content in files.items() if content}
        # The record comes first: if the process is killed between the files, the next call may replace all of them.
        old = read_object(self.data / RECORD, RunError).get("files", {}) if (self.data / RECORD).is_file() else {}
        for state in (digests | {name: old[name] for name in old if name not in digests}, digests):
            record = {"format": FORMAT, **facts, "files": state}
            atomic.write_text(self.data / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            if state is digests:
                break
            for name, content in files.items():
                if content:
                    # A quiz is in the folder of its topic.
                    (self.data / name).parent.mkdir(parents=True, exist_ok=True)
                    atomic.write_bytes(self.data / name, content)
                else:
                    (self.data / name).unlink(missing_ok=True)


def find_project(folder: Path, model: str | None) -> PreparedProject:
    """Return the project of a folder, which need not exist.

    Raises `ConfigError` if neither the folder nor `model` names a base model, or if they name different ones.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder for the project")
    if (folder / FILE_NAME).is_file():
        config = load_config(folder).config
        if model is not None and model not in (config.model.name, str(folder / config.model.name)):
            raise ConfigError(
                f"{folder / FILE_NAME}: names the base model {config.model.name}, and --model {model}: leave --model "
                "out, or change the file"
            )
        return PreparedProject(folder, config.model, config.backend, exists=True)
    if model is None:
        raise ConfigError(f"{folder}: has no {FILE_NAME} that names a base model; name it with --model")
    # A folder that is named on the command line is meant from where the command runs.
    name = str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model
    return PreparedProject(folder, ModelConfig(name=name), BackendConfig(), exists=False)


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()
