"""A merged model against base and adapter, from their files alone: is every weight W + s·B·A, and every other W?

Block by block of rows, so that memory does not grow with the model. The rounding of the dtype in which the merge was
written is known exactly, element by element, so this tells more than any probe: one wrong number in a model is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.weight_changes import NotStoredError, site_changes
from mindprint.contract import AdapterState, Float32, LoraFactors
from mindprint.models.quantized import QuantizedWeight, StoredTensor, dense_weights
from mindprint.trust.adapters import strength_finding
from mindprint.trust.bases import Doubt
from mindprint.trust.report import Code, Finding, listed
from mindprint.trust.stored import blocks, rounded, same_values

DIGITS: Mapping[str, int] = {"F64": 24, "F32": 24, "F16": 11, "BF16": 8}
"""Significant bits of the dtypes that a merge is written in. F64 is read as float32."""

EPSILON: Mapping[str, float] = {dtype: 2.0**-digits for dtype, digits in DIGITS.items()}
"""Half a unit in the last place relative to the value, at most."""

LOOSE = 4.0
"""How many roundings are allowed for where a merge that went wrong is named. None of them makes it right."""

CHANGE_ROUNDINGS = 3
"""How often a tool may round the change to the dtype before it adds it: the product, its scaling, and a cast."""

SUMMING = 2.0**-22
"""Relative to |W| + |d|: four roundings of float32, 2^-24 each. Two are the tool's (of s·BA and of the sum), two are
ours (of s·BA and of the difference from W)."""

_STEP: Mapping[str, float] = {"F16": 2.0**-25}
"""Half the smallest step of a dtype, below which rounding is not relative."""

Fate = Literal["exact", "rounded", "lost", "swallowed", "scaled", "transposed", "other", "not finite"]


@dataclass(frozen=True)
class Merge:
    """The state of one adapted weight: `factor` is how often the change is in it, `noise` the rest relative to it."""

    fate: Fate
    factor: float = 1.0
    noise: float = 0.0


@dataclass
class _Sums:
    """Sums over the blocks of one weight, float64: of the change that is there (x), that should be (d), or is d's
    transpose (t), and of the weight itself (w).

    `excess` and `roughly` are the greatest error of an element as a share of what is allowed: of one rounding of the
    exact sum, and of a sum whose parts were rounded before.
    """

    xx: float = 0.0
    xd: float = 0.0
    dd: float = 0.0
    xt: float = 0.0
    ww: float = 0.0
    excess: float = 0.0
    roughly: float = 0.0
    finite: bool = True
    touched: bool = False
    expected: bool = False

    def rest(self, factor: float, product: float) -> float:
        """Return the norm of `x - factor · d`, given `x · d`."""
        return math.sqrt(max(self.xx - 2 * factor * product + factor * factor * self.dd, 0.0))


def merge_findings(merged: Path, base: Path, adapter: AdapterState) -> Iterator[Finding | Doubt]:
    """Yield the faults of a merge. Only the probe can judge tensors that have other names.

    The weights of a quantized base count as their dequantized values. The adapted weights of a quantized merge
    are not compared: rounding to few bits moves them by more than an adapter does, and only the probe can tell what is
    left of it. Raises `ModelError` for a folder that cannot be read, and `AdapterError` for an adapter whose shapes are
    not those of the base.
    """
    found, wanted = dense_weights(merged), dense_weights(base)
    shared = sorted(found.keys() & wanted.keys())
    facts = read_base_facts(base)
    adapted: set[str] = set()
    not_stored: set[str] = set()
    fates: dict[str, Merge] = {}
    for site in adapter.tensors:
        try:
            changes = site_changes(adapter, site, wanted, facts)
        except NotStoredError:
            not_stored.add(site)
            continue
        for change in changes:
            name, place = change.weight.tensor, change.weight.locate
            if name not in found or found[name].shape != wanted[name].shape:
                continue
            if isinstance(found[name], QuantizedWeight):
                adapted.add(name)
                if same_values(found[name], wanted[name]):
                    fates[str(change.weight)] = Merge("swallowed", 0.0)
            elif found[name].dtype in EPSILON:
                adapted.add(name)
                fates[str(change.weight)] = judge(place(found[name]), place(wanted[name]), change.factors, change.scale)
    rest = [name for name in shared if name not in adapted and _is_comparable(found[name], wanted[name])]
    yield from _described(fates)
    yield from _elsewhere(not_stored)
    yield from _untouched(tuple(name for name in rest if not same_values(found[name], wanted[name])))
    yield from _names(found.keys(), wanted.keys())


def _is_comparable(found: StoredTensor, wanted: StoredTensor) -> bool:
    """Return whether a weight that no adapter touches has to have the base's values."""
    # One that was quantized on the way has others, whether or not the adapter touches it.
    if isinstance(found, QuantizedWeight):
        return isinstance(wanted, QuantizedWeight) and found.scheme == wanted.scheme
    return True


