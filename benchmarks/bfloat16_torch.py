"""PyTorch: our DPO and SFT steps in bfloat16 next to our own in float32.

    python benchmarks/bfloat16_torch.py [--alone] [--turns 5] [--shapes 147+73 32+200 ragged]

The same rows and machine, one process each, taking turns.
"""

from side_by_side.turns import compare

if __name__ == "__main__":
    for stage in ("dpo", "sft"):
        ours = f"mindprint-torch-{stage}"
        compare(f"{stage.upper()}, PyTorch, bfloat16 next to float32", f"{ours}-bfloat16", ours)
