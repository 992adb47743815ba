"""`mindprint merge`: the base with the adapter in it, as a model of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from mindprint.adapter.formats import adapter_format
from mindprint.adapter.merging import merged_folder, refuse_taken
from mindprint.cli.generate import backend_section
from mindprint.cli.output import emit, json_option, notice, say
from mindprint.cli.verify import as_values, show
from mindprint.config import BackendConfig, ModelConfig
from mindprint.contract import AdapterState
from mindprint.errors import AdapterError, GuardError
from mindprint.models import folder as models
from mindprint.plugins.loading import BACKENDS, installed
from mindprint.runs.opened import Located, locate_adapter, placement_for, read_located
from mindprint.trust.adapters import copy_findings
from mindprint.trust.fingerprint import read_fingerprint
from mindprint.trust.merged import merge_findings
from mindprint.trust.report import Finding, Report
from mindprint.trust.verify import verify_merged


class NotVerifiedError(GuardError):
    """A merge that is not what base and adapter compute."""

    def __init__(self, out: Path, report: Report | None, findings: tuple[Finding, ...]) -> None:
        said = "; ".join(finding.message for finding in findings if finding.fails)
        super().__init__(f"{out}: was not kept, for the merge does not verify: {said}")
        self.report = report


@click.command("merge", short_help="Merge an adapter into its base.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@click.option("--backend", help="What verifies the result: auto, torch, mlx, ...; default: the run's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
@click.option("--no-verify", is_flag=True, help="Compare the files only; compute nothing.")
@json_option
def command(
    *,
    adapter: Path,
    out: Path,
    model: str | None,
    backend: str | None,
    device: str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Write the base of ADAPTER with the adapter in it to the new folder OUT, and verify it.

    ADAPTER is a project (its newest complete run), a run, or an adapter of Mindprint's, PEFT's or mlx-lm's. Nothing is
    computed by a framework but the verification. A merge that does not verify is removed: exit code 1.
    """
    refuse_taken(out)
    located = locate_adapter(adapter)
    base, state = read_located(located, model)
    _refuse_own_weights(located.adapter, base)
    section = backend_section(backend, device)
    try:
        with merged_folder(out, base, state, located.adapter) as merged:
            report = None if no_verify else _verified(located, merged.folder, out, base, state, section)
            if report is None:
                _compare_files(merged.folder, out, base, state)
    except NotVerifiedError as error:
        if error.report is not None and not as_json:
            show(error.report)
        raise
    if as_json:
        verified = None if report is None else as_values(report)
        emit({"folder": str(out.resolve()), "base": base.name, "changed": list(merged.changed), "verified": verified})
        return
    say(f"{out}: {len(merged.changed)} weights of {base.name} changed, everything else is as it was")
    if report is not None:
        show(report)


def _verified(
    located: Located,
    folder: Path,
    out: Path,
    base: models.ModelFolder,
    state: AdapterState,
    section: BackendConfig | None,
) -> Report | None:
    """What a backend computes with the merge beside base and adapter; None where none is installed."""
    if not installed(BACKENDS):
        notice("no backend is installed: the files are compared, nothing is computed", warning=True)
        return None
    merged = models.resolve_model(ModelConfig(name=str(folder.resolve())), Path.cwd())
    placement = placement_for(located, section, None, base)
    report = verify_merged(merged, base, state, placement, read_fingerprint(located.adapter), notice)
    report = replace(report, subject=str(out))
    if not report.ok:
        raise NotVerifiedError(out, report, report.findings)
    return report


def _compare_files(folder: Path, out: Path, base: models.ModelFolder, state: AdapterState) -> None:
    """Every weight against W + s·B·A, every other against the base's."""
    findings = tuple(found for found in merge_findings(folder, base.path, state) if isinstance(found, Finding))
    if any(finding.fails for finding in findings):
        raise NotVerifiedError(out, None, findings)


def _refuse_own_weights(folder: Path, base: models.ModelFolder) -> None:
    """PEFT saves embeddings along with an adapter on them; they must be the base's."""
    if adapter_format(folder) == "peft":
        for finding in copy_findings(folder, base):
            raise AdapterError(f"{folder}: {finding.message}; it cannot be merged as LoRA")
