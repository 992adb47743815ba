"""Checks of a backend on a small model: whether training really trains, and nothing but the adapter.

They find real faults: an optimizer that updates nothing, a compiled step that keeps the adapter it was
compiled with, a frozen base that moves, a forward pass of training that differs from that of evaluation.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from time import perf_counter

import numpy as np

from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.merging import merged_folder
from mindprint.adapter.peft_format import read_adapter, write_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.config import Config, DataConfig
from mindprint.contract import (
    AdapterState,
    Float32,
    LoadedModel,
    LoraConfig,
    Sampling,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.data.collate import sft_batch
from mindprint.data.render import render_sft
from mindprint.data.row_files import Origin
from mindprint.data.rows import SftRow
from mindprint.data.tokenizer import load_tokenizer
from mindprint.errors import MindprintError
from mindprint.losses import sft_loss
from mindprint.models.engine import Engine, Placement
from mindprint.models.folder import ModelFolder, tensors
from mindprint.models.likelihoods import sum_pairs
from mindprint.models.tensor_files import FLOAT_DTYPES
from mindprint.plugins.backend import Backend, is_finite
from mindprint.tolerances import LOG_PROB_NOISE
from mindprint.training.objectives import OBJECTIVES
from mindprint.training.prepare import Prepared, lora_config
from mindprint.training.stages import Stage, StepOutcome

STEPS = 5
ROWS = 4
LEARNING_RATE = 1e-3
MAX_LENGTH = 128


@dataclass(frozen=True)
class Finding:
    """The result of one check on a subject, with its figures."""

    name: str
    ok: bool
    detail: str
    subject: str = ""


def guarded(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of `check` about `subject`. An exception becomes one more, failed."""
    try:
        for finding in check():
            yield replace(finding, subject=subject)
    except Exception as error:  # noqa: BLE001 (any exception of a broken backend is a finding)
        kind = "" if isinstance(error, MindprintError) else f"{type(error).__name__}: "
        yield Finding("works", ok=False, detail=" ".join(f"{kind}{error}".split()), subject=subject)


def check_training(placement: Placement, model: ModelFolder) -> Iterator[Finding]:
    """Take a few SFT steps on one batch and look at everything they should and should not have changed."""
    batch = _batch(model)
    engine = Engine(model)
    try:
        engine.load(placement)
        # Before the injection: an adapter that cannot be switched off would otherwise pass.
        untouched = engine.backend.log_probs(engine.model, batch, adapter=False)
        before = _inject(engine)
        trace = _train(engine.backend, engine.model, batch)
        yield from _findings(trace, before, engine.save().adapter, placement)
        digest_error = _raised(engine.check_base)
        yield Finding("base", ok=digest_error is None, detail=digest_error or "its weights are as they were")
        moved = _greatest(engine.backend.log_probs(engine.model, batch, adapter=False) - untouched)
        yield Finding(
            "adapter off", ok=moved <= _noise(placement), detail=f"log-probs within {moved:.1g} of the base's"
        )
    finally:
        engine.release()


@dataclass(frozen=True)
class _Trace:
    """The metrics of the steps, the loss that evaluation computed before each, and the seconds of the last."""

    metrics: tuple[StepMetrics, ...]
    evaluated: tuple[float, ...]
    seconds: float


