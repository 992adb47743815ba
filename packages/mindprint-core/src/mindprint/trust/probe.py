"""The probe: a few hundred fixed tokens whose log-probs tell one model from another.

Synthetic: an adapter must not publish its owner's writing. Tokens are drawn from the tokenizer's vocabulary by
counter-based generators, so the same tokenizer always has the same probe. One long row exercises position, draws over
the whole vocabulary exercise rare tokens, draws that favour the first ids (in a BPE the frequent ones) and two
conversations in the chat template look more like what adapters are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mindprint.contract import Dtype, Float32, Int32, LoadedModel, TokenBatch
from mindprint.data.collate import whole_sequences
from mindprint.data.render import PreferenceExample
from mindprint.data.rows import Message
from mindprint.data.tokenizer import Tokenizer
from mindprint.draws import uniform
from mindprint.errors import DataError
from mindprint.plugins.backend import Backend
from mindprint.tolerances import (
    FLOAT32_ROUNDING,
    GREATEST_ERRORS,
    LOG_PROB_ROUNDINGS,
    MEAN_ERRORS,
    PROBE_TOLERANCES,
    ROUNDINGS,
    log_prob_error,
)
from mindprint.trust.report import Comparison, Tolerance

LONGEST, MIDDLE, TURN = 192, 96, 24
"""Tokens of the long row, of the row of frequent ids, and of each side of a conversation."""

HELDOUT_ROWS = 8
"""The greatest number of held-out rows, where the configuration asks for them."""

CHECKED_TOKENS = 32
"""Tokens of the row that is computed before training, where weights tell the rest."""

ORDINARY_WEIGHT = 65504.0
"""The largest number of float16. Products of three such weights are still far below float32's largest number."""

DECIMALS = 6
"""Of log-probs in a fingerprint: a tenth of the smallest tolerance."""

NOISE_FACTOR, MOST = 4.0, 10.0
"""Where the measured noise is above the table, this many times that noise is allowed, and never more than this many
times the table: large models compute with more noise than small ones, but noise must not excuse everything."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")

Source = Literal["synthetic", "heldout"]


@dataclass(frozen=True)
class Probe:
    """Rows of token ids, and where they came from."""

    rows: tuple[Int32, ...]
    source: Source = "synthetic"

    @property
    def tokens(self) -> int:
        """Return the number of log-probs: nothing predicts the first token of a row."""
        return sum(len(row) - 1 for row in self.rows)


@dataclass(frozen=True)
class Noise:
    """The distance of rows from themselves when they are computed in another batch, nats a token."""

    mean: float
    greatest: float


def synthetic_probe(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Probe:
    """Return the probe of a tokenizer, cut to the positions and embeddings of the model of `config` (config.json)."""
    vocabulary = min(tokenizer.vocab_size, _configured(config, "vocab_size") or tokenizer.vocab_size)
    positions = _configured(config, "max_position_embeddings", "n_positions", "n_ctx") or LONGEST
    # Uniform ids are mostly rare tokens. A skew of 4 favours small ids, which are the frequent ones in a BPE.
    rows = [_drawn(LONGEST, vocabulary, "rare"), _drawn(MIDDLE, vocabulary, "frequent", skew=4.0)]
    rows += [_conversation(tokenizer, vocabulary, number) for number in range(2)]
    return Probe(tuple(row[:positions] for row in rows if len(row[:positions]) > 1 and row.max() < vocabulary))


def heldout_probe(examples: Sequence[PreferenceExample]) -> Probe:
    """Return rows of the owner's held-out pairs, prompt and chosen answer. Others can read them in the file."""
    rows = [np.concatenate([example.prompt, example.chosen])[:LONGEST] for example in examples[:HELDOUT_ROWS]]
    return Probe(tuple(rows), "heldout")


def score(backend: Backend, model: LoadedModel, probe: Probe, *, adapter: bool) -> Float32:
    """Return log-probs of every token but each row's first, float32 `[probe.tokens]`. Each row is computed unpadded."""
    parts = [_scored(backend, model, [row], adapter=adapter) for row in probe.rows]
    return np.concatenate(parts).astype(np.float32)


def score_before_training(backend: Backend, model: LoadedModel, probe: Probe) -> None:
    """Compute as much of the probe with the bare base as tells that all of it has finite log-probs.

    One short row does if every weight is finite and of an ordinary size, and activations have float32's exponents. Else
    each row counts: a damaged token meets no other row, and float16 overflows with some tokens only.

    Raises:
        NotFiniteError: If a log-prob is not finite.
    """
    largest = backend.largest_weight(model)
    # NaN is below nothing.
    if model.dtype != "float16" and largest is not None and largest <= ORDINARY_WEIGHT:
        probe = Probe((min(probe.rows, key=len)[:CHECKED_TOKENS],), probe.source)
    score(backend, model, probe, adapter=False)


