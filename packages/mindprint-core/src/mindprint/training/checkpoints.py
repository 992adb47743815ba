"""Checkpoints: everything a run continues from, in files that any backend can take over.

A checkpoint is a folder named by the number of optimizer steps before it. It holds the adapter as PEFT writes it,
AdamW's moments under the same tensor names, and `cursor.json`: the position of the run, its identity,
a digest of each other file and one of itself. Folders appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from mindprint import atomic
from mindprint.adapter.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    from_tensors,
    read_adapter,
    to_tensors,
    write_adapter,
)
from mindprint.contract import AdapterState, LoraConfig, LoraFactors, TrainingState
from mindprint.errors import AdapterError, CheckpointError, DamagedCheckpointError
from mindprint.input_files import MALFORMED, read_json, typed
from mindprint.plugins.ranks import Ranks

CURSOR_FILE = "cursor.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FORMAT = 2
"""Format 1 had no digest of cursor.json itself. It is still read."""

# torch.optim.AdamW calls its moments so.
_FIRST, _SECOND = "exp_avg.", "exp_avg_sq."


@dataclass(frozen=True)
class Cursor:
    """The position of a run: `step` optimizer steps in all, `stage_step` of them in stage `stage_index` of the plan.

    `stage_index` one past the last stage means that training is complete. `backend` wrote the checkpoint, in
    `environment`: the versions and thread counts on which bit-for-bit resume depends. `attempt` is the topic's, from 1,
    and `topic_step` the optimizer steps before its first attempt.
    """

    step: int
    stage_index: int
    stage_step: int
    backend: str
    environment: Mapping[str, str]
    attempt: int = 1
    topic_step: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back."""

    folder: Path
    cursor: Cursor
    state: TrainingState