def judge(found: StoredTensor, base: StoredTensor, factors: LoraFactors, scale: float) -> Merge:
    """Compare one weight `[out, in]` of the merged model with the base's plus the change."""
    sums = _summed(found, base, factors, scale)
    if not sums.finite:
        return Merge("not finite")
    if sums.dd == 0:
        return Merge("other" if sums.touched else "exact")
    if not sums.touched:
        return Merge("lost" if sums.expected else "swallowed", 0.0)
    # The least-squares factor of the expected change d in the change x that is there: x·d / d·d.
    factor, size = sums.xd / sums.dd, math.sqrt(sums.dd)
    if sums.excess <= 1 or sums.roughly <= 1:
        fate: Fate = "exact" if sums.excess <= 1 else "rounded"
    else:
        fate = _fault(sums, EPSILON[found.dtype], math.prod(found.shape))
    return Merge(fate, factor, sums.rest(1.0, sums.xd) / size)


def _fault(sums: _Sums, epsilon: float, elements: int) -> Fate:
    """Name the change of a weight that is not W + s·B·A within the rounding of every element."""
    factor, size = sums.xd / sums.dd, math.sqrt(sums.dd)
    # Roundings are independent and relative to the weight: their norm is about ε·‖W‖, and the change adds its own.
    rounding = LOOSE * epsilon * (math.sqrt(sums.ww) + size) / size
    # The factor is a mean over all elements, so that its error falls with the square root of their number.
    uncertain = max(0.02, 4 * rounding / math.sqrt(elements))
    # Noise of this size has the right change in it, and is not a matter of strength.
    if abs(factor - 1) <= uncertain:
        return "other"
    if sums.rest(factor, sums.xd) <= (rounding + 1e-3) * size:
        return "scaled" if abs(factor) > uncertain else "lost"
    if sums.xt and sums.rest(1.0, sums.xt) <= (rounding + 1e-3) * size:
        return "transposed"
    return "other"


def _summed(found: StoredTensor, base: StoredTensor, factors: LoraFactors, scale: float) -> _Sums:
    sums = _Sums()
    a, b = factors
    # Only a square weight can have the transpose of its change added without an error.
    square = a.shape[1] == b.shape[0]
    lengths = np.linalg.norm(b, axis=1), np.linalg.norm(a, axis=0)
    with np.errstate(all="ignore"):  # values that are not finite are a finding, not a warning
        for start, weight, merged in blocks(base, found):
            rows = slice(start, start + len(weight))
            d = np.float32(scale) * (b[rows] @ a)
            x = merged - weight
            narrow = rounded(weight, found.dtype)
            sums.finite &= bool(np.isfinite(merged).all())
            # Compared as bytes: NaN is unequal to itself, and -0.0 equals 0.0.
            sums.touched |= bool(merged.tobytes() != narrow.tobytes())
            sums.expected |= bool((rounded(weight + d, found.dtype) != narrow).any())
            once = _half_steps(merged, found.dtype)
            slack = _arithmetic(weight, d, factors, scale, lengths[0][rows], lengths[1])
            sums.excess = max(sums.excess, _greatest(np.abs(x - d) / (once + slack)))
            if sums.excess > 1:
                # A tool may have rounded the base before it added the change (it loaded it so), or the change.
                early = np.minimum(np.abs(x - d), np.abs(merged - narrow - d))
                before = CHANGE_ROUNDINGS * _half_steps(d, found.dtype)
                sums.roughly = max(sums.roughly, _greatest(early / (once + before + slack)))
            sums.xx, sums.xd, sums.dd = sums.xx + _dot(x, x), sums.xd + _dot(x, d), sums.dd + _dot(d, d)
            sums.ww += _dot(weight, weight)
            if square:
                sums.xt += _dot(x, np.float32(scale) * (a[:, rows].T @ b.T))
    return sums


