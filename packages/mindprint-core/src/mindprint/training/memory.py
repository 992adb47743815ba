"""The memory that a run needs, estimated before anything is loaded, and the settings that would need less.

Core finds the largest batches of the run. The backend estimates the memory for them (`mindprint_memory`). For a backend
without that hook, core makes a rough estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np

from mindprint.config import ConfigFile, merged
from mindprint.contract import (
    BaseSizes,
    Dtype,
    MemoryNeed,
    MemoryRequest,
    ModelSpec,
    PreferenceBatch,
    QuantizeMethod,
    StageName,
    TokenBatch,
    Update,
)
from mindprint.data.collate import shared_sequences, whole_sequences
from mindprint.data.render import PreferenceExample, render_preferences
from mindprint.data.stored import Stored
from mindprint.errors import AdapterError, ConfigError, MindprintError
from mindprint.events import Notice
from mindprint.models.engine import Placement, fits_in_float32
from mindprint.models.folder import quantization
from mindprint.models.free_memory import free_bytes
from mindprint.models.likelihoods import BATCH_ROWS, batches_by_length
from mindprint.models.sizes import is_packed, language_weights, read_base_sizes, read_sites
from mindprint.plugins.launched import launched_here
from mindprint.training.objectives import OBJECTIVES
from mindprint.training.plan import StagePlan
from mindprint.training.prepare import Prepared, lora_config

GIB = 2**30

MARGIN = 1.15
"""An estimate may be this factor too low: `benchmarks/plan.py` compares it with runs, and allows 15 %."""

FOLDER = "model.name=FOLDER"

NAMED_PARTS = ("weights", "adapter", "activations", "logits")
"""The parts of a need that the line before a run names."""

PACKED_BITS: Mapping[QuantizeMethod, float] = {"nf4": 4.13, "4bit": 4.5, "8bit": 8.5}
"""Bits of a weight with its share of the scales: 16 bits each for scale and bias of a group of 64, 8 with NF4."""

MOST_STEPS = 2000
"""Steps of a stage whose batches are looked at. In a longer one, the longest rows are taken for a batch."""

ITEM_BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

Verdict = Literal["fits", "may not fit", "does not fit"]


@dataclass(frozen=True)
class StageMemory:
    """The need of a stage where it is greatest, and the memory that is free there.

    Attributes:
        stage: The stage.
        topic: The topic whose batch needs most.
        placement: Backend, device and dtype.
        need: The parts of the need, in bytes.
        free: The bytes that are free on the device, None if nothing tells.
        rows: The rows, or pairs, of the batch that needs most.
        longest: The tokens of its longest row.
        rough: Whether core estimated it, because the backend does not.
        fingerprint: Whether the run needs most at its end, when the base is loaded once more in float32.
    """

    stage: StageName
    topic: str
    placement: Placement
    need: MemoryNeed
    free: int | None
    rows: int
    longest: int
    rough: bool
    fingerprint: bool = False

    @property
    def moment(self) -> str:
        """What the run does when it needs most: its stage, or the fingerprint."""
        return "the fingerprint" if self.fingerprint else self.stage

    @property
    def verdict(self) -> Verdict:
        """Whether it fits, with the error of the estimate in mind."""
        if self.free is None or self.need.total * MARGIN <= self.free:
            return "fits"
        return "may not fit" if self.need.total <= self.free else "does not fit"


@dataclass(frozen=True)
class Proposal:
    """Settings that need less memory.

    Attributes:
        settings: Settings and their values, as the command line takes them.
        cost: The price, in words.
        total: The bytes that the run would then need.
        verdict: Whether it would then fit.
    """

    settings: tuple[str, ...]
    cost: str
    total: int
    verdict: Verdict


@dataclass(frozen=True)
class HeaviestStep:
    """The micro-batch of a stage that needs most memory: its rows, where it is computed, and the estimate for it."""

    plan: StagePlan
    placement: Placement
    rows: tuple[int, ...]
    memory: StageMemory


class RunMemory:
    """The estimates of a prepared run, stage by stage, and of the same run with other settings."""

    def __init__(self, prepared: Prepared, placements: Sequence[Placement], ranks: int | None = None) -> None:
        self._prepared = prepared
        self.ranks = ranks or max((place.backend.ranks.size for place in placements), default=1)
        self._plans = tuple(zip(prepared.plans, placements, strict=True))
        self.base = read_base_sizes(prepared.model.path)
        self.parameters = sum(math.prod(weight.shape) for weight in language_weights(prepared.model.path).values())
        sites = read_sites(prepared.model.path)
        self._linear = sum(site.in_features * site.out_features for site in sites if is_packed(site))
        if prepared.config.model.quantize is not None:
            self.base = self._packed(prepared.config.model.quantize)
        self.adapter = lora_config(prepared.config.adapter, sites)
        self.sites = tuple(site for site in sites if site.name in set(self.adapter.target_modules))
        self._read = _largest(_read_batches(prepared))
        free, here = free_bytes(), ranks or launched_here()
        # The ranks of one machine divide its memory. A GPU is of one rank alone, and the backend reads its memory.
        self._free = None if free is None else free // here
        self.stages = self.estimates(prepared.config_file)

    @property
    def greatest(self) -> StageMemory:
        """The stage that needs most, compared with the memory that is free for it."""
        return max(self.stages, key=_share_of_free)

    @property
    def trainable(self) -> int:
        """The number of elements that are trained."""
        return sum(self.adapter.rank(site.name) * (site.in_features + site.out_features) for site in self.sites)

    def proposals(self) -> tuple[Proposal, ...]:
        """Return settings under which the run would need less, each alone, and at last all together."""
        single = list(_cheaper(self._prepared.config_file, self.greatest))
        proposals = [self._proposal(settings, cost) for settings, cost in single]
        # An estimate is not good enough to praise a setting for a few percent.
        useful = [proposal for proposal in proposals if proposal.total < 0.97 * self.greatest.need.total]
        if len(useful) > 1 and not any(proposal.verdict == "fits" for proposal in useful):
            together = tuple(dict.fromkeys(chain.from_iterable(proposal.settings for proposal in useful)))
            useful.append(self._proposal(together, "all of them"))
        return (*useful, *self._packed_proposals())

    def _packed(self, method: QuantizeMethod) -> BaseSizes:
        """Return the base's sizes with its linear layers packed."""
        packed = int(self._linear * PACKED_BITS[method] / 8)
        return replace(self.base, elements=self.base.elements - self._linear, packed_bytes=packed)

    def _packed_proposals(self) -> Iterator[Proposal]:
        """Yield the need with the base in 4 bits: packed while it is loaded, or another folder where nothing can."""
        capabilities = self.greatest.placement.backend.info.capabilities
        if self.base.packed_bytes or not capabilities & {"quantize", "affine"}:
            return
        steps = self.heaviest_steps(self._prepared.config_file, self._packed("4bit"))
        greatest = max((step.memory for step in steps), key=_share_of_free)
        setting = "model.quantize=4bit" if "quantize" in capabilities else FOLDER
        yield Proposal((setting,), "a base in 4 bits: coarser numbers", greatest.need.total, greatest.verdict)

    def _proposal(self, settings: tuple[str, ...], cost: str) -> Proposal:
        changes: dict[str, Any] = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            section, _, key = name.partition(".")
            changes.setdefault(section, {})[key] = int(value) if value.isdigit() else {"true": True}.get(value, value)
        greatest = max(self.estimates(merged(self._prepared.config_file, changes)), key=_share_of_free)
        return Proposal(settings, cost, greatest.need.total, greatest.verdict)

    def estimates(self, file: ConfigFile) -> tuple[StageMemory, ...]:
        """Return the need of each stage and placement under the settings of `file`, where it is greatest."""
        return tuple(step.memory for step in self.heaviest_steps(file))

    def heaviest_steps(self, file: ConfigFile, base: BaseSizes | None = None) -> tuple[HeaviestStep, ...]:
        """Return the micro-batch of each stage and placement that needs most under the settings of `file`."""
        steps: dict[tuple[StageName, Placement], HeaviestStep] = {}
        for planned, placed in self._plans:
            settings = getattr(file.config, planned.stage)
            section = settings.backend or file.config.backend
            plan = replace(
                planned,
                settings=settings,
                backend=section,
                order=replace(
                    planned.order,
                    batch_size=settings.rows_at_once,
                    gradient_accumulation=settings.gradient_accumulation,
                ),
            )
            placement = placed if section.dtype == "auto" else replace(placed, dtype=section.dtype)
            for rows in _heaviest_rows(plan):
                estimate = self._estimate(plan, placement, rows, base or self.base)
                key = (plan.stage, placement)
                if key not in steps or estimate.need.total > steps[key].memory.need.total:
                    steps[key] = HeaviestStep(plan, placement, tuple(rows), estimate)
        return tuple(steps.values())

    def _estimate(self, plan: StagePlan, placement: Placement, rows: Sequence[int], base: BaseSizes) -> StageMemory:
        prepared, objective = self._prepared, OBJECTIVES[plan.stage]
        examples = [prepared.examples_of(plan)[row] for row in rows]
        batch = objective.batch(examples, prepared.tokenizer.pad_id, None)
        update = Update(0.0, 0, gradient_checkpointing=plan.backend.recomputes, share_prompts=False)
        path = prepared.model.path
        request = MemoryRequest(
            spec=ModelSpec(
                str(path),
                placement.device,
                placement.dtype,
                quantization(path),
                prepared.model.quantize,
                shard=placement.shard,
                devices=placement.devices,
            ),
            base=base,
            sites=self.sites,
            adapter=self.adapter,
            batch=batch,
            update=objective.complete_update(update, [batch], plan.settings),
            read=self._read,
            ranks=self.ranks,
        )
        training = placement.backend.memory(request)
        need, at_end = training or rough_need(request), False
        if placement.dtype != "float32" and not placement.shard and fits_in_float32(self.parameters):
            # The fingerprint of a base in a reduced dtype is measured in float32 as well. Nothing is trained then.
            last = self._fingerprint_request(request)
            need_at_end = placement.backend.memory(last) or rough_need(last)
            if need_at_end.total > need.total:
                need, at_end = need_at_end, True
        bounds = [self._free if need.free is None else need.free]
        if plan.backend.memory_limit is not None:
            bounds.append(int(plan.backend.memory_limit * GIB))
        free = min((bound for bound in bounds if bound is not None), default=None)
        longest = max(objective.longest_sequence(example) for example in examples)
        return StageMemory(plan.stage, plan.topic, placement, need, free, len(rows), longest, training is None, at_end)

    def _fingerprint_request(self, request: MemoryRequest) -> MemoryRequest:
        """Return the request for reading the fingerprint's probe in float32: as good as no step, and the probe."""
        probe = self._prepared.probe.rows
        return replace(
            request,
            spec=replace(request.spec, dtype="float32"),
            batch=whole_sequences([row[:2] for row in probe[:1]]),
            update=Update(0.0, 1),
            read=whole_sequences(probe),
        )


