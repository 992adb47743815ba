"""Facts of weights on the device that holds them, in one pass: a cheap digest, and the largest magnitude."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mindprint_torch.model import TorchModel
from mindprint_torch.sharding import first_byte, held, summed_over_ranks

WORDS_AT_ONCE = 1 << 20
"""64-bit words that are multiplied at once, which bounds temporary memory to 8 MiB."""


def base_digest(model: TorchModel) -> str:
    """Return the digest of the base's weights as they are in memory."""
    return weights_digest(model.base)


def largest_weight(model: TorchModel) -> float | None:
    """Return the largest magnitude among the base's weights, NaN if one is NaN, None if they are packed or sharded."""
    weights = model.base.values()
    if any(isinstance(weight, DTensor) or not weight.is_floating_point() for weight in weights):
        return None
    # `aminmax` reads a weight once and writes nothing of its size. It passes NaN on.
    ends = [end.float().abs().cpu() for weight in weights if weight.numel() for end in weight.aminmax()]
    return float(torch.stack(ends).max())


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over each weight's name, shape, dtype and checksum.

    The checksum is `sum((2 i + 1) * word_i)` modulo 2^64 over the weight's bytes as 64-bit words. Its factors are odd,
    hence invertible, so that a change of any single word always changes it.
    """
    factors = _factors(weights)
    checksums = [part_checksum(held(weight), first_byte(weight), factors[weight.device]) for weight in weights.values()]
    # The checksum is a sum over words, so that it is one over the shares of all ranks.
    shared = [isinstance(weight, DTensor) for weight in weights.values()]
    if any(shared):
        own = [checksum for checksum, is_share in zip(checksums, shared, strict=True) if is_share]
        sums = iter(summed_over_ranks(torch.stack(own)))
        checksums = [
            next(sums) if is_share else checksum.cpu() for checksum, is_share in zip(checksums, shared, strict=True)
        ]
    digest = hashlib.sha256()
    for (name, weight), checksum in zip(weights.items(), _to_host(checksums), strict=True):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {checksum}\n".encode())
    return digest.hexdigest()


def _to_host(checksums: list[Tensor]) -> list[int]:
    if not checksums:
        return []
    # A base may be on several devices.
    first = checksums[0].device
    return torch.stack([checksum.to(first) for checksum in checksums]).tolist()


def _factors(weights: Mapping[str, Tensor]) -> dict[torch.device, Tensor]:
    """Return the odd numbers from 1 on each device, as many as one pass over its weights multiplies with."""
    words: dict[torch.device, int] = {}
    for weight in weights.values():
        needed = min(weight.numel() * weight.element_size() // 8 + 1, WORDS_AT_ONCE)
        words[weight.device] = max(words.get(weight.device, 0), needed)
    return {device: torch.arange(1, 2 * count, 2, dtype=torch.int64, device=device) for device, count in words.items()}


def part_checksum(part: Tensor, first: int, factors: Tensor) -> Tensor:
    """Return the number that a part of a weight adds to the weight's checksum, int64.

    Args:
        part: Values that are next to each other in the weight.
        first: The byte of the whole weight at which they start.
        factors: The odd numbers from 1.
    """
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for start, words in _words(part, first):
        # Factors restart in every chunk: (2 (start + i) + 1) w = (2 i + 1) w + 2 start w.
        total += (words * factors[: len(words)]).sum() + 2 * start * words.sum()
    return total


def _words(part: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the bytes of a part as int64 words, with the index of each chunk's first word in the whole weight.

    The first and the last word are filled with zeros.
    """
    data = part.detach().contiguous().view(-1).view(torch.uint8)
    # Bytes that are not in this part are zeros, which add nothing to the sum.
    if lead := first % 8:
        data = torch.cat([data.new_zeros(lead), data])
    # A tensor within a mapped file need not start where a 64-bit word may.
    elif data.data_ptr() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    for start in range(0, whole, 8 * WORDS_AT_ONCE):
        yield (first + start) // 8, data[start : min(start + 8 * WORDS_AT_ONCE, whole)].view(torch.int64)
    if whole < len(data):
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[: len(data) - whole] = data[whole:]
        yield (first + whole) // 8, last.view(torch.int64)
