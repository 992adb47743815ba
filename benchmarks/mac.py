"""What a Mac can reach at most, from arithmetic alone: nothing is measured here, and no Mac is needed.

    python benchmarks/mac.py

Chips are given with the figures that Apple publishes for them. A training step needs 4 operations for each weight and
token, since base weights have no gradient (`on_gpu.work.useful_flops`). Generation reads every weight once a token.
"""

from __future__ import annotations

from dataclasses import dataclass

LENGTH, COMPLETION = 512, 384
"""Tokens of an SFT row, and those of them that count, which alone go through the LM head."""

BITS = {"bfloat16": 16.0, "4 bits": 4.5}
"""Bits of a weight. In 4 bits, each group of 64 has a scale and a bias of 16 bits."""


@dataclass(frozen=True)
class Model:
    """A model's sizes: elements of its layers and its LM head, layers, and width of the queries."""

    name: str
    body: int
    head: int
    layers: int
    width: int

    @property
    def operations(self) -> float:
        """The operations of a training step for each token."""
        # Attention: two products forward and four backward, and a token sees half of its row on average.
        attention = 12 * self.layers * self.width * LENGTH / 2
        return 4 * self.body + 4 * self.head * COMPLETION / LENGTH + attention

    def weights(self, bits: float) -> float:
        """Return the bytes that are read for a token."""
        return (self.body + self.head) * bits / 8


MODELS = (
    Model("Llama 3.2 1B", 16 * 60_817_408, 128_256 * 2048, 16, 2048),
    Model("Qwen 3 4B", 36 * 100_925_440, 151_936 * 2560, 36, 4096),
    Model("Llama 3.1 8B", 32 * 218_103_808, 128_256 * 4096, 32, 4096),
)


@dataclass(frozen=True)
class Chip:
    """A chip's nominal TFLOP/s in float32, where Apple states them, and GB/s of its memory."""

    name: str
    teraflops: float | None
    bandwidth: float


CHIPS = (Chip("M1", 2.6, 68), Chip("M1 Max", 10.4, 400), Chip("M4 Pro", None, 273), Chip("M4 Max", None, 546))


def main() -> None:
    """Print the greatest tokens a second of training and of generation."""
    for model in MODELS:
        print(f"{model.name}: {model.operations / 1e9:.1f} GFLOP for each token of a training step")
        for dtype, bits in BITS.items():
            print(f"  {dtype}: {model.weights(bits) / 1e9:.1f} GB of weights")
            for chip in CHIPS:
                training = f"{chip.teraflops * 1e12 / model.operations:6.0f}" if chip.teraflops else "     -"
                generation = chip.bandwidth * 1e9 / model.weights(bits)
                print(f"    {chip.name:8s}{training} tokens/s of training, {generation:4.0f} of generation, at most")
    for chip in CHIPS:
        if chip.teraflops:
            # A weight of two bytes is read for 2 operations a token.
            print(f"{chip.name}: above {chip.teraflops * 1e3 / chip.bandwidth:.0f} tokens at once, products limit")


if __name__ == "__main__":
    main()
