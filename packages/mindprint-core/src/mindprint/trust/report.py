"""The result of a verification: findings under stable codes, the figures behind them, and their tolerances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Code = Literal[
    "adapter_changed",
    "backend_differs",
    "base_changed",
    "config_differs",
    "layers_missing",
    "merge_differs",
    "merge_lost",
    "no_effect",
    "not_computed",
    "no_fingerprint",
    "not_finite",
    "other_quantization",
    "partly_applied",
    "precision",
    "probe_cannot_tell",
    "requantized",
    "rope_differs",
    "scale",
    "sites_swapped",
    "stop_tokens_differ",
    "template_changed",
    "tokenizer_changed",
    "transposed",
    "unmatched_targets",
    "written_otherwise",
    "wrong_base",
]

MEANINGS: Mapping[Code, str] = {
    "adapter_changed": "the adapter's values are not those that were trained, and none of the codes below says how",
    "backend_differs": "every file is as it was, and this backend computes something else from them",
    "base_changed": "some of the base's weights have changed",
    "config_differs": "the base's config.json states another computation",
    "layers_missing": "layers of the adapter, or tensors of a merged model, are not there",
    "merge_differs": "a merged weight is neither W + s·B·A nor any known mistake",
    "merge_lost": "the merged model is the base: the adapter's effect is not in it",
    "no_effect": "the adapter changes nothing",
    "no_fingerprint": "the adapter has no fingerprint to compare with: only checks that need none were made",
    "not_computed": "the model could not be loaded, or not with this adapter, so that no probe was scored",
    "not_finite": "values that are NaN or infinite",
    "other_quantization": "the base is quantized otherwise than the one that the adapter was trained on",
    "partly_applied": "the adapter acts in some of its places and not in others",
    "precision": "the same within the rounding of a narrower dtype",
    "probe_cannot_tell": "the dtype's noise is above the adapter's effect: judged by digests alone",
    "requantized": "the merged model is quantized, so that part of the adapter's effect was rounded away",
    "rope_differs": "the base's rotary embedding is configured otherwise",
    "scale": "the adapter acts by a factor stronger or weaker than it was trained",
    "sites_swapped": "a module has the factors of another one",
    "stop_tokens_differ": "answers end at other tokens",
    "template_changed": "the chat template is another one",
    "tokenizer_changed": "text becomes other tokens",
    "transposed": "the factors are stored or applied transposed",
    "unmatched_targets": "the adapter's target_modules names modules that the base does not have",
    "written_otherwise": "files say the same in another way, and the probe computes the same from them",
    "wrong_base": "this is not the base that the adapter was trained on",
}
"""Every code with its meaning, for the documentation and for `--json` readers."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was. One that `fails` makes the verification fail; others are to be known.

    `sites` are the modules or tensors concerned, `factor` is how many times too strong (`scale`).
    """

    code: Code
    message: str
    fails: bool = True
    sites: tuple[str, ...] = ()
    factor: float | None = None


@dataclass(frozen=True)
class Tolerance:
    """Nats a token by which two evaluations may differ, on average and at most, and why so.

    `relative` is allowed in addition, as a share of the size of a log-prob. `least_share` is the share of the mean size
    of the log-probs below which the mean bound does not go.
    """

    mean: float
    greatest: float
    reason: str
    relative: float = 0.0
    least_share: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Log-probs of the probe against those of the fingerprint, in nats a token.

    `greatest` is the difference at the token that decides. `tolerance` has the bounds of the mean and of this token.
    """

    what: str
    tokens: int
    mean: float
    greatest: float
    tolerance: Tolerance

    @property
    def within(self) -> bool:
        return self.mean <= self.tolerance.mean and self.greatest <= self.tolerance.greatest

    @property
    def deciding(self) -> str:
        """Return the figure that is furthest beyond its bound, in words."""
        allowed = self.tolerance
        if self.greatest / allowed.greatest > self.mean / allowed.mean:
            return f"one log-prob differs by {self.greatest:.4g} nats, where {allowed.greatest:.4g} is allowed"
        return f"log-probs differ by {self.mean:.4g} nats a token on average, where {allowed.mean:.4g} is allowed"


@dataclass(frozen=True)
class Effect:
    """The adapter's effect on the probe: mean |log p(with) - log p(without)| in nats a token, then and now.

    `recorded` is None without a fingerprint.
    """

    recorded: float | None
    found: float


@dataclass(frozen=True)
class Report:
    """The whole verification of `subject`, an adapter's folder or a merged model's."""

    subject: str
    kind: Literal["adapter", "merged model"]
    base: str
    backend: str
    device: str
    dtype: str
    checked: tuple[str, ...]
    findings: tuple[Finding, ...]
    comparisons: tuple[Comparison, ...] = ()
    effect: Effect | None = None

    @property
    def ok(self) -> bool:
        return not any(finding.fails for finding in self.findings)

    @property
    def codes(self) -> frozenset[Code]:
        """Return the codes of the findings that fail."""
        return frozenset(finding.code for finding in self.findings if finding.fails)


def listed(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    """Return the first few names, and the number of the rest."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
