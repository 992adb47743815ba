"""The last layer's products where they are asked for: which modules skip, what that saves, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindprint.asked_places import Asked, asking
from mindprint.contract import LoadedModel, PreferenceBatch, TokenBatch, Update
from mindprint.layouts import forked, preference_sequences, sequences
from mindprint.plugins.backend import Backend
from mindprint_torch import sharding
from mindprint_torch.asked import _forward, skip_unasked
from mindprint_torch.logprobs import head_log_probs, layout_log_probs
from mindprint_torch.prompts import row_shape
from mindprint_torch.recompute import recomputed

Load = Callable[..., LoadedModel]
MakeBatch = Callable[..., TokenBatch]
MakePairs = Callable[..., PreferenceBatch]
SKIPPING = {
    "llama": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "gemma2": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "cohere": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "qwen2_moe": {"mlp", "self_attn.q_proj", "self_attn.o_proj"},
    "deepseek_v3": {"mlp", "self_attn.o_proj"},
    "gpt2": {"mlp"},
    "lfm2": {"feed_forward", "self_attn.q_proj"},
    "bloom": set(),
    "mamba": set(),
}
"""The modules of the last layer that skip, by family. BLOOM's take the residual stream too, and Mamba has one mixer."""


SHARING = ("llama", "cohere", "deepseek_v3", "gpt2", "qwen2_moe")
"""Families of these that read a prompt once for both completions."""


def skipping(network: Any) -> set[str]:
    """Return the names of the modules that skip, without those of the layers that they are in."""
    forwards = {name: vars(module).get("forward") for name, module in network.named_modules()}
    found = [name for name, forward in forwards.items() if isinstance(forward, partial) and forward.func is _forward]
    layers = {name.split(".")[-2 if "_proj" not in name else -3] for name in found}
    assert layers <= {"1"}, "only in the last of two layers"
    return {name.split(".1.", 1)[1] for name in found}


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default, torch.ops.aten.mm.out):
            first = args[1] if func is torch.ops.aten.addmm_.default else args[0]
            self.operations += 2 * first.numel() * output.shape[1]
        return output


def everywhere(model: LoadedModel, layout: Any) -> Tensor:
    """Return the log-probs of a layout with nothing skipped."""
    handle = model.handle
    shape = row_shape(layout, handle.device, handle.network.dtype)
    hidden = handle.head.hidden_states(torch.from_numpy(layout.tokens).long(), **shape)
    selected = hidden.flatten(0, 1)[torch.from_numpy(layout.sources).long()]
    return head_log_probs(handle.head, selected, torch.from_numpy(layout.targets).long())


def gradients(model: LoadedModel, log_probs: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 2, len(log_probs))
    return list(torch.autograd.grad(log_probs @ weights, model.handle.adapter.parameters, allow_unused=True))


@pytest.mark.parametrize("architecture", SKIPPING)
def test_modules_that_skip(train: Load, architecture: str) -> None:
    assert skipping(train(architecture).handle.network) == SKIPPING[architecture]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("architecture", "shared"),
    [*((name, False) for name, parts in SKIPPING.items() if parts), *((name, True) for name in SHARING)],
)
def test_numbers_and_gradients_are_those_of_whole_layers(
    train: Load,
    token_batch: MakeBatch,
    preference_batch: MakePairs,
    architecture: str,
    shared: bool,
    checkpointing: bool,
) -> None:
    model = train(architecture)
    layout = forked(preference_sequences(preference_batch())) if shared else sequences(token_batch())
    expected = everywhere(model, layout)
    with recomputed(model.handle.network, enabled=checkpointing):
        values = layout_log_probs(model.handle, layout)
        by_factors = gradients(model, values)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    for gradient, wanted in zip(by_factors, gradients(model, expected), strict=True):
        if wanted is None:
            assert gradient is None
        else:
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_products_are_counted_where_they_are_asked(train: Load, token_batch: MakeBatch) -> None:
    model, layout = train("llama"), sequences(token_batch())
    with Products() as whole:
        gradients(model, everywhere(model, layout))
    with Products() as asked:
        gradients(model, layout_log_probs(model.handle, layout))
    # Three products of the block, queries and output: of the base one forward and one backward, of A and B two each.
    hidden, inner, rank = 32, 40, 4
    sites = [(hidden, inner), (hidden, inner), (inner, hidden), (hidden, hidden), (hidden, hidden)]
    per_token = sum(2 * 2 * size_in * size_out + 2 * 3 * rank * (size_in + size_out) for size_in, size_out in sites)
    skipped = layout.tokens.size - len(layout.sources)
    assert whole.operations - asked.operations == skipped * per_token


def test_dropout_draws_the_same_masks(backend: Backend, train: Load, token_batch: MakeBatch) -> None:
    """With everything asked for, nothing is skipped, and the same seed has the same masks as a batch that skips."""
    batch = token_batch()
    update = Update(0.0, batch.loss_tokens, max_grad_norm=None, seed=5)
    first, second = train("llama", dropout=0.5), train("llama", dropout=0.5)
    loss = backend.sft_step(first, [batch], update).loss
    for module in second.handle.network.model.layers[-1].modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            module.forward = forward.args[1]
    assert backend.sft_step(second, [batch], update).loss == loss


def test_a_block_that_looks_at_its_neighbours_is_left_alone(load: Load) -> None:
    """It needs all tokens, and so it needs the attention's output at all of them."""
    head = load("llama").handle.head
    block = head.model.model.layers[-1].mlp
    apart = block.forward
    block.forward = lambda x: apart(x) + 0.01 * apart(x.roll(1, dims=1))
    assert skip_unasked(head) == 0
    assert skipping(head.model) == set()


def test_queries_that_others_read_are_left_alone(load: Load) -> None:
    """Here every query has a little of all others in it. Then the block alone skips."""
    head = load("llama").handle.head
    attention = head.model.model.layers[-1].self_attn
    attention.o_proj.register_forward_hook(lambda _, __, output: output + 1e-6 * output.mean(dim=1, keepdim=True))
    assert skip_unasked(head) == 1
    assert skipping(head.model) == {"mlp"}


def test_a_lent_pass_does_not_ask_for_the_places_of_another(train: Load) -> None:
    network = train("llama").handle.network
    with asking(Asked(torch.tensor([3, 7]))):
        sharding._lend_pass(network, backward=True)


def test_nothing_is_skipped_outside_of_log_probs(train: Load) -> None:
    network = train("llama").handle.network
    tokens = torch.arange(6)[None]
    logits = network(input_ids=tokens, use_cache=False).logits
    with asking(Asked(torch.tensor([2]))):
        asked = network(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(asked[0, 2], logits[0, 2], atol=1e-5)
    assert not np.allclose(asked[0, 1].detach(), logits[0, 1].detach(), atol=1e-2)
