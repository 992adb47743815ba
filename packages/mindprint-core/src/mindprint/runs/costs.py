"""The costs of a run: the time to load its base, and the most memory that its process had."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from mindprint import atomic
from mindprint.contract import LoadedModel, ModelSpec
from mindprint.errors import RunError
from mindprint.hookspecs import hookimpl
from mindprint.input_files import read_json, typed
from mindprint.runs.folder import check_format

COSTS_FILE = "costs.json"
COSTS_FORMAT = 1


@dataclass(frozen=True)
class Costs:
    """`load_seconds`: of the first `mindprint_load_model`. `peak_bytes`: most memory that the process had resident.

    Memory of an accelerator that is not the host's own is not in it.
    """

    load_seconds: float
    peak_bytes: int


class LoadTimer:
    """An observer of the backend's hooks that times the first loading of the base."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    @hookimpl(wrapper=True)
    def mindprint_load_model(self, spec: ModelSpec) -> Generator[None, LoadedModel, LoadedModel]:  # noqa: ARG002
        started = perf_counter()
        model = yield
        # Later loads find the files in the page cache, and would say nothing about the first.
        if self.seconds is None:
            self.seconds = perf_counter() - started
        return model


def write_costs(run: Path, costs: Costs) -> None:
    atomic.write_text(run / COSTS_FILE, json.dumps({"format": COSTS_FORMAT, **asdict(costs)}, indent=2) + "\n")


def read_costs(run: Path) -> Costs | None:
    """Read the costs of a run. None if they were not measured."""
    try:
        content = read_json(run / COSTS_FILE)
        check_format(run / COSTS_FILE, content.get("format", 1), COSTS_FORMAT)
        return typed(Costs, content)
    except FileNotFoundError:
        # Runs that `mindprint train` made have no costs file, which is not an error.
        return None
    except RunError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{run / COSTS_FILE}: cannot be read: {error}; delete it, or train again") from error


def peak_bytes() -> int:
    """Return the most memory that this process had resident.

    Linux's own counter comes first: `getrusage` includes there the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # macOS counts in bytes, Linux in kibibytes.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
