"""A base whose decoder layers are divided among the ranks, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each rank holds the same share of every layer's weights, and all of the rest: the token embedding, the last norm, the
output layer and the adapter. FSDP gathers a layer before it computes, and frees it afterwards. So a pass through the
layers needs all ranks. But the ranks do not have the same number of passes: their micro-batches differ, and one answer
is longer than another. `Turns` keeps them together. A rank says what it is about to do. The others do the same at that
moment, or lend their shares: they run a pass of one token and throw its result away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mindprint.asked_places import asking
from mindprint.errors import ModelError
from mindprint_torch import ranks


class Turn(IntEnum):
    """The things that a rank can be about to do. The greatest of all ranks is done first."""

    REST = 0
    """Nothing: it waits for the others, at an exchange."""
    READ = 1
    """A forward pass without a graph."""
    TRAIN = 2
    """A forward pass, and one backward pass through it."""


class Turns:
    """The order in which the ranks use their shares together.

    Args:
        lend: For each turn, the part in it of a rank that wants something else.
        announce: Tells the others a number, and returns the numbers of all ranks.
    """

    def __init__(
        self, lend: Mapping[Turn, Callable[[], object]], announce: Callable[[int], Sequence[int]] = ranks.announce
    ) -> None:
        self._lend = lend
        self._announce = announce
        self._lending = False

    def take(self, wanted: Turn) -> None:
        """Return when it is this rank's turn, after lending its shares to the others as often as they need them.

        A rank that rests returns when all of them do.
        """
        if self._lending:
            return
        while (chosen := Turn(max(self._announce(wanted)))) != wanted:
            self._lending = True
            try:
                self._lend[chosen]()
            finally:
                self._lending = False


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers to shard, in their order.

    Raises:
        ModelError: The model has none that are known, or they cannot be sharded.
    """
    layers: list[nn.Module] = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    name = type(network).__name__
    if not layers:
        raise ModelError(f"{name} has no decoder layers that can be sharded: set backend.shard=false")
    weights = [weight for layer in layers for weight in layer.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise ModelError(f"{name} has layers that share weights, which cannot be sharded: set backend.shard=false")
    if any(weight.ndim > 2 for weight in weights if weight.is_floating_point()):
        raise ModelError(f"{name} has stacks of experts, which are not sharded: set backend.shard=false")
    return layers


def row_range(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first row of a rank's share of a weight, and the one behind its last: as `torch.chunk` divides."""
    step = -(-rows // size)
    return min(rank * step, rows), min((rank + 1) * step, rows)


def first_byte(weight: Tensor) -> int:
    """Return where this rank's share of a weight starts in the whole one, in bytes."""
    if not isinstance(weight, DTensor):
        return 0
    start, _ = row_range(weight.shape[0], weight.device_mesh.get_local_rank(), weight.device_mesh.size())
    return start * (weight.numel() // weight.shape[0]) * weight.element_size()


def held(weight: Tensor) -> Tensor:
    """Return this rank's share of a weight, or all of one that is not divided."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def gathered_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Yield each sharded layer while this rank holds all of it. All ranks do this at the same time."""
    for layer in network.modules():
        sharded: Any = layer
        if hasattr(sharded, "unshard") and hasattr(sharded, "reshard"):
            sharded.unshard()
            try:
                yield layer
            finally:
                sharded.reshard()


def take_turns(network: PreTrainedModel) -> None:
    """Let each pass through the layers, and each exchange, wait for its turn."""
    turns = Turns(
        {
            Turn.READ: lambda: _lend_pass(network, backward=False),
            Turn.TRAIN: lambda: _lend_pass(network, backward=True),
        }
    )

    def before(*_: Any) -> None:
        turns.take(Turn.TRAIN if torch.is_grad_enabled() else Turn.READ)

    # Before FSDP's own hook, which gathers the first layer.
    decoder_layers(network)[0].register_forward_pre_hook(before, prepend=True)
    ranks.rest_before_exchanges(lambda: turns.take(Turn.REST))


def _lend_pass(network: PreTrainedModel, *, backward: bool) -> None:
    """Pass one token through the layers, and back if asked. The result is thrown away."""
    tokens = torch.zeros((1, 1), dtype=torch.long, device=network.device)
    # This rank may be within a pass that asks for places, which are not those of this token.
    with torch.set_grad_enabled(backward), asking(None):
        logits = network(input_ids=tokens, use_cache=False).logits
    if logits.requires_grad:
        factors = [weight for weight in network.parameters() if weight.requires_grad]
        # Not `backward`, which would add to the gradients of this rank's own passes.
        torch.autograd.grad(logits, factors, torch.zeros_like(logits), allow_unused=True)


def summed_over_ranks(numbers: Tensor) -> Tensor:
    """Return the sum of all ranks' int64 numbers, modulo 2^64."""
    total = numbers.cpu().clone()
    ranks.exchanged(lambda: dist.all_reduce(total))
    return total
