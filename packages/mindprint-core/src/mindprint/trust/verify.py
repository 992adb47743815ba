"""Does an adapter, or a merged model, still do what it did where it was trained? Recompute, compare, name what differs.

First what is exact: digests, and what each module's change became. Then the probe on a backend. A difference that files
alone cannot judge (a setting that only one config.json states, weights under other names) is settled by the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindprint import models
from mindprint.adapter.peft_format import read_adapter
from mindprint.contract import AdapterState, Dtype, Float32, LoraFactors
from mindprint.data.tokenizer import load_tokenizer
from mindprint.errors import AdapterError, GuardError, MindprintError, ModelError, NotFiniteError, TransposedError
from mindprint.tensor_files import read_float32
from mindprint.training.engine import Engine, Placement
from mindprint.trust.changes import ROUNDED, SAME, Change, change, changes, exchanged, reshaped
from mindprint.trust.digests import Difference, WeightsDigest, computed_settings, differences, digest_weights
from mindprint.trust.fingerprint import (
    AdapterRecord,
    Fingerprint,
    Measurement,
    TokenizerRecord,
    mean_effect,
    read_fingerprint,
)
from mindprint.trust.measurement import record_tokenizer
from mindprint.trust.merged import merge_findings
from mindprint.trust.probe import Noise, Probe, compared, measure_noise, score, synthetic_probe, tolerance
from mindprint.trust.report import Comparison, Effect, Finding, Report, listed

TELLING = 3.0
"""The probe tells something about an adapter if its effect is this many times the tolerance or more."""

IMPLAUSIBLE = 1.0
"""A change as large as the weight itself is no fine-tuning; trained adapters are seen at 0.001 to 0.3."""

WEIGHED = 16
"""How many modules are weighed against the base where no fingerprint says how strong the adapter should be."""

Notice = Callable[[str], None]
DTYPE_OF: Mapping[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class _Judgement:
    """What was found so far; `doubts` are findings that hold unless the probe shows that nothing computes otherwise."""

    findings: list[Finding] = field(default_factory=list)
    doubts: list[Finding] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    effect: Effect | None = None

    @property
    def fails(self) -> bool:
        return any(finding.fails for finding in self.findings)

    def settle(self, *, same: bool) -> None:
        """The probe has spoken about what files left open."""
        for doubt in self.doubts:
            harmless = Finding(
                "written_otherwise", f"{doubt.message}; the probe is the same", fails=False, sites=doubt.sites
            )
            self.findings.append(harmless if same else doubt)
        self.doubts.clear()

    def report(self, subject: Path, kind: str, base: models.ModelFolder, placement: Placement) -> Report:
        self.settle(same=False)
        name, device, dtype = placement.backend.name, placement.device, placement.dtype
        findings = tuple(sorted(self.findings, key=lambda finding: not finding.fails))
        shown = (tuple(self.checked), findings, tuple(self.comparisons), self.effect)
        return Report(
            str(subject), "adapter" if kind == "adapter" else "merged model", base.name, name, device, dtype, *shown
        )


def verify_adapter(
    folder: Path, base: models.ModelFolder, placement: Placement, notice: Notice = lambda _: None
) -> Report:
    """Verify the adapter in `folder` on `base`, against its fingerprint if it has one.

    Raises a `MindprintError` for files that cannot be read or cannot be of this base at all.
    """
    fingerprint = read_fingerprint(folder)
    judgement = _Judgement()
    try:
        adapter, _ = read_adapter(folder)
    except TransposedError as error:  # readable, and decidable without looking at a value
        judgement.findings.append(Finding("transposed", str(error)))
        return judgement.report(folder, "adapter", base, placement)
    _judge_adapter(judgement, adapter, fingerprint)
    _judge_base(judgement, base, fingerprint)
    if fingerprint is None:
        _judge_strength(judgement, adapter, base)
    _probe_adapter(judgement, adapter, base, placement, fingerprint, notice)
    return judgement.report(folder, "adapter", base, placement)


def verify_merged(
    merged: models.ModelFolder,
    base: models.ModelFolder,
    adapter: AdapterState,
    placement: Placement,
    fingerprint: Fingerprint | None = None,
    notice: Notice = lambda _: None,
) -> Report:
    """Verify that `merged` is `base` with `adapter` in it: weight by weight from the files, then by the probe.

    With a fingerprint the probe is compared with what was measured where the adapter was trained, else with base and
    adapter computed here. Raises a `MindprintError` for files that cannot be read.
    """
    judgement = _Judgement()
    _judge_adapter(judgement, adapter, fingerprint)
    _judge_base(judgement, base, fingerprint)
    _judge_merge(judgement, merged, base, adapter)
    _probe_merge(judgement, merged, base, adapter, placement, fingerprint, notice)
    return judgement.report(merged.path, "merged model", base, placement)


# --- the adapter's own files -----------------------------------------------------------------------------------------


def _judge_adapter(judgement: _Judgement, adapter: AdapterState, fingerprint: Fingerprint | None) -> None:
    judgement.checked.append("adapter values")
    bad = [site for site, pair in adapter.tensors.items() if not all(np.isfinite(part).all() for part in pair)]
    if bad:
        message = f"{len(bad)} of {len(adapter.tensors)} modules have values that are NaN or infinite ({listed(bad)})"
        judgement.findings.append(Finding("not_finite", message, sites=tuple(bad)))
        return
    found = changes(adapter)
    if fingerprint is None:
        message = "no fingerprint.json: checked are its values, its fit, its strength and that it does something"
        judgement.findings.append(Finding("no_fingerprint", message, fails=False))
        judgement.findings.extend(_without_effect(found))
        return
    judgement.checked.append("adapter digest")
    judgement.findings.extend(_against_record(adapter, found, fingerprint.adapter))


def _without_effect(found: Mapping[str, Change]) -> Iterator[Finding]:
    idle = tuple(site for site, one in found.items() if one.norm == 0)
    if len(idle) == len(found):
        yield Finding("no_effect", "the adapter changes no weight: every A or B is zero", sites=idle)
    elif idle:
        message = f"{len(idle)} of {len(found)} modules change nothing: A or B is zero ({listed(idle)})"
        yield Finding("partly_applied", message, fails=False, sites=idle)


def _against_record(adapter: AdapterState, found: Mapping[str, Change], record: AdapterRecord) -> Iterator[Finding]:
    """What became of each module's change since the fingerprint."""
    missing, extra = (tuple(sorted(a.keys() - b.keys())) for a, b in ((record.changes, found), (found, record.changes)))
    if missing:
        yield Finding(
            "layers_missing",
            f"{len(missing)} of {len(record.changes)} modules are not in the adapter ({listed(missing)})",
            sites=missing,
        )
    if extra:
        yield Finding("adapter_changed", f"{len(extra)} modules were not in the adapter ({listed(extra)})", sites=extra)
    shared = [site for site in found if site in record.changes]
    other = [site for site in shared if found[site].distance(record.changes[site]) > SAME]
    idle = tuple(site for site in other if found[site].norm == 0)
    if idle and len(idle) == len(found):
        yield Finding("no_effect", "the adapter changes no weight any more: every A or B is zero", sites=idle)
        return
    if idle:
        yield Finding(
            "partly_applied",
            f"{len(idle)} of {len(found)} modules change nothing any more ({listed(idle)})",
            sites=idle,
        )
    other = [site for site in other if site not in idle]
    scaled = {site: found[site].factor(record.changes[site]) for site in other}
    scaled = {site: f for site, f in scaled.items() if found[site].distance(record.changes[site], f) <= SAME}
    if scaled:
        yield _scaled(scaled, len(found))
    other = [site for site in other if site not in scaled]
    rounded = [site for site in other if found[site].distance(record.changes[site]) <= ROUNDED]
    if rounded:
        yield Finding(
            "precision",
            f"the factors of {len(rounded)} modules were rounded to a narrower dtype",
            fails=False,
            sites=tuple(rounded),
        )
    other = [site for site in other if site not in rounded]
    yield from _otherwise(adapter, found, record, other)


