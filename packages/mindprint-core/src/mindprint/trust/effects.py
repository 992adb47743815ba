"""The share of an adapter's effect that is left on other weights: quantized ones, or another form of the base."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindprint.contract import Float32

LEAST_KEPT = 0.95
"""The share of its effect that an adapter has to keep, and the likeness of a merge that was quantized again. A rounding
that loses more, or that adds more noise than this leaves room for (a third of the effect), was too coarse."""


@dataclass(frozen=True)
class KeptEffect:
    """An effect compared with the one where the adapter was trained.

    `share` is the least-squares factor of the trained effect in this one, and `likeness` the cosine between the two: 1
    where nothing but the strength differs, less the more noise there is.
    """

    share: float
    likeness: float

    @property
    def as_strong(self) -> bool:
        """Whether the effect is there, neither weaker nor stronger than the tolerance allows."""
        return LEAST_KEPT <= self.share <= 1 / LEAST_KEPT

    @property
    def alike(self) -> bool:
        """Whether it is as strong, and little of what changes is noise."""
        # Rounding errors that point in all directions leave the share as it is, and only the likeness shows them.
        return self.as_strong and self.likeness >= LEAST_KEPT

    def __str__(self) -> str:
        return f"{self.share:.2f} of the adapter's effect (likeness {self.likeness:.2f})"


def kept_effect(trained: tuple[Float32, Float32], here: tuple[Float32, Float32]) -> KeptEffect:
    """Compare two effects, each given as the probe's log-probs without and with the adapter."""
    wanted, found = (after.astype(np.float64) - before for before, after in (trained, here))
    product, squared, length = float(wanted @ found), float(wanted @ wanted), float(np.linalg.norm(found))
    return KeptEffect(product / max(squared, 1e-300), product / max(squared**0.5 * length, 1e-300))
