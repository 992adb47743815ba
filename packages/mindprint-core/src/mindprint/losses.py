"""Every training loss, once, over a small array namespace.

A backend supplies an `ArrayNamespace` for its framework and differentiates `PreferenceLoss.total`. `NUMPY` with float64
arrays is the reference. The log-probs of a pair are sums over completion tokens, and every array is `[pairs]`.

The DPO loss is `-log sigmoid(beta * [(pi_c - pi_r) - (ref_c - ref_r)])` (Rafailov et al. 2023, arXiv 2305.18290,
eq. 7), which is `mean(logaddexp(0, -logits))` with no further minus sign: a formula once published for this system
carries one and so learns to prefer the rejected answer.

To add a pairwise loss, write its formula, and add its name to `PreferenceLossName` and a line to `PAIRWISE_LOSSES`. The
configuration, the guards, the backends and the conformance suite then know it: no other file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

# Written out, because type checkers accept no Literal that is computed from `PAIRWISE_LOSSES`.
PreferenceLossName = Literal[
    "sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm", "orpo", "simpo"
]


class ArrayNamespace(Protocol):
    """The functions of a framework that the losses call.

    Arrays may be anything that supports `+ - * / **` and negation, with arrays and with Python numbers on either side:
    also the traced arrays of a framework that compiles or differentiates. Apart from `sum`, every function works
    elementwise on `[pairs]`. The losses neither index arrays nor branch on their values.
    """

    def log_sigmoid(self, x: Any) -> Any:
        """Return `log(1 / (1 + exp(-x)))`, without overflow for large negative `x`."""

    def sigmoid(self, x: Any) -> Any:
        """Return `1 / (1 + exp(-x))`."""

    def relu(self, x: Any) -> Any:
        """Return `max(x, 0)`."""

    def exp(self, x: Any) -> Any:
        """Return `e ** x`."""

    def log1p(self, x: Any) -> Any:
        """Return `log(1 + x)`, exact for small `x`."""

    def sum(self, x: Any) -> Any:
        """Return the sum of all elements, a scalar."""


class _NumPy:
    """The reference namespace. It computes in the dtype it is given, float64 where a test wants the truth."""

    def log_sigmoid(self, x: Any) -> Any:
        # log(1 / (1 + e^-x)) = -log(e^0 + e^-x), which logaddexp computes without overflow.
        return -np.logaddexp(0.0, -x)

    def sigmoid(self, x: Any) -> Any:
        # 1 / (1 + e^-x) overflows for large negative x. The exponential of log_sigmoid does not.
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
    """The inputs of a preference loss, arrays of any framework, each `[pairs]`.

    Args:
        policy_chosen: Summed log-probs of the chosen completions under the model that is trained, in nats.
        policy_rejected: The same for the rejected completions.
        reference_chosen: The chosen completions' summed log-probs under the reference. None where the loss takes none.
        reference_rejected: The same for the rejected completions.
        chosen_tokens: Numbers of tokens of the chosen completions.
        rejected_tokens: The same for the rejected completions.
    """

    policy_chosen: Any
    policy_rejected: Any
    reference_chosen: Any
    reference_rejected: Any
    chosen_tokens: Any
    rejected_tokens: Any


@dataclass(frozen=True)
class PreferenceLoss:
    """One preference loss with its constants. Names and definitions are those of TRL 1.16, and cDPO's label smoothing.

    Args:
        name: The loss.
        beta: Strength.
        label_smoothing: Assumed share of pairs whose labels are flipped, for the losses that know it.
        sft_weight: Adds this multiple of the chosen completions' mean negative log-prob a token (RPO, arXiv
            2404.19733).
        gamma: SimPO's target margin.
    """

    name: PreferenceLossName = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma: float = 0.5

    @property
    def reference_free(self) -> bool:
        """True if the loss takes no reference."""
        return PAIRWISE_LOSSES[self.name].reference_free

    @property
    def uses_mean_log_probs(self) -> bool:
        """True if the loss sees log-probs divided by the number of completion tokens."""
        return PAIRWISE_LOSSES[self.name].mean_log_probs

    def per_pair(self, xp: ArrayNamespace, pairs: PairLogProbs) -> Any:
        """Return the loss of each pair, `[pairs]`, without the SFT term."""
        chosen, rejected = self._scores(pairs)
        return PAIRWISE_LOSSES[self.name].formula(xp, self, chosen, rejected)

    def total(
        self,
        xp: ArrayNamespace,
        pairs: PairLogProbs,
        *,
        pair_count: int,
        chosen_token_count: int,
        weights: Any = None,
    ) -> Any:
        """Return the scalar to differentiate for one micro-batch: sums over it, divided by the whole step's counts.

        Args:
            xp: The framework's functions.
            pairs: Log-probs and token counts of the micro-batch.
            pair_count: `Update.pairs`: pairs of the whole step, without padding.
            chosen_token_count: `Update.tokens`: tokens of the chosen completions of the whole step, without padding.
            weights: `[pairs]`, 1 for a pair and 0 for a row that only pads the batch to a static shape. Such a row adds
                nothing to loss and gradient, for every loss, whatever finite log-probs and token counts, 0 included,
                it has. None if nothing is padded.
        """
        if weights is not None:
            pairs = _without_padding(pairs, weights)
        per_pair = self.per_pair(xp, pairs)
        policy_chosen = pairs.policy_chosen
        if weights is not None:
            per_pair, policy_chosen = per_pair * weights, policy_chosen * weights
        # Divided by the step's counts and not by this batch's: then micro-batches of any sizes add up to one step.
        loss = xp.sum(per_pair) / pair_count
        # Left out at a weight of 0, because 0 times an infinite log-prob would be NaN.
        if self.sft_weight:
            loss = loss - self.sft_weight * xp.sum(policy_chosen) / chosen_token_count
        return loss

    def rewards(self, pairs: PairLogProbs) -> tuple[Any, Any]:
        """Return the implicit rewards of chosen and rejected completions, each `[pairs]`.

        They are those that TRL reports: `beta * (policy - reference)`, summed. For the reference-free losses they are
        beta times the mean log-prob of a token.
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
        """Return the loss of a pair when policy equals reference (ln 2 for sigmoid), if the loss takes a reference."""
        zero = np.zeros(1)
        pairs = PairLogProbs(zero, zero, zero, zero, np.ones(1), np.ones(1))
        return float(self.per_pair(NUMPY, pairs)[0])

    def _scores(self, pairs: PairLogProbs) -> tuple[Any, Any]:
        chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
        if not self.reference_free:
            chosen, rejected = chosen - pairs.reference_chosen, rejected - pairs.reference_rejected
        # The difference to the reference is taken before the mean. Both are over the same tokens, so the order is free.
        if self.uses_mean_log_probs:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        return chosen, rejected


