"""An adapter's change in a few numbers a module, which show from files alone how it differs from the trained one.

The change of a weight is `D = s · B · A`. Of each module its norm and `TRACES` numbers `uᵀ D v` are recorded, with u
and v vectors of random signs that depend on their lengths alone. A change that is f times as strong has f times these
numbers; any other change has others, but for chance; and two modules of one shape that were swapped have each other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import AdapterState, LoraFactors
from mindprint.draws import random_bits

TRACES = 4

SAME = 1e-5
"""Relative to the change's norm: recomputed from the same float32 values."""

DIGITS: Mapping[str, int] = {"F32": 24, "F16": 11, "BF16": 8}
"""Significant bits of the dtypes that factors are stored in."""

_SMALLEST_STEP: Mapping[str, float] = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}

DEVIATIONS = 6.0
"""How many standard deviations a rounding may move a number: a Gaussian is beyond them twice in a billion."""


@dataclass(frozen=True)
class RoundingError:
    """The greatest plausible error of a change's norm and traces, if its factors were rounded to a dtype once."""

    norm: float
    traces: tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """The adapter's change of one weight: scale, Frobenius norm of `s · B · A`, and its traces."""

    scale: float
    norm: float
    traces: tuple[float, ...]

    def factor(self, recorded: Change) -> float:
        """Return the least-squares factor between the recorded traces and these."""
        # Least squares: the f that makes ‖new − f · old‖ smallest is old·new / old·old.
        old, new = np.array(recorded.traces), np.array(self.traces)
        return float(old @ new / max(float(old @ old), 1e-300))

    def within(self, recorded: Change, error: RoundingError) -> bool:
        """Return whether this is the recorded change but for a rounding of the factors."""
        # The record has nine digits of each number.
        written = 1e-9 * recorded.norm
        if abs(self.norm - recorded.norm) > error.norm + written:
            return False
        apart = np.abs(np.array(self.traces) - np.array(recorded.traces))
        return bool((apart <= np.array(error.traces) + written + 1e-9 * np.abs(recorded.traces)).all())

    def distance(self, recorded: Change, factor: float = 1.0) -> float:
        """Return the distance from `factor` times the recorded change, relative to the greater norm."""
        apart = float(np.linalg.norm(np.array(self.traces) - factor * np.array(recorded.traces)))
        # Few traces can agree by chance. The norm has to agree as well.
        norms = abs(self.norm - abs(factor) * recorded.norm)
        return max(apart, norms) / max(self.norm, abs(factor) * recorded.norm, 1e-300)


def changes(adapter: AdapterState) -> dict[str, Change]:
    """Return the change of every module of an adapter, by site."""
    return {site: change(factors, adapter.config.scale(site)) for site, factors in sorted(adapter.tensors.items())}


def change(factors: LoraFactors, scale: float) -> Change:
    """Return the change of one module, in float64 and without forming `B · A`. A stack's is that of all its experts."""
    stacked = [part if part.ndim == 3 else part[None] for part in factors]
    squared, traces = 0.0, np.zeros(TRACES)
    for expert, (a, b) in enumerate(zip(*(part.astype(np.float64) for part in stacked), strict=True)):
        # ‖B·A‖² = tr(AᵀBᵀB·A) = Σ (BᵀB) ∘ (A·Aᵀ): products of r × r instead of the whole weight.
        squared += float(((b.T @ b) * (a @ a.T)).sum())
        traces += [_trace(a, b, expert, number) for number in range(TRACES)]
    norm = abs(scale) * max(squared, 0.0) ** 0.5
    return Change(scale, _rounded(norm), tuple(map(_rounded, scale * traces)))


