"""An adapter's values compared with its fingerprint or, if it has none, with plausible values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.formats import adapter_format
from mindprint.adapter.peft_format import adapter_digest, base_copies
from mindprint.adapter.weight_changes import stored_tensors
from mindprint.contract import AdapterState, LoraFactors
from mindprint.models import folder as models
from mindprint.models.tensor_files import read_float32
from mindprint.trust.changes import ROUNDED, SAME, Change, change, changes, exchanged, reshaped
from mindprint.trust.fingerprint import AdapterRecord
from mindprint.trust.report import Finding, listed
from mindprint.trust.stored import same_values

IMPLAUSIBLE = 1.0
"""A change as large as the weight itself is not fine-tuning: trained adapters are seen at 0.001 to 0.3."""

WEIGHED = 16
"""How many modules are weighed against the base where no fingerprint says how strong the adapter should be."""

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
    if adapter_digest(adapter) == record.digest:
        return []
    return list(_against_record(adapter, found, record.changes)) or [_other_digits()]


def copy_findings(folder: Path, base: models.ModelFolder) -> Iterator[Finding]:
    """Compare weights of the base that PEFT saved along with the base's: PEFT puts them into it on loading."""
    if adapter_format(folder) != "peft":
        return
    weights, copies, facts = models.tensors(base.path), base_copies(folder), read_base_facts(base.path)
    stored = {site: stored_tensors(site, weights.keys(), facts) for site in copies}
    other = tuple(
        site for site, names in stored.items() if not all(same_values(copies[site], weights[name]) for name in names)
    )
    if other:
        message = f"the adapter brings another {listed(other)} than the base's: it was trained in addition to LoRA"
        yield Finding("adapter_changed", message, sites=other)


def strength_findings(adapter: AdapterState, base: models.ModelFolder) -> Iterator[Finding]:
    """Compare the size of the change with that of the weights that it changes, for an adapter without a fingerprint."""
    weights, found, facts = models.tensors(base.path), changes(adapter), read_base_facts(base.path)
    stored = {site: stored_tensors(site, weights.keys(), facts) for site in found}
    sites = [site for site, names in stored.items() if names]
    ratios = []
    # A sample is enough: alpha taken for the scale makes every module too strong by the same factor.
    for site in sites[:: max(1, len(sites) // WEIGHED)]:
        norm = float(np.linalg.norm(read_float32(weights[stored[site][0]]).astype(np.float64)))
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


def _against_record(adapter: AdapterState, found: Changes, recorded: Changes) -> Iterator[Finding]:
    """Compare each module's change with the recorded one. The first finding that explains a module names it."""
    yield from _modules(found, recorded)
    other = [site for site in found if site in recorded and found[site].distance(recorded[site]) > SAME]
    # From the most to the least specific. A module that one explains is not given to the next.
    for explain in (_idle, _scaled, _rounded, _swapped):
        finding = explain(found, recorded, other)
        if finding is not None:
            yield finding
            other = [site for site in other if site not in finding.sites]
    if turned := tuple(site for site in other if _was_not_transposed(adapter, site, recorded[site])):
        message = f"the factors of {_share(turned, found)} were read without transposing them ({listed(turned)})"
        yield Finding("transposed", message, sites=turned)
    if rest := tuple(site for site in other if site not in turned):
        message = f"{_share(rest, found)} have other values than were trained ({listed(rest)})"
        yield Finding("adapter_changed", message, sites=rest)


def _other_digits() -> Finding:
    message = "the adapter's values are stored otherwise: what each module changes is the same within 1e-5 of it"
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
    factors = {site: f for site, f in factors.items() if found[site].distance(recorded[site], f) <= SAME}
    return strength_finding(factors, len(found), "act", "as strongly as trained") if factors else None


def strength_finding(factors: Mapping[str, float], total: int, verb: str, than: str) -> Finding:
    """Return a finding that modules are too strong or too weak, by how much, and whether all by the same."""
    # The median: one module that went wrong in another way must not hide the common factor.
    values = list(factors.values())
    factor, low, high = float(np.median(values)), min(values), max(values)
    spread = "" if high - low <= 0.02 * abs(factor) else f" ({low:.4g} to {high:.4g})"
    message = f"{len(values)} of {total} modules {verb} {factor:.4g} times{spread} {than} ({listed(list(factors))})"
    return Finding("scale", message, sites=tuple(factors), factor=factor)


def _rounded(found: Changes, recorded: Changes, sites: Sequence[str]) -> Finding | None:
    rounded = tuple(site for site in sites if found[site].distance(recorded[site]) <= ROUNDED)
    message = f"the factors of {_share(rounded, found)} were rounded to a narrower dtype"
    return Finding("precision", message, fails=False, sites=rounded) if rounded else None


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
