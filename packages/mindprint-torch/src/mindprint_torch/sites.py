"""The places of a base that can take LoRA."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mindprint.contract import AdapterSite
from mindprint.models.layer_names import is_fused_output
from mindprint_torch.experts import stacked_sites
from mindprint_torch.head import embedding_layer
from mindprint_torch.packed_layers import PackedLinear


def list_sites(network: PreTrainedModel) -> tuple[AdapterSite, ...]:
    """Return linear layers (GPT-2's transposed ones too), the token embedding and stacks of experts, in model order."""
    return tuple(_sites(network))


def _sites(network: PreTrainedModel) -> Iterator[AdapterSite]:
    embedding = embedding_layer(network)
    # The order of modules is the order of tensors in adapter files, and so the same on every machine.
    for name, module in network.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            yield AdapterSite(name, "embedding", module.num_embeddings, module.embedding_dim)
        elif is_fused_output(network.config.model_type, name):
            continue
        # A router may be a linear layer with another forward pass (PhiMoE), which LoRA's would replace.
        elif isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, PackedLinear.forward):
            yield AdapterSite(name, "linear", module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            yield AdapterSite(name, "linear", module.nx, module.nf)
        else:
            yield from stacked_sites(network, name, module)
