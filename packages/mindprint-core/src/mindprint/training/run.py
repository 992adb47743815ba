"""A run from configuration to adapter: prepare everything that can be wrong, then train stage by stage."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from mindprint import atomic
from mindprint._version import __version__
from mindprint.adapter.initial import initial_adapter, started_adapter
from mindprint.adapter.peft_format import adapter_digest
from mindprint.adapter.targets import resolve_targets
from mindprint.config import ConfigFile, DpoConfig, dump_config, load_config, make_config, merged
from mindprint.contract import AdapterSite, AdapterState, LoraConfig, TrainingState
from mindprint.curriculum.examiner import Examiner
from mindprint.errors import BackendError, Interrupted, MindprintError
from mindprint.events import (
    CheckpointWritten,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    StepDone,
)
from mindprint.hookspecs import HOOK_API
from mindprint.models.engine import Engine, Placement, Placements
from mindprint.models.likelihoods import CompletionSums, sum_pairs
from mindprint.plugins.loading import load_scorers, load_trackers, observer_hooks
from mindprint.plugins.watching import Trackers
from mindprint.reports import write_reports
from mindprint.runs.folder import Resume, RunFolder, open_run, portable
from mindprint.runs.results import RunResult, stage_results, verdicts
from mindprint.training.checkpoints import (
    Checkpoint,
    Cursor,
    checkpoint_name,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from mindprint.training.course import Course, Position
from mindprint.training.final_adapter import write_final_adapter
from mindprint.training.loop import run_stage, stop_on_signal
from mindprint.training.plan import StagePlan, total_steps
from mindprint.training.prepare import Prepared, prepare
from mindprint.training.reference import (
    load_reference,
    reference_key,
    rows_digest,
    save_reference,
)
from mindprint.training.stages import DpoStage, SftStage, Stage
from mindprint.trust.measurement import take_fingerprint

OnEvent = Callable[[Event], None]


def train(
    config: str | os.PathLike[str] | ConfigFile | Mapping[str, Any],
    *,
    run: str | os.PathLike[str] | None = None,
    resume: bool | Resume = False,
    on_event: OnEvent | None = None,
    observers: Sequence[object] = (),
    **overrides: Any,
) -> RunResult:
    """Train SFT, then DPO, topic by topic, and write one adapter.

    `config` is a folder with `mindprint.yaml`, a YAML file, or the values themselves; `overrides` are merged into it
    (`backend="mlx"`, `sft={"learning_rate": 1e-4}`). `run` names the run's folder (default: a new one under `runs/`
    beside the configuration); with `resume` the newest run there goes on from its last checkpoint, or, with
    `resume="latest"`, from the newest that is sound. `on_event` and the plugins in `observers` see every event; what
    they raise ends the run. A tracker that the configuration names and that raises is turned off, with a warning.

    Raises a `MindprintError` for every wrong input before anything is trained, `GuardError` when training would corrupt
    its result, and `Interrupted` after a checkpoint when the user stops it.
    """
    file = _config_file(config)
    if overrides:
        file = merged(file, overrides)
    mode: Resume | None = "last" if resume is True else (resume or None)
    prepared = prepare(file)
    folder = open_run(file.folder / "runs", run, mode)
    trackers = Trackers(load_trackers(file.config.trackers))
    return _Run(prepared, folder, mode, on_event or (lambda _: None), observers, trackers).train()


class _Run:
    """One call of `train`: the state that its steps share."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        resume: Resume | None,
        on_event: OnEvent,
        observers: Sequence[object],
        trackers: Trackers,
    ) -> None:
        self.prepared = prepared
        self.folder = folder
        self.resume = resume
        self._on_event = on_event
        self._observers = observers
        self._hooks = observer_hooks(observers)
        self._trackers = trackers
        self.engine = Engine(prepared.model, self._notice)
        self.placements: tuple[Placement, ...] = ()
        extra = load_scorers(prepared.config.voice.scorers)
        examiner = Examiner(prepared.split, prepared.config, prepared.tokenizer, self.engine, extra)
        self.course = Course(prepared, folder, self.engine, examiner, self._emit)

    def train(self) -> RunResult:
        started = perf_counter()
        self.placements = self._place()
        with self._open_folder():
            start = self._find_checkpoint() if self.resume else None
            try:
                self._announce(start)
                state = self._stages(start)
                self._finish(state)
                self._write_adapter(state.adapter)
            finally:
                self.engine.release()
        self._write_reports()
        self._emit(RunFinished(str(self.folder.path), str(self.folder.adapter), perf_counter() - started))
        return RunResult(self.folder.path, self.folder.adapter, stage_results(self.folder), verdicts(self.folder))

    @contextmanager
    def _open_folder(self) -> Iterator[None]:
        """Make the run's folder and hold it; a run that fails before its first checkpoint leaves nothing."""
        made = [path for path in (self.folder.path, self.folder.path.parent) if not path.exists()]
        try:
            with self.folder.locked():
                yield
        except BaseException:
            if made and not list_checkpoints(self.folder.checkpoints):
                shutil.rmtree(made[-1], ignore_errors=True)
            raise

    # --- before the first step ---------------------------------------------------------------------------------------

    def _place(self) -> tuple[Placement, ...]:
        placements = Placements(self._observers)
        return tuple(placements.resolve(plan.backend) for plan in self.prepared.plans)

    def _find_checkpoint(self) -> Checkpoint | None:
        """Where to go on from; None for a run that was ended before its first checkpoint."""
        if not list_checkpoints(self.folder.checkpoints):
            self._notice("the run has no checkpoint yet: it starts from the beginning")
            return None
        checkpoint, passed_over = newest_checkpoint(
            self.folder.checkpoints, self.prepared.identity, whole=self.resume == "latest"
        )
        for reason in passed_over:
            self._notice(f"passed over: {reason}", warning=True)
        return checkpoint

    def _announce(self, start: Checkpoint | None) -> None:
        self._write_facts()
        if start is not None:
            self._forget_after(start.cursor)
            self._warn_of_other_environment(start.cursor)
        resumed_from = start.cursor.step if start else None
        self._emit(RunStarted(str(self.folder.path), total_steps(self.prepared.plans), resumed_from))
        for notice in self.prepared.notes:
            self._emit(notice)
        for placement in dict.fromkeys(self.placements):
            self._notice(f"backend: {placement}")
            for note in placement.backend.info.notes:
                self._notice(note)

    def _write_facts(self) -> None:
        prepared = self.prepared
        atomic.write_text(self.folder.config, dump_config(portable(prepared.config_file, self.folder.path)))
        facts = prepared.split.facts
        self.folder.write_split(facts.trained, facts.held_out)
        self.folder.write_manifest(
            {
                "mindprint": __version__,
                "hook_api": HOOK_API,
                "model": {"name": prepared.model.name, "revision": prepared.model.revision},
                "identity": dict(prepared.identity),
                "rows": {
                    "sft": {topic: len(rows) for topic, rows in prepared.sft.items()},
                    "preferences": {topic: len(rows) for topic, rows in prepared.preferences.items()},
                },
                "rows_from_memory": prepared.config.data.rows_digest,
                "splits": facts.stated(),
                "curriculum": prepared.outline.stated(),
                "stages": [
                    {"topic": plan.topic, "stage": plan.stage, "steps": plan.steps, "backend": place.backend.name,
                     "device": place.device, "dtype": place.dtype}
                    for plan, place in zip(prepared.plans, self.placements, strict=True)
                ],
                "environment": {place.backend.name: place.environment() for place in self.placements},
            }
        )  # fmt: skip

    def _forget_after(self, cursor: Cursor) -> None:
        self.folder.forget_after(cursor.step, ended=cursor.stage_index == len(self.prepared.plans))
        for checkpoint in list_checkpoints(self.folder.checkpoints):
            if int(checkpoint.name) > cursor.step:
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _warn_of_other_environment(self, cursor: Cursor) -> None:
        placement = self.placements[min(cursor.stage_index, len(self.placements) - 1)]
        if placement.backend.name != cursor.backend:
            self._notice(f"resuming on {placement.backend.name} what {cursor.backend} trained so far")
            return
        now = placement.environment()
        changed = [f"{name} {cursor.environment.get(name)} → {value}" for name, value in now.items()
                   if cursor.environment.get(name) != value]  # fmt: skip
        if changed:
            self._notice(
                f"resume is not bit for bit: the checkpoint was written under another {', '.join(changed)}",
                warning=True,
            )

    # --- stage by stage ----------------------------------------------------------------------------------------------

    def _stages(self, start: Checkpoint | None) -> TrainingState:
        position, done = (Position.of(start.cursor), start.cursor.stage_step) if start else (Position(), 0)
        ended = len(self.prepared.plans)
        if start and position.index == ended:
            return start.state
        sites = self._load_everywhere(position.index)
        state = start.state if start else self._initial_state(sites)
        with stop_on_signal() as stop_requested:
            while position.index < ended:
                plan, placement = self.course.stage(position), self.placements[position.index]
                if not done:
                    state = state.without_optimizer()
                    self._save_checkpoint(position, 0, state)
                    self._stop_if(stop_requested)
                self._run_stage(plan, placement, position, state, done, stop_requested)
                position, state = self.course.after(plan, position, self.engine.backend.save(self.engine.model))
                done = 0
            self._save_checkpoint(position, 0, state.without_optimizer())
        return state

    def _finish(self, state: TrainingState) -> None:
        """Evaluate the whole run with what it came to, where its last stage trained."""
        if self.prepared.config.evaluation.happens("final"):
            self.engine.start_stage(self.placements[-1], state)
            self.course.finish()

    def _load_everywhere(self, first: int) -> Sequence[AdapterSite]:
        """Load the base at every placement still to come, `first` last: what cannot be had is said before training.

        Returns the sites of `first`. Raises `BackendError` when another placement lacks one, or has it otherwise.
        """
        found: dict[Placement, Sequence[AdapterSite]] = {}
        for placement in reversed(dict.fromkeys(self.placements[first:])):
            self.engine.load(placement)
            found[placement] = self.engine.backend.adapter_sites(self.engine.model)
        sites = found[self.placements[first]]
        targets = set(self._targets(sites))
        for placement, others in found.items():
            lacking = {site for site in sites if site.name in targets} - set(others)
            if lacking:
                names = ", ".join(sorted(site.name for site in lacking)[:3])
                raise BackendError(f"backend {placement.backend.name!r} cannot adapt {names} of this base as others do")
        return sites

    def _targets(self, sites: Sequence[AdapterSite]) -> tuple[str, ...]:
        return resolve_targets(sites, self.prepared.config.adapter.target_modules)

    def _initial_state(self, sites: Sequence[AdapterSite]) -> TrainingState:
        wanted = self.prepared.config.adapter
        lora = LoraConfig(wanted.r, wanted.alpha, self._targets(sites), wanted.dropout, wanted.use_rslora)
        if wanted.start_from is not None and self.prepared.start is not None:
            return TrainingState(started_adapter(self.prepared.start, lora, Path(wanted.start_from)))
        return TrainingState(initial_adapter(sites, lora, self.prepared.config.seed))

    def _run_stage(
        self,
        plan: StagePlan,
        placement: Placement,
        position: Position,
        state: TrainingState,
        done: int,
        stop_requested: Callable[[], bool],
    ) -> None:
        started = perf_counter()
        reference = self._reference(plan, placement, state, done)
        self.engine.start_stage(placement, state)
        stage = self._stage(plan, reference)
        self._emit(StageStarted(plan.topic, plan.stage, placement.backend.name, plan.steps, done))
        losses: list[float] = []

        def on_step(event: StepDone) -> None:
            losses.append(event.loss)
            self.folder.append_step(event)
            self._emit(event)

        def save(steps: int) -> None:
            self._save_checkpoint(position, steps, self.engine.backend.save(self.engine.model))

        every = self.prepared.config.checkpoints.every
        if not run_stage(self.engine, stage, done, on_step, save, every, stop_requested):
            raise self._interrupted()
        self.engine.check_base()
        first, last = (losses[0], losses[-1]) if losses else (None, None)
        self._emit(
            StageFinished(
                plan.topic, plan.stage, placement.backend.name, plan.steps, first, last, perf_counter() - started
            )
        )

    def _stage(self, plan: StagePlan, reference: CompletionSums | None) -> Stage:
        pad_id = self.prepared.tokenizer.pad_id
        if plan.stage == "sft":
            return SftStage(plan, self.prepared.sft[plan.topic], pad_id)
        return DpoStage(plan, self.prepared.preferences[plan.topic], pad_id, reference)

    def _reference(
        self, plan: StagePlan, placement: Placement, state: TrainingState, done: int
    ) -> CompletionSums | None:
        """The stage's reference: from the run's cache, or computed with the adapter that the stage starts from."""
        settings = plan.settings
        if not isinstance(settings, DpoConfig) or settings.preference_loss().reference_free:
            return None
        if done:
            folder = self.folder.checkpoints / checkpoint_name(plan.first_step)
            state = read_checkpoint(folder, self.prepared.identity).state
        examples = self.prepared.preferences[plan.topic]
        key = reference_key(
            base=self.prepared.identity["base model"],
            adapter=adapter_digest(state.adapter),
            rows=rows_digest(examples),
            template=self.prepared.identity["chat template"],
            dtype=placement.dtype,
        )
        again = f"-{plan.attempt}" if plan.attempt > 1 else ""
        file = self.folder.references / f"{plan.index:04d}{again}.safetensors"
        if file.exists():
            return load_reference(file, key)
        self.engine.start_stage(placement, state)
        reference = sum_pairs(
            self.engine.backend,
            self.engine.model,
            examples,
            self.prepared.tokenizer.pad_id,
            share_prompts=settings.share_prompts,
        )
        self.folder.references.mkdir(exist_ok=True)
        save_reference(file, reference, key, placement.backend.name)
        return reference

    def _save_checkpoint(self, position: Position, stage_step: int, state: TrainingState) -> None:
        step = position.step + stage_step
        placement = self.placements[min(position.index, len(self.placements) - 1)]
        cursor = Cursor(
            step, position.index, stage_step, placement.backend.name, placement.environment(), position.attempt,
            position.topic_step,
        )  # fmt: skip
        self.folder.checkpoints.mkdir(exist_ok=True)
        path = write_checkpoint(
            self.folder.checkpoints, state, cursor, self.prepared.identity, self.prepared.model.name
        )
        keep = self.prepared.config.checkpoints.keep
        prune_checkpoints(self.folder.checkpoints, keep, len(self.prepared.plans))
        self._emit(CheckpointWritten(str(path), step))

    def _stop_if(self, stop_requested: Callable[[], bool]) -> None:
        if stop_requested():
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        step = list_checkpoints(self.folder.checkpoints)[-1].name
        return Interrupted(
            f"stopped; the checkpoint of step {int(step)} is in {self.folder.checkpoints}; "
            f"go on with: mindprint train {shlex.quote(str(self.folder.path))} --resume"
        )

    def _write_adapter(self, adapter: AdapterState) -> None:
        """The final adapter with its fingerprint, taken where the last stage trained."""
        prepared = self.prepared
        fingerprint = take_fingerprint(
            self.engine, self.placements[-1], adapter, prepared.tokenizer, prepared.probe, self._notice
        )
        write_final_adapter(self.folder.adapter, adapter, prepared.model, prepared.config, fingerprint)

    def _write_reports(self) -> None:
        """What cannot be reported of a run does not undo it: its adapter is whole."""
        try:
            write_reports(self.folder)
        except (MindprintError, OSError) as error:
            self._notice(f"no report: {error}; try again with: mindprint report {self.folder.path}", warning=True)

    # --- telling -----------------------------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        self._on_event(event)
        self._hooks.mindprint_event(event=event)
        for failure in self._trackers.tell(event):
            self._notice(failure, warning=True)

    def _notice(self, message: str, *, warning: bool = False) -> None:
        self._emit(Notice(message, warning))


def _config_file(config: str | os.PathLike[str] | ConfigFile | Mapping[str, Any]) -> ConfigFile:
    if isinstance(config, ConfigFile):
        return config
    return make_config(config) if isinstance(config, Mapping) else load_config(config)
