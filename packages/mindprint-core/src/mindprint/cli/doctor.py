"""`mindprint doctor`: versions, devices, and whether training really trains here."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import click

from mindprint.cli.output import emit, json_option, say, table
from mindprint.cli.plugins import device_lines, info_values
from mindprint.config import ModelConfig, load_config
from mindprint.models.engine import Placement, Placements
from mindprint.models.folder import resolve_model
from mindprint.plugins.backend import Backend, load_backend
from mindprint.plugins.entries import BACKENDS, install_commands, installed
from mindprint.training.prepare import Prepared, prepare
from mindprint.training.selfcheck import Finding, check_deeply, check_training, guarded

LIBRARIES = ("numpy", "safetensors", "tokenizers", "transformers", "datasets", "pydantic", "pluggy")


@dataclass
class Report:
    """A diagnosis: versions, backends, and findings in the order in which they were made."""

    platform: str
    versions: dict[str, str]
    backends: dict[str, Backend] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)


@click.command("doctor", short_help="Check this installation.")
@click.option("--backend", help="Check this backend alone; default: every installed one.")
@click.option("--config", type=click.Path(path_type=Path), help="Check a project's configuration, data and model too.")
@click.option("--deep", is_flag=True, help="With --config: train its first steps, and follow the adapter to an answer.")
@click.option("--model", default="builtin:tiny", show_default=True, help="What the training check trains on.")
@json_option
def command(*, backend: str | None, config: Path | None, deep: bool, model: str, as_json: bool) -> int:
    """Check versions, devices, and that training really trains: a few steps on a small model, on every usable device.

    The gradient is finite and not zero, the adapter changes, the base does not, the loss falls, and what training
    computes is what evaluation computes. Exit code 1 if a check fails.
    """
    if deep and config is None:
        raise click.UsageError("--deep follows a project's own model and data: name the project with --config")
    report = Report(_platform(), _versions())
    for name in [backend] if backend else _installed(report):
        _check_backend(report, name, model)
    if config is not None:
        report.findings.extend(_check_config(config, deep=deep))
    if as_json:
        emit(_as_json(report))
    else:
        _show(report)
    return 0 if report.ok else 1


def _platform() -> str:
    return f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    """Return the versions of Mindprint and of the libraries that it needs, from metadata."""
    found = {d.name: d.version for d in distributions() if d.name.startswith("mindprint-") or d.name in LIBRARIES}
    # Mindprint's own packages lead: a report of a problem is asked for their versions first.
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("mindprint-"), item[0])))


def _installed(report: Report) -> list[str]:
    names = [plugin.name for plugin in installed(BACKENDS)]
    if not names:
        remedy = f"none; {install_commands()}"
        report.findings.append(Finding("installed backends", ok=False, detail=remedy))
    return names


def _check_backend(report: Report, name: str, model: str) -> None:
    loaded: list[Backend] = []
    # A backend that does not load becomes a finding, and the others are still checked.
    report.findings.extend(guarded(name, partial(_loads, loaded, name)))
    for backend in loaded:
        report.backends[name] = backend
        if not backend.info.training:
            report.findings.append(Finding("trains", ok=True, detail=f"{name} only evaluates and answers"))
            continue
        for placement in _placements(backend):
            where = f"{name} on {placement.device}, {placement.dtype}"
            report.findings.extend(guarded(where, partial(_trains, placement, model)))


def _loads(loaded: list[Backend], name: str) -> Iterator[Finding]:
    loaded.append(load_backend(name))
    usable = [device.name for device in loaded[0].info.devices if device.usable]
    yield Finding("loads", ok=bool(usable), detail=f"usable devices: {', '.join(usable) or 'none'}")


def _placements(backend: Backend) -> list[Placement]:
    usable = (device for device in backend.info.devices if device.usable)
    # Only usable devices are tried: a build for CUDA on a machine without a GPU is not a fault.
    return [Placement(backend, device.name, device.default_dtype) for device in usable]


def _trains(placement: Placement, model: str) -> Iterator[Finding]:
    return check_training(placement, resolve_model(ModelConfig(name=model), Path.cwd()))


def _check_config(path: Path, *, deep: bool) -> Iterator[Finding]:
    """Check a project's input and, with `deep`, also train its first steps."""
    prepared: list[Prepared] = []
    yield from guarded(str(path), partial(_prepares, path, prepared))
    # The list is empty if the preparation failed. That finding is already in the report.
    for ready in prepared if deep else ():
        placement = Placements().resolve_training(ready.plans[0].backend)
        where = f"{path} on {placement.backend.name}, {placement.device}, {placement.dtype}"
        yield from guarded(where, partial(check_deeply, ready, placement))


def _prepares(path: Path, into: list[Prepared]) -> Iterator[Finding]:
    prepared = prepare(load_config(path))
    yield Finding("configuration", ok=True, detail=_counts(prepared))
    for note in prepared.notes:
        yield Finding("note", ok=True, detail=note.message)
    placements = Placements()
    # Stages mostly share one backend section. Each is resolved once.
    for section in dict.fromkeys(plan.backend for plan in prepared.plans):
        yield Finding("backend", ok=True, detail=str(placements.resolve_training(section)))
    into.append(prepared)


def _counts(prepared: Prepared) -> str:
    sft, pairs = (sum(map(len, rows.values())) for rows in prepared.examples.values())
    topics = len({plan.topic for plan in prepared.plans})
    return f"{prepared.model.name}, {topics} topics, {sft} SFT rows, {pairs} preference pairs"


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "platform": report.platform,
        "versions": report.versions,
        "backends": {name: info_values(backend.info) for name, backend in report.backends.items()},
        "checks": [asdict(finding) for finding in report.findings],
    }


def _show(report: Report) -> None:
    say(report.platform)
    say(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    for name, backend in report.backends.items():
        libraries = ", ".join(f"{library} {version}" for library, version in backend.info.libraries.items())
        say(f"\n{name}: {libraries}")
        for line in [*device_lines(backend.info), *backend.info.notes]:
            say(f"  {line}")
    say("\n" + table(("checked", "what", "result", "detail"), _rows(report.findings)))
    failed = sum(not finding.ok for finding in report.findings)
    say(f"\n{f'{failed} of {len(report.findings)} checks failed' if failed else 'all checks passed'}")


def _rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    return [(f.subject, f.name, "ok" if f.ok else "FAILED", f.detail) for f in findings]
