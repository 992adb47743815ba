"""DPO, PyTorch: Mindprint next to TRL's DPO trainer, with the reference computed at every step and ahead of training.

    python benchmarks/dpo_torch.py [--alone] [--turns 5] [--shapes 147+73 32+200 ragged]

The same rows, dtype and machine, one process each, taking turns. Our pass for the reference takes turns too, for the
ratios over whole epochs. TRL's own pass, where it computes the reference ahead, is in none of them.
"""

from side_by_side.turns import compare

if __name__ == "__main__":
    peers = ("trl-dpo", "trl-dpo-precomputed")
    compare("DPO, PyTorch", "mindprint-torch-dpo", "mindprint-torch-dpo-reference", *peers)
