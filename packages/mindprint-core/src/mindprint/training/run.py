"""A run from configuration to adapter: check everything that can be wrong, then train stage by stage."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from mindprint.config import ConfigFile, differing_settings, load_config, make_config, merged
from mindprint.contract import AdapterState, TrainingState
from mindprint.curriculum.examiner import Examiner
from mindprint.errors import CheckpointError, Interrupted, MindprintError, ModelError, NotFiniteError
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
from mindprint.input_files import typed
from mindprint.models.engine import Engine, Placement, Placements
from mindprint.plugins.hooks import observer_hooks
from mindprint.plugins.ranks import Ranks
from mindprint.plugins.scoring import load_scorers
from mindprint.plugins.watching import Trackers, load_trackers
from mindprint.printing import short_path
from mindprint.runs.folder import Resume, RunFolder, newest_run, open_run, portable, runs_folder
from mindprint.runs.results import RunResult, StageResult, Verdict, stage_results, verdicts
from mindprint.training.agreement import check_ranks, idle_ranks, joined_ranks, refuse_differences
from mindprint.training.auto import Choice, choice_of, has_auto
from mindprint.training.checkpoints import (
    Checkpoint,
    CheckpointStore,
    Cursor,
    OtherRunError,
    checkpoint_from_bytes,
    checkpoint_to_bytes,
)
from mindprint.training.choosing import choose_settings
from mindprint.training.course import Course, EvaluationStopped, Position
from mindprint.training.final_adapter import write_final_adapter
from mindprint.training.later_use import refused_uses
from mindprint.training.loop import run_stage, stop_on_signal
from mindprint.training.memory import memory_notices
from mindprint.training.objectives import OBJECTIVES
from mindprint.training.on_policy import PolicyPairs
from mindprint.training.pace import Pace
from mindprint.training.plan import StagePlan, total_steps
from mindprint.training.prepare import SECTIONS_OF_IDENTITY, Prepared, initial_state, lora_config, prepare, write_facts
from mindprint.training.reference import ReferenceCache
from mindprint.training.stages import Stage
from mindprint.trust.measurement import take_fingerprint
from mindprint.trust.probe import score_before_training

OnEvent = Callable[[Event], None]

SECONDS_OF_ONE_REQUEST = 5.0
"""Under a launcher: Ctrl-C reaches a process from the terminal, and again from the launcher, which passes it on."""


def train(
    config: str | os.PathLike[str] | ConfigFile | Mapping[str, Any],
    *,
    run: str | os.PathLike[str] | None = None,
    resume: bool | Resume = False,
    on_event: OnEvent | None = None,
    on_stop: Callable[[], None] = lambda: None,
    observers: Sequence[object] = (),
    **overrides: Any,
) -> RunResult:
    """Train SFT, then DPO, topic by topic, and write one adapter.

    `config` is a folder with `mindprint.yaml`, a YAML file, or the values themselves. `overrides` are merged into it
    (`backend="mlx"`, `sft={"learning_rate": 1e-4}`). `run` names the run's folder (default: a new one under `runs/`
    next to the configuration). With `resume` the newest run there continues from its last checkpoint, or, with
    `resume="latest"`, from the newest that is sound. `on_event` and the plugins in `observers` see every event. An
    exception that they raise ends the run. A tracker that raises is turned off, with a warning. `on_stop` is called
    from the signal handler when the user asks the run to stop.

    Raises a `MindprintError` for every wrong input before anything is trained, `GuardError` when training would corrupt
    its result, and `Interrupted` after a checkpoint when the user stops it. Where a launcher started several processes,
    they train one adapter, and only the first writes, prints and is watched.
    """
    file = _config_file(config)
    if overrides:
        file = merged(file, overrides)
    mode: Resume | None = "last" if resume is True else (resume or None)
    placements = Placements(observers)
    ranks = joined_ranks(file.config, placements)
    try:
        # Connected before the rows are read, which may take one rank minutes longer than MLX's ring waits.
        ranks.gather(None)
        if mode and has_auto(file.config):
            # A run continues with its own choice, whatever is free now. Only the first rank has its files.
            file = _with_recorded_choice(file, run, ranks)
        # Everything that can be wrong is found here, before a backend is imported or a folder is made.
        prepared = ranks.together(lambda: prepare(file, on_event if ranks.first else None))
        trackers = Trackers(load_trackers(file.config.trackers) if ranks.first else ())
        resolved = tuple(placements.resolve_training(plan.backend) for plan in prepared.plans)
        ranks = resolved[0].backend.ranks
        check_ranks(prepared, resolved)
        if has_auto(file.config):
            choice, line = choose_settings(file, prepared, resolved, ranks)
            prepared = ranks.together(lambda: prepare(choice.applied(file)).with_note(line))
        # From here on another process may not write to the run, and a failure removes a folder without a checkpoint.
        with _shared_folder(ranks, runs_folder(file), run, mode) as folder:
            if mode:
                # Only the first rank has the files of the run.
                prepared = prepared.in_order(ranks.from_first(lambda: prepared.in_order_of(folder).order))
            once = _Run(prepared, resolved, ranks, folder, mode, on_event or (lambda _: None), observers, trackers)
            return once.train(on_stop)
    except MindprintError as error:
        _name_rank(error, ranks)
        raise


def _with_recorded_choice(file: ConfigFile, run: str | os.PathLike[str] | None, ranks: Ranks) -> ConfigFile:
    """Return the configuration with what the run that continues chose for its settings that are `auto`."""

    def recorded() -> dict[str, Any]:
        path = Path(run) if run else newest_run(runs_folder(file))
        if path is None or not RunFolder(path).config.is_file():
            return {}
        choice = choice_of(file, load_config(RunFolder(path).config).config)
        return {"sizes": dict(choice.batch_sizes), "recompute": choice.recompute}

    told = ranks.from_first(recorded)
    return Choice(told["sizes"], told["recompute"]).applied(file) if told else file


@contextmanager
def _shared_folder(
    ranks: Ranks, runs: Path, run: str | os.PathLike[str] | None, resume: Resume | None
) -> Iterator[RunFolder]:
    """Hold the run's folder on the first rank. The others know its path, and neither read nor write there."""
    with ExitStack() as held:
        path = ranks.from_first(lambda: str(held.enter_context(open_run(runs, run, resume)).path))
        yield RunFolder(Path(path))


