"""State the memory that a run needs before anything is loaded, part by part, and settings that need less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mindprint.api.results import Result, Table
from mindprint.api.training import Configuration, Records, load_config, with_rows
from mindprint.errors import ConfigError, DataError
from mindprint.models.engine import Placements
from mindprint.training.auto import has_auto
from mindprint.training.choosing import estimated_choice
from mindprint.training.memory import GIB, Proposal, RunMemory, StageMemory, estimate_memory
from mindprint.training.prepare import prepare

PARTS = (
    ("weights", "weights"),
    ("adapter", "adapter, gradients, AdamW"),
    ("activations", "activations"),
    ("logits", "logits"),
    ("other", "framework"),
)
"""The parts of a need, and their names in the table."""


@dataclass(frozen=True, repr=False)
class PlanResult(Result):
    """The memory that a run needs, returned by `mindprint.plan`.

    Attributes:
        model: The name of the base model.
        parameters: The number of elements of its weights.
        trainable: The number of elements that would be trained.
        stages: The need of each stage on each backend, where it is greatest.
        proposals: Settings that need less. Empty if everything fits.
        ranks: The number of processes that would train together. All figures are those of one of them.
        fits: Whether every stage fits into the memory that is free.
    """

    model: str
    parameters: int
    trainable: int
    stages: tuple[StageMemory, ...]
    proposals: tuple[Proposal, ...]
    ranks: int = 1

    @property
    def fits(self) -> bool:
        """Whether every stage fits, or nothing tells how much is free."""
        return all(stage.verdict != "does not fit" for stage in self.stages)

    def blocks(self) -> Iterator[Table | str]:
        """Yield the table of parts, the verdict, and the proposals."""
        yield f"{self.model}: {self.parameters:,} parameters, of which LoRA trains {self.trainable:,} more"
        if self.ranks > 1:
            yield f"each of {self.ranks} ranks, which share the memory of this machine:"
        columns = [f"{stage.stage} on {stage.placement.backend.name}" for stage in self.stages]
        rows = [[name, *(_gib(getattr(stage.need, part)) for stage in self.stages)] for part, name in PARTS]
        rows.append(["in all", *(_gib(stage.need.total) for stage in self.stages)])
        rows.append(["free", *("?" if stage.free is None else _gib(stage.free) for stage in self.stages)])
        rows.append(["", *(stage.verdict for stage in self.stages)])
        yield Table(["GiB", *columns], rows, tuple(range(1, len(columns) + 1)))
        yield "\n".join(map(_batch_line, self.stages))
        if self.proposals:
            table = [[" ".join(each.settings), _gib(each.total), each.verdict, each.cost] for each in self.proposals]
            yield Table(["settings that need less", "GiB", "", ""], table, (1,))

    def to_dict(self) -> dict[str, Any]:
        """Return the values that `mindprint plan --json` prints. Sizes are in bytes."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "ranks": self.ranks,
            "fits": self.fits,
            "stages": [
                {
                    "stage": stage.stage,
                    "topic": stage.topic,
                    "backend": stage.placement.backend.name,
                    "device": stage.placement.device,
                    "dtype": stage.placement.dtype,
                    "parts": {part: getattr(stage.need, part) for part, _ in PARTS},
                    "total": stage.need.total,
                    "free": stage.free,
                    "verdict": stage.verdict,
                    "rows": stage.rows,
                    "longest": stage.longest,
                    "rough": stage.rough,
                    "fingerprint": stage.fingerprint,
                }
                for stage in self.stages
            ],
            "proposals": [asdict(proposal) for proposal in self.proposals],
        }

    def __repr__(self) -> str:
        return str(self)


def plan(config: Configuration, *, rows: Records | None = None, ranks: int = 1, **overrides: Any) -> PlanResult:
    """State the memory that a run needs, and whether it fits into this device, before anything is loaded.

    Args:
        config: A folder with `mindprint.yaml`, a YAML file, the values themselves, or what `load_config` returned.
        rows: Training rows from memory, as `train` takes them.
        ranks: The number of processes of this machine that would train together.
        **overrides: Sections or settings to merge in: `backend="mlx"`, `sft={"batch_size": 1}`.

    Returns:
        A `PlanResult`: the memory of each stage, part by part, and settings that need less.

    Raises:
        MindprintError: The input is wrong, a backend or device is not available, or the base's config.json does not
            state its sizes.

    Example:
        >>> mindprint.plan("my-voice").fits
        True
    """
    file = load_config(config, **overrides)
    file = file if rows is None else with_rows(file, rows)
    prepared = prepare(file)
    if not prepared.plans:
        raise DataError("there is nothing to train: no stage that is enabled has rows")
    placements = Placements()
    resolved = [placements.resolve_training(each.backend) for each in prepared.plans]
    if ranks == 1 and any(placement.shard for placement in resolved):
        raise ConfigError(
            f"{file.source}: backend.shard divides the base among several processes: name their number "
            "(`mindprint plan --ranks 2`), or set backend.shard=false"
        )
    if has_auto(file.config) and (choice := estimated_choice(file, prepared, resolved, ranks)):
        prepared = prepare(choice.applied(file))
    memory: RunMemory = estimate_memory(prepared, resolved, ranks)
    fits = all(stage.verdict == "fits" for stage in memory.stages)
    proposals = () if fits else memory.proposals()
    return PlanResult(prepared.model.name, memory.parameters, memory.trainable, memory.stages, proposals, ranks)


def _batch_line(stage: StageMemory) -> str:
    rows = "pairs" if stage.stage == "dpo" else "rows"
    where = f"{stage.placement.where}, {stage.placement.dtype}"
    rough = f"; a rough estimate, since backend {stage.placement.backend.name!r} makes none" if stage.rough else ""
    at_end = "; most at the end, when the fingerprint reads the base in float32" if stage.fingerprint else ""
    return f"{stage.stage}: {stage.rows} {rows} of at most {stage.longest:,} tokens at once, on {where}{at_end}{rough}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
