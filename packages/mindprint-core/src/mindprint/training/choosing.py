"""The choice of settings that are `auto`, by the estimate of the memory and by one real step on the heaviest rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindprint.config import ConfigFile
from mindprint.contract import StageName, Update
from mindprint.errors import ConfigError, MindprintError
from mindprint.models.engine import Engine, Placement
from mindprint.models.free_memory import peak_bytes, reset_peak
from mindprint.models.likelihoods import CompletionSums
from mindprint.plugins.ranks import Ranks
from mindprint.training.auto import Choice, batch_sizes, largest_choice, recompute_is_auto, stages_with_auto
from mindprint.training.memory import HeaviestStep, RunMemory, estimate_memory, readable_size
from mindprint.training.objectives import OBJECTIVES
from mindprint.training.prepare import Prepared, initial_state

MEMORY_ERRORS = ("out of memory", "allocate memory", "unable to allocate", "not enough memory", "bad_alloc", "malloc")
"""Words by which the frameworks say that memory is exhausted. PyTorch says "can't allocate memory" on a CPU."""


@dataclass(frozen=True)
class Trial:
    """One real step on the heaviest rows.

    Attributes:
        step: The rows, and the estimate for them.
        needed: The memory that was resident at most, less the memory before. None where nothing measures it, and for a
            step that ran out of memory.
        fits: Whether it was computed within the memory that is free.
    """

    step: HeaviestStep
    needed: int | None
    fits: bool


def choose_settings(
    file: ConfigFile, prepared: Prepared, placements: Sequence[Placement], ranks: Ranks
) -> tuple[Choice, str]:
    """Decide the settings that are `auto`, and say in a line what was chosen and why.

    The largest batches without gradient checkpointing come first, then smaller ones, then those with it. Several ranks
    choose by the estimate alone and take the smallest of their choices: a rank that ran out of memory in a step
    would leave the others waiting.

    Args:
        file: The configuration, with `auto` in it.
        prepared: The run with the largest need (`prepare` makes it).
        placements: The placement of each planned stage.
        ranks: The processes that train together.

    Raises:
        ConfigError: No choice fits.
        ModelError: The base's config.json does not state a size that the estimate needs.
    """
    if ranks.alone:
        return _tried_choice(file, prepared, placements)
    own = ranks.together(lambda: _fitting(file, estimate_memory(prepared, placements)))
    every = ranks.gather({"sizes": dict(own.batch_sizes), "recompute": own.recompute})
    sizes = {stage: min(other["sizes"][stage] for other in every) for stage in own.batch_sizes}
    choice = Choice(sizes, None if own.recompute is None else any(other["recompute"] for other in every))
    return choice, f"auto: {' '.join(choice.settings(file))}, by the estimate, the smallest of {ranks.size} ranks"


def estimated_choice(
    file: ConfigFile, prepared: Prepared, placements: Sequence[Placement], ranks: int = 1
) -> Choice | None:
    """Return the choice that fits by the estimate alone, for each of `ranks` processes, None if there is none."""
    try:
        return _fitting(file, estimate_memory(prepared, placements, ranks))
    except ConfigError:
        return None


def _tried_choice(file: ConfigFile, prepared: Prepared, placements: Sequence[Placement]) -> tuple[Choice, str]:
    memory = estimate_memory(prepared, placements)
    choice = _fitting(file, memory)
    while True:
        trials = _try_steps(prepared, memory.heaviest_steps(choice.applied(file)))
        failed = next((trial for trial in trials if not trial.fits), None)
        if failed is None:
            return choice, _line(file, choice, trials)
        following = _next_choice(file, choice, failed.step.plan.stage, memory)
        if following is None:
            raise _nothing_fits(file, failed.step, failed)
        choice = following


def _next_choice(file: ConfigFile, choice: Choice, stage: StageName, memory: RunMemory) -> Choice | None:
    smaller = choice.smaller(file.config, stage)
    if smaller is not None or choice.recompute is not False:
        return smaller
    return _largest_fitting(file, memory, recompute=True)


def _fitting(file: ConfigFile, memory: RunMemory) -> Choice:
    """Return the first choice that fits by the estimate. Raises `ConfigError` if none does."""
    options = (False, True) if recompute_is_auto(file.config) else (False,)
    for recompute in options:
        choice = _largest_fitting(file, memory, recompute=recompute)
        if choice is not None:
            return choice
    least = _at_level(file, len(options) > 1, level=-1)
    steps = [step for step in memory.heaviest_steps(least.applied(file)) if step.memory.verdict != "fits"]
    raise _nothing_fits(file, max(steps, key=lambda step: step.memory.need.total))


def _largest_fitting(file: ConfigFile, memory: RunMemory, *, recompute: bool) -> Choice | None:
    """Return the largest batch of each stage that fits by the estimate, None if a stage fits with none."""
    config = file.config
    fitting: dict[StageName, int | None] = {}
    levels = max((len(batch_sizes(config, stage)) for stage in stages_with_auto(config)), default=1)
    for level in range(levels):
        choice = _at_level(file, recompute, level)
        estimates = memory.estimates(choice.applied(file))
        for stage in {estimate.stage for estimate in estimates} - set(fitting):
            if all(estimate.verdict == "fits" for estimate in estimates if estimate.stage == stage):
                fitting[stage] = choice.batch_sizes.get(stage)
    if {estimate.stage for estimate in estimates} - set(fitting):
        return None
    # A stage that is off, or has no rows, keeps its largest batch.
    sizes = {stage: fitting.get(stage) or size for stage, size in largest_choice(config).batch_sizes.items()}
    return Choice(sizes, choice.recompute)


def _at_level(file: ConfigFile, recompute: bool, level: int) -> Choice:
    """Return the choice with the batch of each stage at a place of its list, or the last one."""
    largest = largest_choice(file.config, recompute=recompute)
    sizes = {}
    for stage in largest.batch_sizes:
        possible = batch_sizes(file.config, stage)
        sizes[stage] = possible[min(level, len(possible) - 1)]
    return Choice(sizes, largest.recompute)


def _try_steps(prepared: Prepared, steps: Sequence[HeaviestStep]) -> list[Trial]:
    """Take one step on the heaviest rows of each stage, up to the first that does not fit. Nothing of them is kept."""
    trials: list[Trial] = []
    for step in steps:
        engine = Engine(prepared.model)
        before = reset_peak()
        try:
            _take_step(engine, prepared, step)
            fits = True
        except MindprintError as error:
            if not _is_memory_error(error):
                raise
            fits = False
        finally:
            engine.release()
        peak = peak_bytes()
        needed = None
        if fits and step.placement.device == "cpu" and before is not None and peak is not None:
            needed = peak - before
        free = step.memory.free
        trials.append(Trial(step, needed, fits and (needed is None or free is None or needed <= free)))
        if not trials[-1].fits:
            break
    return trials


def _take_step(engine: Engine, prepared: Prepared, step: HeaviestStep) -> None:
    plan, objective = step.plan, OBJECTIVES[step.plan.stage]
    examples = [prepared.examples_of(plan)[row] for row in step.rows]
    # The values of a reference do not change what a step needs.
    nothing = np.zeros(len(examples))
    reference = CompletionSums(nothing, nothing) if objective.needs_reference(plan.settings) else None
    batch = objective.batch(examples, prepared.tokenizer.pad_id, reference)
    update = Update(
        0.0,
        tokens=0,
        optimizer=plan.settings.optimizer,
        max_grad_norm=plan.settings.max_grad_norm,
        gradient_checkpointing=plan.backend.recomputes,
        share_prompts=False,
    )
    update = objective.complete_update(update, [batch], plan.settings)
    engine.load(step.placement)
    engine.start_stage(step.placement, initial_state(prepared, engine.backend.adapter_sites(engine.model)))
    objective.take_step(engine.backend, engine.model, [batch], plan.settings, update)


def _is_memory_error(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause).lower() for words in MEMORY_ERRORS):
            return True
        cause = cause.__cause__
    return False


def _line(file: ConfigFile, choice: Choice, trials: Sequence[Trial]) -> str:
    settings = f"auto: {' '.join(choice.settings(file))}"
    measured = [trial for trial in trials if trial.needed is not None]
    if not measured:
        return f"{settings}, which the heaviest step was tried with"
    most = max(measured, key=lambda trial: trial.needed or 0)
    free = "" if most.step.memory.free is None else f" of {readable_size(most.step.memory.free)}"
    return f"{settings}; the heaviest step needed {readable_size(most.needed or 0)}{free}"


def _nothing_fits(file: ConfigFile, step: HeaviestStep, trial: Trial | None = None) -> ConfigError:
    plan, memory = step.plan, step.memory
    free = "an unknown amount" if memory.free is None else readable_size(memory.free)
    if trial is None:
        finding = f"{memory.moment} needs about {readable_size(memory.need.total)} and {free} is free,"
    elif trial.needed is None:
        finding = f"a step of {plan.stage} ran out of memory"
    else:
        finding = f"a step of {plan.stage} needed {readable_size(trial.needed)} and {free} is free,"
    recomputed = " and activations computed again" if plan.backend.recomputes else ""
    return ConfigError(
        f"{file.source}: auto finds no settings that fit: {finding} with {plan.settings.rows_at_once} of its rows at "
        f"once{recomputed}: `mindprint plan` lists settings that need less"
    )
