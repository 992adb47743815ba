"""The positions of a base: how long a sequence it was made for, and whether it can compute longer ones at all."""

from __future__ import annotations

from pathlib import Path

from mindprint.models.folder import model_config, tensors

LENGTH_SETTINGS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""The names that model families have for their longest sequence."""

LEARNED_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""Endings of the tables of learned positions (GPT-2, OPT, GPT-Neo): there is no row for a position beyond them."""


def longest_sequence(folder: Path) -> int | None:
    """Return the longest sequence in tokens that config.json states, None if it states none."""
    config = model_config(folder)
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        for name in LENGTH_SETTINGS:
            length = part.get(name)
            if type(length) is int and length > 0:
                return length
    return None


def has_learned_positions(folder: Path) -> bool:
    """Return whether the base looks positions up in a table. Rotary positions are computed, for any length."""
    return any(name.endswith(LEARNED_POSITIONS) for name in tensors(folder))
