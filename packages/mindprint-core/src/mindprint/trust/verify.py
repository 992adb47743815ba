"""The verification of an adapter or a merged model: recompute its effect, compare, name the differences.

Exact checks come first: digests, and each module's change. Then the probe on a backend. A difference that files
alone cannot judge (a setting that only one config.json states, weights under other names) is settled by the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mindprint.adapter.formats import read_any_adapter
from mindprint.adapter.gguf_files import GgufFile
from mindprint.adapter.gguf_merging import merged_share
from mindprint.contract import AdapterState, Dtype, Float32, ModelSpec
from mindprint.data.tokenizer import load_tokenizer
from mindprint.errors import AdapterError, GuardError, ModelError, NotFiniteError, TransposedError
from mindprint.models import folder as models
from mindprint.models.engine import Engine, Placement
from mindprint.models.quantized import Quantization, read_quantization
from mindprint.models.tensor_files import FLOAT_DTYPES
from mindprint.trust.adapters import copy_findings, strength_findings, target_findings, value_findings
from mindprint.trust.bases import Doubt, base_findings, other_quantization, settings_findings, tokenizer_findings
from mindprint.trust.digests import computed_settings, differences
from mindprint.trust.effects import LEAST_KEPT, kept_effect
from mindprint.trust.fingerprint import Fingerprint, Measurement, mean_effect, read_fingerprint
from mindprint.trust.measurement import record_tokenizer
from mindprint.trust.merged import merge_findings
from mindprint.trust.probe import Noise, Probe, compared, measure_noise, score, synthetic_probe, tolerance, widened
from mindprint.trust.report import Code, Comparison, Effect, Finding, Report, Tolerance

TELLING = 3.0
"""The probe tells something about an adapter if its effect is this many times the tolerance or more."""

LOST = 0.5
"""The share of an adapter's change below which a GGUF file counts as the base model's."""

GGUF_DTYPES: Mapping[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The types of GGUF weights that are judged by the tolerance of a dtype."""

OF_THE_BASE: frozenset[Code] = frozenset({"wrong_base", "base_changed", "rope_differs", "config_differs", "not_finite"})
"""Findings that explain why the base alone computes something else."""

ROUNDED_FACTORS = 0.05
"""Share of its effect by which an adapter may differ whose factors were rounded to float16 or bfloat16."""

CURVATURE = 0.25
"""An adapter at f times its strength has an effect whose direction departs from the recorded one by less than this
times (f - 1)², for log-probs are smooth in the strength: a tenth is seen. One that acts only in places departs more."""

Notice = Callable[[str], None]


def verify_adapter(
    folder: Path,
    base: models.ModelFolder,
    placement: Placement,
    notice: Notice = lambda _: None,
    *,
    require_fingerprint: bool = False,
    any_quantization: bool = False,
    state: AdapterState | None = None,
) -> Report:
    """Verify the adapter in `folder` on `base`, against its fingerprint if it has one or if that is required.

    On a base that is quantized otherwise than in training, the share of the effect that is left is measured. It fails
    unless `any_quantization` asks for such a base, and then if too little is left. `state` is the same adapter as it is
    in a file of another format, which is then what is verified.

    Raises a `MindprintError` for files that cannot be read, or that cannot belong to each other at all.
    """
    fingerprint, judgement = read_fingerprint(folder), _Judgement()
    if fingerprint is None and require_fingerprint:
        judgement.add([_required(folder)], "fingerprint.json")
        return judgement.report(folder, "adapter", base, placement)
    try:
        adapter = state or read_any_adapter(folder, base.path)[0]
    except TransposedError as error:  # readable, and decided without a look at the values
        judgement.add([Finding("transposed", str(error))], "adapter shapes")
        return judgement.report(folder, "adapter", base, placement)
    _judge_files(judgement, adapter, base, fingerprint)
    judgement.findings.extend(copy_findings(folder, base))
    judgement.findings.extend(target_findings(folder, base))
    probe = fingerprint.probe if fingerprint else _own_probe(base)
    here = _scored(
        judgement, probe, base, placement, adapter, notice, _differs_from(fingerprint, placement.dtype, base)
    )
    if fingerprint is not None and (words := other_quantization(base, fingerprint.base)):
        _judge_quantization(judgement, here, fingerprint.measurement(placement.dtype), words, asked=any_quantization)
    elif fingerprint is not None:
        _compare_adapter(judgement, here, fingerprint, placement.dtype, base)
    elif here.adapter is not None:
        _judge_effect(judgement, here)
    return judgement.report(folder, "adapter", base, placement)