def _scaled(factors: Mapping[str, float], total: int) -> Finding:
    factor = float(np.median(list(factors.values())))
    low, high = min(factors.values()), max(factors.values())
    spread = "" if high - low <= 1e-3 * abs(factor) else f" ({low:.4g} to {high:.4g})"
    message = f"{len(factors)} of {total} modules act {factor:.4g} times as strongly as trained{spread} ({listed(list(factors))})"
    return Finding("scale", message, sites=tuple(factors), factor=factor)


def _otherwise(
    adapter: AdapterState, found: Mapping[str, Change], record: AdapterRecord, sites: list[str]
) -> Iterator[Finding]:
    """Modules whose change is another one: transposed, another module's, or simply other values."""
    turned = tuple(site for site in sites if _fits_reshaped(adapter, site, record.changes[site]))
    if turned:
        yield Finding(
            "transposed",
            f"the factors of {len(turned)} modules were read without transposing them ({listed(turned)})",
            sites=turned,
        )
    rest = [site for site in sites if site not in turned]
    swapped = exchanged(found, record.changes, rest)
    if swapped:
        pairs = [f"{site} has that of {other}" for site, other in swapped.items()]
        yield Finding(
            "sites_swapped", f"{len(swapped)} modules have another one's change ({listed(pairs)})", sites=tuple(swapped)
        )
    rest = [site for site in rest if site not in swapped]
    if rest:
        yield Finding(
            "adapter_changed",
            f"{len(rest)} of {len(found)} modules have other values than were trained ({listed(rest)})",
            sites=tuple(rest),
        )


