"""An adapter's values compared with its fingerprint or, if it has none, with plausible values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.formats import adapter_format, unmatched_note
from mindprint.adapter.peft_format import adapter_digest, base_copies
from mindprint.adapter.weight_changes import stored_tensors
from mindprint.contract import AdapterState, LoraFactors
from mindprint.models import folder as models
from mindprint.models.quantized import dense_weights, read_rows
from mindprint.trust.changes import SAME, Change, change, changes, exchanged, reshaped, rounding_error
from mindprint.trust.fingerprint import AdapterRecord
from mindprint.trust.report import Finding, listed
from mindprint.trust.stored import rounded, same_values

IMPLAUSIBLE = 1.0
"""A change as large as the weight itself is not fine-tuning: trained adapters are seen at 0.001 to 0.3."""

WEIGHED = 16
"""How many modules are weighed against the base where no fingerprint says how strong the adapter should be."""

NARROW: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16"}
"""The dtypes that tools round an adapter's factors to."""

Changes = Mapping[str, Change]


def value_findings(adapter: AdapterState, record: AdapterRecord | None) -> list[Finding]:
    """Return the faults of an adapter's values, judged from its files alone."""
    bad = [site for site, pair in adapter.tensors.items() if not all(np.isfinite(part).all() for part in pair)]
    if bad:
        message = f"{_share(bad, adapter.tensors)} have values that are NaN or infinite ({listed(bad)})"
        return [Finding("not_finite", message, sites=tuple(bad))]
    found = changes(adapter)
    if record is None:
        return list(_without_record(found))
    digest = adapter_digest(adapter)
    if digest == record.digest:
        return []
    if digest in record.rounded.values():
        return [_precision(tuple(found), found)]
    return list(_against_record(adapter, found, record)) or [_other_digits()]


def rounded_digests(adapter: AdapterState) -> dict[str, str]:
    """Return the digests that an adapter has once its factors are stored in bfloat16 or float16.

    They are recorded, so that a rounded adapter is recognised bit by bit and not by its likeness.
    """
    digests = {}
    for dtype, name in NARROW.items():
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is found as such
            tensors = {
                site: LoraFactors(*(rounded(part, dtype) for part in pair)) for site, pair in adapter.tensors.items()
            }
        digests[name] = adapter_digest(AdapterState(adapter.config, tensors))
    return digests


def target_findings(folder: Path, base: models.ModelFolder) -> Iterator[Finding]:
    """Note names in `target_modules` that the base lacks."""
    if note := unmatched_note(folder, base.path):
        yield Finding("unmatched_targets", note, fails=False)


def copy_findings(folder: Path, base: models.ModelFolder) -> Iterator[Finding]:
    """Compare weights of the base that PEFT saved along with the base's: PEFT puts them into it on loading."""
    if adapter_format(folder) != "peft":
        return
    weights, copies, facts = dense_weights(base.path), base_copies(folder), read_base_facts(base.path)
    stored = {site: stored_tensors(site, weights.keys(), facts) for site in copies}
    other = tuple(
        site for site, names in stored.items() if not all(same_values(copies[site], weights[name]) for name in names)
    )
    if other:
        message = f"the adapter brings another {listed(other)} than the base's: it was trained in addition to LoRA"
        yield Finding("adapter_changed", message, sites=other)