def verify_merged(
    merged: models.ModelFolder,
    base: models.ModelFolder,
    adapter: AdapterState,
    placement: Placement,
    fingerprint: Fingerprint | None = None,
    notice: Notice = lambda _: None,
    *,
    require_fingerprint: bool = False,
    any_quantization: bool = False,
) -> Report:
    """Verify that `merged` is `base` with `adapter` in it: weight by weight from the files, then by the probe.

    A quantized merge is judged by the share of the adapter's effect that is left. With a fingerprint the probe is
    compared with the measurement after training, otherwise with base and adapter computed here.

    Raises a `MindprintError` for files that cannot be read.
    """
    judgement = _Judgement()
    if fingerprint is None and require_fingerprint:
        judgement.add([_required(merged.path)], "fingerprint.json")
        return judgement.report(merged.path, "merged model", base, placement)
    _judge_files(judgement, adapter, base, fingerprint)
    judgement.add(merge_findings(merged.path, base.path, adapter), "merged weights")
    settings = differences(computed_settings(base.path), computed_settings(merged.path))
    judgement.add(settings_findings(settings, "the merged model's"), "merged config.json")
    tokenizer = record_tokenizer(load_tokenizer(base.path))
    judgement.add(tokenizer_findings(merged, tokenizer), "merged tokenizer and chat template")
    _probe_merge(judgement, merged, base, adapter, placement, fingerprint, notice, any_quantization=any_quantization)
    return judgement.report(merged.path, "merged model", base, placement)


def verify_gguf(
    opened: GgufFile,
    base: models.ModelFolder,
    adapter: AdapterState,
    placement: Placement,
    fingerprint: Fingerprint | None = None,
    notice: Notice = lambda _: None,
    *,
    require_fingerprint: bool = False,
) -> Report:
    """Verify that a GGUF file is `base` with `adapter` in it: by its weights, then by the probe on a backend for GGUF.

    A file of fewer than 16 bits is judged by the share of the adapter's effect that is left.

    Raises a `MindprintError` for files that cannot be read, or a file of another base.
    """
    judgement = _Judgement()
    if fingerprint is None and require_fingerprint:
        judgement.add([_required(opened.path)], "fingerprint.json")
        return judgement.report(opened.path, "merged model", base, placement)
    _judge_files(judgement, adapter, base, fingerprint)
    share = merged_share(opened, base, adapter)
    judgement.checked.append("merged weights")
    if share < LOST:
        message = f"the weights have {share:.2f} of the adapter's change: this is the base model's file"
        judgement.findings.append(Finding("merge_lost", message, factor=share))
    probe = fingerprint.probe if fingerprint else _own_probe(base)
    recorded = fingerprint.measurement(placement.dtype) if fingerprint else None
    noise: Noise | None
    if recorded is not None:
        before, after, noise = recorded.base, recorded.adapter, recorded.noise
    else:
        here = _scored(judgement, probe, base, placement, adapter, notice, _differs_from(None, placement.dtype, base))
        if here.base is None or here.adapter is None:
            return judgement.report(opened.path, "merged model", base, placement)
        before, after, noise = here.base, here.adapter, here.noise
    now = _scored_file(judgement, probe, opened.path, placement)
    judgement.effect = Effect(mean_effect(before, after), mean_effect(before, now))
    types = {tensor.kind.name for tensor in opened.tensors.values()}
    dtypes = [GGUF_DTYPES[name] for name in types if name in GGUF_DTYPES]
    dtypes += [recorded.dtype] if recorded is not None else []
    allowed = tolerance([placement.dtype, *dtypes], noise, config=models.model_config(base.path))
    if coarse := sorted(types - set(GGUF_DTYPES)):
        _judge_requantized(judgement, (before, after, now), allowed, ", ".join(coarse))
    else:
        both = compared("merged model", now, after, allowed)
        judgement.settle(same=both.within)
        _judge_comparison(judgement, both, before, after, now)
    return judgement.report(opened.path, "merged model", base, placement)


