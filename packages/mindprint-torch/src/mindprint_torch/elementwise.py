"""The work between a layer's products: in torch, and as one kernel each where Triton can run.

Everywhere else than here these are several operations of torch, each of which reads and writes whole arrays. On a GPU
they took a third of a step (`benchmarks/gpu.sh run --only profile`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

SWITCH = "MINDPRINT_TRITON"
"""The environment variable that turns the kernels off, with 0."""


def triton_kernels(device: torch.device) -> Any | None:
    """Return the module `triton_kernels` if its kernels run on this device, else None."""
    return _kernels() if device.type == "cuda" and os.environ.get(SWITCH) != "0" else None


@cache
def _kernels() -> Any | None:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("mindprint_torch.triton_kernels")
        # The first launch compiles, for which Triton needs a C compiler and the headers of Python.
        kernels.gate_product(*(torch.zeros(1, device="cuda") for _ in range(2)))
    except Exception as error:  # noqa: BLE001  a compiler that is missing or broken may fail in any way
        warnings.warn(
            f"Triton cannot compile kernels here ({type(error).__name__}: {error}), so that steps take longer;"
            f" install a C compiler, or set {SWITCH}=0",
            stacklevel=2,
        )
        return None
    return kernels


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which Triton starts kernels on this device, as long as the arrays are on it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def normalise(
    x: Tensor, weight: Tensor, epsilon: float, *, plus_one: bool, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """Return `x / rms(x)` times a weight for `x` `[..., width]`, and `1 / rms(x)` in float32, `[rows]`.

    Args:
        x: The input.
        weight: `[width]`.
        epsilon: A number that is added to the mean square.
        plus_one: Whether 1 is added to the weight.
        rounds_first: Whether the normalised input is rounded to its dtype before it is multiplied.
    """
    kernels = triton_kernels(x.device)
    if kernels is not None:
        return kernels.normalise(x.contiguous(), weight, epsilon, plus_one=plus_one, rounds_first=rounds_first)  # type: ignore[no-any-return]
    if x.dtype == torch.float32:
        # In place, and with the mean square from a reduction that writes no array of squares.
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        return (x * inverse).mul_(weight + 1.0 if plus_one else weight), inverse.flatten()
    values = x.float()
    inverse = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    normalised = values * inverse
    if rounds_first:
        normalised = normalised.to(x.dtype)
    scale = weight.float() + 1.0 if plus_one else weight
    return (normalised * scale).to(x.dtype), inverse.flatten()


def normalise_back(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, plus_one: bool, rounds_first: bool
) -> Tensor:
    """Return the gradient by `x` of `normalise`, for a gradient by its output and the second of its results."""
    kernels = triton_kernels(x.device)
    if kernels is not None:
        return kernels.normalise_back(  # type: ignore[no-any-return]
            gradient.contiguous(), x.contiguous(), weight, inverse, plus_one=plus_one, rounds_first=rounds_first
        )
    # With f = 1 / rms(x), n = f x and y = n w, and g = dL/dy: dL/dx = f (g w - n mean(g w n)).
    factor = inverse.view(*x.shape[:-1], 1)
    if x.dtype == torch.float32:
        by_normalised = gradient * (weight + 1.0 if plus_one else weight)
        # f n mean(g w n) = x f^3 mean(g w x).
        mean = torch.linalg.vecdot(by_normalised, x).unsqueeze_(-1).div_(x.shape[-1])
        return by_normalised.mul_(factor).addcmul_(x, mean.mul_(factor**3), value=-1.0)
    normalised = x.float() * factor
    by_normalised = gradient.float() * (weight.float() + 1.0 if plus_one else weight.float())
    if rounds_first:
        by_normalised = by_normalised.to(x.dtype).float()
    mean = (by_normalised * normalised).mean(-1, keepdim=True)
    return (factor * (by_normalised - normalised * mean)).to(x.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
    """Return heads rotated by their tokens' angles, or with `back` the gradient by them of a gradient by that.

    Args:
        x: `[rows, heads, tokens, size]`.
        cosine: The angles' cosines, `[rows or 1, tokens, size]`.
        sine: Likewise.
        back: Whether `x` is a gradient, which is rotated by the transposed matrix.
    """
    kernels = triton_kernels(x.device)
    if kernels is not None:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return kernels.rotate(x, cosine.contiguous(), sine.contiguous(), back=back)  # type: ignore[no-any-return]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    if back:
        first, second = (x * sine).chunk(2, dim=-1)
        return x * cosine + torch.cat([second, -first], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
