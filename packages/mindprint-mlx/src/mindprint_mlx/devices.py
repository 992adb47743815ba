"""The devices that MLX can use here, and the library versions that decide its numbers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

from mindprint.contract import QUANTIZED_FORMATS, BackendInfo, DeviceInfo, Dtype
from mindprint.errors import BackendError
from mindprint.plugins.launched import mlx_world
from mindprint_mlx import blas

ALL_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
LIBRARIES = ("mlx", "mlx-lm", "numpy")
CAPABILITIES = frozenset(
    {"dropout", "bfloat16", "float16", "sampling", "filters", "mixed", "streaming", "embedding", "experts", "ranks"}
    | set(QUANTIZED_FORMATS)
)


def backend_info() -> BackendInfo:
    """Return the devices in order of preference: Metal, CUDA, CPU. Nothing is allocated on any of them."""
    chosen = blas.prepare()
    libraries = {name: _version(name) for name in LIBRARIES} | {"blas": chosen.name}
    notes = (chosen.note, blas.precision_note())
    return BackendInfo(
        name="mlx",
        devices=(_metal(), _cuda(), _cpu(chosen)),
        capabilities=CAPABILITIES,
        libraries=libraries,
        notes=tuple(note for note in notes if note),
        world=mlx_world(),
    )


def device(name: str) -> mx.Device:
    """Return MLX's device of the name that configurations have for it.

    Raises:
        BackendError: If it cannot be used here.
    """
    known = backend_info().device(name)
    if known is None or not known.usable:
        reason = "it is unknown to MLX" if known is None else known.reason
        raise BackendError(f"backend 'mlx' cannot use device {name!r} here: {reason}")
    return mx.Device(mx.cpu if name == "cpu" else mx.gpu)


def _metal() -> DeviceInfo:
    reason = None if mx.metal.is_available() else "MLX finds no Metal GPU: it needs Apple silicon and macOS"
    return DeviceInfo("metal", reason, _gpu_name(reason), ALL_DTYPES, "bfloat16", accelerator=True)


def _cuda() -> DeviceInfo:
    available = hasattr(mx, "cuda") and mx.cuda.is_available()
    reason = None if available else 'this MLX has no CUDA; on Linux with an NVIDIA GPU: pip install "mlx[cuda12]"'
    return DeviceInfo("cuda", reason, _gpu_name(reason), ALL_DTYPES, "bfloat16", accelerator=True)


def _cpu(chosen: blas.Blas) -> DeviceInfo:
    # bfloat16 and float16 work here too, but no BLAS has them: they run many times slower than float32.
    return DeviceInfo("cpu", None, f"matrix products on {chosen.name}", ALL_DTYPES, "float32")


def _gpu_name(reason: str | None) -> str:
    if reason is not None:
        return ""
    facts: dict[str, Any] = mx.device_info(mx.Device(mx.gpu))
    return str(facts.get("device_name", ""))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