class OtherRunError(CheckpointError):
    """A checkpoint of another base, dataset or configuration. `part` is the part of its identity that differs."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(
            f"{folder}: was made with another {part} than this configuration has; "
            "resume with the configuration of that run (its config.yaml), or start a new run"
        )
        self.part = part


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, identity: Mapping[str, str], base_model: str, keep: int) -> None:
        self._folder = folder
        self._identity = identity
        self._base_model = base_model
        self._keep = keep

    def save(self, state: TrainingState, cursor: Cursor) -> Path:
        """Write a checkpoint, then delete those that are no longer needed."""
        self._folder.mkdir(exist_ok=True)
        path = write_checkpoint(self._folder, state, cursor, self._identity, self._base_model)
        prune_checkpoints(self._folder, self._keep)
        return path

    def read(self, step: int) -> Checkpoint:
        """Read the checkpoint after `step` optimizer steps. Raises as `read_checkpoint` does."""
        return read_checkpoint(self._folder / checkpoint_name(step), self._identity)

    def read_shared(self, step: int, ranks: Ranks) -> Checkpoint:
        """Read a checkpoint on the first rank, and return it on all of them."""
        checkpoint = ranks.from_first(lambda: self.read(step), checkpoint_to_bytes, checkpoint_from_bytes)
        assert checkpoint is not None, "`read` raises for a checkpoint that is missing"
        return checkpoint

    def find_newest(self, *, sound: bool) -> tuple[Checkpoint | None, list[str]]:
        """Return the checkpoint to resume from and the reasons for which others were passed over.

        None for a run that was ended before its first checkpoint. Raises as `newest_checkpoint` does.
        """
        if not list_checkpoints(self._folder):
            return None, []
        return newest_checkpoint(self._folder, self._identity, sound=sound)

    def newest_step(self) -> int | None:
        """Return the optimizer steps before the newest checkpoint, or None without a checkpoint."""
        folders = list_checkpoints(self._folder)
        return int(folders[-1].name) if folders else None

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of steps that a resumed run will take again."""
        for folder in list_checkpoints(self._folder):
            if int(folder.name) > step:
                shutil.rmtree(folder, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    return f"{step:06d}"


def write_checkpoint(
    parent: Path, state: TrainingState, cursor: Cursor, identity: Mapping[str, str], base_model: str
) -> Path:
    """Write a checkpoint under `parent`. `identity` holds digests of everything that it depends on."""
    folder = parent / checkpoint_name(cursor.step)
    with atomic.new_folder(folder) as aside:
        write_adapter(aside, state.adapter, base_model)
        _write_optimizer(aside / OPTIMIZER_FILE, state)
        # Taken of the files and not of the values: a disk that loses bytes is found as well.
        files = {name: _file_digest(aside / name) for name in (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE)}
        content = {"format": FORMAT, "cursor": asdict(cursor), "identity": dict(identity), "files": files}
        text = json.dumps({**content, "digest": _content_digest(content)}, indent=2) + "\n"
        (aside / CURSOR_FILE).write_text(text, encoding="utf-8")
    return folder


def read_checkpoint(folder: Path, identity: Mapping[str, str]) -> Checkpoint:
    """Read a checkpoint and check it part by part.

    Raises `DamagedCheckpointError` naming the part that is truncated, edited or missing, and `CheckpointError` naming
    the part of its identity that differs from `identity`.
    """
    content = _read_cursor(folder / CURSOR_FILE)
    for name, digest in content["files"].items():
        _check_file(folder / name, digest)
    # Damage is looked for first, because a damaged file can look like another base or configuration.
    for part, digest in identity.items():
        if content["identity"].get(part) != digest:
            raise OtherRunError(folder, part)
    try:
        adapter, _ = read_adapter(folder)
        state = _read_optimizer(folder / OPTIMIZER_FILE, TrainingState(adapter))
    except (AdapterError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder}: {error}") from error
    return Checkpoint(folder, typed(Cursor, content["cursor"]), state)


def list_checkpoints(parent: Path) -> list[Path]:
    """Return the checkpoint folders under `parent`, oldest first. Half-written ones do not count."""
    if not parent.is_dir():
        return []
    # Temporary names begin with a dot, so that a folder which was killed half-way is never listed.
    return sorted(path for path in parent.iterdir() if path.is_dir() and path.name.isdigit())


def newest_checkpoint(parent: Path, identity: Mapping[str, str], *, sound: bool) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint to resume from, and why newer ones were passed over.

    With `sound` False the newest, which must be sound. With `sound` True the newest that is sound. Either way one that
    is of another base, dataset or configuration is refused.
    """
    folders = list_checkpoints(parent)
    passed_over: list[str] = []
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder, identity), passed_over
        except DamagedCheckpointError as error:
            # Falling back repeats work, and the damage may have a reason: the user decides.
            if not sound:
                raise CheckpointError(f"{error} (`--resume latest` takes the newest sound checkpoint)") from error
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(f"{parent}: no checkpoint is sound; {passed_over[0]}")
    raise CheckpointError(f"{parent}: holds no checkpoint to resume from; start a new run")


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and those that a run which continues from one of them can need.

    From a checkpoint, a roll-back or a lost reference needs the start of the stage that it is in, and a retry the start
    of the topic's first attempt.
    """
    newest = list_checkpoints(parent)[-keep:]
    needed = {int(folder.name) for folder in newest}
    for folder in newest:
        try:
            cursor = typed(Cursor, _read_cursor(folder / CURSOR_FILE)["cursor"])
        except CheckpointError:
            continue  # nothing can continue from it
        needed |= {cursor.step - cursor.stage_step, cursor.topic_step}
    # Only now, with every reason to keep one collected: a start can be older than all that are listed as newest.
    for folder in list_checkpoints(parent):
        if int(folder.name) not in needed:
            shutil.rmtree(folder, ignore_errors=True)


def checkpoint_to_bytes(checkpoint: Checkpoint | None) -> bytes:
    """Encode a checkpoint for the ranks that do not read it from the disk. None is encoded too."""
    if checkpoint is None:
        return b""
    facts: dict[str, Any] = {"folder": str(checkpoint.folder), "cursor": asdict(checkpoint.cursor)}
    state = checkpoint.state
    facts |= {"config": asdict(state.adapter.config), "steps": state.optimizer_steps, "loss_scale": state.loss_scale}
    tensors = {
        f"{part} {letter} {site}": np.ascontiguousarray(values)
        for part, factors in enumerate((state.adapter.tensors, state.first_moments, state.second_moments))
        for site, pair in factors.items()
        for letter, values in zip("ab", pair, strict=True)
    }
    return json.dumps(facts).encode() + b"\n" + save(tensors)


def checkpoint_from_bytes(content: bytes) -> Checkpoint | None:
    """Decode what `checkpoint_to_bytes` encoded."""
    if not content:
        return None
    line, _, rest = content.partition(b"\n")
    facts, tensors = json.loads(line), load(rest)
    config = typed(LoraConfig, facts["config"])
    parts = [
        {
            site: LoraFactors(tensors[f"{part} a {site}"], tensors[f"{part} b {site}"])
            for site in config.target_modules
            if f"{part} a {site}" in tensors
        }
        for part in range(3)
    ]
    state = TrainingState(AdapterState(config, parts[0]), parts[1], parts[2], facts["steps"], facts["loss_scale"])
    return Checkpoint(Path(facts["folder"]), typed(Cursor, facts["cursor"]), state)


def _write_optimizer(file: Path, state: TrainingState) -> None:
    tensors = to_tensors(state.first_moments, _FIRST) | to_tensors(state.second_moments, _SECOND)
    metadata = {"optimizer_steps": str(state.optimizer_steps)}
    if state.loss_scale is not None:
        # Metadata are text, and `repr` of a float is exact.
        metadata["loss_scale"] = repr(state.loss_scale)
    file.write_bytes(save(tensors, metadata=metadata))


def _read_optimizer(file: Path, start: TrainingState) -> TrainingState:
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    config = start.adapter.config
    ranks = {site: config.rank(site) for site in config.target_modules}
    moments: tuple[Mapping[str, LoraFactors], ...] = ({}, {})
    # A stage's start has no moments yet.
    if tensors:
        moments = tuple(from_tensors(tensors, ranks, prefix) for prefix in (_FIRST, _SECOND))
    scale = metadata.get("loss_scale")
    steps = int(metadata["optimizer_steps"])
    return TrainingState(start.adapter, moments[0], moments[1], steps, None if scale is None else float(scale))


def _read_cursor(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
        written = content["format"]
        if written > FORMAT:
            raise CheckpointError(
                f"{file}: is in checkpoint format {written}, which a newer Mindprint wrote; this one reads formats up "
                f"to {FORMAT}: pip install --upgrade mindprint-core"
            )
        if written > 1 and content.pop("digest") != _content_digest(content):
            raise DamagedCheckpointError(f"{file}: is truncated or edited: its content is not that of its digest")
        typed(Cursor, content["cursor"])
        content["identity"].items()
        content["files"].items()
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{file}: is missing") from None
    except (OSError, *MALFORMED) as error:
        raise DamagedCheckpointError(f"{file}: is truncated or edited ({error})") from error
    return dict(content)


def _check_file(file: Path, digest: str) -> None:
    try:
        found = _file_digest(file)
    except OSError as error:
        raise DamagedCheckpointError(f"{file}: is missing or unreadable ({error.strerror})") from error
    if found != digest:
        raise DamagedCheckpointError(f"{file}: is truncated or edited: its digest is not the one in {CURSOR_FILE}")


def _content_digest(content: Mapping[str, Any]) -> str:
    """Digest the content of cursor.json. It steers a run: edited, it could skip a stage."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
