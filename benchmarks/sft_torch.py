"""SFT, PyTorch: Mindprint next to TRL's SFT trainer.

    python benchmarks/sft_torch.py [--alone] [--turns 5] [--shapes 147+73 32+200 ragged]

The same rows, dtype and machine, one process each, taking turns.
"""

from side_by_side.turns import compare

if __name__ == "__main__":
    compare("SFT, PyTorch", "mindprint-torch-sft", "trl-sft")