def _half_steps(values: Float32, dtype: str) -> Float32:
    """Return half a unit in the last place of each value: the most that rounding to nearest can move it."""
    # The bits of a float32's exponent, alone, are the power of two at or below its size.
    powers = (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    steps: Float32 = np.maximum(powers * np.float32(EPSILON[dtype]), np.float32(_STEP.get(dtype, 1e-38)))
    return steps


def _arithmetic(
    weight: Float32,
    d: Float32,
    factors: LoraFactors,
    scale: float,
    row_lengths: NDArray[np.float32],
    column_lengths: NDArray[np.float32],
) -> Float32:
    """Return how far two computations of W + s·B·A in float32 can be apart, before the sum is rounded to its dtype."""
    # A product of r terms has an error of at most r·u·Σ|b||a| (Higham 2002, section 3.1), and Σ|b||a| ≤ ‖b‖·‖a‖.
    # It counts twice: for the tool that merged, and for ours.
    product = np.float32(2 * len(factors.a) * 2.0**-24 * abs(scale)) * np.outer(row_lengths, column_lengths)
    bound: Float32 = np.float32(SUMMING) * (np.abs(weight) + np.abs(d)) + product.astype(np.float32)
    return bound


def _greatest(ratios: NDArray[Any]) -> float:
    return float(ratios.max(initial=0.0))


def _dot(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.vdot(first.astype(np.float64), second.astype(np.float64)))


def _described(fates: Mapping[str, Merge]) -> Iterator[Finding]:
    by_fate: dict[Fate, list[str]] = {}
    for name, merge in fates.items():
        by_fate.setdefault(merge.fate, []).append(name)
    lost = by_fate.get("lost", []) + by_fate.get("swallowed", [])
    if lost:
        yield _lost(tuple(lost), len(fates), swallowed="lost" not in by_fate)
    for fate, code, words in _WORDS:
        if names := by_fate.get(fate):
            yield Finding(
                code, f"{len(names)} of {len(fates)} adapted weights {words} ({listed(names)})", sites=tuple(names)
            )
    if names := by_fate.get("scaled"):
        factors = {name: fates[name].factor for name in names}
        yield strength_finding(factors, len(fates), "have the change", "as strong as it should be")
    yield from _precision(fates)


_WORDS: tuple[tuple[Fate, Code, str], ...] = (
    ("not finite", "not_finite", "hold values that are NaN or infinite"),
    ("transposed", "transposed", "had the transpose of the adapter's change added"),
    ("other", "merge_differs", "are not the base's plus the adapter's change"),
)


def _lost(names: tuple[str, ...], total: int, *, swallowed: bool) -> Finding:
    why = "smaller than the rounding of its dtype" if swallowed else "not in it"
    if len(names) == total:
        return Finding("merge_lost", f"the merged model is the base: the adapter's change is {why}", sites=names)
    message = f"{len(names)} of {total} adapted weights are the base's: the adapter's change is {why} ({listed(names)})"
    return Finding("partly_applied", message, sites=names)


def _precision(fates: Mapping[str, Merge]) -> Iterator[Finding]:
    """Report rounding that is large compared with the merged change."""
    merges = [merge for merge in fates.values() if merge.fate in ("exact", "rounded")]
    noise = float(np.median([merge.noise for merge in merges])) if merges else 0.0
    # Below a tenth of the change, rounding is not worth a word. Above, the merge is sound and the user should know.
    if noise > 0.1:
        message = f"rounding to the merged model's dtype moves a weight by {noise:.2g} times what the adapter does"
        yield Finding("precision", message, fails=False)


def _untouched(names: tuple[str, ...]) -> Iterator[Finding]:
    if names:
        message = f"{len(names)} tensors that the adapter does not touch are not the base's ({listed(names)})"
        yield Finding("base_changed", message, sites=names)


def _elsewhere(names: AbstractSet[str]) -> Iterator[Doubt]:
    """Report modules whose weights the files have under unknown names, which is left to the probe."""
    if names:
        message = f"{len(names)} adapted weights are not in the files under their own names ({listed(sorted(names))})"
        yield Doubt(Finding("merge_differs", message, sites=tuple(sorted(names))))


def _names(found: AbstractSet[str], wanted: AbstractSet[str]) -> Iterator[Doubt]:
    missing, extra = tuple(sorted(wanted - found)), tuple(sorted(found - wanted))
    if missing:
        message = f"{len(missing)} of the base's tensors are not in the merged model ({listed(missing)})"
        yield Doubt(Finding("layers_missing", message, sites=missing))
    elif extra:
        yield Doubt(
            Finding("merge_differs", f"{len(extra)} tensors are not of the base ({listed(extra)})", sites=extra)
        )
