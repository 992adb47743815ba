"""The device of this backend, and the library versions that decide its numbers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mindprint.contract import BackendInfo, DeviceInfo
from mindprint.errors import BackendError
from mindprint_llamacpp.library import load_library

LIBRARIES = ("xllamacpp", "gguf", "numpy")


def backend_info() -> BackendInfo:
    """Return the CPU, with the reason if llama.cpp cannot be loaded or is of a release that is not known."""
    try:
        reason, detail = None, f"llama.cpp {load_library().version}"
    except BackendError as error:
        reason, detail = str(error), ""
    return BackendInfo(
        name="llamacpp",
        devices=(DeviceInfo("cpu", reason, detail),),
        capabilities=frozenset({"sampling", "filters", "mixed", "streaming", "gguf"}),
        libraries={name: _version(name) for name in LIBRARIES},
        training=False,
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
