"""Adapters as files: prove one, merge it into its base model, or convert it for another tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from mindprint import atomic
from mindprint.adapter import gguf_format, mlx_lm_format, peft_format
from mindprint.adapter.base_facts import BaseFacts, read_base_facts
from mindprint.adapter.formats import (
    Format,
    TargetFormat,
    adapter_format,
    named_base,
    read_any_adapter,
    unmatched_note,
)
from mindprint.adapter.gguf_files import FileType, read_gguf
from mindprint.adapter.gguf_merging import RECORD, merged_gguf
from mindprint.adapter.merging import merged_folder, read_record, refuse_taken
from mindprint.adapter.mlx_lm_config import corrected_config, missing_keys, mlx_lm_note
from mindprint.adapter.prompting import read_prompting, write_prompting
from mindprint.adapter.rewriting import layout_note
from mindprint.adapter.targets import is_router, is_stack
from mindprint.api.options import Notices, OnNotice, backend_section
from mindprint.api.results import ConvertResult, MergeResult, VerifyResult
from mindprint.config import BackendConfig, DataConfig, ModelConfig
from mindprint.contract import AdapterState, Dtype
from mindprint.errors import AdapterError, BackendError, ConfigError, GuardError
from mindprint.models import folder as models
from mindprint.models.engine import Placement
from mindprint.models.folder import is_gguf
from mindprint.plugins.entries import BACKENDS, installed, installed_names
from mindprint.runs.opened import Located, find_base, locate_adapter, placement_for, read_located
from mindprint.trust.adapters import copy_findings
from mindprint.trust.fingerprint import read_fingerprint
from mindprint.trust.merged import merge_findings
from mindprint.trust.report import Finding, Report
from mindprint.trust.verify import verify_adapter, verify_gguf, verify_merged

GGUF_BACKEND = "llamacpp"
"""The backend that computes with GGUF files unless another one is named."""

ModelFormat = Literal["folder", "gguf"]
"""Whose models are written by a merge: Hugging Face's folders, or llama.cpp's files."""


class NotVerifiedError(GuardError):
    """A merge that computes something other than base and adapter do. It was removed.

    Attributes:
        verification: The failed verification, or None where only the files were compared.
    """

    def __init__(self, out: Path, verification: VerifyResult | None, findings: tuple[Finding, ...]) -> None:
        failures = "; ".join(finding.message for finding in findings if finding.fails)
        super().__init__(f"{out}: was not kept, for the merge does not verify: {failures}")
        self.verification = verification


def verify(
    path: str | PathLike[str],
    *,
    model: str | None = None,
    adapter: str | PathLike[str] | None = None,
    backend: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    require_fingerprint: bool = False,
    any_quantization: bool = False,
    on_notice: OnNotice | None = None,
) -> VerifyResult:
    """Recompute an adapter's fingerprint and name what differs.

    Args:
        path: A project (its newest complete run), the folder of a run or of an adapter, that of a merged model, or the
            GGUF file of a merged model or an adapter.
        model: Where the base model is, if not where the run or the adapter says.
        adapter: The adapter that `path`, a merged model, came from, if it was moved.
        backend: `torch`, `mlx`, or any installed backend. Default: the run's.
        device: `cpu`, `cuda`, `mps`, `metal`. Default: the run's.
        dtype: What to compute in. Default: float32 where it fits.
        require_fingerprint: Let an adapter without a fingerprint fail, instead of checking what can be checked.
        any_quantization: Accept a base in full precision or in other bits than the adapter was trained on, if the
            adapter has at least 0.95 of its effect there.
        on_notice: Receives messages about loading as they come.

    Returns:
        A `VerifyResult`. `result.ok` is True if it computes the same as where it was trained.

    Raises:
        AdapterError: The adapter, or the one that a merged model came from, cannot be found or read.
        MindprintError: The base model cannot be found, read or loaded.

    Example:
        >>> result = mindprint.verify("my-voice")
        >>> result.ok
        True
        >>> print(result.verdict)
        verified: it does what it did where it was trained
    """
    section = BackendConfig(type=backend or "auto", device=device or "auto", dtype=dtype or "auto")
    # Without a request the run's own choice is used, so "auto" must not replace it.
    chosen = None if backend is None and device is None else section
    notices = Notices(on_notice)
    folder = Path(path)
    if folder.is_file() and is_gguf(folder):
        report = _verify_gguf(folder, adapter, model, chosen, notices, require_fingerprint=require_fingerprint)
    elif is_merged(folder):
        source = Path(adapter) if adapter else None
        report = _verify_merge(
            folder, source, model, chosen, dtype, notices, require_fingerprint, any_quantization=any_quantization
        )
    else:
        located = locate_adapter(folder)
        base = find_base(located, model)
        placement = placement_for(located, chosen, dtype, base)
        report = verify_adapter(
            located.adapter,
            base,
            placement,
            notices,
            require_fingerprint=require_fingerprint,
            any_quantization=any_quantization,
        )
    return VerifyResult(report, notices.heard)


def _verify_gguf(
    file: Path,
    adapter: str | PathLike[str] | None,
    model: str | None,
    section: BackendConfig | None,
    notices: Notices,
    *,
    require_fingerprint: bool,
) -> Report:
    """Judge a GGUF file through llama.cpp, against the fingerprint of the adapter that it came from."""
    opened = read_gguf(file)
    recorded = opened.key(f"{RECORD}adapter")
    source = Path(adapter) if adapter is not None else file.parent / str(recorded)
    if adapter is None and (recorded is None or not source.is_dir()):
        raise AdapterError(f"{file}: where the adapter is that it came from is not known; name it with --adapter")
    located = locate_adapter(source)
    base, state = read_located(located, model)
    placement = _place_gguf(located, section, base)
    if opened.key("general.type") == "adapter":
        held = gguf_format.read_adapter(file, read_base_facts(base.path), base.path)
        report = verify_adapter(
            located.adapter, base, placement, notices, require_fingerprint=require_fingerprint, state=held
        )
        return replace(report, subject=str(file))
    digest = opened.key(f"{RECORD}adapter_digest")
    if adapter is None and digest is not None and digest != peft_format.adapter_digest(state):
        raise AdapterError(f"{source}: is no longer the adapter that was merged into {file}; name that with --adapter")
    fingerprint = read_fingerprint(located.adapter)
    return verify_gguf(opened, base, state, placement, fingerprint, notices, require_fingerprint=require_fingerprint)


def _place_gguf(located: Located, section: BackendConfig | None, base: models.ModelFolder) -> Placement:
    """Return where a GGUF file is computed. Raises `BackendError` for a backend that does not read such files."""
    # Asking every backend would import its framework only to learn that it reads none.
    if section is None and GGUF_BACKEND not in installed_names(BACKENDS):
        raise BackendError(f"computing with a GGUF file needs llama.cpp: pip install mindprint-{GGUF_BACKEND}")
    placement = placement_for(located, section or BackendConfig(type=GGUF_BACKEND), None, base)
    if "gguf" not in placement.backend.info.capabilities:
        raise BackendError(f"backend {placement.backend.name!r} reads no GGUF files: leave out --backend")
    return placement


def is_merged(folder: Path) -> bool:
    """Return whether a folder is a model's rather than an adapter's, a run's or a project's."""
    # The folder of an adapter may hold a copy of the base's config.json, so the adapter's own file decides.
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()


def _verify_merge(
    path: Path,
    adapter: Path | None,
    model: str | None,
    section: BackendConfig | None,
    dtype: Dtype | None,
    notices: Notices,
    require_fingerprint: bool,
    *,
    any_quantization: bool,
) -> Report:
    record = read_record(path)
    # The record holds a path relative to the merged model, so that both can be moved together.
    source = adapter or (path / record.adapter if record else None)
    if source is None:
        raise AdapterError(f"{path} is a merged model: name the adapter that it came from with --adapter")
    if adapter is None and not source.is_dir():
        raise AdapterError(f"{path}: the adapter that it came from is no longer at {source}; name it with --adapter")
    located = locate_adapter(source)
    # A merge into another base than the adapter's own says which.
    into = record.base if record is not None and record.into else None
    base, state = read_located(located, model or into)
    # Another adapter at the recorded path would make a sound merge look broken.
    if adapter is None and record is not None and peft_format.adapter_digest(state) != record.adapter_digest:
        raise AdapterError(f"{source}: is no longer the adapter that was merged into {path}; name that with --adapter")
    merged = models.resolve_model(ModelConfig(name=str(path.resolve())), Path.cwd())
    placement = placement_for(located, section, dtype, base)
    fingerprint = read_fingerprint(located.adapter)
    return verify_merged(
        merged,
        base,
        state,
        placement,
        fingerprint,
        notices,
        require_fingerprint=require_fingerprint,
        any_quantization=any_quantization or into is not None,
    )


def merge(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    verify: bool = True,
    fix_config: bool = False,
    model: str | None = None,
    into: str | None = None,
    quantize: bool = False,
    to: ModelFormat = "folder",
    file_type: FileType | None = None,
    backend: str | None = None,
    device: str | None = None,
    on_notice: OnNotice | None = None,
) -> MergeResult:
    """Write the base model with the adapter in it to a new folder or GGUF file, and verify it.

    Only the verification computes with a framework. A merge that does not verify is removed. A quantized base is
    written in full precision: `dequantized weight + s·B·A`, rounded once.

    Args:
        adapter: A project (its newest complete run), a run, or an adapter of Mindprint's, PEFT's or mlx-lm's.
        out: The new model's folder, or its GGUF file. It must not exist.
        verify: Let a backend compare the merged model with base and adapter. Otherwise only the files are compared.
        fix_config: Add the keys to the merged config.json that mlx-lm needs to compute the same model.
        model: Where the base model is, if not where the run or the adapter says.
        into: Another form of the base model to merge into, such as the full-precision model of a quantized base. The
            adapter's effect on it is measured. With `to="gguf"` also the base's own GGUF file: all its keys are kept.
        quantize: Quantize the result in the format of the base that the adapter was trained on. It is kept only if it
            has at least 0.95 of the adapter's effect.
        to: `folder` for a folder in Hugging Face layout, `gguf` for a file of llama.cpp's.
        file_type: `f32`, `f16`, `bf16` or `q8_0`: the type of a GGUF file's weights. Default: the type that each weight
            has in the file that `into` names, otherwise `f16`.
        backend: The backend that verifies. Default: the run's.
        device: `cpu`, `cuda`, `mps`, `metal`. Default: the run's.
        on_notice: Receives messages about the work as they come.

    Returns:
        A `MergeResult` with the folder, the changed weights and the verification.

    Raises:
        NotVerifiedError: The merged model computes something else. Nothing is left behind.
        RunError: `out` exists already, or the folder that it is to be in does not.
        MindprintError: The adapter or its base model cannot be read.

    Example:
        >>> result = mindprint.merge("my-voice", "my-model")
        >>> result.verification.ok
        True
        >>> (result.folder / "model.safetensors").is_file()
        True
    """
    target = Path(out)
    # Refused first: reading and merging a large base would otherwise be wasted.
    refuse_taken(target)
    notices = Notices(on_notice)
    if to == "gguf" or file_type is not None or (into is not None and is_gguf(Path(into))):
        _refuse_mixed(to, file_type, into, fix_config=fix_config, quantize=quantize)
        section = None if backend is None else backend_section(backend, device)
        return _merge_gguf(target, adapter, model, into, file_type, notices, section, computes=verify)
    located = locate_adapter(adapter)
    trained, state = read_located(located, model)
    base = trained if into is None else models.resolve_model(ModelConfig(name=into), Path.cwd())
    # A base that is packed at loading is in full precision on the disk: other weights than the adapter was trained on.
    elsewhere = into is not None or base.quantize is not None
    base = replace(base, quantize=None)
    _refuse_own_weights(located.adapter, base)
    if note := unmatched_note(located.adapter, base.path):
        notices(note)
    if note := layout_note(base.path):
        notices(note, warning=True)
    # A merge without a backend is still useful on a machine that only stores models.
    computes = verify and bool(installed(BACKENDS))
    if quantize and not computes:
        raise BackendError("a merge that is quantized again has to be measured: install a backend, and let it verify")
    if verify and not computes:
        notices("no backend is installed: the files are compared, nothing is computed", warning=True)
    verification = None
    # The folder gets its name only when the block ends well, so a failed verification leaves nothing.
    grid = trained.path if quantize else None
    with merged_folder(target, base, state, located.adapter, into=elsewhere, grid=grid) as merged:
        write_prompting(merged.folder, _data_settings(located))
        if keys := missing_keys(base.path):
            if fix_config:
                _write_corrected(merged.folder, base)
            else:
                notices(f"{mlx_lm_note(keys)}, or merge with --fix-config")
        if computes:
            section = backend_section(backend, device)
            verification = _verified(located, merged.folder, target, base, state, section, notices, into=elsewhere)
        else:
            _compare_files(merged.folder, target, base, state)
    return MergeResult(target, base.name, tuple(merged.changed), verification, notices.heard)


def _refuse_mixed(
    to: ModelFormat, file_type: FileType | None, into: str | None, *, fix_config: bool, quantize: bool
) -> None:
    """Refuse options of one kind of merge that were given for the other."""
    if to != "gguf":
        named = "a type of GGUF weights" if into is None or not is_gguf(Path(into)) else f"{into}, a GGUF file"
        raise ConfigError(f"{named} is only for a merge that writes GGUF: add --to gguf")
    if fix_config or quantize:
        option = "--fix-config" if fix_config else "--quantize"
        raise ConfigError(f"{option} is for a merged folder, and a GGUF file has no such thing; leave it out")
    if file_type is not None and file_type not in get_args(FileType):
        raise ConfigError(f"{file_type!r} is not a type that is written here: {', '.join(get_args(FileType))}")


def _merge_gguf(
    target: Path,
    adapter: str | PathLike[str],
    model: str | None,
    into: str | None,
    file_type: FileType | None,
    notices: Notices,
    section: BackendConfig | None,
    *,
    computes: bool,
) -> MergeResult:
    """Write a merged GGUF file, whose bytes are compared with those that were computed, and judge it with llama.cpp."""
    located = locate_adapter(adapter)
    base, state = read_located(located, model)
    base = replace(base, quantize=None)
    file = Path(into) if into is not None and not Path(into).is_dir() else None
    if into is not None and file is None:
        base = models.resolve_model(ModelConfig(name=into), Path.cwd())
    _refuse_own_weights(located.adapter, base)
    if note := unmatched_note(located.adapter, base.path):
        notices(note)
    with merged_gguf(target, base, state, located.adapter, into=file, kind=file_type) as merged:
        notices(f"rounded to the file's types, the weights have {merged.kept:.4f} of the adapter's change")
        for note in _left_behind(located):
            notices(note)
        verification = None
        if computes:
            try:
                placement = _place_gguf(located, section, base)
            except BackendError as error:
                notices(f"the file's bytes were compared, and nothing was computed with it: {error}")
            else:
                fingerprint = read_fingerprint(located.adapter)
                report = verify_gguf(read_gguf(merged.path), base, state, placement, fingerprint, notices)
                verification = VerifyResult(replace(report, subject=str(target)))
                if not verification.ok:
                    raise NotVerifiedError(target, verification, verification.findings)
    return MergeResult(target, base.name, merged.changed, verification, notices.heard)


def _verified(
    located: Located,
    folder: Path,
    out: Path,
    base: models.ModelFolder,
    state: AdapterState,
    section: BackendConfig | None,
    notices: Notices,
    *,
    into: bool,
) -> VerifyResult:
    """Compute with the merged model, and compare with base model and adapter."""
    merged = models.resolve_model(ModelConfig(name=str(folder.resolve())), Path.cwd())
    placement = placement_for(located, section, None, base)
    fingerprint = read_fingerprint(located.adapter)
    report = verify_merged(merged, base, state, placement, fingerprint, notices, any_quantization=into)
    # The merge was verified under a temporary name. The report has to name the final one.
    verification = VerifyResult(replace(report, subject=str(out)))
    if not verification.ok:
        raise NotVerifiedError(out, verification, verification.findings)
    return verification


def _compare_files(folder: Path, out: Path, base: models.ModelFolder, state: AdapterState) -> None:
    """Compare every changed weight with W + s·B·A, and every other weight with the base model's."""
    findings = tuple(found for found in merge_findings(folder, base.path, state) if isinstance(found, Finding))
    if any(finding.fails for finding in findings):
        raise NotVerifiedError(out, None, findings)