def _name_rank(error: MindprintError, ranks: Ranks) -> None:
    """Say in an error's message which rank it is from, or nothing where the first rank says the same."""
    if ranks.first or not str(error):
        return
    # All ranks stop at once, and one line is enough.
    error.args = ("" if isinstance(error, Interrupted) else f"{ranks}: {error}",)


class _Run:
    """One call of `train`: the state that its steps share."""

    def __init__(
        self,
        prepared: Prepared,
        placements: tuple[Placement, ...],
        ranks: Ranks,
        folder: RunFolder,
        resume: Resume | None,
        on_event: OnEvent,
        observers: Sequence[object],
        trackers: Trackers,
    ) -> None:
        config = prepared.config
        self.prepared = prepared
        self.placements = placements
        self.ranks = ranks
        self.folder = folder
        self.resume = resume
        self._on_event = on_event
        self._hooks = observer_hooks(observers)
        self._trackers = trackers
        self.engine = Engine(prepared.model, self._notice)
        self.checkpoints = CheckpointStore(
            folder.checkpoints, prepared.identity, prepared.model.name, config.checkpoints.keep
        )
        self.references = ReferenceCache(folder.references, prepared.identity, self.engine, prepared.tokenizer.pad_id)
        self.policy_pairs = PolicyPairs(
            folder.on_policy,
            prepared.identity,
            self.engine,
            prepared.tokenizer,
            config.data,
            prepared.split.train.preferences,
        )
        extra = load_scorers(config.voice.scorers)
        examiner = Examiner(prepared.split, config, prepared.tokenizer, self.engine, extra, prepared.people)
        self.course = Course(prepared, folder, self.engine, examiner, self.checkpoints, self._emit, ranks)
        self._pace = Pace()

    def train(self, on_stop: Callable[[], None]) -> RunResult:
        started = perf_counter()
        start = None
        if self.resume:
            start = self.ranks.from_first(self._find_start, checkpoint_to_bytes, checkpoint_from_bytes)
        try:
            if self.ranks.first:
                self._announce(start)
            with stop_on_signal(
                on_stop if self.ranks.first else lambda: None, 0.0 if self.ranks.alone else SECONDS_OF_ONE_REQUEST
            ) as self.ranks.asked_to_stop:
                state = self._train_stages(start)
                self._evaluate_end(state)
            self._write_adapter(state.adapter)
        finally:
            # A notebook keeps the process, which must not keep the model's memory.
            self.engine.release()
        # Launchers end all processes when one has ended, so that the others wait here.
        return self.ranks.from_first(lambda: self._finish(started), _result_to_bytes, _result_from_bytes)

    def _finish(self, started: float) -> RunResult:
        # Last, because the adapter is worth more than its reports.
        self._write_reports()
        self._emit(RunFinished(str(self.folder.path), str(self.folder.adapter), perf_counter() - started))
        return RunResult(self.folder.path, self.folder.adapter, stage_results(self.folder), verdicts(self.folder))

    def _find_start(self) -> Checkpoint | None:
        """Return the checkpoint to continue from, None for a run that was ended before its first one."""
        try:
            checkpoint, passed_over = self.checkpoints.find_newest(sound=self.resume == "latest")
        except OtherRunError as error:
            raise CheckpointError(self._named_differences(error)) from error
        if checkpoint is None:
            self._notice("the run has no checkpoint yet: it starts from the beginning")
        for reason in passed_over:
            self._notice(f"passed over: {reason}", warning=True)
        return checkpoint

    def _named_differences(self, error: OtherRunError) -> str:
        """Return the refusal of a checkpoint with the settings that differ, and with the command that would work."""
        try:
            run, here = load_config(self.folder.config).config, portable(self.prepared.config_file, self.folder.path)
        except MindprintError:
            return str(error)
        differing = differing_settings(run, here, SECTIONS_OF_IDENTITY[error.part])
        if not differing:
            return str(error)
        named = "; ".join(
            f"{name} is {json.dumps(theirs)} in the run, {json.dumps(ours)} here"
            for name, (theirs, ours) in differing.items()
        )
        command = f"mindprint train {shlex.quote(short_path(self.folder.path))} --resume"
        return (
            f"{self.folder.path}: the {error.part} is another one: {named}; continue the run with its own settings: "
            f"{command}, or leave out --resume to start a new run"
        )

    def _announce(self, start: Checkpoint | None) -> None:
        write_facts(self.prepared, self.placements, self.folder)
        if start is not None:
            cursor, plans = start.cursor, self.prepared.plans
            ended = cursor.stage_index == len(plans)
            # Stopped in the evaluation after a stage, the run evaluates that stage again.
            again = not ended and cursor.stage_step == plans[cursor.stage_index].steps
            self.folder.forget_after(cursor.step, ended=ended, evaluates_again=again)
            self.checkpoints.forget_after(start.cursor.step)
            self._warn_of_other_environment(start.cursor)
        resumed_from = start.cursor.step if start else None
        self._emit(RunStarted(str(self.folder.path), total_steps(self.prepared.plans), resumed_from))
        for notice in (*self.prepared.notes, *idle_ranks(self.prepared, self.ranks)):
            self._emit(notice)
        for placement in dict.fromkeys(self.placements):
            self._notice(f"backend: {placement}" + ("" if self.ranks.alone else f", {self.ranks.size} ranks"))
            for note in placement.backend.info.notes:
                self._notice(note)
        for notice in memory_notices(self.prepared, self.placements):
            self._emit(notice)

    def _warn_of_other_environment(self, cursor: Cursor) -> None:
        placement = self.placements[min(cursor.stage_index, len(self.placements) - 1)]
        if placement.backend.name != cursor.backend:
            self._notice(f"resuming on {placement.backend.name} what {cursor.backend} trained so far")
            return
        # Another backend computes the same within tolerances. The same backend promises the same bits.
        now = placement.environment()
        changed = [f"{name} {cursor.environment.get(name)} → {value}" for name, value in now.items()
                   if cursor.environment.get(name) != value]  # fmt: skip
        if changed:
            self._notice(
                f"resume is not bit for bit: the checkpoint was written under another {', '.join(changed)}",
                warning=True,
            )

    def _train_stages(self, start: Checkpoint | None) -> TrainingState:
        """Take every stage from the checkpoint, or from the beginning, and return what training ends with."""
        position, done = (Position.of(start.cursor), start.cursor.stage_step) if start else (Position(), 0)
        ended = len(self.prepared.plans)
        if start and position.index == ended:
            # Only the final evaluation or the adapter was missing: nothing is loaded to train.
            return start.state
        targets = self.prepared.config.adapter
        sites = self.engine.load_everywhere(
            self.placements[position.index :], lambda sites: lora_config(targets, sites).target_modules
        )
        if not self.ranks.alone:
            refuse_differences(self.ranks, {"the base model in memory": self.engine.base_digest})
        if refusal := refused_uses(self.prepared.model.path, sites, lora_config(targets, sites)):
            self._notice(refusal, warning=True)
        self._check_probe()
        state = start.state if start else initial_state(self.prepared, sites)
        while position.index < ended:
            plan, placement = self.course.stage(position), self.placements[position.index]
            if not done:
                # Every stage has a new optimizer, as separate trainers would, and a checkpoint to roll back to.
                state = state.without_optimizer()
                self._save_checkpoint(position, 0, state)
                if self.ranks.stop_requested():
                    raise self._interrupted()
            self._train_stage(plan, placement, position, state, done)
            state = self.engine.save()
            try:
                position, state = self.course.after(plan, position, state)
            except EvaluationStopped:
                # The stage is trained, and the run that continues evaluates it first.
                self._save_checkpoint(position, plan.steps, state)
                raise self._interrupted() from None
            done = 0
        # Killed during the final evaluation, the run continues there and trains nothing again.
        self._save_checkpoint(position, 0, state.without_optimizer())
        return state

    def _evaluate_end(self, state: TrainingState) -> None:
        if self.prepared.config.evaluation.happens("final"):
            self.engine.start_stage(self.placements[-1], state)
            try:
                self.course.finish()
            except EvaluationStopped:
                raise self._interrupted() from None

    def _check_probe(self) -> None:
        """Raise `ModelError` for a base that cannot compute the fingerprint's probe: better now than after training.

        The probe has tokens that no training text may have, and rows of a damaged base can be NaN one by one.
        """
        try:
            score_before_training(self.engine.backend, self.engine.model, self.prepared.probe)
        except NotFiniteError as error:
            raise ModelError(
                f"{self.prepared.model.path}: the base model computes no finite log-probs for tokens of the "
                f"fingerprint's probe ({error}): its weights are damaged or overflow in this dtype; download it again, "
                "or set backend.dtype=float32"
            ) from error

    def _train_stage(
        self,
        plan: StagePlan,
        placement: Placement,
        position: Position,
        state: TrainingState,
        done: int,
    ) -> None:
        """Take the steps of one stage after the first `done` of them. Raises `Interrupted` when asked to stop."""
        examples, reference = self.prepared.examples_of(plan), None
        objective = OBJECTIVES[plan.stage]
        is_on_policy, needs_reference = objective.is_on_policy(plan.settings), objective.needs_reference(plan.settings)
        start = self._state_at_start(plan, state, done) if is_on_policy or needs_reference else state
        if is_on_policy:
            examples = self.policy_pairs.pairs_of(plan, placement, start, examples, self._on_answers)
        if needs_reference:
            reference = self.references.reference_of(plan, placement, start, examples)
        self.engine.start_stage(placement, state)
        stage = Stage(plan, examples, self.prepared.tokenizer.pad_id, reference)
        self._emit(StageStarted(plan.topic, plan.stage, placement.backend.name, plan.steps, done))
        losses: list[float] = []

        def on_step(event: StepDone) -> None:
            if not self.ranks.first:
                return
            losses.append(event.loss)
            self.folder.append_step(event)
            self._emit(event)
            if estimate := self._pace.estimate(event, plan, self.prepared.plans[plan.index + 1 :]):
                self._notice(estimate)

        def save(steps: int) -> None:
            if self.ranks.first:
                self._save_checkpoint(position, steps, self.engine.save())

        every = self.prepared.config.checkpoints.every
        if not run_stage(self.engine, stage, done, on_step, save, every, self.ranks.stop_requested):
            raise self._interrupted()
        # Once a stage and not once a step: the digest reads all of the base's weights.
        self.engine.check_base()
        if not self.ranks.first:
            return
        first, last = (losses[0], losses[-1]) if losses else (None, None)
        # The same seconds as in the table of results: those of the steps, an interrupted process's included.
        seconds = sum(line["seconds"] for line in self.folder.read_steps() if line["step"] > plan.first_step)
        self._emit(
            StageFinished(plan.topic, plan.stage, placement.backend.name, plan.steps, first, last, round(seconds, 3))
        )

    def _state_at_start(self, plan: StagePlan, state: TrainingState, done: int) -> TrainingState:
        """Return the state that a stage started with, which in its middle `state` is not any more."""
        return self.checkpoints.read_shared(plan.first_step, self.ranks).state if done else state

    def _on_answers(self, done: int, total: int) -> None:
        """Tell of the answers to the prompts of pairs. Raises `Interrupted` between two batches when asked to stop."""
        if done == 0:
            self._notice(f"the model answers the prompts of {total} pairs, for its rejected answers")
        if done < total and self.ranks.stop_requested():
            # The checkpoint of the stage's start, or of a later step, has been written.
            raise self._interrupted()

    def _save_checkpoint(self, position: Position, stage_step: int, state: TrainingState) -> None:
        # A checkpoint is the same file whatever the number of ranks: all of them have the same state.
        if not self.ranks.first:
            return
        step = position.step + stage_step
        # Past the last stage there is no placement. The last one wrote the state.
        placement = self.placements[min(position.index, len(self.placements) - 1)]
        cursor = Cursor(
            step, position.index, stage_step, placement.backend.name, placement.environment(), position.attempt,
            position.topic_step,
        )  # fmt: skip
        self._emit(CheckpointWritten(str(self.checkpoints.save(state, cursor)), step))

    def _interrupted(self) -> Interrupted:
        if not self.ranks.first:
            return Interrupted("")
        return Interrupted(
            f"stopped; the checkpoint of step {self.checkpoints.newest_step()} is in {self.folder.checkpoints}; "
            f"continue with: mindprint train {shlex.quote(str(self.folder.path))} --resume"
        )

    def _write_adapter(self, adapter: AdapterState) -> None:
        """Let the first rank write the final adapter. All of them hold a sharded base until it is done."""
        if self.placements[-1].shard:
            self.engine.start_stage(self.placements[-1], TrainingState(adapter))
            self.ranks.from_first(lambda: self._write_first_adapter(adapter))
        elif self.ranks.first:
            self._write_first_adapter(adapter)

    def _write_first_adapter(self, adapter: AdapterState) -> None:
        """Write the final adapter with its fingerprint, taken where the last stage trained."""
        prepared, fingerprint = self.prepared, None
        try:
            fingerprint = take_fingerprint(
                self.engine, self.placements[-1], adapter, prepared.tokenizer, prepared.probe, self._notice
            )
        except (MindprintError, RuntimeError, MemoryError) as error:
            # The training is done and must not be lost: an adapter without a fingerprint can still be used.
            reason = " ".join(str(error).split()) or type(error).__name__
            self._notice(f"the adapter is written without a fingerprint, which failed: {reason}", warning=True)
            self.folder.add_to_manifest({"fingerprint": f"not taken: {reason}"})
        write_final_adapter(self.folder.adapter, adapter, prepared.model, prepared.config, fingerprint)

    def _write_reports(self) -> None:
        """Write the reports. A report that fails does not undo the run: its adapter is whole."""
        from mindprint.reports import write_reports  # noqa: PLC0415 (only a run that has ended needs it)

        try:
            write_reports(self.folder)
        except (MindprintError, OSError) as error:
            self._notice(f"no report: {error}; try again with: mindprint report {self.folder.path}", warning=True)

    def _emit(self, event: Event) -> None:
        if not self.ranks.first:
            return
        self._on_event(event)
        self._hooks.mindprint_event(event=event)
        # A tracker cannot end the run. The caller's function and observers can: they are part of the program.
        for failure in self._trackers.tell(event):
            self._notice(failure, warning=True)

    def _notice(self, message: str, *, warning: bool = False) -> None:
        self._emit(Notice(message, warning))


def _result_to_bytes(result: RunResult) -> bytes:
    parts = {"stages": [asdict(stage) for stage in result.stages], "verdicts": [asdict(v) for v in result.verdicts]}
    return json.dumps({"run": str(result.run), "adapter": str(result.adapter), **parts}).encode()


def _result_from_bytes(content: bytes) -> RunResult:
    told = json.loads(content)
    stages = tuple(typed(StageResult, stage) for stage in told["stages"])
    return RunResult(
        Path(told["run"]), Path(told["adapter"]), stages, tuple(typed(Verdict, item) for item in told["verdicts"])
    )


def _config_file(config: str | os.PathLike[str] | ConfigFile | Mapping[str, Any]) -> ConfigFile:
    if isinstance(config, ConfigFile):
        return config
    return make_config(config) if isinstance(config, Mapping) else load_config(config)
