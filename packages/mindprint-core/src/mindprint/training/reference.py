"""Log-probs of the reference: the policy as a preference stage begins, evaluated once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindprint import atomic
from mindprint.contract import Float32, LoadedModel
from mindprint.data.collate import pair_sequences, shared_sequences
from mindprint.data.render import PreferenceExample
from mindprint.errors import GuardError
from mindprint.plugins.backend import Backend

BATCH_PAIRS = 16


@dataclass(frozen=True)
class Reference:
    """Summed completion log-probs of each pair under the reference, float32 `[pairs]`, in the order of the rows."""

    chosen: Float32
    rejected: Float32


def compute_reference(
    backend: Backend,
    model: LoadedModel,
    examples: Sequence[PreferenceExample],
    pad_id: int,
    *,
    adapter: bool = True,
    share_prompts: bool = True,
) -> Reference:
    """Evaluate every pair once, the longest together so that little is padded.

    With `share_prompts` the backend may read each prompt once for both completions; the numbers are the same.
    """
    chosen = np.zeros(len(examples), np.float32)
    rejected = np.zeros(len(examples), np.float32)
    by_length = sorted(range(len(examples)), key=lambda i: _length(examples[i]))
    for start in range(0, len(by_length), BATCH_PAIRS):
        rows = by_length[start : start + BATCH_PAIRS]
        pairs = [examples[row] for row in rows]
        batches = (shared_sequences(pairs, pad_id),) if share_prompts else pair_sequences(pairs, pad_id)
        sums = [backend.log_probs(model, batch, adapter=adapter).sum(axis=1, dtype=np.float64) for batch in batches]
        chosen[rows], rejected[rows] = np.split(np.concatenate(sums), 2)
    return Reference(chosen, rejected)


def reference_key(**parts: str) -> str:
    """What a reference belongs to: base, adapter, rows, template, dtype; not the backend, whose numbers are equal."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def rows_digest(examples: Sequence[PreferenceExample]) -> str:
    """Digest of the token ids of all pairs, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for part in (example.prompt, example.chosen, example.rejected):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def save_reference(file: Path, reference: Reference, key: str, backend: str) -> None:
    """Write a reference with its key and who computed it."""
    tensors = {"chosen": reference.chosen, "rejected": reference.rejected}
    atomic.write_bytes(file, save(tensors, metadata={"key": key, "backend": backend}))


def load_reference(file: Path, key: str) -> Reference:
    """Read a reference back. Raises `GuardError` if it is not the one that `key` names."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            found = (tensors.metadata() or {}).get("key")
            reference = Reference(tensors.get_tensor("chosen"), tensors.get_tensor("rejected"))
    except (SafetensorError, OSError) as error:
        raise GuardError(f"{file}: cannot be read: {error}; delete it and resume: it will be computed anew") from error
    if found != key:
        raise GuardError(
            f"{file}: belongs to another base, adapter, data or template than this stage's; "
            "delete it and resume: it will be computed anew"
        )
    return reference


def _length(example: PreferenceExample) -> int:
    return len(example.prompt) + max(len(example.chosen), len(example.rejected))
