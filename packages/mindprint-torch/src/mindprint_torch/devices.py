"""The devices that PyTorch can use here, and the library versions that decide its numbers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from mindprint.contract import QUANTIZED_FORMATS, BackendInfo, DeviceInfo, Dtype
from mindprint.plugins.launched import torchrun_world

LIBRARIES = ("torch", "transformers", "trl")
MPS_NOTE = (
    "PyTorch on MPS is known to corrupt adapters in silence: it is never chosen by itself, nothing is ever merged on "
    "it, and what was trained on it should be verified on another device; on Apple Silicon prefer the MLX backend"
)


def backend_info() -> BackendInfo:
    """Return the devices in order of preference: CUDA, CPU, and MPS only for those who name it.

    Nothing is allocated on any of them.
    """
    mps = _mps()
    return BackendInfo(
        name="torch",
        devices=(_cuda(), _cpu(), mps),
        capabilities=frozenset(
            {
                "dropout",
                "bfloat16",
                "float16",
                "sampling",
                "filters",
                "mixed",
                "streaming",
                "embedding",
                "quantize",
                "experts",
                "ranks",
                "shard",
                "devices",
            }
            | set(QUANTIZED_FORMATS)
        ),
        libraries={name: _version(name) for name in LIBRARIES} | {"threads": str(torch.get_num_threads())},
        notes=(MPS_NOTE,) if mps.usable else (),
        world=torchrun_world(),
    )


def _cuda() -> DeviceInfo:
    if not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        reason = "no CUDA device is visible" if built else f"torch {torch.__version__} has no CUDA"
        return DeviceInfo("cuda", reason, accelerator=True)
    detail = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
        return DeviceInfo("cuda", None, detail, dtypes, "bfloat16", accelerator=True)
    return DeviceInfo("cuda", None, detail, ("float32", "float16"), "float16", accelerator=True)


def _cpu() -> DeviceInfo:
    return DeviceInfo("cpu", None, f"{torch.get_num_threads()} threads", ("float32", "bfloat16"), "float32")


def _mps() -> DeviceInfo:
    if not torch.backends.mps.is_available():
        return DeviceInfo("mps", "needs Apple Silicon and a PyTorch built for it", accelerator=True, auto=False)
    return DeviceInfo("mps", None, "named only: PyTorch on MPS corrupts adapters", accelerator=True, auto=False)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
