"""Rotary position embeddings as transformers computes them, put into whatever class mlx-lm built.

mlx-lm looks for the base where it was years ago, and each of its scalings is another scheme. So its modules only say
how they pair dimensions (`traditional`). Frequencies come from here, by the formulas of transformers'
`modeling_rope_utils.py`, in float32 as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mindprint.contract import Float32
from mindprint.errors import ModelError
from mindprint.layouts import RotaryLimit

Parameters = Mapping[str, Any]

KNOWN = frozenset(
    {
        "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "factor",
        "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
        "truncate", "short_factor", "long_factor", "alpha",
    }
)  # fmt: skip
"""The parameters that some type takes. An unknown one may change the computation, and is refused."""

LENGTH_SCALES = frozenset({"short_mscale", "long_mscale"})
"""Parameters of PhiMoE alone: the factors of sine and cosine up to the original length, and beyond."""


@dataclass(frozen=True)
class Frequencies:
    """Inverse frequencies, float32 `[dims / 2]`, and the factor of sine and cosine.

    For inputs of more than `limit` tokens, `long` takes the place of `inverse` and `long_factor` that of `factor`
    (longrope only).
    """

    inverse: Float32
    factor: float = 1.0
    long: Float32 | None = None
    limit: int | None = None
    long_factor: float = 1.0


class Rope(nn.Module):
    """A rotation of the first `dims` of each head's dimensions. `traditional` pairs neighbours, otherwise halves."""

    def __init__(self, frequencies: Frequencies, *, traditional: bool) -> None:
        super().__init__()
        self.dims = 2 * len(frequencies.inverse)
        self._traditional = traditional
        self._factor = frequencies.factor
        self._long_factor = frequencies.long_factor
        self._limit = frequencies.limit
        # A frequency of 0 is an infinite wavelength, which leaves its dimensions as they are.
        with np.errstate(divide="ignore"):
            self._wavelengths = mx.array(1 / frequencies.inverse)
        self._long = None if frequencies.long is None else mx.array(1 / frequencies.long)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        is_long = self._is_long(x, offset)
        factor = self._long_factor if is_long else self._factor
        if factor != 1.0:
            rotated = x[..., : self.dims] * factor
            x = mx.concatenate([rotated.astype(x.dtype), x[..., self.dims :]], axis=-1)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self._traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._long if is_long else self._wavelengths,
        )

    def _is_long(self, x: mx.array, offset: int) -> bool:
        # As in transformers, the whole input is rotated one way or the other, by its length. Rows of unlike kinds are
        # never read together (`layouts.sequences_apart`).
        return self._limit is not None and x.shape[-2] + offset > self._limit

    @property
    def limit(self) -> int | None:
        """The length above which an input is rotated by other frequencies."""
        return self._limit


def read_rotary_limit(module: nn.Module) -> RotaryLimit | None:
    """Return the length above which the model's rotary embeddings depend on it, or None if none of them does."""
    ropes = (part for _, part in module.named_modules() if isinstance(part, Rope))
    limits = {rope.limit for rope in ropes if rope.limit is not None}
    if not limits:
        return None
    # Layers with different limits: above the lowest, only rows of one length are surely alike to all of them.
    return RotaryLimit(min(limits), each_length=len(limits) > 1)


def frequencies(
    parameters: Parameters, head_dim: int, max_positions: int | None, family: frozenset[str] = frozenset()
) -> Frequencies:
    """Return the frequencies that transformers computes for these parameters.

    `family` names parameters that only the model's family has.

    Raises:
        ModelError: For a type or a parameter that is not supported here.
    """
    if odd := sorted(name for name, value in parameters.items() if name not in KNOWN | family and value is not None):
        raise ModelError(f"rope_parameters say {odd[0]} = {parameters[odd[0]]!r}, which is not supported on MLX")
    compute = _TYPES.get(parameters["rope_type"])
    if compute is None:
        raise ModelError(f"rope type {parameters['rope_type']!r} is not supported on MLX (it has {', '.join(_TYPES)})")
    try:
        return compute(parameters, _unscaled(parameters, head_dim), max_positions)
    except KeyError as error:
        raise ModelError(f"rope type {parameters['rope_type']!r} needs {error} in rope_parameters") from None


def _unscaled(parameters: Parameters, head_dim: int) -> Float32:
    # Proportional embeddings keep the dimensions of the whole head, and leave some of them as they are.
    partial = 1.0 if parameters["rope_type"] == "proportional" else parameters["partial_rotary_factor"]
    dims = int(head_dim * partial)
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return (1 / np.float32(parameters["rope_theta"]) ** exponents).astype(np.float32)