def strength_findings(adapter: AdapterState, base: models.ModelFolder) -> Iterator[Finding]:
    """Compare the size of the change with that of the weights that it changes, for an adapter without a fingerprint."""
    weights, found, facts = dense_weights(base.path), changes(adapter), read_base_facts(base.path)
    stored = {site: stored_tensors(site, weights.keys(), facts) for site in found}
    sites = [site for site, names in stored.items() if names]
    ratios = []
    # A sample is enough: alpha taken for the scale makes every module too strong by the same factor.
    for site in sites[:: max(1, len(sites) // WEIGHED)]:
        weight = weights[stored[site][0]]
        values = read_rows(weight, 0, math.prod(weight.shape[:-1]))
        norm = float(np.linalg.norm(values.astype(np.float64)))
        ratios.append(found[site].norm / max(norm, 1e-300))
    ratio = float(np.median(ratios)) if ratios else 0.0
    if ratio >= IMPLAUSIBLE:
        scale = adapter.config.scale(sites[0])
        message = (
            f"the change is {ratio:.3g} times as large as the weights that it changes: is its scale {scale:g} right?"
        )
        yield Finding("scale", message)


def _without_record(found: Changes) -> Iterator[Finding]:
    message = "no fingerprint.json: checked are the values, their fit and strength, and that they do something"
    yield Finding("no_fingerprint", message, fails=False)
    idle = tuple(site for site, one in found.items() if one.norm == 0)
    if len(idle) == len(found):
        yield Finding("no_effect", "the adapter changes no weight: every A or B is zero", sites=idle)
    elif idle:
        message = f"{_share(idle, found)} change nothing: A or B is zero ({listed(idle)})"
        yield Finding("partly_applied", message, fails=False, sites=idle)


def _against_record(adapter: AdapterState, found: Changes, record: AdapterRecord) -> Iterator[Finding]:
    """Compare each module's change with the recorded one. The first finding that explains a module names it."""
    recorded = record.changes
    yield from _modules(found, recorded)
    other = [site for site in found if site in recorded and not _is_rounded(adapter, site, recorded[site], "F32")]
    # From the most to the least specific. A module that one explains is not given to the next.
    for explain in (_idle, _scaled, _swapped):
        finding = explain(found, recorded, other)
        if finding is not None:
            yield finding
            other = [site for site in other if site not in finding.sites]
    # A fingerprint of format 1 has no digests of the rounded factors. Then likeness has to do.
    alike = [] if record.rounded else [site for site in other if _is_narrow(adapter, site, recorded[site])]
    if alike:
        yield _precision(tuple(alike), found)
        other = [site for site in other if site not in alike]
    if turned := tuple(site for site in other if _was_not_transposed(adapter, site, recorded[site])):
        message = f"the factors of {_share(turned, found)} were read without transposing them ({listed(turned)})"
        yield Finding("transposed", message, sites=turned)
    if rest := tuple(site for site in other if site not in turned):
        message = f"{_share(rest, found)} have other values than were trained ({listed(rest)})"
        yield Finding("adapter_changed", message, sites=rest)


def _is_rounded(adapter: AdapterState, site: str, recorded: Change, dtype: str) -> bool:
    """Return whether a module's change is the recorded one but for a rounding of its factors to `dtype`."""
    pair, scale = adapter.tensors[site], adapter.config.scale(site)
    return change(pair, scale).within(recorded, rounding_error(pair, scale, dtype))


def _is_narrow(adapter: AdapterState, site: str, recorded: Change) -> bool:
    """Return whether a module's factors are exact in 16 bits, and no further from the record than rounding explains."""
    pair = adapter.tensors[site]
    return any(
        all(np.array_equal(rounded(part, dtype), part) for part in pair) and _is_rounded(adapter, site, recorded, dtype)
        for dtype in NARROW
    )


def _other_digits() -> Finding:
    message = (
        "the adapter's values are stored otherwise: each module's change is the same within the rounding of float32"
    )
    return Finding("written_otherwise", message, fails=False)


def _modules(found: Changes, recorded: Changes) -> Iterator[Finding]:
    missing, extra = (tuple(sorted(one.keys() - other.keys())) for one, other in ((recorded, found), (found, recorded)))
    if missing:
        message = f"{_share(missing, recorded)} are not in the adapter ({listed(missing)})"
        yield Finding("layers_missing", message, sites=missing)
    if extra:
        message = f"{len(extra)} modules were not in the adapter when it was trained ({listed(extra)})"
        yield Finding("adapter_changed", message, sites=extra)


def _idle(found: Changes, _recorded: Changes, sites: Sequence[str]) -> Finding | None:
    idle = tuple(site for site in sites if found[site].norm == 0)
    if idle and all(one.norm == 0 for one in found.values()):
        return Finding("no_effect", "the adapter changes no weight any more: every A or B is zero", sites=idle)
    message = f"{_share(idle, found)} change nothing any more: A or B is zero ({listed(idle)})"
    return Finding("partly_applied", message, sites=idle) if idle else None


def _scaled(found: Changes, recorded: Changes, sites: Sequence[str]) -> Finding | None:
    factors = {site: found[site].factor(recorded[site]) for site in sites}
    factors = {
        site: factor
        for site, factor in factors.items()
        # Noise leaves a factor of nearly one. That is not a matter of strength.
        if abs(factor - 1) > 10 * SAME and found[site].distance(recorded[site], factor) <= SAME
    }
    return strength_finding(factors, len(found), "act", "as strongly as trained") if factors else None


def strength_finding(factors: Mapping[str, float], total: int, verb: str, than: str) -> Finding:
    """Return a finding that modules are too strong or too weak, by how much, and whether all by the same."""
    # The median: one module that went wrong in another way must not hide the common factor.
    values = list(factors.values())
    factor, low, high = float(np.median(values)), min(values), max(values)
    spread = "" if high - low <= 0.02 * abs(factor) else f" ({low:.4g} to {high:.4g})"
    message = f"{len(values)} of {total} modules {verb} {factor:.4g} times{spread} {than} ({listed(list(factors))})"
    return Finding("scale", message, sites=tuple(factors), factor=factor)


def _precision(sites: tuple[str, ...], found: Changes) -> Finding:
    message = f"the factors of {_share(sites, found)} were rounded to a narrower dtype"
    return Finding("precision", message, fails=False, sites=sites)


def _swapped(found: Changes, recorded: Changes, sites: Sequence[str]) -> Finding | None:
    swapped = exchanged(found, recorded, sites)
    pairs = [f"{site} has that of {other}" for site, other in swapped.items()]
    message = f"{_share(pairs, found)} have the change of another one ({listed(pairs)})"
    return Finding("sites_swapped", message, sites=tuple(swapped)) if swapped else None


def _was_not_transposed(adapter: AdapterState, site: str, recorded: Change) -> bool:
    """Return whether the change is the recorded one once the factors are transposed, or exchanged and transposed."""
    pair, scale = adapter.tensors[site], adapter.config.scale(site)
    if pair.a.ndim == 3:
        return False
    meant = [*reshaped(pair)]
    if pair.a.shape == pair.b.shape[::-1]:
        meant.append(LoraFactors(pair.b.T, pair.a.T))
    return any(change(factors, scale).distance(recorded) <= SAME for factors in meant)


def _share(some: Sequence[str], of_all: Mapping[str, object]) -> str:
    return f"{len(some)} of {len(of_all)} modules"
