"""`mindprint verify`: does an adapter, or a merged model, still do what it did where it was trained?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mindprint.adapter.merging import read_record
from mindprint.adapter.peft_format import adapter_digest
from mindprint.cli.output import emit, json_option, notice, say, table
from mindprint.config import BackendConfig, ModelConfig
from mindprint.contract import Dtype
from mindprint.errors import AdapterError
from mindprint.models import folder as models
from mindprint.runs.opened import Located, find_base, locate_adapter, placement_for, read_located
from mindprint.trust.fingerprint import read_fingerprint
from mindprint.trust.report import Finding, Report
from mindprint.trust.verify import verify_adapter, verify_merged


@click.command("verify", short_help="Prove that an adapter or a merge does what it did.")
@click.argument("path", metavar="ADAPTER", type=click.Path(path_type=Path), default=".")
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter that ADAPTER, a merged model, came from.")
@click.option("--backend", help="auto, torch, mlx, ...; default: the run's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in; default: float32 where it fits.",
)
@json_option
def command(
    *,
    path: Path,
    model: str | None,
    adapter: Path | None,
    backend: str | None,
    device: str | None,
    dtype: Dtype | None,
    as_json: bool,
) -> int:
    """Recompute an adapter's fingerprint and name what differs.

    ADAPTER is a project (its newest complete run), the folder of a run or of an adapter, or that of a merged model.
    Exit code 0 if it does what it did where it was trained, 1 if not, 2 if its files cannot be read.
    """
    section = BackendConfig(type=backend or "auto", device=device or "auto", dtype=dtype or "auto")
    chosen = None if backend is None and device is None else section
    if is_merged(path):
        report = _verify_merge(path, adapter, model, chosen, dtype)
    else:
        report = _verify_adapter(locate_adapter(path), model, chosen, dtype)
    if as_json:
        emit(as_values(report))
    else:
        show(report)
    return 0 if report.ok else 1


def is_merged(path: Path) -> bool:
    """Whether a folder is a model's rather than an adapter's, a run's or a project's."""
    return (path / "config.json").is_file() and not (path / "adapter_config.json").exists()


def _verify_adapter(located: Located, model: str | None, section: BackendConfig | None, dtype: Dtype | None) -> Report:
    base = find_base(located, model)
    return verify_adapter(located.adapter, base, placement_for(located, section, dtype, base), notice)


def _verify_merge(
    path: Path, adapter: Path | None, model: str | None, section: BackendConfig | None, dtype: Dtype | None
) -> Report:
    record = read_record(path)
    source = adapter or (path / record.adapter if record else None)
    if source is None:
        raise click.UsageError(f"{path} is a merged model: name the adapter that it came from with --adapter")
    if adapter is None and not source.is_dir():
        raise AdapterError(f"{path}: the adapter that it came from is no longer at {source}; name it with --adapter")
    located = locate_adapter(source)
    base, state = read_located(located, model)
    if adapter is None and record is not None and adapter_digest(state) != record.adapter_digest:
        raise AdapterError(f"{source}: is no longer the adapter that was merged into {path}; name that with --adapter")
    merged = models.resolve_model(ModelConfig(name=str(path.resolve())), Path.cwd())
    placement = placement_for(located, section, dtype, base)
    return verify_merged(merged, base, state, placement, read_fingerprint(located.adapter), notice)


# --- showing ---------------------------------------------------------------------------------------------------------


def show(report: Report) -> None:
    say(f"{report.kind}: {report.subject}")
    say(f"base: {report.base}, on {report.backend}, {report.device}, {report.dtype}")
    say(f"checked: {', '.join(report.checked)}")
    if report.comparisons:
        header = ("log-probs, nats a token", "tokens", "mean", "greatest", "mean allowed", "greatest", "which is")
        say("\n" + table(header, list(_rows(report)), numbers=(1, 2, 3, 4, 5)))
    if report.effect is not None:
        then = "" if report.effect.recorded is None else f", {report.effect.recorded:.4g} where it was trained"
        say(f"\nthe adapter moves the probe by {report.effect.found:.4g} nats a token{then}")
    say()
    for finding in report.findings:
        say(_line(finding))
    say(_verdict(report))


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    for one in report.comparisons:
        allowed = one.tolerance
        numbers = (f"{one.mean:.1e}", f"{one.greatest:.1e}", f"{allowed.mean:.1e}", f"{allowed.greatest:.1e}")
        yield one.what, str(one.tokens), *numbers, allowed.reason


def _line(finding: Finding) -> str:
    return f"{'FAILED' if finding.fails else 'note'}  {finding.code}: {finding.message}"


def _verdict(report: Report) -> str:
    if report.ok and not any(finding.code == "no_fingerprint" for finding in report.findings):
        return "verified: it does what it did where it was trained"
    if report.ok:
        return "nothing wrong was found; without a fingerprint that is all that can be said"
    failed = sum(finding.fails for finding in report.findings)
    return f"not verified: {failed} finding{'s' if failed > 1 else ''}"


def as_values(report: Report) -> dict[str, Any]:
    """A report as `--json` prints it."""
    return {"ok": report.ok, **asdict(report)}
