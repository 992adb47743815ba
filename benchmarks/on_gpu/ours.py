"""Mindprint as a contestant: the hooks that a run calls, on the rows of `work.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from on_gpu import work
from on_gpu.clock import held_gib, peak_gib, spread, start_peak, wait_for

# ruff: noqa: PLC0415  the process that orders the measurements imports no framework


@dataclass
class Opened:
    """A loaded base with a new adapter on all its linear layers. `base_gib` is the memory that the base takes."""

    backend: Any
    model: Any
    device: str
    adapter: Any
    base_gib: float = 0.0


def open_model(
    folder: Path, device: str, dtype: Any, *, quantize: Any = None, target_parameters: Sequence[str] = ()
) -> Opened:
    """Load the base and inject core's initial adapter, which every contestant starts from.

    `quantize` packs the base while it is loaded. `target_parameters` names stacks of experts that get LoRA as well.
    """
    from mindprint.adapter.initial import initial_adapter
    from mindprint.adapter.targets import resolve_targets
    from mindprint.contract import LoraConfig, ModelSpec
    from mindprint.models.folder import quantization as base_quantization
    from mindprint.plugins.backend import load_backend

    backend = load_backend("torch")
    before = held_gib(device)
    model = backend.load_model(ModelSpec(str(folder), device, dtype, base_quantization(folder), quantize))
    base_gib = held_gib(device) - before
    sites = backend.adapter_sites(model)
    config = LoraConfig(work.RANK, work.ALPHA, resolve_targets(sites, "all-linear", target_parameters))
    adapter = initial_adapter(sites, config, seed=0)
    backend.inject_adapter(model, adapter)
    return Opened(backend, model, device, adapter, base_gib)


def close(opened: Opened) -> None:
    """Give the model's memory back."""
    opened.backend.release(opened.model)


def start_again(opened: Opened) -> None:
    """Put the initial adapter back, with a new optimizer."""
    from mindprint.contract import TrainingState

    opened.backend.restore(opened.model, TrainingState(opened.adapter))


def take_steps(
    opened: Opened,
    stage: str,
    batches: Sequence[Sequence[work.Row]],
    learning_rate: float,
    *,
    checkpointing: bool = False,
    share_prompts: bool = True,
) -> dict[str, Any]:
    """Take one step a batch. Return losses, the seconds of each step with its collation, and those of the reference.

    The reference of pairs is computed before the steps, as a run does.
    """
    from mindprint.contract import Update
    from mindprint.data.collate import preference_batch, sft_batch
    from mindprint.losses import PreferenceLoss

    update = Update(learning_rate, tokens=1, gradient_checkpointing=checkpointing, share_prompts=share_prompts)
    references, reference_seconds = _references(opened, batches, share_prompts) if stage == "dpo" else ([], [])
    losses, seconds, norms = [], [], []
    wait_for(opened.device)
    for index, rows in enumerate(batches):
        started = perf_counter()
        if stage == "sft":
            tokens = sft_batch([_single(row) for row in rows], work.PAD)
            metrics = opened.backend.sft_step(opened.model, [tokens], replace(update, tokens=tokens.loss_tokens))
        else:
            pairs = preference_batch([_pair(row) for row in rows], work.PAD, references[index])
            loss_tokens = int(pairs.chosen_lengths.sum())
            metrics = opened.backend.dpo_step(
                opened.model,
                [pairs],
                PreferenceLoss(beta=work.BETA),
                replace(update, tokens=loss_tokens, pairs=pairs.pairs),
            )
        wait_for(opened.device)
        seconds.append(perf_counter() - started)
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    return {"losses": losses, "norms": norms, "step_seconds": seconds, "reference_seconds": reference_seconds}


def measure_cell(opened: Opened, cell: dict[str, Any]) -> dict[str, Any]:
    """Measure steps on rows of one length (`on_gpu.calls.cell_batches`)."""
    from on_gpu.calls import cell_batches

    start_peak(opened.device)
    taken = take_steps(
        opened,
        cell["stage"],
        cell_batches(cell),
        1e-4,
        checkpointing=cell["checkpointing"],
        share_prompts=cell.get("share_prompts", True),
    )
    warm_up = cell["warm_up"]
    result = {**spread(taken["step_seconds"][warm_up:]), "gib": peak_gib(opened.device), "loss": taken["losses"][0]}
    if taken["reference_seconds"]:
        result["reference_seconds"] = spread(taken["reference_seconds"][warm_up:])["seconds"]
    return result


def stated_memory(opened: Opened, folder: Path, dtype: Any, cell: dict[str, Any]) -> dict[str, int]:
    """Return the memory that the backend states for steps of a cell, as for `mindprint plan`: its parts, in bytes."""
    from dataclasses import asdict

    from mindprint.contract import MemoryRequest, ModelSpec, Update
    from mindprint.data.collate import preference_batch, sft_batch
    from mindprint.models.sizes import read_base_sizes
    from on_gpu.calls import cell_batches

    rows = cell_batches({**cell, "steps": 1, "warm_up": 0})[0]
    if cell["stage"] == "sft":
        batch: Any = sft_batch([_single(row) for row in rows], work.PAD)
    else:
        batch = preference_batch([_pair(row) for row in rows], work.PAD, None)
    targets = set(opened.adapter.config.target_modules)
    request = MemoryRequest(
        spec=ModelSpec(str(folder), opened.device, dtype),
        base=read_base_sizes(folder),
        sites=[site for site in opened.backend.adapter_sites(opened.model) if site.name in targets],
        adapter=opened.adapter.config,
        batch=batch,
        update=Update(0.0, 0, gradient_checkpointing=cell["checkpointing"]),
    )
    need = asdict(opened.backend.memory(request))
    return {part: size for part, size in need.items() if part != "free"}


def _references(opened: Opened, batches: Sequence[Sequence[work.Row]], share: bool) -> tuple[list[Any], list[float]]:
    from mindprint.models.likelihoods import sum_pairs

    references, seconds = [], []
    for rows in batches:
        started = perf_counter()
        pairs = [_pair(row) for row in rows]
        sums = sum_pairs(opened.backend, opened.model, pairs, work.PAD, share_prompts=share)
        wait_for(opened.device)
        seconds.append(perf_counter() - started)
        references.append((sums.chosen, sums.rejected))
    return references, seconds


def _single(row: work.Row) -> Any:
    from mindprint.data.render import SftExample
    from mindprint.data.rows import Origin

    mask = np.arange(len(row.prompt) + len(row.chosen)) >= len(row.prompt)
    return SftExample("t", _ids([*row.prompt, *row.chosen]), mask, Origin("rows", 1))


def _pair(row: work.Row) -> Any:
    from mindprint.data.render import PreferenceExample
    from mindprint.data.rows import Origin

    return PreferenceExample("t", _ids(row.prompt), _ids(row.chosen), _ids(row.rejected), Origin("rows", 1))


def _ids(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)
