"""A cheap digest of weights on the device that holds them, in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mindprint_torch.model import TorchModel

WORDS_AT_ONCE = 1 << 20
"""64-bit words that are multiplied at once, which bounds temporary memory to 8 MiB."""


def base_digest(model: TorchModel) -> str:
    """Return the digest of the base's weights as they are in memory."""
    return weights_digest(model.base)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over each weight's name, shape, dtype and checksum.

    The checksum is `sum((2 i + 1) * word_i)` modulo 2^64 over the weight's bytes as 64-bit words. Its factors are odd,
    hence invertible, so that a change of any single word always changes it.
    """
    factors = _factors(weights)
    checksums = [_checksum(weight, factors[weight.device]) for weight in weights.values()]
    digest = hashlib.sha256()
    for (name, weight), checksum in zip(weights.items(), _to_host(checksums), strict=True):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {checksum}\n".encode())
    return digest.hexdigest()


def _to_host(checksums: list[Tensor]) -> list[int]:
    return torch.stack(checksums).tolist() if checksums else []


def _factors(weights: Mapping[str, Tensor]) -> dict[torch.device, Tensor]:
    """Return the odd numbers from 1 on each device, as many as one pass over its weights multiplies with."""
    words: dict[torch.device, int] = {}
    for weight in weights.values():
        needed = min(weight.numel() * weight.element_size() // 8 + 1, WORDS_AT_ONCE)
        words[weight.device] = max(words.get(weight.device, 0), needed)
    return {device: torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device) for device, count in words.items()}


def _checksum(weight: Tensor, factors: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, words in _words(weight):
        # Factors restart in every chunk: (2 (start + i) + 1) w = (2 i + 1) w + 2 start w.
        total += (words * factors[: len(words)]).sum() + 2 * start * words.sum()
    return total


def _words(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the weight's bytes as int64 words, with the index of each chunk's first word; the last is zero-filled."""
    data = weight.detach().contiguous().view(-1).view(torch.uint8)
    # A tensor within a mapped file need not start where a 64-bit word may.
    if data.data_ptr() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    for start in range(0, whole, 8 * WORDS_AT_ONCE):
        yield start // 8, data[start : min(start + 8 * WORDS_AT_ONCE, whole)].view(torch.int64)
    if whole < len(data):
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[: len(data) - whole] = data[whole:]
        yield whole // 8, last.view(torch.int64)