def measure_noise(backend: Backend, model: LoadedModel, probe: Probe, alone: Float32, *, adapter: bool) -> Noise:
    """Return the distance of the rows in one padded batch from `alone`, the same rows each by itself."""
    # Another batch shape makes kernels sum in another order: that is the noise of a sound computation.
    together = _scored(backend, model, probe.rows, adapter=adapter)
    apart = np.abs(together.astype(np.float64) - alone)
    return Noise(float(apart.mean()), float(apart.max()))


def tolerance(dtypes: Sequence[Dtype], *noises: Noise | None, config: Mapping[str, Any] | None = None) -> Tolerance:
    """Return the allowed difference of two evaluations: the coarser dtype's bound, or the measured noise if wider.

    `config` is the base's config.json. A deeper base rounds more, in float32 a wider one too, and the bound grows.
    """
    # The coarser of two computations decides how far they can agree.
    coarsest = max(dtypes, key=lambda dtype: PROBE_TOLERANCES[dtype])
    mean, greatest = PROBE_TOLERANCES[coarsest]
    measured = [NOISE_FACTOR * max(noise.mean / mean, noise.greatest / greatest) for noise in noises if noise]
    # The greatest of the measured noises, at most MOST times the table: noise must not excuse everything.
    wider = max(1.0, min(max(measured, default=0.0), MOST))
    reason = f"rounding of {coarsest}" if wider <= 1 else f"{NOISE_FACTOR:g} times the measured noise"
    allowed = Tolerance(wider * mean, wider * greatest, reason)
    layers, width = _configured(config or {}, *_LAYERS), _configured(config or {}, *_WIDTHS)
    error = log_prob_error(coarsest, layers, width) if layers and width else 0.0
    if MEAN_ERRORS * error > allowed.mean or GREATEST_ERRORS * error > allowed.greatest:
        reason = f"rounding of {coarsest} through {layers} layers of width {width}"
    mean, greatest = max(allowed.mean, MEAN_ERRORS * error), max(allowed.greatest, GREATEST_ERRORS * error)
    if coarsest == "float32":
        return Tolerance(mean, greatest, reason, LOG_PROB_ROUNDINGS * FLOAT32_ROUNDING)
    # The table of 16 bits is for log-probs near 8. Logits are rounded to 16 bits, so errors grow with their size.
    return Tolerance(mean, greatest, reason, least_share=MEAN_ERRORS * ROUNDINGS[coarsest])


def widened(allowed: Tolerance, share: float, before: Float32, after: Float32) -> Tolerance:
    """Return a tolerance that also lets a share of the adapter's effect differ: its factors were rounded."""
    moved = np.abs(after.astype(np.float64) - before)
    mean, greatest = max(allowed.mean, share * float(moved.mean())), max(allowed.greatest, share * float(moved.max()))
    return replace(
        allowed, mean=mean, greatest=greatest, reason=f"{share:.0%} of the effect: the adapter's factors were rounded"
    )


def compared(what: str, found: Float32, recorded: Float32, allowed: Tolerance) -> Comparison:
    """Compare `found` with `recorded`, both `[tokens]`. The tolerance that is returned holds for the deciding token."""
    apart, size = np.abs(found.astype(np.float64) - recorded), np.abs(recorded.astype(np.float64))
    # A log-prob is a difference of two numbers of its size or more, and their rounding grows with it.
    bounds = allowed.greatest + allowed.relative * size
    worst = int(np.argmax(apart / bounds))
    typical = float(size.mean())
    mean = max(allowed.mean + allowed.relative * typical, allowed.least_share * typical)
    decided = replace(allowed, mean=mean, greatest=float(bounds[worst]))
    return Comparison(what, len(found), float(apart.mean()), float(apart[worst]), decided)


def _scored(backend: Backend, model: LoadedModel, rows: Sequence[Int32], *, adapter: bool) -> Float32:
    batch: TokenBatch = whole_sequences(rows)
    return backend.log_probs(model, batch, adapter=adapter)[batch.loss_mask]


def _drawn(length: int, vocabulary: int, *labels: str | int, skew: float = 1.0) -> Int32:
    """Draw ids from the whole vocabulary, uniformly. A `skew` above 1 favours the first."""
    return (uniform((length,), 0, "probe", *labels) ** skew * vocabulary).astype(np.int32)


def _conversation(tokenizer: Tokenizer, vocabulary: int, number: int) -> Int32:
    """Draw a question and an answer and render them in the tokenizer's template, or without it where that refuses."""
    words = [_drawn(TURN, vocabulary, "conversation", number, side, skew=2.0) for side in ("user", "assistant")]
    texts = [tokenizer.decode(side.tolist()).strip() or "so" for side in words]
    try:
        turns = [Message("user", texts[0]), Message("assistant", texts[1])]
        return np.array(tokenizer.render(turns, generation_prompt=False), np.int32)[: LONGEST // 2]
    except DataError:
        return np.concatenate(words)


def _configured(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these settings that config.json, or its text part, has."""
    parts = (config, config.get("text_config") or {})
    return next((part[name] for part in parts for name in names if isinstance(part.get(name), int)), None)
