"""What the machine offers, said honestly; memory that is given back."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import pytest
from mlx_samples import linear_sites, lora, preference_batch, token_batch

from mindprint.contract import LoadedModel, Update
from mindprint.losses import PreferenceLoss
from mindprint_mlx import adapter, blas, devices, model, steps


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return result.stdout.strip()


class TestInfo:
    def test_devices_and_their_defaults(self) -> None:
        info = devices.backend_info()
        assert [device.name for device in info.devices] == ["metal", "cuda", "cpu"]
        assert [device.default_dtype for device in info.devices] == ["bfloat16", "bfloat16", "float32"]
        assert info.device("cpu").usable

    def test_a_device_is_usable_exactly_when_mlx_says_so(self) -> None:
        info = devices.backend_info()
        assert info.device("metal").usable == mx.metal.is_available()
        assert info.device("cuda").usable == mx.cuda.is_available()
        for device in info.devices:
            assert device.usable or device.reason

    def test_the_libraries_that_decide_numbers_are_named(self) -> None:
        libraries = devices.backend_info().libraries
        assert libraries["mlx"] == mx.__version__
        assert libraries["mlx-lm"].startswith("0.")
        assert libraries["blas"] == blas.prepare().name


@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere MLX brings its own fast BLAS")
class TestBlas:
    def test_a_fast_one_is_loaded_before_mlx_and_used(self) -> None:
        """The product of two matrices differs in its last bits from the reference BLAS's, and comes much faster."""
        if "OpenBLAS" not in blas.prepare().name:
            pytest.skip("no OpenBLAS on this machine")
        code = """
import time, mlx.core as mx
a = mx.random.normal((768, 768), key=mx.random.key(0))
mx.eval(a)
def seconds():
    start = time.perf_counter()
    mx.eval(a @ a)
    return time.perf_counter() - start
print(min(seconds() for _ in range(5)))
"""
        slow, fast = float(python(code)), float(python("import mindprint_mlx\n" + code))
        assert fast < slow / 3

    def test_it_is_said_when_mlx_was_imported_first(self) -> None:
        found = python("import mlx.core, mindprint_mlx.blas as b; print(b.prepare().name, '|', b.prepare().note)")
        assert found.startswith("unknown | mlx was imported before mindprint_mlx")

    def test_it_is_said_when_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blas, "_candidates", lambda: (("libnothing.so.9", str),))
        monkeypatch.delitem(sys.modules, "mlx.core")
        found = blas.prepare.__wrapped__()
        assert found.name == "reference BLAS"
        assert "libopenblas0-pthread" in found.note


class TestPrecision:
    def test_reduced_precision_is_off_unless_the_user_says_otherwise(self) -> None:
        code = "import os; from mindprint_mlx import blas; print(os.environ[blas.TF32], blas.precision_note())"
        assert python(code, **{blas.TF32: "0"}) == "0 None"
        assert python(code, **{blas.TF32: "1"}).startswith("1 MLX_ENABLE_TF32=1: float32 matrix products on a GPU may")
        without = "import os; os.environ.pop('MLX_ENABLE_TF32', None)\n" + code
        assert python(without) == "0 None"


class TestMemory:
    def test_released_memory_is_free_again(self, make: Callable[..., LoadedModel]) -> None:
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        loaded, batch = make(), token_batch()
        adapter.inject(loaded.handle, lora(linear_sites(loaded)))
        steps.sft_step(loaded.handle, [batch], Update(1e-3, batch.loss_tokens))
        assert mx.get_active_memory() > before + 4 * loaded.parameters
        model.release(loaded.handle)
        assert mx.get_active_memory() <= before + 1024
        assert mx.get_cache_memory() == 0

    def test_steps_leave_nothing_behind(self, make: Callable[..., LoadedModel]) -> None:
        loaded, batch, pairs = make(), token_batch(), preference_batch()
        adapter.inject(loaded.handle, lora(linear_sites(loaded)))
        seen = []
        for _ in range(12):
            steps.sft_step(loaded.handle, [batch], Update(1e-3, batch.loss_tokens))
            steps.dpo_step(loaded.handle, [pairs], PreferenceLoss(), Update(1e-3, 9, pairs.pairs))
            seen.append(mx.get_active_memory())
        assert max(seen[2:]) <= min(seen[2:]) * 1.001
