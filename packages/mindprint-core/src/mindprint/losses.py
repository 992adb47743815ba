"""Every training loss, once, over a small array namespace.

A backend supplies `ArrayNamespace` for its framework and differentiates what comes out; `NUMPY` with float64 arrays is
the reference. Log-probs of a pair are sums over completion tokens; `[pairs]` throughout.

The DPO loss is `-log sigmoid(beta * [(pi_c - pi_r) - (ref_c - ref_r)])` (Rafailov et al. 2023, arXiv 2305.18290,
eq. 7), which is `mean(logaddexp(0, -logits))` with no further minus sign: a formula once published for this system
carries one and so learns to prefer the rejected answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

PreferenceLossName = Literal[
    "sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm", "orpo", "simpo"
]


class ArrayNamespace(Protocol):
    """What a framework must offer for the losses. Arrays support `+ - * / **` with arrays and Python numbers."""

    def log_sigmoid(self, x: Any) -> Any: ...
    def sigmoid(self, x: Any) -> Any: ...
    def relu(self, x: Any) -> Any: ...
    def exp(self, x: Any) -> Any: ...
    def log1p(self, x: Any) -> Any: ...
    def sum(self, x: Any) -> Any: ...


class _NumPy:
    """The reference namespace: computes in the dtype it is given, float64 where a test wants the truth."""

    def log_sigmoid(self, x: Any) -> Any:
        return -np.logaddexp(0.0, -x)

    def sigmoid(self, x: Any) -> Any:
        return np.exp(-np.logaddexp(0.0, -x))

    def relu(self, x: Any) -> Any:
        return np.maximum(x, 0.0)

    def exp(self, x: Any) -> Any:
        return np.exp(x)

    def log1p(self, x: Any) -> Any:
        return np.log1p(x)

    def sum(self, x: Any) -> Any:
        return np.sum(x)


NUMPY: ArrayNamespace = _NumPy()


@dataclass(frozen=True)
class PairLogProbs:
    """Summed log-probs of a batch of pairs, each `[pairs]`, and completion token counts. Arrays of any framework.

    The reference is None for the losses that take none.
    """

    policy_chosen: Any
    policy_rejected: Any
    reference_chosen: Any
    reference_rejected: Any
    chosen_tokens: Any
    rejected_tokens: Any


@dataclass(frozen=True)
class PreferenceLoss:
    """One preference loss with its constants; names and definitions as in TRL 1.16, and cDPO's label smoothing.

    `sft_weight` adds that multiple of the chosen answers' mean negative log-prob a token (RPO, arXiv 2404.19733); it is
    1 for ORPO by that method's own definition. `gamma` is SimPO's target margin.
    """

    name: PreferenceLossName = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma: float = 0.5

    @property
    def reference_free(self) -> bool:
        return self.name in ("orpo", "simpo")

    @property
    def uses_mean_log_probs(self) -> bool:
        """Whether the loss sees log-probs divided by the number of completion tokens."""
        return self.name in ("ipo", "sigmoid_norm", "orpo", "simpo")

    def per_pair(self, xp: ArrayNamespace, pairs: PairLogProbs) -> Any:
        """The loss of each pair, `[pairs]`, without the SFT term."""
        chosen, rejected = self._scores(pairs)
        return _LOSSES[self.name](xp, self, chosen, rejected)

    def total(self, xp: ArrayNamespace, pairs: PairLogProbs, *, pair_count: int, chosen_token_count: int) -> Any:
        """The scalar to differentiate for one micro-batch: sums over it, divided by the whole step's counts."""
        loss = xp.sum(self.per_pair(xp, pairs)) / pair_count
        if self.sft_weight:
            loss = loss - self.sft_weight * xp.sum(pairs.policy_chosen) / chosen_token_count
        return loss

    def rewards(self, pairs: PairLogProbs) -> tuple[Any, Any]:
        """Implicit rewards of chosen and rejected, each `[pairs]`: beta times the scores that the method compares.

        As TRL reports them: `beta * (policy - reference)`, summed; for the reference-free losses beta times the mean
        log-prob of a token.
        """
        if self.reference_free:
            return (
                self.beta * pairs.policy_chosen / pairs.chosen_tokens,
                self.beta * pairs.policy_rejected / pairs.rejected_tokens,
            )
        return (
            self.beta * (pairs.policy_chosen - pairs.reference_chosen),
            self.beta * (pairs.policy_rejected - pairs.reference_rejected),
        )

    def at_zero(self) -> float:
        """The loss of a pair when policy equals reference (ln 2 for sigmoid). Only for losses with a reference."""
        zero = np.zeros(1)
        pairs = PairLogProbs(zero, zero, zero, zero, np.ones(1), np.ones(1))
        return float(self.per_pair(NUMPY, pairs)[0])

    def _scores(self, pairs: PairLogProbs) -> tuple[Any, Any]:
        chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
        if not self.reference_free:
            chosen, rejected = chosen - pairs.reference_chosen, rejected - pairs.reference_rejected
        if self.uses_mean_log_probs:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        return chosen, rejected


def _sigmoid(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """Rafailov et al. 2023, eq. 7; with label smoothing the conservative form of Mitchell's cDPO note."""
    logits = loss.beta * (chosen - rejected)
    smoothing = loss.label_smoothing
    if not smoothing:
        return -xp.log_sigmoid(logits)
    return -(1 - smoothing) * xp.log_sigmoid(logits) - smoothing * xp.log_sigmoid(-logits)


def _hinge(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """SLiC (arXiv 2305.10425) with the DPO margin."""
    return xp.relu(1 - loss.beta * (chosen - rejected))


def _ipo(_xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """IPO (arXiv 2310.12036, eq. 17) on mean log-probs, as its authors computed it and TRL does."""
    return (chosen - rejected - 1 / (2 * loss.beta)) ** 2


def _robust(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """Robust DPO (arXiv 2403.00409, eq. 12): unbiased when a share `label_smoothing` of labels is flipped."""
    logits, noise = loss.beta * (chosen - rejected), loss.label_smoothing
    return (-(1 - noise) * xp.log_sigmoid(logits) + noise * xp.log_sigmoid(-logits)) / (1 - 2 * noise)


def _apo_zero(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """APO-zero (arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    return 1 - xp.sigmoid(loss.beta * chosen) + xp.sigmoid(loss.beta * rejected)


def _apo_down(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """APO-down (arXiv 2408.06266, eq. 8): chosen down, rejected further down."""
    return xp.sigmoid(loss.beta * chosen) + 1 - xp.sigmoid(loss.beta * (chosen - rejected))


def _orpo(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): log odds ratio of mean log-probs; beta is the paper's lambda."""
    odds = (chosen - rejected) - (xp.log1p(-xp.exp(chosen)) - xp.log1p(-xp.exp(rejected)))
    return -loss.beta * xp.log_sigmoid(odds)


def _simpo(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """SimPO (arXiv 2405.14734, eq. 6): mean log-probs and a target margin gamma."""
    return -xp.log_sigmoid(loss.beta * (chosen - rejected) - loss.gamma)


_LOSSES = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sigmoid_norm": _sigmoid,
    "orpo": _orpo,
    "simpo": _simpo,
}


def sft_loss(log_probs: NDArray[np.floating[Any]], mask: NDArray[np.bool_]) -> float:
    """Mean negative log-prob of the masked tokens, over the whole step: the definition backends are tested against."""
    return float(-(log_probs * mask).sum() / mask.sum())
