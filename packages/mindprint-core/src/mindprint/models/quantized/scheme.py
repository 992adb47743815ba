"""Quantization schemes as config.json states them: one for the whole model, and others for single layers.

mlx-lm writes a section `quantization`, and a copy of it as `quantization_config`: bits, group size and mode, then
modules by their path with a scheme or with False. transformers writes `quantization_config` with a `quant_method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mindprint.errors import ModelError
from mindprint.models.folder import model_config

Method = Literal["affine", "mxfp4", "mxfp8", "nvfp4", "nf4", "fp4", "int8"]
"""The formats that core reads: four of MLX, and three of bitsandbytes."""

METHODS: tuple[Method, ...] = get_args(Method)

BITS: Mapping[Method, tuple[int, ...]] = {
    "affine": (1, 2, 3, 4, 5, 6, 8),
    "mxfp4": (4,),
    "mxfp8": (8,),
    "nvfp4": (4,),
    "nf4": (4,),
    "fp4": (4,),
    "int8": (8,),
}
"""Bits that an element of a format can have."""

# What `mlx.core.quantize` takes for a size that nobody gave: config.json may leave it out for a single layer.
_DEFAULTS: Mapping[str, tuple[int, int]] = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}

BLOCK_SIZE = 64
"""The elements that share a scale in bitsandbytes' 4-bit formats, unless a weight states another number."""

Family = Literal["mlx", "bitsandbytes"]

_REMEDY = (
    "formats that are read are MLX's affine, mxfp4, mxfp8 and nvfp4, and bitsandbytes' nf4, fp4 and int8; take the "
    "full-precision model, or one that is quantized in one of these"
)


@dataclass(frozen=True)
class Scheme:
    """A way of storing a weight in few bits.

    Args:
        method: The format, of `METHODS`.
        bits: Bits of an element.
        group_size: Consecutive elements that share a scale. 0 for `int8`, where a whole row does.
        double: Whether the scales of `nf4` and `fp4` are quantized as well (double quantization).
    """

    method: Method
    bits: int
    group_size: int
    double: bool = False

    def __str__(self) -> str:
        if self.method == "affine":
            return f"affine, {self.bits} bits, groups of {self.group_size}"
        return f"{self.method} with double quantization" if self.double else self.method


@dataclass(frozen=True)
class Quantization:
    """The quantization of a base as its config.json states it.

    Args:
        family: The library whose tensors these are: `mlx`, or `bitsandbytes`.
        default: The scheme of every quantized layer without an override.
        overrides: By module path the scheme of single layers, None for one that is not quantized.
    """

    family: Family
    default: Scheme
    overrides: Mapping[str, Scheme | None] = field(default_factory=dict)

    def scheme_of(self, module: str) -> Scheme | None:
        """Return the stated scheme of a module, by the name that it has in the files. None for full precision."""
        return self.overrides.get(module, self.default)

    def __str__(self) -> str:
        others = {scheme for scheme in self.overrides.values() if scheme not in (None, self.default)}
        return f"{self.default}" + (f", some layers {', '.join(sorted(map(str, others)))}" if others else "")


def read_quantization(folder: Path) -> Quantization | None:
    """Return the quantization that a base's config.json states, None for full precision.

    Raises `ModelError` for a section that cannot be read, and for a format that core has no definition of.
    """
    config = model_config(folder)
    section = _section(config, folder)
    if section is None:
        return None
    where = f"{folder / 'config.json'}: quantization"
    method = section.get("quant_method")
    if method is None:
        return _of_mlx(section, where)
    if method == "bitsandbytes":
        return Quantization("bitsandbytes", _of_bitsandbytes(section, where))
    raise ModelError(f"{where}: {_named(method, section)} is not known here; {_REMEDY}")


def _section(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | None:
    """Return the section that counts. mlx-lm reads `quantization` first, transformers only `quantization_config`."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    for part in parts:
        for key in ("quantization", "quantization_config"):
            section = part.get(key)
            if section and not isinstance(section, dict):
                raise ModelError(f"{folder / 'config.json'}: {key} is {section!r}, not a section: download it again")
            if section:
                return dict(section)
    return None


def _of_mlx(section: Mapping[str, Any], where: str) -> Quantization:
    default = _mlx_scheme(section, where)
    overrides: dict[str, Scheme | None] = {}
    for name, value in section.items():
        # Everything that is not a fact of the default is a module's path.
        if isinstance(value, dict):
            overrides[name] = _mlx_scheme(value, f"{where}.{name}")
        elif isinstance(value, bool):
            overrides[name] = default if value else None
    return Quantization("mlx", default, overrides)


def _mlx_scheme(values: Mapping[str, Any], where: str) -> Scheme:
    mode = values.get("mode", "affine")
    if mode not in _DEFAULTS:
        raise ModelError(f"{where}: mode {mode!r} is not known here; {_REMEDY}")
    bits, group_size = (
        _positive(values.get(name), usual, f"{where}.{name}")
        for name, usual in zip(("bits", "group_size"), _DEFAULTS[mode], strict=True)
    )
    if bits not in BITS[mode]:
        known = ", ".join(map(str, BITS[mode]))
        raise ModelError(f"{where}: {mode} with {bits} bits is not known here (known: {known})")
    if mode != "affine" and group_size != _DEFAULTS[mode][1]:
        raise ModelError(f"{where}: {mode} has groups of {_DEFAULTS[mode][1]} elements, not of {group_size}")
    return Scheme(mode, bits, group_size)


def _of_bitsandbytes(section: Mapping[str, Any], where: str) -> Scheme:
    four, eight = (section.get(f"load_in_{bits}bit", section.get(f"_load_in_{bits}bit")) for bits in (4, 8))
    if bool(four) == bool(eight):
        raise ModelError(f"{where}: bitsandbytes needs load_in_4bit or load_in_8bit, one of the two")
    if eight:
        return Scheme("int8", 8, 0)
    method = section.get("bnb_4bit_quant_type", "fp4")
    if method not in ("nf4", "fp4"):
        raise ModelError(f"{where}: bnb_4bit_quant_type {method!r} is not known here; {_REMEDY}")
    return Scheme(method, 4, BLOCK_SIZE, bool(section.get("bnb_4bit_use_double_quant")))


def _positive(value: object, usual: int, where: str) -> int:
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {value!r} is not a positive whole number")
    return value


def _named(method: object, section: Mapping[str, Any]) -> str:
    detail = section.get("format") or section.get("quant_algo") or section.get("fmt")
    return f"quant_method {method!r}" + (f" ({detail})" if detail else "")
