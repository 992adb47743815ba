"""What a model does with its last hidden state, as a function of its own.

Some models scale their logits (Cohere, Granite), some cap them (Gemma 2), and the next one will do something else.
Instead of knowing them all, the model's own forward runs with its body replaced by the hidden states in question, so
that whatever it does to them afterwards is done here too. That this holds is measured when the model is loaded.
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

PROBE_TOKENS = 6
STRETCH = 64.0
"""How much hidden states are stretched to see whether a head caps its logits: a cap leaves small ones as they are."""


@dataclass(frozen=True)
class Head:
    """`head(hidden)` maps hidden states `[n, hidden]` to logits `[n, vocabulary]`, both in the model's dtype.

    `body` is the part that makes hidden states, `output_type` the type of its answers. `plain` says that the logits
    are those of the output layer, untouched.
    """

    model: PreTrainedModel
    body: nn.Module
    output_type: type
    plain: bool
    vocabulary: int

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
        """The body's last hidden states, `[rows, width, hidden]`, for `tokens` `[rows, width]` padded on the right.

        `shape`: `position_ids` `[rows, width]` and an additive `attention_mask` `[rows, 1, width, width]`, where rows
        are not plain sequences.
        """
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False, **shape).last_hidden_state
        return hidden


def output_layer(model: PreTrainedModel) -> nn.Module:
    layer: nn.Module = model.get_output_embeddings()
    return layer


def embedding_layer(model: PreTrainedModel) -> nn.Embedding:
    layer: Any = model.get_input_embeddings()
    return layer  # type: ignore[no-any-return]


@torch.no_grad()
def read_head(model: PreTrainedModel) -> Head:
    """Find the model's body and head, and check on a few tokens that together they make the model.

    Raises `ModelError` if they do not, if the model lets a token see what follows it, or if its logits are not finite.
    """
    name = type(model).__name__
    tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] % embedding_layer(model).num_embeddings
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise ModelError(f"{name} computes logits that are not finite in {model.dtype}")
    head = next((head for body in _bodies(model) if (head := _head(model, body, tokens, logits))), None)
    if head is None:
        raise ModelError(f"{name} is not a body followed by an output layer; not supported")
    half = PROBE_TOKENS // 2
    if not _same(head.hidden_states(tokens[:, :half]), head.hidden_states(tokens)[:, :half]):
        raise ModelError(f"{name} lets tokens see what follows them; only causal models can be trained")
    return head


def _bodies(model: PreTrainedModel) -> list[nn.Module]:
    """What may be the body: the base model, or, where that is a wrapper (OPT), the decoder in it."""
    candidates = (model.base_model, model.get_decoder())
    return [body for body in candidates if body is not model] if output_layer(model) is not None else []


def _head(model: PreTrainedModel, body: nn.Module, tokens: Tensor, logits: Tensor) -> Head | None:
    """The model's head if `body` is what comes before it."""
    answer = body(input_ids=tokens, use_cache=False)
    hidden, kind = answer.last_hidden_state[0], type(answer)
    if not _same(_logits(model, body, kind, hidden), logits):
        return None
    stretched = STRETCH * hidden
    layer = output_layer(model)
    plain = isinstance(layer, nn.Linear) and torch.equal(
        _logits(model, body, kind, stretched), layer(stretched[None])[0]
    )
    return Head(model, body, kind, plain, vocabulary=logits.shape[-1])


def _logits(model: PreTrainedModel, body: nn.Module, output_type: type, hidden: Tensor) -> Tensor:
    """The model's logits `[n, vocabulary]` had its body answered `hidden` `[n, hidden]`."""
    placeholder = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
    with _answering(body, output_type(last_hidden_state=hidden[None])):
        logits: Tensor = model(input_ids=placeholder, use_cache=False).logits
    return logits[0]


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to how rounding differs between shapes: relative to the largest value, which dwarfs it in any dtype."""
    tolerance = 1e-3 if other.dtype == torch.float32 else 5e-2
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())


@contextmanager
def _answering(body: nn.Module, answer: Any) -> Iterator[None]:
    """Within this context, `body` returns `answer` whatever it is asked."""
    before = vars(body).get("forward")
    body.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
