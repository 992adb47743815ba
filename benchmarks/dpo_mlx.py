"""DPO, MLX: Mindprint next to mlx-lm-lora's DPO.

    python benchmarks/dpo_mlx.py [--alone] [--turns 5] [--shapes 147+73 32+200 ragged] [--device metal --dtype bfloat16]

The same rows, dtype and machine, one process each, taking turns.
"""

from side_by_side.turns import compare

if __name__ == "__main__":
    compare("DPO, MLX", "mindprint-mlx-dpo", "mlx-lm-lora-dpo")