def rounding_error(factors: LoraFactors, scale: float, dtype: str) -> RoundingError:
    """Return how far the change of these factors can be from that of the ones that they were rounded from.

    Rounding moves each element by an error that is uniform over one unit in the last place, ulp² / 12 in the square and
    independent of the others. To first order the error of `uᵀ B A v` is `Σ δB (A v)ᵀ + Σ (uᵀ B) δA`, whose variance
    follows, and likewise that of the norm from its gradients `B (A Aᵀ) / ‖B A‖` and `(Bᵀ B) A / ‖B A‖`.
    """
    stacked = [part.astype(np.float64) if part.ndim == 3 else part[None].astype(np.float64) for part in factors]
    norm = change(factors, 1.0).norm
    of_traces, of_norm, lost = np.zeros(TRACES), 0.0, 0.0
    for expert, (a, b) in enumerate(zip(*stacked, strict=True)):
        a_error, b_error = (_step(part, dtype) ** 2 / 12 for part in (a, b))
        for number in range(TRACES):
            u, v = _signs(len(b), "u", expert, number), _signs(a.shape[1], "v", expert, number)
            of_traces[number] += b_error.sum(0) @ (a @ v) ** 2 + a_error.sum(1) @ (u @ b) ** 2
        if norm > 0:
            of_norm += float((b_error * (b @ (a @ a.T)) ** 2).sum() + (a_error * ((b.T @ b) @ a) ** 2).sum()) / norm**2
            # An error at right angles to the change makes it longer: by ‖E‖² / 2‖D‖.
            lost += float(b_error.sum(0) @ (a**2).sum(1) + a_error.sum(1) @ (b**2).sum(0)) / (2 * norm)
    traces = DEVIATIONS * abs(scale) * np.sqrt(of_traces)
    return RoundingError(abs(scale) * (DEVIATIONS * of_norm**0.5 + 2 * lost), tuple(map(float, traces)))


def _step(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return one unit in the last place of each value in a dtype."""
    # frexp gives a mantissa in [0.5, 1), so the last of `DIGITS` bits is 2^(exponent - digits).
    step = np.exp2(np.frexp(values)[1].astype(np.float64) - DIGITS[dtype])
    return np.where(values == 0, 0.0, np.maximum(step, _SMALLEST_STEP[dtype]))


def _rounded(value: float) -> float:
    """Round to nine digits: float32 factors determine no more, and it is short in a file."""
    return float(f"{value:.9g}")


def _trace(a: NDArray[np.float64], b: NDArray[np.float64], expert: int, number: int) -> float:
    # uᵀ(B·A)v = (uᵀB)(A·v): two thin products. Its square has the mean ‖B·A‖² (cf. Hutchinson 1989).
    return float((_signs(len(b), "u", expert, number) @ b) @ (a @ _signs(a.shape[1], "v", expert, number)))


def reshaped(factors: LoraFactors) -> tuple[LoraFactors, LoraFactors]:
    """Undo a mistaken reshape: return the factors that a transpose would have produced.

    First if bytes of `[in, r]` and `[r, out]` were taken for `[r, in]` and `[out, r]`, then if it was the other way.
    """
    a, b = factors
    to_peft = LoraFactors(a.reshape(a.shape[::-1]).T, b.reshape(b.shape[::-1]).T)
    return to_peft, LoraFactors(a.T.reshape(a.shape), b.T.reshape(b.shape))


def exchanged(found: Mapping[str, Change], recorded: Mapping[str, Change], sites: Sequence[str]) -> dict[str, str]:
    """Return, for each of these sites that has the recorded change of another site, that other site."""
    return {
        site: other
        for site in sites
        for other in recorded
        # All idle modules look alike, so that an exchange between them means nothing.
        if other != site and recorded[other].norm > 0 and found[site].distance(recorded[other]) <= SAME
    }


def _signs(length: int, *labels: str | int) -> NDArray[np.float64]:
    """Return a vector of ±1, keyed by its length: two modules of one shape share their vectors."""
    return np.where(random_bits(length, 0, "trace", length, *labels) >> np.uint64(63), 1.0, -1.0)
