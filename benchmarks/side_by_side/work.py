"""The work: a random 50M-parameter Qwen2, an adapter on all its linear layers, and rows of given lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 32768, 512, 1536, 11, 8, 2
EOS, PAD, FIRST_WORD = 0, 1, 2
RANK, ALPHA, LEARNING_RATE, BETA = 8, 16.0, 5e-6, 0.1
PAIRS, ROWS, STEPS = 4, 8, 18

SHAPES = {"147+73": (147, 147, 73, 73), "32+200": (32, 32, 200, 200), "ragged": (12, 260, 8, 300)}
"""Shortest and longest prompt and completion in tokens. Lengths between them are even on a log scale."""

DEVICE, DTYPE = "MINDPRINT_BENCH_DEVICE", "MINDPRINT_BENCH_DTYPE"
"""Variables of the environment that tell MLX's contestants what to compute on, and in."""

MLX_DEVICES = {"cpu": "mx.cpu", "metal": "mx.gpu"}
"""MLX's names for the devices that our configurations name."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its completions, which end in the end-of-sequence token. SFT has no `rejected`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def rows(shape: str, count: int) -> list[Row]:
    """Return the same rows for everybody."""
    low, high, shortest, longest = SHAPES[shape]
    # A fixed seed: contestants are separate processes, and each makes the rows for itself.
    rng = np.random.default_rng(7)

    def ids(start: int, stop: int) -> list[int]:
        length = round(float(np.exp(rng.uniform(np.log(start), np.log(stop)))))
        return [int(word) for word in rng.integers(FIRST_WORD, VOCABULARY, length)]

    def completion() -> list[int]:
        return [*ids(shortest, longest)[:-1], EOS]

    return [Row(ids(low, high), completion(), completion()) for _ in range(count)]


def text(ids: list[int]) -> str:
    """Return a text that the tokenizer of `write_model` turns into these ids. Peers add the end of sequence."""
    return " ".join(f"w{word}" for word in ids if word != EOS)


def write_model(folder: Path) -> None:
    """Save the model, and a tokenizer with a word for every id."""
    import torch  # noqa: PLC0415
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config  # noqa: PLC0415

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, tie_word_embeddings=True,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<eos>": EOS, "<pad>": PAD, **{f"w{word}": word for word in range(FIRST_WORD, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")  # noqa: S106
    wrapped.save_pretrained(folder)


def useful_flops(batch: list[Row], *, preference: bool) -> float:
    """Return the operations that a step needs: base linears, attention and LM head, forward and backward.

    Rows are not padded, and a prompt counts once. Of the last layer only keys and values count for all tokens, and the
    rest for tokens whose hidden state predicts one of a completion. The gradient by activations costs as much as the
    forward pass, of attention twice.
    """
    head_dim = HIDDEN // HEADS
    keys = 2 * HIDDEN * KEY_HEADS * head_dim
    rest = 2 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
    total = 0.0
    for row in batch:
        completions = (row.chosen, row.rejected) if preference else (row.chosen,)
        prompt, own = len(row.prompt), [len(completion) - 1 for completion in completions]
        # Under a causal mask a token sees half of its own part on average, and all of the prompt.
        seen_by_own = sum(length * prompt + length**2 / 2 for length in own)
        # The prompt's last token predicts the first one of each completion.
        asked, seen_by_asked = 1 + sum(own), prompt + seen_by_own
        # A multiplication and an addition each; forward, and by activations backward. Base weights have no gradient.
        read = prompt + sum(own)
        total += 2 * 2 * (LAYERS * keys * read + rest * ((LAYERS - 1) * read + asked))
        total += 3 * 4 * HIDDEN * ((LAYERS - 1) * (prompt**2 / 2 + seen_by_own) + seen_by_asked)
        total += 2 * 2 * HIDDEN * VOCABULARY * sum(map(len, completions))
    return total
