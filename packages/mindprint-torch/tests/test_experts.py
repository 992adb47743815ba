"""LoRA on stacked experts: its gradients in float64, and the memory that it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from mindprint.contract import LoraConfig
from mindprint_torch.experts import StackProduct, attach
from mindprint_torch.lora import LoraLayer
from mindprint_torch.sites import list_sites

SIZES = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gradients_are_autograds_in_float64(has_bias: bool) -> None:
    """One expert of four gets no row."""
    torch.manual_seed(0)
    counts, scale = [3, 0, 1, 4], 1.7
    parts = [torch.randn(shape, dtype=torch.float64) for shape in ((8, 5), (4, 6, 5), (4, 6), (4, 2, 5), (4, 6, 2))]
    rows, weight, bias, a, b = parts
    for part in (rows, a, b):
        part.requires_grad_()
    experts = torch.arange(4).repeat_interleave(torch.tensor(counts))
    changed = weight + scale * b @ a
    expected = (changed[experts] @ rows[:, :, None])[:, :, 0] + (bias[experts] if has_bias else 0)
    outer = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * outer).sum(), (rows, a, b))
    output = StackProduct.apply(rows, counts, weight, bias if has_bias else None, a, b, scale)
    computed = torch.autograd.grad((output * outer).sum(), (rows, a, b))
    torch.testing.assert_close(output, expected)
    for ours, theirs in zip(computed, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not computed[1][1].any()


def test_a_step_keeps_no_array_of_the_size_of_a_stack() -> None:
    """PEFT's way keeps a copy of each stack with its change. Here only W, A and B themselves are as large."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, **HEADS)).eval().requires_grad_(False)
    sites = {site.name: site for site in list_sites(network) if site.kind == "experts"}
    layers = attach(network, sites, LoraConfig(2, 4.0, tuple(sites)))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    smallest = min(site.experts * site.in_features * site.out_features for site in sites.values() if site.experts)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.arange(3, 19)[None]).logits.sum().backward()
    assert kept
    assert max(kept) < smallest / 4
    assert all(isinstance(layer, LoraLayer) and layer.lora_B.grad is not None for layer in layers.values())


def test_experts_that_compute_something_else_are_not_listed() -> None:
    network = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, **HEADS))
    kind = type(network.model.layers[0].mlp.experts)
    # On the instance: a class of another version of transformers could do this.
    network.model.layers[0].mlp.experts.forward = lambda *args: (
        2 * kind.forward(network.model.layers[0].mlp.experts, *args)
    )
    names = {site.name for site in list_sites(network) if site.kind == "experts"}
    assert names == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