def _scored_file(judgement: _Judgement, probe: Probe, file: Path, placement: Placement) -> Float32:
    """Score the probe on a GGUF file."""
    backend = placement.backend
    model = backend.load_model(ModelSpec(str(file), placement.device, placement.dtype))
    try:
        if int(max(row.max() for row in probe.rows)) >= model.vocab_size:
            raise ModelError(f"{file}: has {model.vocab_size} tokens, and the probe uses others: another base")
        judgement.checked.append(f"probe of {probe.tokens} tokens")
        return score(backend, model, probe, adapter=False)
    finally:
        backend.release(model)


def _required(folder: Path) -> Finding:
    return Finding("no_fingerprint", f"{folder}: the adapter has no fingerprint.json, and one is required")


@dataclass
class _Judgement:
    """The findings so far."""

    findings: list[Finding] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    effect: Effect | None = None

    @property
    def failed(self) -> frozenset[Code]:
        return frozenset(finding.code for finding in self.findings if finding.fails)

    def add(self, found: Iterable[Finding | Doubt], checked: str) -> None:
        """Add the findings of a check."""
        self.checked.append(checked)
        for finding in found:
            if isinstance(finding, Doubt):
                self.doubts.append(finding)
            else:
                self.findings.append(finding)

    def settle(self, *, same: bool) -> None:
        """Decide the doubts that files left, now that the probe has been scored."""
        self.findings.extend(doubt.settled(same=same) for doubt in self.doubts)
        self.doubts.clear()

    def report(
        self, subject: Path, kind: Literal["adapter", "merged model"], base: models.ModelFolder, placement: Placement
    ) -> Report:
        # Doubts that no probe has settled count as findings.
        self.settle(same=False)
        findings = tuple(sorted(self.findings, key=lambda finding: not finding.fails))
        name, device, dtype = placement.key
        checked, comparisons = tuple(self.checked), tuple(self.comparisons)
        return Report(str(subject), kind, base.name, name, device, dtype, checked, findings, comparisons, self.effect)


def _judge_files(
    judgement: _Judgement, adapter: AdapterState, base: models.ModelFolder, fingerprint: Fingerprint | None
) -> None:
    """Check everything that needs no model: the adapter's values, and the base against the fingerprint."""
    judgement.add(value_findings(adapter, fingerprint.adapter if fingerprint else None), "adapter values")
    if fingerprint is not None:
        method = fingerprint.base.weights.method
        judgement.add(base_findings(base, fingerprint.base), f"base weights ({method}) and config.json")
        judgement.add(tokenizer_findings(base, fingerprint.tokenizer), "tokenizer and chat template")
    elif not judgement.failed:
        judgement.add(strength_findings(adapter, base), "strength compared with the base's weights")


@dataclass(frozen=True)
class _Scores:
    """The probe's log-probs as they are here; None where the model could not compute them."""

    base: Float32 | None = None
    adapter: Float32 | None = None
    noise: Noise | None = None


def _own_probe(base: models.ModelFolder) -> Probe:
    return synthetic_probe(load_tokenizer(base.path), models.model_config(base.path))


def _differs_from(
    fingerprint: Fingerprint | None, dtype: Dtype, base: models.ModelFolder
) -> Callable[[Float32, Float32], bool]:
    """Return a test whether scores are so far from those recorded that the noise here is worth measuring."""
    if fingerprint is None:
        return lambda _base, _both: True
    recorded = fingerprint.measurement(dtype)
    allowed = tolerance([dtype, recorded.dtype], recorded.noise, config=models.model_config(base.path))
    return lambda base, both: (
        not compared("", base, recorded.base, allowed).within
        or not compared("", both, recorded.adapter, allowed).within
    )