def default_sft_weight(name: PreferenceLossName) -> float:
    """Return the SFT weight of a loss whose configuration states none."""
    return PAIRWISE_LOSSES[name].sft_weight


def takes_label_smoothing(name: PreferenceLossName) -> bool:
    """Return whether label smoothing has a meaning for a loss."""
    return PAIRWISE_LOSSES[name].label_smoothing


def _without_padding(pairs: PairLogProbs, weights: Any) -> PairLogProbs:
    """Return the pairs with harmless values where `weights` is 0, and unchanged where it is 1.

    A weight of 0 on the loss alone is not enough: in padding a formula can be infinite or undefined (a division by 0
    tokens, ORPO's log(1 - p) at p = 1), and 0 times infinity is NaN, in the loss and in its gradient. So the inputs are
    replaced before the formula sees them, by a completion of one token with a log-prob of -1 nat. Multiplication and
    addition do it exactly (x * 1 + 0 is x), and need no `where` of the framework.
    """
    padding = 1 - weights

    def at_minus_one(log_probs: Any) -> Any:
        return None if log_probs is None else log_probs * weights - padding

    return PairLogProbs(
        policy_chosen=at_minus_one(pairs.policy_chosen),
        policy_rejected=at_minus_one(pairs.policy_rejected),
        reference_chosen=at_minus_one(pairs.reference_chosen),
        reference_rejected=at_minus_one(pairs.reference_rejected),
        chosen_tokens=pairs.chosen_tokens * weights + padding,
        rejected_tokens=pairs.rejected_tokens * weights + padding,
    )