def _refuse_own_weights(folder: Path, base: models.ModelFolder) -> None:
    """Refuse embeddings that PEFT saved along with an adapter on them, unless they are the base model's."""
    if adapter_format(folder) == "peft":
        for finding in copy_findings(folder, base):
            raise AdapterError(f"{folder}: {finding.message}; it cannot be merged as LoRA")


def convert(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    to: TargetFormat,
    *,
    fix_config: bool = False,
    model: str | None = None,
    on_notice: OnNotice | None = None,
) -> ConvertResult:
    """Write an adapter in the format of PEFT, mlx-lm or llama.cpp (GGUF) to a new folder.

    Args:
        adapter: A project (its newest complete run), a run, or an adapter of Mindprint's, PEFT's or mlx-lm's.
        out: The new adapter's folder. It must not exist.
        to: `peft`, `mlx-lm`, or `gguf` (`adapter.gguf` for llama.cpp, with a `Modelfile` for Ollama).
        fix_config: Where mlx-lm needs other keys in the base's config.json, write such a file next to the adapter.
        model: Where the base model is, if not where the run or the adapter says.
        on_notice: Receives the notes as they come.

    Returns:
        A `ConvertResult` with the folder and the number of modules.

    Raises:
        AdapterError: The adapter is in that format already, or holds something that the format cannot; or `to` is
            `gguf` and the package gguf is not installed.
        RunError: `out` exists already, or the folder that it is to be in does not.

    Example:
        >>> result = mindprint.convert("my-voice", "my-voice-mlx", to="mlx-lm")
        >>> result.source_format, result.target_format
        ('peft', 'mlx-lm')
    """
    target = Path(out)
    refuse_taken(target)
    located = locate_adapter(adapter)
    source = adapter_format(located.adapter)
    if source == to:
        raise AdapterError(f"{located.adapter}: is in the format of {to} already")
    base = find_base(located, model)
    facts = read_base_facts(base.path)
    state, _ = read_any_adapter(located.adapter, base.path)
    # An adapter that cannot be written in whole leaves no folder behind.
    with atomic.new_folder(target) as aside:
        # The name that the adapter states is kept, so that hub names do not become local paths.
        base_name = named_base(located.adapter) or base.name
        if to == "gguf":
            notes = gguf_format.write_adapter(aside, state, facts, base.path, base_name)
            notes = (*notes, *_left_behind(located))
        else:
            notes = (*_write_converted(aside, state, facts, base_name, to), *_uncompared(facts))
            write_prompting(aside, _data_settings(located))
        if to == "mlx-lm" and (keys := missing_keys(base.path)):
            remedy = "convert with --fix-config to get such a file"
            if fix_config:
                _write_corrected(aside, base)
                remedy = f"{target / 'config.json'} is such a file, to copy over the base's"
            notes = (*notes, f"{mlx_lm_note(keys)} ({remedy})")
    if note := unmatched_note(located.adapter, base.path):
        notes = (*notes, note)
    notices = Notices(on_notice)
    for note in notes:
        notices(note)
    return ConvertResult(target, source, to, len(state.tensors), notes)