def _batch(model: ModelFolder) -> TokenBatch:
    lines = files("mindprint").joinpath("resources", "curriculum", "sft.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[:ROWS]]
    rows = [SftRow("sample", r["prompt"], r["completion"], Origin("sft.jsonl", n)) for n, r in enumerate(records, 1)]
    tokenizer = load_tokenizer(model.path)
    return sft_batch(render_sft(rows, tokenizer, DataConfig(max_length=MAX_LENGTH)).examples, tokenizer.pad_id)


def _inject(engine: Engine) -> AdapterState:
    sites = engine.backend.adapter_sites(engine.model)
    adapter = initial_adapter(sites, LoraConfig(8, 16.0, resolve_targets(sites, "all-linear")), seed=0)
    engine.inject(adapter)
    return adapter


def _train(backend: Backend, model: LoadedModel, batch: TokenBatch) -> _Trace:
    update = Update(LEARNING_RATE, batch.loss_tokens)
    metrics, evaluated, seconds = [], [], 0.0
    for step in range(STEPS):
        # Training and evaluation are different code in every backend, and must compute the same loss.
        evaluated.append(sft_loss(backend.log_probs(model, batch), batch.loss_mask))
        started = perf_counter()
        metrics.append(backend.sft_step(model, [batch], replace(update, seed=step)))
        seconds = perf_counter() - started
    return _Trace(tuple(metrics), tuple(evaluated), seconds)


def _findings(trace: _Trace, before: AdapterState, after: AdapterState, placement: Placement) -> Iterator[Finding]:
    norm = trace.metrics[0].grad_norm
    yield Finding("gradient", ok=math.isfinite(norm) and norm > 0, detail=f"norm {norm:.4g} at the first step")
    change = max(_greatest(after.tensors[site].b - pair.b) for site, pair in before.tensors.items())
    yield Finding("adapter", ok=change > 0, detail=f"changed by up to {change:.2g} in {STEPS} steps")
    first, last = trace.metrics[0].loss, trace.metrics[-1].loss
    yield Finding("loss", ok=last < first, detail=f"{first:.4f} → {last:.4f}, {trace.seconds * 1000:.0f} ms a step")
    apart = max(abs(m.loss - e) for m, e in zip(trace.metrics, trace.evaluated, strict=True))
    detail = f"training and evaluation within {apart:.1g} nats a token at every step"
    yield Finding("same numbers", ok=apart <= _noise(placement), detail=detail)


def _noise(placement: Placement) -> float:
    return LOG_PROB_NOISE[placement.dtype]


def _greatest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _raised(check: Callable[[], None]) -> str | None:
    try:
        check()
    except MindprintError as error:
        return str(error)
    return None


DEEP_STEPS = 3
PROMPTS = 3
LONGEST_ANSWER = 256


def check_deeply(prepared: Prepared, placement: Placement) -> Iterator[Finding]:
    """Take the configured run's first steps, and follow the adapter through file and merge to an answer.

    They find real faults: an adapter on other modules than were named, a base that is trained too, an
    adapter that is not the same once saved and loaded, a merge that loses it, a model that answers with nothing.
    """
    engine = Engine(prepared.model)
    batch = _own_batch(prepared)
    try:
        engine.load(placement)
        before = _inject_configured(engine, prepared.config)
        where = f"{len(before.tensors)} modules, {before.elements:,} elements, and nothing else is trainable"
        yield Finding("LoRA", ok=True, detail=where)
        outcomes = _take_steps(engine, prepared, before)
        after = engine.save().adapter
        yield from _trained(before, after, outcomes, engine)
        # Of the model that was trained, to compare with what its files give.
        trained = engine.backend.log_probs(engine.model, batch)
        yield _answers(engine, prepared)
        engine.release()
        with tempfile.TemporaryDirectory() as folder:
            yield _reloaded(engine, placement, Path(folder), after, batch, trained)
            engine.release()
            yield _merged(placement, Path(folder), after, prepared.model, batch, trained)
    finally:
        engine.release()


def _own_batch(prepared: Prepared) -> TokenBatch:
    """Return a few of the configuration's own rows, to compute log-probs of."""
    plan = prepared.plans[0]
    return OBJECTIVES[plan.stage].sample_sequences(prepared.examples_of(plan)[:ROWS], prepared.tokenizer.pad_id)


def _inject_configured(engine: Engine, config: Config) -> AdapterState:
    sites = engine.backend.adapter_sites(engine.model)
    adapter = initial_adapter(sites, lora_config(config.adapter, sites), config.seed)
    engine.inject(adapter)
    return adapter


def _take_steps(engine: Engine, prepared: Prepared, start: AdapterState) -> list[StepOutcome]:
    """Take the first steps of the run's first stage, as the run itself would."""
    plan, pad_id = prepared.plans[0], prepared.tokenizer.pad_id
    engine.restore(TrainingState(start))
    examples, reference = prepared.examples_of(plan), None
    if OBJECTIVES[plan.stage].needs_reference(plan.settings):
        reference = sum_pairs(engine.backend, engine.model, examples, pad_id)
    stage = Stage(plan, examples, pad_id, reference)
    return [stage.take_step(engine, step) for step in range(min(DEEP_STEPS, plan.steps))]


def _trained(
    before: AdapterState, after: AdapterState, outcomes: Sequence[StepOutcome], engine: Engine
) -> Iterator[Finding]:
    norms = [outcome.metrics.grad_norm for outcome in outcomes]
    finite = all(is_finite(outcome.metrics) for outcome in outcomes)
    yield Finding("gradient", ok=finite and norms[0] > 0, detail=f"norms {', '.join(f'{norm:.3g}' for norm in norms)}")
    change = max(_greatest(after.tensors[site].b - pair.b) for site, pair in before.tensors.items())
    yield Finding("adapter", ok=change > 0, detail=f"changed by up to {change:.2g} in {len(outcomes)} steps")
    error = _raised(engine.check_base)
    yield Finding("base", ok=error is None, detail=error or "its weights are as they were")


def _reloaded(
    engine: Engine, placement: Placement, folder: Path, adapter: AdapterState, batch: TokenBatch, trained: Float32
) -> Finding:
    """Write the adapter, read it, put it on a base that was loaded again."""
    write_adapter(folder, adapter, engine.folder.name)
    engine.load(placement)
    engine.inject(read_adapter(folder)[0])
    apart = _greatest(engine.backend.log_probs(engine.model, batch) - trained)
    detail = f"log-probs within {apart:.1g} nats of those in training"
    return Finding("save and load", ok=apart <= _noise(placement), detail=detail)


def _merged(
    placement: Placement, folder: Path, adapter: AdapterState, base: ModelFolder, batch: TokenBatch, trained: Float32
) -> Finding:
    """Merge the adapter into its base and load the result: a model like any other, that computes the same."""
    out = folder / "merged"
    with merged_folder(out, base, adapter, source=folder):
        pass
    engine = Engine(ModelFolder(out, "the merged model"))
    try:
        engine.load(placement)
        apart = _greatest(engine.backend.log_probs(engine.model, batch, adapter=False) - trained)
    finally:
        engine.release()
    # A merge rounds to the dtypes of the base's files, which may be narrower than that of the run.
    stored = {FLOAT_DTYPES[info.dtype] for info in tensors(out).values() if info.dtype in FLOAT_DTYPES}
    allowed = max(LOG_PROB_NOISE[dtype] for dtype in (*stored, placement.dtype))
    detail = f"log-probs within {apart:.1g} nats of those in training, rounding to the base's dtype allows {allowed:g}"
    return Finding("merge", ok=apart <= allowed, detail=detail)


def _answers(engine: Engine, prepared: Prepared) -> Finding:
    """Answer a few of the rows' prompts: every answer has words, and one at least comes to its end."""
    plan, tokenizer = prepared.plans[0], prepared.tokenizer
    prompts = [OBJECTIVES[plan.stage].sample_prompt(example) for example in prepared.examples_of(plan)[:PROMPTS]]
    longest = max(LONGEST_ANSWER, prepared.config.generation.longest)
    answers = engine.backend.generate(engine.model, prompts, Sampling(longest, tokenizer.stop_token_ids))
    ended = sum(answer.stop_reason == "stop" for answer in answers)
    empty = sum(not tokenizer.decode(answer.tokens.tolist()).strip() for answer in answers)
    stuck = sum(len(answer.tokens) > 1 and len(set(answer.tokens.tolist())) == 1 for answer in answers)
    detail = (
        f"{ended} of {len(answers)} answers end within {longest} tokens, {empty} empty, {stuck} of one repeated token"
    )
    return Finding("generation", ok=ended > 0 and not empty and not stuck, detail=detail)