def _share_of_free(stage: StageMemory) -> float:
    return stage.need.total / max(stage.free or GIB, 1)


def rough_need(request: MemoryRequest) -> MemoryNeed:
    """Return core's estimate for a backend that makes none: a plain transformer that keeps all that it computes."""
    base, item = request.base, ITEM_BYTES[request.spec.dtype]
    batch = request.batch
    if isinstance(batch, PreferenceBatch):
        lengths = batch.prompt_lengths + batch.chosen_lengths.clip(min=batch.rejected_lengths)
        tokens, targets = 2 * batch.pairs * int(lengths.max()), 2 * int(batch.chosen_lengths.sum())
    else:
        tokens, targets = batch.tokens.size, batch.loss_tokens
    queries, keys = base.heads * base.head_size, base.key_heads * base.head_size
    per_token = item * (2 * (base.norms + 1) * base.hidden + 3 * queries + 2 * keys + 4 * base.inner)
    layers = 2 if request.update.gradient_checkpointing else base.layers
    factors = sum(request.adapter.rank(site.name) * (site.in_features + site.out_features) for site in request.sites)
    elsewhere = base.layer_elements - base.layer_elements // request.ranks if request.spec.shard else 0
    return MemoryNeed(
        weights=(base.elements - elsewhere) * item + base.packed_bytes,
        adapter=4 * 8 * factors,
        activations=tokens * (layers * per_token + base.layers * base.hidden * item),
        logits=2 * 4 * base.vocabulary * targets,
    )