def _fits_reshaped(adapter: AdapterState, site: str, recorded: Change) -> bool:
    pair, scale = adapter.tensors[site], adapter.config.scale(site)
    candidates = [reshaped(pair)]
    if pair.a.shape == pair.b.shape[::-1]:
        candidates.append(LoraFactors(pair.b.T, pair.a.T))
    return any(change(candidate, scale).distance(recorded) <= SAME for candidate in candidates)


def _judge_strength(judgement: _Judgement, adapter: AdapterState, base: models.ModelFolder) -> None:
    """Without a fingerprint: whether the change is small beside the weights that it changes."""
    if judgement.fails:
        return
    judgement.checked.append("strength beside the base's weights")
    weights = models.tensors(base.path)
    found = changes(adapter)
    sites = [site for site in found if f"{site}.weight" in weights]
    ratios = []
    for site in sites[:: max(1, len(sites) // WEIGHED)]:
        norm = float(np.linalg.norm(read_float32(weights[f"{site}.weight"]).astype(np.float64)))
        ratios.append(found[site].norm / max(norm, 1e-300))
    ratio = float(np.median(ratios)) if ratios else 0.0
    if ratio >= IMPLAUSIBLE:
        scale = adapter.config.scale(next(iter(found)))
        message = f"the adapter's change is {ratio:.3g} times as large as the weights it is added to: is its scale, {scale:g}, right?"
        judgement.findings.append(Finding("scale", message))


# --- the base's files ------------------------------------------------------------------------------------------------


def _judge_base(judgement: _Judgement, base: models.ModelFolder, fingerprint: Fingerprint | None) -> None:
    if fingerprint is None:
        return
    recorded = fingerprint.base
    found = digest_weights(base.path, recorded.weights.method)
    judgement.checked += [f"base weights ({recorded.weights.method})", "config.json", "tokenizer", "chat template"]
    _judge_weights(judgement, found, recorded.weights, base)
    _judge_settings(judgement, differences(recorded.settings, computed_settings(base.path)), "the base's")
    judgement.findings.extend(_against_tokenizer(base, fingerprint.tokenizer))


def _judge_weights(
    judgement: _Judgement, found: WeightsDigest, recorded: WeightsDigest, base: models.ModelFolder
) -> None:
    parts = sorted(found.parts.keys() | recorded.parts.keys())
    other = [part for part in parts if found.parts.get(part) != recorded.parts.get(part)]
    changed = tuple(part for part in other if _same_layout(part, found, recorded))
    if changed and len(changed) >= len(parts) / 2:
        message = f"the weights of {base.name} are not those of the base the adapter was trained on"
        judgement.findings.append(Finding("wrong_base", message, sites=changed))
    elif changed:
        message = f"{len(changed)} of {len(parts)} parts of the base have other weights ({listed(changed)})"
        judgement.findings.append(Finding("base_changed", message, sites=changed))
    if others := tuple(part for part in other if part not in changed):
        message = f"{len(others)} of {len(parts)} parts of the base have tensors of other names, shapes or dtypes ({listed(others)})"
        judgement.doubts.append(Finding("wrong_base", message, sites=others))


def _same_layout(part: str, found: WeightsDigest, recorded: WeightsDigest) -> bool:
    one, other = found.parts.get(part), recorded.parts.get(part)
    return one is not None and other is not None and one.layout == other.layout


def _judge_settings(judgement: _Judgement, changed: tuple[Difference, ...], whose: str) -> None:
    """Settings that both state and state differently decide; what one of them leaves out the probe decides."""
    for one_sided, target in ((False, judgement.findings), (True, judgement.doubts)):
        for rope in (True, False):
            these = [one for one in changed if (one.one_sided, one.of_rope) == (one_sided, rope)]
            if these:
                what = "rotary embedding" if rope else "configuration"
                message = f"{whose} {what} differs: {listed([str(one) for one in these])}"
                names = tuple(one.setting for one in these)
                target.append(Finding("rope_differs" if rope else "config_differs", message, sites=names))


def _against_tokenizer(model: models.ModelFolder, recorded: TokenizerRecord) -> Iterator[Finding]:
    found = record_tokenizer(load_tokenizer(model.path))
    if found.digest != recorded.digest:
        yield Finding("tokenizer_changed", f"the tokenizer of {model.name} is another one: text becomes other tokens")
    if found.template != recorded.template:
        yield Finding("template_changed", f"the chat template of {model.name} is another one than in training")
    if set(found.stop_token_ids) != set(recorded.stop_token_ids):
        was, now = sorted(recorded.stop_token_ids), sorted(found.stop_token_ids)
        yield Finding("stop_tokens_differ", f"answers end at the tokens {now}, in training at {was}")


# --- a merged model's files ------------------------------------------------------------------------------------------


def _judge_merge(
    judgement: _Judgement, merged: models.ModelFolder, base: models.ModelFolder, adapter: AdapterState
) -> None:
    judgement.checked += ["merged weights", "merged config.json", "merged tokenizer", "merged chat template"]
    findings, doubts = merge_findings(merged.path, base.path, adapter)
    judgement.findings += findings
    judgement.doubts += doubts
    _judge_settings(
        judgement, differences(computed_settings(base.path), computed_settings(merged.path)), "the merged model's"
    )
    judgement.findings.extend(_against_tokenizer(merged, record_tokenizer(load_tokenizer(base.path))))


# --- the probe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """The probe's log-probs as they are here, None where the model could not compute them."""

    base: Float32 | None = None
    adapter: Float32 | None = None
    noise: Noise | None = None


def _probe_adapter(
    judgement: _Judgement,
    adapter: AdapterState,
    base: models.ModelFolder,
    placement: Placement,
    fingerprint: Fingerprint | None,
    notice: Notice,
) -> None:
    probe = fingerprint.probe if fingerprint else _own_probe(base)
    scores = _scored(judgement, probe, base, placement, adapter, notice, noise=fingerprint is None)
    if scores.base is not None and scores.adapter is not None:
        recorded = fingerprint.measurement(placement.dtype) if fingerprint else None
        judgement.effect = Effect(recorded.effect if recorded else None, mean_effect(scores.base, scores.adapter))
    if fingerprint is not None:
        _judge_probe(judgement, scores, fingerprint.measurement(placement.dtype), placement.dtype)
    elif judgement.effect is not None and scores.noise is not None:
        _judge_effect(judgement, judgement.effect.found, scores.noise)


def _judge_effect(judgement: _Judgement, effect: float, noise: Noise) -> None:
    """Without a fingerprint: whether the adapter does anything that is not noise."""
    if effect <= noise.mean and not judgement.fails:
        message = f"the adapter moves the probe by {effect:.2g} nats a token, within the noise of {noise.mean:.2g}"
        judgement.findings.append(Finding("no_effect", message))


def _probe_merge(
    judgement: _Judgement,
    merged: models.ModelFolder,
    base: models.ModelFolder,
    adapter: AdapterState,
    placement: Placement,
    fingerprint: Fingerprint | None,
    notice: Notice,
) -> None:
    probe = fingerprint.probe if fingerprint else _own_probe(base)
    if fingerprint is not None:
        recorded = fingerprint.measurement(placement.dtype)
        before, after, dtypes = recorded.base, recorded.adapter, [placement.dtype, recorded.dtype]
        noise: Noise | None = recorded.noise
    else:
        scores = _scored(judgement, probe, base, placement, adapter, notice, noise=True)
        if scores.base is None or scores.adapter is None:
            return
        before, after, dtypes, noise = scores.base, scores.adapter, [placement.dtype], scores.noise
    now = _scored(judgement, probe, merged, placement, None, notice).base
    if now is None:
        return
    judgement.effect = Effect(mean_effect(before, after), mean_effect(before, now))
    stored = {DTYPE_OF[info.dtype] for info in models.tensors(merged.path).values() if info.dtype in DTYPE_OF}
    allowed = tolerance([*dtypes, *stored], noise)
    comparison = compared("merged model", now, after, allowed)
    judgement.comparisons.append(comparison)
    judgement.settle(same=comparison.within)
    telling = judgement.effect.recorded is not None and judgement.effect.recorded >= TELLING * allowed.mean
    if not telling:
        judgement.findings.append(_cannot_tell(judgement.effect, allowed.mean, allowed.reason))
    if not comparison.within and not judgement.fails:
        judgement.findings.append(_unexplained(before, after, now, comparison))


def _judge_probe(judgement: _Judgement, scores: _Scores, recorded: Measurement, dtype: Dtype) -> None:
    """Compare with what was measured where the adapter was trained, and name what no file explains."""
    if scores.base is None:
        return
    allowed = tolerance([dtype, recorded.dtype], recorded.noise)
    base = compared("base", scores.base, recorded.base, allowed)
    judgement.comparisons.append(base)
    judgement.settle(same=base.within)
    if not base.within and not judgement.fails:
        message = f"the base's files are what they were, and its log-probs differ by {base.mean:.2g} nats a token"
        judgement.findings.append(Finding("backend_differs", message))
    if scores.adapter is None:
        return
    adapter = compared("base and adapter", scores.adapter, recorded.adapter, allowed)
    judgement.comparisons.append(adapter)
    if recorded.effect < TELLING * allowed.mean:
        assert judgement.effect is not None
        judgement.findings.append(_cannot_tell(judgement.effect, allowed.mean, allowed.reason))
    if not adapter.within and not judgement.fails:
        judgement.findings.append(_unexplained(recorded.base, recorded.adapter, scores.adapter, adapter))


def _cannot_tell(effect: Effect, noise: float, reason: str) -> Finding:
    recorded = effect.recorded or 0.0
    message = (
        f"the adapter moves the probe by {recorded:.2g} nats a token, {reason} by {noise:.2g}: judged by the files"
    )
    return Finding("probe_cannot_tell", message, fails=False)


def _unexplained(before: Float32, after: Float32, now: Float32, comparison: Comparison) -> Finding:
    """Files say that all is well, and the probe does not: what became of the effect."""
    wanted, found = (values.astype(np.float64) - before for values in (after, now))
    factor = float(wanted @ found) / max(float(wanted @ wanted), 1e-300)
    alike = float(wanted @ found) / max(float(np.linalg.norm(wanted) * np.linalg.norm(found)), 1e-300)
    how = f"log-probs differ by {comparison.mean:.2g} nats a token"
    if np.abs(found).mean() <= comparison.tolerance.mean:
        return Finding("no_effect", f"the files are right, and the backend computes the base alone: {how}")
    if alike > 0.98 and abs(factor - 1) > 0.02:
        return Finding(
            "scale", f"the files are right, and the effect is {factor:.3g} times as strong: {how}", factor=factor
        )
    if 0 < factor < 0.98:
        return Finding(
            "partly_applied", f"the files are right, and {factor:.0%} of the effect is there: {how}", factor=factor
        )
    return Finding("backend_differs", f"the files are right, and this backend computes something else: {how}")


def _own_probe(base: models.ModelFolder) -> Probe:
    return synthetic_probe(load_tokenizer(base.path), models.model_config(base.path))


def _scored(
    judgement: _Judgement,
    probe: Probe,
    model: models.ModelFolder,
    placement: Placement,
    adapter: AdapterState | None,
    notice: Notice,
    *,
    noise: bool = False,
) -> _Scores:
    """Load a model and score the probe, without and with the adapter if there is one.

    What cannot be loaded or injected raises, unless files have explained it already: then there are no scores.
    """
    engine = Engine(model, notice)
    base: Float32 | None = None
    try:
        engine.load(placement)
        _check_vocabulary(probe, engine.model.vocab_size, model)
        base = score(engine.backend, engine.model, probe, adapter=False)
        if adapter is None:
            judgement.checked.append(f"probe of {probe.tokens} tokens")
            return _Scores(base)
        engine.inject(adapter)
        with_adapter = score(engine.backend, engine.model, probe, adapter=True)
        judgement.checked.append(f"probe of {probe.tokens} tokens, without and with the adapter")
        measured = measure_noise(engine.backend, engine.model, probe, with_adapter, adapter=True) if noise else None
        return _Scores(base, with_adapter, measured)
    except NotFiniteError:
        if not any(finding.code == "not_finite" for finding in judgement.findings):
            whose = model.name if base is None else "the base with the adapter"
            judgement.findings.append(Finding("not_finite", f"{whose} computes log-probs that are NaN or infinite"))
    except (AdapterError, GuardError, ModelError):
        if not judgement.fails and not judgement.doubts:
            raise
    finally:
        engine.release()
    return _Scores(base)


def _check_vocabulary(probe: Probe, vocabulary: int, model: models.ModelFolder) -> None:
    greatest = max(int(row.max()) for row in probe.rows)
    if greatest >= vocabulary:
        raise ModelError(
            f"{model.name}: has {vocabulary} tokens, the fingerprint's probe uses token {greatest}: another base"
        )


__all__ = ["MindprintError", "read_fingerprint", "verify_adapter", "verify_merged"]