def _compare_adapter(
    judgement: _Judgement, here: _Scores, fingerprint: Fingerprint, dtype: Dtype, base: models.ModelFolder
) -> None:
    """Compare with the measurement after training, and report a difference that no file explains."""
    if here.base is None:
        return
    recorded = fingerprint.measurement(dtype)
    dtypes = [dtype, recorded.dtype, *_narrower(base, fingerprint)]
    allowed = tolerance(dtypes, recorded.noise, here.noise, config=models.model_config(base.path))
    alone = compared("base", here.base, recorded.base, allowed)
    judgement.comparisons.append(alone)
    both = _compared_with_adapter(judgement, here, recorded, allowed)
    # An adapter that files have found wrong already says nothing about the base.
    judgement.settle(same=alone.within and (both is None or both.within or bool(judgement.failed)))
    if not alone.within and not judgement.failed & OF_THE_BASE:
        message = f"the base's files are as they were, and what it computes is not: {alone.deciding}"
        judgement.findings.append(Finding("backend_differs", message))
    if both is not None and here.adapter is not None:
        judgement.effect = Effect(recorded.effect, mean_effect(here.base, here.adapter))
        _judge_comparison(judgement, both, recorded.base, recorded.adapter, here.adapter)


def _judge_quantization(judgement: _Judgement, here: _Scores, trained: Measurement, words: str, *, asked: bool) -> None:
    """Say how much of its effect an adapter has on a base that is quantized otherwise than in training."""
    if here.base is None or here.adapter is None:
        judgement.findings.append(Finding("other_quantization", f"{words}; what is left of it was not measured"))
        return
    judgement.effect = Effect(trained.effect, mean_effect(here.base, here.adapter))
    kept = kept_effect((trained.base, trained.adapter), (here.base, here.adapter))
    message = f"{words}: it has {kept} there"
    if not kept.as_strong:
        message += f", where {LEAST_KEPT} to {1 / LEAST_KEPT:.2f} is the same adapter"
    elif not asked:
        message += "; ask for it with --any-quantization if that is meant"
    judgement.settle(same=kept.as_strong)
    judgement.findings.append(
        Finding("other_quantization", message, fails=not (asked and kept.as_strong), factor=kept.share)
    )


def _compared_with_adapter(
    judgement: _Judgement, here: _Scores, recorded: Measurement, allowed: Tolerance
) -> Comparison | None:
    if here.adapter is None:
        return None
    allowed = _for_rounded_factors(judgement, allowed, recorded.base, recorded.adapter)
    return compared("base with adapter", here.adapter, recorded.adapter, allowed)


def _for_rounded_factors(judgement: _Judgement, allowed: Tolerance, before: Float32, after: Float32) -> Tolerance:
    """Widen a tolerance if files have shown that the adapter's factors were rounded."""
    rounded = any(finding.code == "precision" for finding in judgement.findings)
    return widened(allowed, ROUNDED_FACTORS, before, after) if rounded else allowed


def _narrower(base: models.ModelFolder, fingerprint: Fingerprint) -> list[Dtype]:
    """Return the dtypes that the base is stored in, except the recorded one."""
    if read_quantization(base.path) is not None:
        return []
    # A base that was cast since has lost digits, whatever the dtype that computes with it.
    stored = {info.dtype for info in models.tensors(base.path).values()} - {fingerprint.base.weights.dtype}
    return [FLOAT_DTYPES[dtype] for dtype in stored if dtype in FLOAT_DTYPES]


def _judge_effect(judgement: _Judgement, here: _Scores) -> None:
    """Report an adapter without a fingerprint whose effect is within the noise."""
    assert here.base is not None
    assert here.adapter is not None
    assert here.noise is not None
    judgement.effect = Effect(None, mean_effect(here.base, here.adapter))
    if judgement.effect.found <= here.noise.mean and not judgement.failed:
        message = f"the adapter moves the probe by {judgement.effect.found:.2g} nats a token, which is noise"
        judgement.findings.append(Finding("no_effect", message))


