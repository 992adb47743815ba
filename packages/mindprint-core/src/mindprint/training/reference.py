"""The reference of a preference stage on disk: the log-probs of the policy as the stage begins, kept under a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindprint import atomic
from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import TrainingState
from mindprint.data.render import PreferenceExample
from mindprint.errors import GuardError
from mindprint.models.engine import Engine, Placement
from mindprint.models.likelihoods import CompletionSums, sum_pairs
from mindprint.runs.folder import check_format
from mindprint.training.objectives import pairs_digest
from mindprint.training.plan import StagePlan

FORMAT = 1


def reference_key(**parts: str) -> str:
    """Digest everything that a reference depends on: not the backend, because all backends compute the same numbers."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class ReferenceCache:
    """The references of a run: one file a stage and attempt, so that a resumed run does not evaluate them again."""

    def __init__(self, folder: Path, identity: Mapping[str, str], engine: Engine, pad_id: int) -> None:
        self._folder = folder
        self._identity = identity
        self._engine = engine
        self._pad_id = pad_id

    def reference_of(
        self, plan: StagePlan, placement: Placement, start: TrainingState, examples: Sequence[PreferenceExample]
    ) -> CompletionSums:
        """Return a stage's reference, from its file or computed with `start`, the state that the stage starts from.

        Raises `GuardError` if the file belongs to something else.
        """
        # The backend is left out on purpose: a run may move to another one in the middle of a topic.
        key = reference_key(
            base=self._identity["base model"],
            adapter=adapter_digest(start.adapter),
            rows=pairs_digest(examples),
            template=self._identity["chat template"],
            dtype=placement.dtype,
        )
        # Each attempt starts from another adapter, so it has another reference.
        attempt = f"-{plan.attempt}" if plan.attempt > 1 else ""
        file = self._folder / f"{plan.index:04d}{attempt}.safetensors"
        ranks = placement.backend.ranks
        # Only the first rank has the files of the run. The sums of the others come from it.
        stored = ranks.from_first(lambda: load_reference(file, key) if file.exists() else None, _to_bytes, _from_bytes)
        if stored is not None:
            return stored
        self._engine.start_stage(placement, start)
        reference = sum_pairs(
            self._engine.backend,
            self._engine.model,
            examples,
            self._pad_id,
            share_prompts=getattr(plan.settings, "share_prompts", True),
            ranks=ranks,
        )
        if ranks.first:
            self._folder.mkdir(exist_ok=True)
            save_reference(file, reference, key, placement.backend.name)
        return reference


def _to_bytes(reference: CompletionSums | None) -> bytes:
    return b"" if reference is None else np.stack([reference.chosen, reference.rejected]).tobytes()


def _from_bytes(content: bytes) -> CompletionSums | None:
    return CompletionSums(*np.split(np.frombuffer(content, np.float64), 2)) if content else None


def save_reference(file: Path, reference: CompletionSums, key: str, backend: str) -> None:
    """Write a reference, in float32, with its key and the name of the backend that computed it."""
    tensors = {"chosen": reference.chosen.astype(np.float32), "rejected": reference.rejected.astype(np.float32)}
    atomic.write_bytes(file, save(tensors, metadata={"format": str(FORMAT), "key": key, "backend": backend}))


def load_reference(file: Path, key: str) -> CompletionSums:
    """Read a reference back. Raises `GuardError` if it is not the one that `key` names."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            check_format(file, int(metadata.get("format", "1")), FORMAT)
            reference = CompletionSums(
                tensors.get_tensor("chosen").astype(np.float64), tensors.get_tensor("rejected").astype(np.float64)
            )
    except (SafetensorError, OSError, ValueError) as error:
        raise GuardError(f"{file}: cannot be read: {error}; delete it and resume: it will be computed again") from error
    if metadata.get("key") != key:
        raise GuardError(
            f"{file}: belongs to another base, adapter, data or template than this stage's; "
            "delete it and resume: it will be computed again"
        )
    return reference