def _sigmoid(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """Rafailov et al. 2023, eq. 7. With label smoothing it is the conservative form of Mitchell's cDPO note."""
    logits = loss.beta * (chosen - rejected)
    smoothing = loss.label_smoothing
    if not smoothing:
        return -xp.log_sigmoid(logits)
    # A flipped label turns the sign of the logits. This is the mean over flips of the share `smoothing`.
    return -(1 - smoothing) * xp.log_sigmoid(logits) - smoothing * xp.log_sigmoid(-logits)


def _hinge(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """SLiC (arXiv 2305.10425) with the DPO margin."""
    return xp.relu(1 - loss.beta * (chosen - rejected))


def _ipo(_xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """IPO (arXiv 2310.12036, eq. 17) on mean log-probs, as its authors computed it and TRL does."""
    # The paper writes tau for our beta: the loss pulls the difference of log-ratios towards 1 / (2 tau).
    return (chosen - rejected - 1 / (2 * loss.beta)) ** 2


def _robust(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """Robust DPO (arXiv 2403.00409, eq. 12): unbiased when a share `label_smoothing` of labels is flipped."""
    # The division makes the mean over flipped labels equal to the loss of the true ones. The configuration bounds the
    # share below 0.5, which keeps the divisor positive.
    logits, noise = loss.beta * (chosen - rejected), loss.label_smoothing
    return (-(1 - noise) * xp.log_sigmoid(logits) + noise * xp.log_sigmoid(-logits)) / (1 - 2 * noise)


def _apo_zero(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """APO-zero (arXiv 2408.06266, eq. 7): chosen up, rejected down."""
    # The 1 has no gradient. With it, reported losses are those that TRL reports.
    return 1 - xp.sigmoid(loss.beta * chosen) + xp.sigmoid(loss.beta * rejected)


def _apo_down(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """APO-down (arXiv 2408.06266, eq. 8): chosen down, rejected further down."""
    return xp.sigmoid(loss.beta * chosen) + 1 - xp.sigmoid(loss.beta * (chosen - rejected))


def _orpo(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): log odds ratio of mean log-probs, with beta as the paper's lambda."""
    # log odds(p) = log p - log(1 - p). log1p(-e^x) keeps digits that 1 - e^x loses for small probabilities.
    odds = (chosen - rejected) - (xp.log1p(-xp.exp(chosen)) - xp.log1p(-xp.exp(rejected)))
    return -loss.beta * xp.log_sigmoid(odds)


def _simpo(xp: ArrayNamespace, loss: PreferenceLoss, chosen: Any, rejected: Any) -> Any:
    """SimPO (arXiv 2405.14734, eq. 6): mean log-probs and a target margin gamma."""
    # TRL writes the same as beta * (chosen - rejected - gamma / beta).
    return -xp.log_sigmoid(loss.beta * (chosen - rejected) - loss.gamma)


@dataclass(frozen=True)
class PairwiseLoss:
    """The definition of a pairwise loss.

    Args:
        formula: Returns the loss of each pair from the scores of its chosen and rejected completions, `[pairs]` each.
            A score is the policy's log-prob, less the reference's unless the loss is free of one.
        reference_free: Whether the loss takes no reference.
        mean_log_probs: Whether scores are divided by the numbers of completion tokens.
        label_smoothing: Whether `PreferenceLoss.label_smoothing` has a meaning.
        sft_weight: The SFT weight unless the configuration states another. 1 for ORPO by that method's definition.
    """

    formula: Callable[[ArrayNamespace, PreferenceLoss, Any, Any], Any]
    reference_free: bool = False
    mean_log_probs: bool = False
    label_smoothing: bool = False
    sft_weight: float = 0.0


PAIRWISE_LOSSES: dict[PreferenceLossName, PairwiseLoss] = {
    "sigmoid": PairwiseLoss(_sigmoid, label_smoothing=True),
    "hinge": PairwiseLoss(_hinge),
    "ipo": PairwiseLoss(_ipo, mean_log_probs=True),
    "robust": PairwiseLoss(_robust, label_smoothing=True),
    "apo_zero": PairwiseLoss(_apo_zero),
    "apo_down": PairwiseLoss(_apo_down),
    "sigmoid_norm": PairwiseLoss(_sigmoid, mean_log_probs=True),
    "orpo": PairwiseLoss(_orpo, reference_free=True, mean_log_probs=True, sft_weight=1.0),
    "simpo": PairwiseLoss(_simpo, reference_free=True, mean_log_probs=True),
}
"""The losses by name."""


def sft_loss(log_probs: NDArray[np.floating[Any]], mask: NDArray[np.bool_]) -> float:
    """Return the mean negative log-prob of the masked tokens of a whole step. Backends are tested against it.

    Args:
        log_probs: Per-token log-probs, `[rows, T]`.
        mask: The tokens that count, `[rows, T]`.
    """
    # Over all tokens of the step at once. A mean of each row's mean would weigh the tokens of short rows more.
    return float(-(log_probs * mask).sum() / mask.sum())