def _probe_merge(
    judgement: _Judgement,
    merged: models.ModelFolder,
    base: models.ModelFolder,
    adapter: AdapterState,
    placement: Placement,
    fingerprint: Fingerprint | None,
    notice: Notice,
    *,
    any_quantization: bool,
) -> None:
    probe = fingerprint.probe if fingerprint else _own_probe(base)
    after: Float32 | None
    noise: Noise | None
    stored = {FLOAT_DTYPES[info.dtype] for info in models.tensors(merged.path).values() if info.dtype in FLOAT_DTYPES}
    quantized = read_quantization(merged.path)
    recorded = fingerprint.measurement(placement.dtype) if fingerprint else None
    other = other_quantization(base, fingerprint.base) if fingerprint else None
    if fingerprint is not None and recorded is not None and other is None:
        before, after, noise = recorded.base, recorded.adapter, recorded.noise
        stored |= {recorded.dtype, *_narrower(base, fingerprint)}
    else:
        # A backend may not be able to hold an adapter (of stacked experts, say) that files can judge.
        measure = _differs_from(None, placement.dtype, base)
        here = _scored(judgement, probe, base, placement, adapter, notice, measure, needed=False)
        if recorded is not None and other is not None:
            _judge_quantization(judgement, here, recorded, other, asked=any_quantization)
        if here.base is None:
            _require_measured(judgement, quantized)
            return
        before, after, noise = here.base, here.adapter, here.noise
    now = _scored(judgement, probe, merged, placement, None, notice).base
    if now is None:
        _require_measured(judgement, quantized)
        return
    if after is None:
        judgement.effect = Effect(None, mean_effect(before, now))
        _require_measured(judgement, quantized)
        return
    judgement.effect = Effect(mean_effect(before, after), mean_effect(before, now))
    allowed = tolerance([placement.dtype, *stored], noise, config=models.model_config(base.path))
    if quantized is not None:
        _judge_requantized(judgement, (before, after, now), allowed, str(quantized))
        return
    allowed = _for_rounded_factors(judgement, allowed, before, after)
    both = compared("merged model", now, after, allowed)
    judgement.settle(same=both.within)
    _judge_comparison(judgement, both, before, after, now)


def _require_measured(judgement: _Judgement, quantized: Quantization | None) -> None:
    """Let a quantized merge fail that no probe has judged: its files alone prove nothing."""
    if quantized is not None:
        message = f"the merged model is in {quantized}, and the adapter's effect that the rounding leaves is not known"
        judgement.findings.append(Finding("requantized", f"{message}: no backend has measured it"))


def _judge_requantized(
    judgement: _Judgement, scores: tuple[Float32, Float32, Float32], allowed: Tolerance, scheme: str
) -> None:
    """Judge a merge that was rounded onto a quantized grid by the share of the adapter's effect that is left.

    `scores` are the probe's log-probs of the base, of the base with the adapter, and of the merged model.
    """
    before, after, now = scores
    kept = kept_effect((before, after), (before, now))
    effect = mean_effect(before, after)
    tells = effect >= allowed.mean
    sound = kept.alike and tells
    judgement.settle(same=sound)
    message = f"the merged model is in {scheme}, and the rounding leaves {kept}"
    if not tells:
        message += f", which moves the probe by {effect:.2g} nats a token: too little to be measured in this dtype"
    elif not sound:
        message += (
            f": at least {LEAST_KEPT} of both is needed. Merge into full precision with `mindprint merge`, which "
            "writes the weights dequantized, or serve the adapter on the quantized base"
        )
    judgement.findings.append(Finding("requantized", message, fails=not sound, factor=kept.share))


