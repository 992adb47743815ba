"""The gate of fluency: an answer must be about as likely under the base model as the person's own texts are.

A model that training broke writes words that no reader of the language would expect. The other gates look at words and
their order. This one knows more: the base model has read far more text than any reference has.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindprint.contract import Float64

NOT_FLUENT = "is far less likely to the base model than the person's texts"

DEVIATIONS = 3.0
"""How far below the person's mean an answer may be, in standard deviations of her texts."""

AT_LEAST = 0.5
"""The least distance from the lowest of the person's texts to the limit, in nats per token: few texts vary little."""


@dataclass(frozen=True)
class FluencyGate:
    """The least mean log-prob per token under the base model that an answer may have, in nats."""

    limit: float

    def reason(self, log_prob: float | None) -> str | None:
        """Return why an answer with this mean log-prob cannot count, or None. An answer without tokens has no mean."""
        return NOT_FLUENT if log_prob is not None and log_prob < self.limit else None


def fit_fluency(person: Float64) -> FluencyGate:
    """Fit the limit on the mean log-probs of the person's texts under the base model, `[texts]`.

    Only a lower limit is set. The base model's answers are likelier to it than any person's text, and so are those of
    a tuned model that is near to it. Loops, which are likely too, fail another gate.
    """
    lowest = float(person.min()) - AT_LEAST
    return FluencyGate(min(lowest, float(person.mean() - DEVIATIONS * person.std())))
