"""The last layer's products, only at the positions whose hidden states are asked for.

After a layer's attention each token is treated alone, and the head reads only hidden states that predict a counted
token. So in the last layer the feed-forward block, the attention's output and its queries are needed at those places
alone. Keys and values are needed at all of them. At other places these modules return zeros, on which nothing that is
asked for depends. Injecting an adapter measures it: not even NaN at the other places reaches those that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mindprint.asked_places import Asked, asked_now, asking
from mindprint.contract import Int32
from mindprint_mlx.experts import StackLora
from mindprint_mlx.head import Head

IN_ATTENTION = ("q_proj", "o_proj")
"""The classes' names for the layers of attention whose results no other position reads."""

PROBE = ((0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11))
PROBE_PLACES = (1, 3, 4, 8, 11)
"""Places in the probe's rows, with other tokens before, between and behind them."""

WORTH = 0.9
"""Of more than this share of the places, all are computed: to choose rows costs more than it saves."""

AGREEMENT = {mx.float32: 1e-4}
COARSE_AGREEMENT = 5e-2
"""Greatest difference of hidden states, relative to the largest of them: rounding alone, by dtype."""


def worth_asking(places: Int32, tokens: int) -> Asked[Int32] | None:
    """Return these places, of which some may be named again, or None if they are nearly all of the `tokens`."""
    unique = np.unique(places).astype(np.int32)
    return Asked(unique) if 0 < len(unique) <= WORTH * tokens else None


def skip_unasked(module: nn.Module, head: Head) -> int:
    """Let parts of the last layer skip unasked places, where that is measured to hold; return their number."""
    if head.body is None:
        return 0
    tokens = mx.array(PROBE) % head.vocabulary

    def asked_states() -> mx.array:
        return head.states(tokens)[mx.array(PROBE_PLACES)]

    candidates = list(_candidates(module))
    if not candidates:
        return 0
    expected = asked_states()
    # Layers of attention are left out together, rather than tried one by one: most models allow all of them.
    for tried in ([part for _, part in candidates], [part for name, part in candidates if name not in IN_ATTENTION]):
        kinds = [type(part) for part in tried]
        for part, kind in zip(tried, kinds, strict=True):
            part.__class__ = _skipping(kind)
        with asking(Asked(np.array(PROBE_PLACES, np.int32), float("nan"))):
            if _is_same(asked_states, expected):
                return len(tried)
        for part, kind in zip(tried, kinds, strict=True):
            part.__class__ = kind
    return 0


def _candidates(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the parts of the last layer, and the layers in them that attention may not need everywhere."""
    layers: Sequence[Any] = getattr(module, "layers", ())
    for name, part in layers[-1].children().items() if layers else ():
        # Norms cost too little to select rows for. Stacks of experts select rows themselves.
        if not isinstance(part, nn.Module) or not part.children():
            continue
        if any(isinstance(inner, StackLora) or "switch" in path for path, inner in part.named_modules()):
            continue
        yield name, part
        yield from ((inner, layer) for inner, layer in part.children().items() if inner in IN_ATTENTION)


def _skipping(kind: Any) -> Any:
    """Return a module's class that computes where it is asked, `[rows, width, in]` to `[rows, width, out]`."""

    def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
        asked = asked_now()
        # Masks of dropout are drawn for all positions, so that a seed's numbers do not depend on the places.
        if asked is None or others or named or any(getattr(part, "draws", False) for part in self.modules()):
            return kind.__call__(self, x, *others, **named)
        places = mx.array(asked.places)
        rows = kind.__call__(self, x.reshape(-1, x.shape[-1])[places][None])[0]
        result = mx.full((x.shape[0] * x.shape[1], rows.shape[-1]), asked.elsewhere, rows.dtype)
        result[places] = rows
        return result.reshape(*x.shape[:-1], -1)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _is_same(compute: Callable[[], mx.array], expected: mx.array) -> bool:
    try:
        difference = mx.abs(compute() - expected).max() / mx.abs(expected).max()
        # With NaN in it, the comparison is false.
        return bool((difference <= AGREEMENT.get(expected.dtype, COARSE_AGREEMENT)).item())
    except Exception:  # noqa: BLE001  a class that needs all rows may fail in any way
        return False
