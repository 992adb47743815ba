"""Log-probs of given tokens."""

from __future__ import annotations

import numpy as np

from mindprint.contract import Float32, TokenBatch
from mindprint_llamacpp.model import LlamaModel


def log_probs(model: LlamaModel, batch: TokenBatch, *, adapter: bool) -> Float32:
    """Return per-token log-probs, float32 `[rows, T]`, 0 outside the mask.

    Each row is computed by itself, so that neighbours and padding change nothing.
    """
    found = np.zeros(batch.tokens.shape, np.float32)
    for row, length in enumerate(batch.lengths.tolist()):
        tokens = batch.tokens[row, :length]
        # The logits at a position predict the token after it.
        wanted = np.flatnonzero(batch.loss_mask[row, :length]) - 1
        if not len(wanted):
            continue
        # Tokens behind the last wanted position have no influence on it.
        read = tokens[: int(wanted.max()) + 1]
        with model.context(1, len(read), adapter=adapter) as context:
            for place, logits in context.decode(0, read, 0, wanted.tolist()):
                values = logits.astype(np.float64)
                top = values.max()
                total = top + np.log(np.exp(values - top).sum())
                found[row, place + 1] = values[tokens[place + 1]] - total
    return found
