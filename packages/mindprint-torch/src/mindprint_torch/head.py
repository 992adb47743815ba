"""The computation that a model does after its last hidden state, as a separate function.

Some models scale their logits (Cohere, Granite), some cap them (Gemma 2), and the next one will do something else.
Instead of knowing them all, the model's own forward pass runs with its body replaced by the given hidden states, so
that whatever it does to them afterwards is done here too. Loading a model measures that this holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mindprint.errors import ModelError
from mindprint.layouts import RotaryLimit
from mindprint_torch.rope import forget_lengths

PROBE_TOKENS = 6
STRETCH = 64.0
"""The factor of hidden states that shows whether a head caps its logits: a cap leaves small ones as they are."""


@dataclass(frozen=True)
class Head:
    """A model split in two: `head(hidden)` maps hidden states `[n, hidden]` to logits `[n, vocabulary]`, in its dtype.

    `body` is the part that makes hidden states, `output_type` the type of its outputs. `plain` says that the logits
    are those of the output layer, untouched. `rotary_limit` is set where the body depends on the length of its input.
    """

    model: PreTrainedModel
    body: nn.Module
    output_type: type
    plain: bool
    vocabulary: int
    rotary_limit: RotaryLimit | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        return _logits(self.model, self.body, self.output_type, hidden)

    @property
    def layer(self) -> nn.Module:
        """The output layer as it is now: with an adapter around it, if it has one."""
        return output_layer(self.model)

    @property
    def trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.layer.parameters())

    def hidden_states(self, tokens: Tensor, **shape: Tensor) -> Tensor:
        """Return the body's last hidden states, `[rows, width, hidden]`, for `tokens` `[rows, width]`.

        Tokens are padded on the right. `shape` holds `position_ids` `[rows, width]` and an additive `attention_mask`
        `[rows, 1, width, width]` where rows are not plain sequences.
        """
        if self.rotary_limit is not None:
            forget_lengths(self.model)
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False, **shape).last_hidden_state
        return hidden


def output_layer(model: PreTrainedModel) -> nn.Module:
    """Return the layer that makes logits."""
    layer: nn.Module = model.get_output_embeddings()
    return layer


def embedding_layer(model: PreTrainedModel) -> nn.Embedding:
    """Return the token embedding."""
    layer: Any = model.get_input_embeddings()
    return layer  # type: ignore[no-any-return]


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of the token embedding, which may have no parameter, and which is not that of each layer."""
    return embedding_layer(model).weight.device


@torch.no_grad()
def read_head(model: PreTrainedModel, rotary_limit: RotaryLimit | None = None) -> Head:
    """Find the model's body and head, and check on a few tokens that together they make the model.

    Raises:
        ModelError: If they do not, if the model lets a token see those after it, or if its logits are not finite.
    """
    name = type(model).__name__
    tokens = torch.arange(PROBE_TOKENS, device=input_device(model))[None] % embedding_layer(model).num_embeddings
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise ModelError(f"{name} computes logits that are not finite in {model.dtype}")
    half = PROBE_TOKENS // 2
    # Read by itself, the first half has the same logits only if no token sees those behind it. Else padding on the
    # right would do harm.
    head = _find_head(model, tokens[:, :half], logits[:half], rotary_limit)
    if head is None:
        if _find_head(model, tokens, logits, rotary_limit) is None:
            raise ModelError(f"{name} is not a body followed by an output layer; not supported")
        raise ModelError(f"{name} lets tokens see what follows them; only causal models can be trained")
    return head


def _find_head(model: PreTrainedModel, tokens: Tensor, logits: Tensor, rotary_limit: RotaryLimit | None) -> Head | None:
    """Return the model's head behind the first body with which these tokens `[1, n]` get these logits."""
    heads = (_split(model, body, tokens, logits, rotary_limit) for body in _possible_bodies(model))
    return next(filter(None, heads), None)


def _possible_bodies(model: PreTrainedModel) -> list[nn.Module]:
    """Return the base model, and, where that is a wrapper (OPT), the decoder in it."""
    candidates = (model.base_model, model.get_decoder())
    return [body for body in candidates if body is not model] if output_layer(model) is not None else []


def _split(
    model: PreTrainedModel, body: nn.Module, tokens: Tensor, logits: Tensor, rotary_limit: RotaryLimit | None
) -> Head | None:
    """Return the model's head if `body` is the part before it."""
    output = body(input_ids=tokens, use_cache=False)
    hidden, kind = output.last_hidden_state[0], type(output)
    if not _same(_logits(model, body, kind, hidden), logits):
        return None
    stretched = STRETCH * hidden
    layer = output_layer(model)
    plain = isinstance(layer, nn.Linear) and torch.equal(
        _logits(model, body, kind, stretched), layer(stretched[None])[0]
    )
    return Head(model, body, kind, plain, logits.shape[-1], rotary_limit)


def _logits(model: PreTrainedModel, body: nn.Module, output_type: type, hidden: Tensor) -> Tensor:
    """Return the logits `[n, vocabulary]` that the model would make of hidden states `[n, hidden]` from its body."""
    placeholder = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
    with _returning(body, output_type(last_hidden_state=hidden[None])):
        logits: Tensor = model(input_ids=placeholder, use_cache=False).logits
    return logits[0]


def _same(values: Tensor, expected: Tensor) -> bool:
    # Rounding differs between shapes. It is small compared with the largest value in any dtype; an error is not.
    tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
    return values.shape == expected.shape and bool((values - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def _returning(body: nn.Module, output: Any) -> Iterator[None]:
    """Make `body` return `output` within this context, whatever it is given."""
    before = vars(body).get("forward")
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