def _default(_: Parameters, inverse: Float32, __: int | None) -> Frequencies:
    return Frequencies(inverse)


def _linear(parameters: Parameters, inverse: Float32, _: int | None) -> Frequencies:
    """Compute position interpolation (Chen et al. 2023, arXiv 2306.15595)."""
    return Frequencies(inverse / np.float32(parameters["factor"]))


def _llama3(parameters: Parameters, inverse: Float32, _: int | None) -> Frequencies:
    """Compute Llama 3.1's scaling: long wavelengths divided, short ones kept, a ramp between."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * inverse.astype(np.float64) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Frequencies((inverse * (kept + (1 - kept) / factor)).astype(np.float32))


def _yarn(parameters: Parameters, inverse: Float32, max_positions: int | None) -> Frequencies:
    """Compute YaRN (Peng et al. 2023, arXiv 2309.00071)."""
    length = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or (max_positions or length) / length
    low, high = _yarn_range(parameters, 2 * len(inverse), length)
    ramp = np.clip((np.arange(len(inverse)) - low) / ((high - low) or 0.001), 0, 1)
    return Frequencies(
        (inverse / factor * ramp + inverse * (1 - ramp)).astype(np.float32), _yarn_factor(parameters, factor)
    )


def _yarn_range(parameters: Parameters, dims: int, length: int) -> tuple[float, float]:
    # The dimension that makes a number of turns within the original length (section 3.2 of the paper).
    def dimension(rotations: float) -> float:
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dims - 1)


def _yarn_factor(parameters: Parameters, factor: float) -> float:
    def scale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale()


def _longrope(parameters: Parameters, inverse: Float32, max_positions: int | None) -> Frequencies:
    """Compute LongRoPE (Ding et al. 2024, arXiv 2402.13753): factors up to the original length, and others beyond."""
    length = parameters["original_max_position_embeddings"]
    ratio = parameters.get("factor") or (max_positions or length) / length
    factor = parameters.get("attention_factor")
    if factor is None:
        factor = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(length))
    short, long = (np.asarray(parameters[name], np.float32) for name in ("short_factor", "long_factor"))
    if short.shape != inverse.shape or long.shape != inverse.shape:
        raise ModelError(f"longrope: {short.size} and {long.size} factors for {inverse.size} frequencies")
    if parameters.keys() >= LENGTH_SCALES:
        # PhiMoE's code asks for its frequencies without a length, so that they are the short ones at any.
        return Frequencies(
            inverse / short, parameters["short_mscale"], inverse / short, length, parameters["long_mscale"]
        )
    return Frequencies(inverse / short, factor, inverse / long, length, factor)


def _proportional(parameters: Parameters, inverse: Float32, _: int | None) -> Frequencies:
    """Compute Gemma 4's frequencies: those of the whole head, of which only the first part is not 0."""
    exponents = np.arange(len(inverse), dtype=np.float32) / np.float32(len(inverse))
    whole = 1 / np.float32(parameters["rope_theta"]) ** exponents
    rotated = int(parameters["partial_rotary_factor"] * len(inverse))
    whole[rotated:] = 0
    return Frequencies((whole / np.float32(parameters.get("factor") or 1.0)).astype(np.float32))


def softmax_scale(parameters: Parameters, scale: float) -> float:
    """Return the factor of attention scores of DeepSeek's models, which grows with a stretched context."""
    all_dims = parameters.get("mscale_all_dim")
    if parameters.get("rope_type", "default") == "default" or not all_dims or parameters["factor"] <= 1:
        return scale
    return float(scale * (0.1 * all_dims * math.log(parameters["factor"]) + 1.0) ** 2)


def _ntk_alpha(parameters: Parameters, inverse: Float32, _: int | None) -> Frequencies:
    """Compute Hunyuan's scaling: a base stretched once and for all by `alpha`, whatever the length."""
    dims = 2 * len(inverse)
    base = parameters["rope_theta"] * parameters["alpha"] ** (dims / (dims - 2))
    return Frequencies((1 / base ** (np.arange(0, dims, 2) / dims)).astype(np.float32))


_TYPES: Mapping[str, Callable[[Parameters, Float32, int | None], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "ntk_alpha": _ntk_alpha,
    "proportional": _proportional,
}