def _data_settings(located: Located) -> DataConfig:
    """Return how prompts are rendered for an adapter: as its run says, or the file in its folder."""
    return located.config.config.data if located.config else read_prompting(located.adapter)


def _left_behind(located: Located) -> Iterator[str]:
    """Yield a note about variables of the chat template, for which a GGUF file has no place."""
    if variables := _data_settings(located).chat_template_kwargs:
        stated = json.dumps(variables)
        yield (
            f"the adapter was trained with variables of the chat template, which a GGUF file does not hold: start "
            f"llama.cpp with --chat-template-kwargs '{stated}'"
        )


def _write_corrected(folder: Path, base: models.ModelFolder) -> None:
    """Write the base's config.json with the keys that mlx-lm needs."""
    text = json.dumps(corrected_config(base.path), indent=2)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


def _write_converted(folder: Path, state: AdapterState, facts: BaseFacts, base_name: str, to: Format) -> Iterator[str]:
    """Write the adapter, and yield notes about it for a person."""
    if to == "mlx-lm":
        yield from mlx_lm_format.write_adapter(folder, state, facts, base_name)
        return
    parameters = [site for site in state.tensors if is_stack(site) or is_router(site)]
    # PEFT adapts stacked experts and routers as parameters, and has no dropout for these.
    if state.config.dropout and parameters:
        yield f"dropout {state.config.dropout:g} is left out: PEFT has none on {parameters[0]}"
        state = AdapterState(replace(state.config, dropout=0.0), state.tensors)
    peft_format.write_adapter(folder, state, base_name)


def _uncompared(facts: BaseFacts) -> Iterator[str]:
    if not facts.compared:
        yield (
            f"mlx-lm's module names for model_type {facts.model_type!r} were not compared with transformers' "
            "names; mlx-lm refuses an adapter whose names do not fit"
        )
