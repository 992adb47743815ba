"""How prompts were rendered in training, kept next to an adapter or a merged model.

A run's configuration says it. An adapter that leaves its run would lose it, and would then be asked in another way than
it was trained. Only settings that are not the defaults are written, so most adapters have no such file.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from mindprint.config import DataConfig
from mindprint.errors import AdapterError
from mindprint.input_files import read_object

FILE_NAME = "prompting.json"

FIELDS = ("format", "chat_template_kwargs")
"""The fields of `data` that decide how a prompt becomes tokens."""


def write_prompting(folder: Path, data: DataConfig) -> None:
    """Write the settings of `data` that differ from the defaults, if there are any."""
    defaults = DataConfig()
    values = {name: getattr(data, name) for name in FIELDS if getattr(data, name) != getattr(defaults, name)}
    if values:
        (folder / FILE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_prompting(folder: Path) -> DataConfig:
    """Return the settings in a folder, the defaults without a file. Raises `AdapterError` if it cannot be read."""
    file = folder / FILE_NAME
    if not file.is_file():
        return DataConfig()
    values = read_object(file, AdapterError)
    if unknown := sorted(set(values) - set(FIELDS)):
        raise AdapterError(f"{file}: {unknown[0]!r} is not known; known: {', '.join(FIELDS)}")
    try:
        return DataConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