def _heaviest_rows(plan: StagePlan) -> Iterator[Sequence[int]]:
    """Yield the rows of the micro-batch with most tokens, padding included, and of the one with the longest row."""
    order = plan.order
    lengths = np.asarray(order.lengths)
    if order.total_steps > MOST_STEPS:
        # Sorted batches by length may well put the longest rows together in that number of steps.
        yield np.argsort(lengths, kind="stable")[-order.batch_size :].tolist()
        return
    batches = list(chain.from_iterable(order.micro_batches(step) for step in range(order.total_steps)))
    longest = [int(lengths[list(rows)].max()) for rows in batches]
    padded = [len(rows) * length for rows, length in zip(batches, longest, strict=True)]
    for sizes in dict.fromkeys((tuple(padded), tuple(longest))):
        yield batches[max(range(len(batches)), key=sizes.__getitem__)]


def _read_batches(prepared: Prepared) -> Iterator[TokenBatch]:
    """Yield the largest batches whose log-probs the run takes without gradients."""
    config, pad_id = prepared.config, prepared.tokenizer.pad_id
    # The fingerprint's probe is read at the end of every run, all of its rows together.
    yield whole_sequences(prepared.probe.rows)
    pairs: list[PreferenceExample] = []
    if config.evaluation.happens("final"):
        held_out = prepared.split.held_out.pairs
        pairs.extend(render_preferences(held_out, prepared.tokenizer, config.data).examples)
    for plan in prepared.plans:
        if plan.stage == "dpo" and OBJECTIVES[plan.stage].needs_reference(plan.settings):
            pairs.extend(_longest(prepared.examples_of(plan)))
    lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    # Sorted by length, the last batches have the longest rows.
    for rows in list(batches_by_length(lengths))[-2:]:
        yield shared_sequences([pairs[row] for row in rows], pad_id)


