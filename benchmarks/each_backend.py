"""Measurements of several backends, each in a process that imports no other one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def each_backend(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Call this program again for each backend, with `--measure NAME`. Yield the name and what its last line says.

    The last line of a measurement is JSON.
    """
    for name in names:
        command = [sys.executable, *sys.argv, "--measure", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        yield name, json.loads(done.stdout.splitlines()[-1])
