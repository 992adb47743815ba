"""Normalisation, gating and rotation in one piece: numbers and gradients of transformers' own layers.

On a CPU these are the formulas in torch. `benchmarks/gpu.sh run --only kernels` compares Triton's kernels with them.
Where Triton is installed, its interpreter runs the kernels here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from conftest import save_model
from mindprint_torch import elementwise, norms, rotation

WIDTH = 24
DTYPES = (torch.float32, torch.bfloat16)


def both(function: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare values and gradients of two functions: equal up to the order of a sum."""
    results = []
    for each in (function, expected):
        leaf = x.clone().requires_grad_()
        value = each(leaf)
        torch.manual_seed(1)
        value.backward(torch.randn_like(value))  # type: ignore[no-untyped-call]
        results.append((value.detach(), leaf.grad))
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        (LlamaRMSNorm, norms.Variant(False, True)),
        (Gemma2RMSNorm, norms.Variant(True, False)),
        (Olmo2RMSNorm, norms.Variant(False, False)),
    ],
)
def test_norms_compute_as_their_class(kind: Any, variant: norms.Variant, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = kind(WIDTH, eps=0.1).to(dtype).requires_grad_(False)
    norm.weight.normal_()
    expected = norm.forward
    assert norms.fuse_norms(norm) == 1
    # In bfloat16 some variants differ by a rounding only, and the nearest is taken.
    assert norm.forward.args[2] == variant or (dtype == torch.float32 and not variant.plus_one)
    both(norm, expected, torch.randn(2, 3, WIDTH).to(dtype))


def test_other_norms_are_left_alone() -> None:
    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 3 * super().forward(hidden_states)

    assert norms.fuse_norms(ScaledRMSNorm(WIDTH)) == 0
    assert norms.fuse_norms(torch.nn.LayerNorm(WIDTH)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_computes_as_transformers_does(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Cosines and sines of unlike halves: real ones repeat, and would hide a gradient that takes the wrong half.
    cosine, sine = torch.randn(2, rows, 5, 8).to(dtype)
    original = modeling_llama.apply_rotary_pos_emb

    def expected(x: Tensor) -> Tensor:
        return original(x, x, cosine, sine)[0]  # type: ignore[no-any-return]

    both(lambda x: rotation.Rotation.apply(x, cosine, sine), expected, torch.randn(2, 3, 5, 8).to(dtype))  # type: ignore[no-untyped-call]


def test_rotation_is_replaced_where_it_is_the_same_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, rotation.NAME, original)  # put back afterwards
    network = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, "llama")).requires_grad_(False)
    tokens = torch.arange(12).view(2, 6)
    expected = network(tokens).logits
    assert rotation.fuse_rotation(network) == 1 == rotation.fuse_rotation(network)
    assert isinstance(modeling_llama.apply_rotary_pos_emb, rotation.FusedRotation)
    # Without Triton the function that was there computes. With it, ours: here in torch.
    assert torch.equal(network(tokens).logits, expected)
    called = []
    monkeypatch.setattr(rotation, "triton_kernels", lambda device: called.append(device) or torch)
    torch.testing.assert_close(network(tokens).logits, expected)
    assert called
    assert norms.fuse_norms(network) == 5
    torch.testing.assert_close(network(tokens).logits, expected)


def test_rotations_of_other_pairs_keep_their_function() -> None:
    assert rotation._rotates_halves(modeling_llama.apply_rotary_pos_emb)
    assert not rotation._rotates_halves(interleaved)
    assert not rotation._rotates_halves(lambda q, k: (q, k))


def test_other_arguments_go_to_the_function_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "triton_kernels", lambda _: torch)
    fused = rotation.FusedRotation(lambda *_, **__: "the original")  # type: ignore[arg-type,return-value]
    heads, cosine = torch.ones(1, 2, 3, 4), torch.ones(1, 3, 4)
    assert fused(heads, heads, cosine, cosine) != "the original"
    others = [
        (heads, heads, cosine.double(), cosine.double()), (heads, heads, cosine[..., :2], cosine[..., :2]),
        (heads, heads, cosine, cosine, 2),
    ]  # fmt: skip
    assert [fused(*arguments) for arguments in others] == ["the original"] * 3


def test_a_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(elementwise.importlib, "import_module", fail)
    elementwise._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"cannot compile kernels here \(RuntimeError: no C compiler\)"):
            assert elementwise.triton_kernels(torch.device("cuda")) is None
        monkeypatch.setenv(elementwise.SWITCH, "0")
        assert elementwise.triton_kernels(torch.device("cuda")) is None
    finally:
        elementwise._kernels.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compute_the_formulas() -> None:
    """Run the kernels in Triton's interpreter, which rounds to bfloat16 otherwise than a GPU: in float32 alone."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, Path(__file__).with_name("interpret_kernels.py")], check=True, env=environment)
