"""The plugin as core finds it."""

from __future__ import annotations

import subprocess
import sys

import torch

from mindprint.contract import CAPABILITIES
from mindprint.plugins.backend import Backend


def test_importing_the_plugin_imports_no_framework() -> None:
    code = (
        "import sys, mindprint_torch.plugin; "
        "print([name for name in ('torch', 'transformers', 'peft', 'trl', 'numpy.testing') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_asking_for_devices_imports_torch_alone() -> None:
    code = (
        "import sys; from mindprint_torch.devices import backend_info; backend_info(); "
        "print([name for name in ('transformers', 'peft', 'trl') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_info_states_devices_in_order_and_honest_capabilities(backend: Backend) -> None:
    info = backend.info
    assert [device.name for device in info.devices] == ["cuda", "cpu", "mps"]
    cpu = info.device("cpu")
    assert cpu is not None
    assert (cpu.usable, cpu.dtypes, cpu.default_dtype) == (True, ("float32", "bfloat16"), "float32")
    assert info.capabilities <= CAPABILITIES
    assert "experts" in info.capabilities
    assert set(info.libraries) == {"torch", "transformers", "trl", "threads"}
    assert all(version[0].isdigit() for version in info.libraries.values())
    assert info.libraries["threads"] == str(torch.get_num_threads())


def test_mps_is_never_chosen_by_itself(backend: Backend) -> None:
    assert backend.device("auto").name in ("cuda", "cpu")