def _judge_comparison(judgement: _Judgement, both: Comparison, before: Float32, after: Float32, now: Float32) -> None:
    """Report the probe's findings about the adapter's effect, unless files have explained it already."""
    judgement.comparisons.append(both)
    # A small effect drowns in the tolerance: then a probe within it proves nothing about the adapter.
    effect, allowed = mean_effect(before, after), both.tolerance
    if effect < TELLING * allowed.mean:
        message = (
            f"the adapter moves the probe by {effect:.2g} nats a token, {allowed.reason} by up to {allowed.mean:.2g}"
        )
        judgement.findings.append(Finding("probe_cannot_tell", f"{message}: judged by the files", fails=False))
    if not both.within and not judgement.failed:
        judgement.findings.append(_unexplained(before, after, now, both))


def _unexplained(before: Float32, after: Float32, now: Float32, both: Comparison) -> Finding:
    """Return a finding on the effect where files show no fault and the probe does."""
    wanted, found = (values.astype(np.float64) - before for values in (after, now))
    # Cosine and length of the effect that is there against the recorded one: a wrong strength keeps the direction.
    product, squared, norm = float(wanted @ found), float(wanted @ wanted), float(np.linalg.norm(found))
    factor = product / max(squared, 1e-300)
    alike = product / max(squared**0.5 * norm, 1e-300)
    how = both.deciding
    if np.abs(found).mean() <= both.tolerance.mean:
        return Finding("no_effect", f"the files are right, and the backend computes the base alone: {how}")
    # An effect bends with the strength, so that its direction may turn by a part of (f - 1)² (see CURVATURE).
    if factor > 1.2 or 1 - alike <= CURVATURE * (factor - 1) ** 2:
        message = f"the files are right, and the effect is about {factor:.2g} times as strong: {how}"
        return Finding("scale", message, factor=factor)
    if 0 < factor < 1:
        return Finding("partly_applied", f"the files are right, and {factor:.0%} of the effect is there: {how}")
    return Finding("backend_differs", f"the files are right, and this backend computes something else: {how}")


def _scored(
    judgement: _Judgement,
    probe: Probe,
    model: models.ModelFolder,
    placement: Placement,
    adapter: AdapterState | None,
    notice: Notice,
    noise_matters: Callable[[Float32, Float32], bool] = lambda _base, _both: False,
    *,
    needed: bool = True,
) -> _Scores:
    """Load a model and score the probe, without and with the adapter if there is one; measure noise where it matters.

    What cannot be loaded or injected raises if it is `needed`, unless files have explained it already.
    """
    engine = Engine(model, notice)
    base: Float32 | None = None
    try:
        engine.load(placement)
        _check_vocabulary(probe, engine.model.vocab_size, model)
        base = score(engine.backend, engine.model, probe, adapter=False)
        judgement.checked.append(f"probe of {probe.tokens} tokens")
        if adapter is None:
            return _Scores(base)
        engine.inject(adapter)
        both = score(engine.backend, engine.model, probe, adapter=True)
        if not noise_matters(base, both):
            return _Scores(base, both)
        return _Scores(base, both, measure_noise(engine.backend, engine.model, probe, both, adapter=True))
    except NotFiniteError:
        if "not_finite" not in judgement.failed:
            whose = model.name if base is None else "the base with the adapter"
            judgement.findings.append(Finding("not_finite", f"{whose} computes log-probs that are NaN or infinite"))
    except (AdapterError, GuardError, ModelError) as error:
        if needed and not judgement.failed and not judgement.doubts:
            raise
        judgement.findings.append(Finding("not_computed", str(error), fails=False))
    finally:
        engine.release()
    return _Scores(base)


def _check_vocabulary(probe: Probe, vocabulary: int, model: models.ModelFolder) -> None:
    least, greatest = (int(pick([pick(row) for row in probe.rows])) for pick in (min, max))
    if least < 0:
        raise AdapterError(f"fingerprint.json: its probe uses token {least}, which is not a token: it was edited")
    if greatest >= vocabulary:
        raise ModelError(f"{model.name}: has {vocabulary} tokens, and the probe uses token {greatest}: another base")
