"""Compare Triton's kernels, run by its interpreter, with the formulas in torch. Fails by an assertion."""

from __future__ import annotations

import torch
from torch.nn import functional

from mindprint_torch import elementwise, packed, triton_kernels
from mindprint_torch.norms import VARIANTS


def main() -> None:
    """Compare each kernel on random numbers, with widths that fill no block."""
    torch.manual_seed(0)
    x, outer, weight = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    for variant in VARIANTS:
        kind = variant._asdict()
        output, inverse = triton_kernels.normalise(x, weight, 1e-5, **kind)
        torch.testing.assert_close((output, inverse), elementwise.normalise(x, weight, 1e-5, **kind))
        expected = elementwise.normalise_back(outer, x, weight, inverse, **kind)
        torch.testing.assert_close(triton_kernels.normalise_back(outer, x, weight, inverse, **kind), expected)
    gate, up, by_inner = torch.randn(3, 5, 48)
    torch.testing.assert_close(triton_kernels.gate_product(gate, up), functional.silu(gate) * up)
    inner = by_inner.clone()
    by_gate, by_up = triton_kernels.gate_gradients(gate, up, inner)
    torch.testing.assert_close(inner, functional.silu(gate) * up)
    torch.testing.assert_close(by_up, by_inner * functional.silu(gate))
    torch.testing.assert_close(by_gate, torch.ops.aten.silu_backward(by_inner * up, gate))
    for rows in (1, 2):
        heads, (cosine, sine) = torch.randn(2, 7, 3, 24), torch.randn(2, rows, 7, 24)
        for states in (heads.transpose(1, 2), heads.transpose(1, 2).contiguous()):
            for back in (False, True):
                expected = elementwise.rotate(states, cosine, sine, back=back)
                assert torch.equal(triton_kernels.rotate(states, cosine, sine, back=back), expected)
    for bits in (2, 3, 4, 5, 6, 8):
        words = torch.randint(-(1 << 31), 1 << 31, (6, 6 * bits), dtype=torch.int32)
        parts = {"weight": words, "scales": torch.randn(6, 6), "biases": torch.randn(6, 6)}
        affine = packed.AffineWeight((6, 192), torch.float32, parts, bits)
        assert torch.equal(affine._unpacked(triton_kernels, 2, 5), affine.rows(2, 5))
    codes, table = torch.randint(0, 256, (6 * 96,), dtype=torch.uint8), torch.randn(16)
    plain = {"weight": codes, "quant_map": table, "absmax": torch.rand(18)}
    nested = {
        **plain, "absmax": torch.randint(0, 256, (18,), dtype=torch.uint8), "nested_absmax": torch.rand(5),
        "nested_quant_map": torch.randn(256), "nested_offset": torch.tensor(0.5),
    }  # fmt: skip
    for parts, nested_size in ((plain, 0), (nested, 4)):
        blocks = packed.BlockWeight((6, 192), torch.float32, parts, 64, nested_size)
        assert torch.equal(blocks._unpacked(triton_kernels, 2, 5), blocks.rows(2, 5))


if __name__ == "__main__":
    main()