def _longest(pairs: Sequence[PreferenceExample]) -> Sequence[PreferenceExample]:
    """Return the pairs that the largest batches can be made of: of pairs on disk only the longest are read."""
    if not isinstance(pairs, Stored):
        return pairs
    return [pairs[index] for index in np.argsort(pairs.sizes, kind="stable")[-2 * BATCH_ROWS :].tolist()]


def _largest(batches: Iterator[TokenBatch]) -> TokenBatch | None:
    return max(batches, key=lambda batch: batch.tokens.size, default=None)


def _cheaper(file: ConfigFile, stage: StageMemory) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield settings that need less memory for a stage, each with its price in words."""
    settings = getattr(file.config, stage.stage)
    section = f"{stage.stage}.backend" if settings.backend else "backend"
    if not (settings.backend or file.config.backend).recomputes and section == "backend":
        yield ("backend.gradient_checkpointing=true",), "a third more time, same numbers"
    if settings.rows_at_once > 1:
        rows = settings.rows_at_once * settings.gradient_accumulation
        smaller = (f"{stage.stage}.batch_size=1", f"{stage.stage}.gradient_accumulation={rows}")
        yield smaller, "some more time, same numbers"
    device = stage.placement.backend.info.device(stage.placement.device)
    if stage.placement.dtype == "float32" and device and "bfloat16" in device.dtypes and section == "backend":
        yield ("backend.dtype=bfloat16",), "coarser numbers"


def estimate_memory(prepared: Prepared, placements: Sequence[Placement], ranks: int | None = None) -> RunMemory:
    """Estimate the memory of a prepared run, or of each rank where several processes train together.

    `ranks` is their number where a launcher has not started them yet. They are then taken to share this machine.

    Raises:
        ModelError: The base's config.json does not state a size that is needed.
    """
    return RunMemory(prepared, placements, ranks)


def memory_notices(prepared: Prepared, placements: Sequence[Placement]) -> Iterator[Notice]:
    """Yield a line with the memory that a run needs, and a warning if it does not fit. An estimate never ends a run."""
    try:
        memory = estimate_memory(prepared, placements)
        stage = memory.greatest
        proposals = memory.proposals() if stage.verdict == "does not fit" else ()
    except (AdapterError, ConfigError):
        # A setting that this base cannot have: the run refuses it next, and one line is enough.
        return
    except MindprintError as error:
        yield Notice(f"the memory of this run is not estimated: {error}")
        return
    need, free = stage.need, "" if stage.free is None else f" of {readable_size(stage.free)} that are free"
    parts = ", ".join(f"{part} {readable_size(getattr(need, part))}" for part in NAMED_PARTS)
    yield Notice(f"memory: about {readable_size(need.total)}{free}, in {stage.moment} ({parts})")
    if stage.verdict == "does not fit":
        # Another base is a hint of the plan, and no setting to copy.
        settings = (proposal for proposal in proposals if FOLDER not in proposal.settings)
        best = min(settings, key=lambda proposal: proposal.total, default=None)
        hint = f": {' '.join(best.settings)} needs {readable_size(best.total)}" if best else ""
        yield Notice(
            f"the run may end without memory; mindprint plan lists settings that need less{hint}", warning=True
        )


def readable_size(size: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
