"""The reference of a preference stage on disk: the log-probs of the policy as the stage begins, kept under a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindprint import atomic
from mindprint.data.render import PreferenceExample
from mindprint.errors import GuardError
from mindprint.models.likelihoods import CompletionSums


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


def save_reference(file: Path, reference: CompletionSums, key: str, backend: str) -> None:
    """Write a reference, in float32, with its key and the name of the backend that computed it."""
    tensors = {"chosen": reference.chosen.astype(np.float32), "rejected": reference.rejected.astype(np.float32)}
    atomic.write_bytes(file, save(tensors, metadata={"key": key, "backend": backend}))


def load_reference(file: Path, key: str) -> CompletionSums:
    """Read a reference back. Raises `GuardError` if it is not the one that `key` names."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            found = (tensors.metadata() or {}).get("key")
            reference = CompletionSums(
                tensors.get_tensor("chosen").astype(np.float64), tensors.get_tensor("rejected").astype(np.float64)
            )
    except (SafetensorError, OSError) as error:
        raise GuardError(f"{file}: cannot be read: {error}; delete it and resume: it will be computed anew") from error
    if found != key:
        raise GuardError(
            f"{file}: belongs to another base, adapter, data or template than this stage's; "
            "delete it and resume: it will be computed anew"
        )
    return reference
