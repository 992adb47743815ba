"""The course of a run through its curriculum: the decisions after each stage.

Stages are taken as planned, unless an evaluation decides otherwise: a gate skips a topic's DPO, a collapse undoes a
stage, a failed topic is tried again from its start, a failure ends the run early. Every decision is on disk before
anything follows from it. It depends on greedy evaluations alone, so a run that was killed takes the same course again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mindprint.config import Level
from mindprint.contract import TrainingState
from mindprint.curriculum.examiner import Examined, Examiner, examined_from_bytes, examined_to_bytes
from mindprint.curriculum.policy import dpo_runs, judged
from mindprint.events import Decided, Evaluated, Evaluating, Event, Notice
from mindprint.models.engine import Engine
from mindprint.plugins.ranks import Ranks
from mindprint.runs.folder import RunFolder
from mindprint.runs.records import VERDICTS, Decision, EvaluationRecord, Figures, Forgetting, Outcome
from mindprint.training.checkpoints import CheckpointStore, Cursor
from mindprint.training.objectives import OBJECTIVES
from mindprint.training.plan import StagePlan, total_steps
from mindprint.training.prepare import Prepared


@dataclass(frozen=True)
class Position:
    """The stage that comes next: `index` in the plan, after `step` optimizer steps, in an attempt at its topic.

    `topic_step`: the optimizer steps before the topic's first attempt. Past the last index training is complete.
    """

    index: int = 0
    step: int = 0
    attempt: int = 1
    topic_step: int = 0

    @classmethod
    def of(cls, cursor: Cursor) -> Position:
        """Return the position of the stage that a checkpoint is in, or before."""
        return cls(cursor.stage_index, cursor.step - cursor.stage_step, cursor.attempt, cursor.topic_step)


class EvaluationStopped(Exception):  # noqa: N818 (not a failure)
    """An evaluation that ended because a stop was requested."""


class Course:
    """The evaluations and decisions of a run, each recorded before anything follows from it."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        engine: Engine,
        examiner: Examiner,
        checkpoints: CheckpointStore,
        emit: Callable[[Event], None],
        ranks: Ranks,
    ) -> None:
        self._prepared = prepared
        self._folder = folder
        self._engine = engine
        self._examiner = examiner
        self._checkpoints = checkpoints
        self._emit = emit
        self._ranks = ranks
        self._settings = prepared.config.curriculum
        self._evaluation = prepared.config.evaluation

    def stage(self, position: Position) -> StagePlan:
        """Return the planned stage at a position, as it is taken there."""
        # The factor applies once for each attempt after the first.
        rate = self._settings.retry_learning_rate ** (position.attempt - 1)
        return self._prepared.plans[position.index].for_attempt(position.step, position.attempt, rate)

    def after(self, plan: StagePlan, position: Position, state: TrainingState) -> tuple[Position, TrainingState]:
        """Return the position and state after a stage that ended in `state`, which is in memory.

        Raises `EvaluationStopped` at the next batch of an evaluation after a stop was requested.
        """
        step = plan.first_step + plan.steps
        examined = self._examine("topic", plan.topic, [plan.topic]) if self._is_examined(plan) else None
        if examined and examined.collapse:
            if self._settings.roll_back:
                self._record("topic", plan.topic, step, examined, plan=plan)
                state = self._rolled_back(plan, step, examined.collapse)
                examined = self._examine("topic", plan.topic, [plan.topic])
            else:
                self._warn_of_collapse(f"{plan.topic} {plan.stage}", examined.collapse)
        gate = self._gate(plan, step, examined)
        continues = self._next_stage(plan) is not None and (gate is None or gate.decision == "train")
        # Before a topic's last stage nothing is judged: the next stage may still reach the threshold.
        outcome: tuple[Outcome, tuple[str, ...]] = ("measured", ())
        if examined:
            if not continues:
                outcome = judged(self._evaluation.topic, examined.figures)
            self._record("topic", plan.topic, step, examined, outcome, plan)
        if gate:
            self._decide(gate, plan)
        if continues:
            return replace(position, index=plan.index + 1, step=step), state
        return self._after_topic(plan, replace(position, step=step), state, outcome)

    def finish(self) -> None:
        """Evaluate every topic that was trained, at the end of the run. The adapter is in memory."""
        if not self._evaluation.happens("final"):
            return
        topics, step = self._trained(), self._last_step()
        examined = self._examine("final", "", topics, each=True, loops=True)
        # Each topic's line comes before the run's, so that a reader finds the parts of the whole above it.
        for topic, figures in examined.topics.items():
            self._write(EvaluationRecord("topic", topic, step, figures=figures))
        outcome = judged(self._evaluation.final, examined.figures)
        earlier = self._forgotten(topics[:-1], examined)
        self._record("final", "", step, examined, outcome, earlier=earlier)
        if self._ranks.first:
            self._folder.write_answers(examined.answers)
        if examined.collapse:
            self._warn_of_collapse("the run", examined.collapse)

    def _examine(
        self, level: Level, name: str, topics: Sequence[str], *, each: bool = False, loops: bool = False
    ) -> Examined:
        """Evaluate the adapter in memory. Raises `EvaluationStopped` between two batches if a stop was requested."""

        def on_rows(done: int, total: int) -> None:
            if self._ranks.stop_requested() and done < total:
                raise EvaluationStopped
            self._emit(Evaluating(level, name, done, total))

        examined = self._examiner.examine(topics, on_rows, each=each, loops=loops)
        # All ranks have the same answers. One rank's figures decide for all: elsewhere their last bits may differ.
        return self._ranks.from_first(lambda: examined, examined_to_bytes, examined_from_bytes)

    def _is_examined(self, plan: StagePlan) -> bool:
        if not self._evaluation.after_stages:
            return False
        if self._settings.roll_back:
            return True
        following = self._next_stage(plan)
        gate = OBJECTIVES[following.stage].gate(self._settings) if following else "never"
        if following and gate != "never":
            return not isinstance(gate, str)
        return self._evaluation.happens("topic")

    def _next_stage(self, plan: StagePlan) -> StagePlan | None:
        """Return the stage that the topic takes after this one, None after its last."""
        following = self._prepared.plans[plan.index + 1 : plan.index + 2]
        return following[0] if following and following[0].topic == plan.topic else None

    def _gate(self, plan: StagePlan, step: int, examined: Examined | None) -> Decision | None:
        """Decide whether the topic's next stage runs. None if there is none, or nothing to decide."""
        following = self._next_stage(plan)
        if following is None or OBJECTIVES[following.stage].gate(self._settings) == "always":
            return None
        runs, why = dpo_runs(self._settings, examined.figures if examined else None)
        return Decision("train" if runs else "skip", step, plan.topic, why, following.stage, plan.attempt)

    def _rolled_back(self, plan: StagePlan, step: int, collapse: Sequence[str]) -> TrainingState:
        why = "; ".join(collapse)
        first = plan.first_step + 1
        self._decide(Decision("roll back", step, plan.topic, why, plan.stage, plan.attempt, first, step), plan)
        # The lines stay in metrics.jsonl: a reader can see why a stage was undone.
        if self._ranks.first:
            self._folder.mark_rolled_back(first, step)
        return self._restored(plan.first_step)

    def _restored(self, step: int) -> TrainingState:
        """Restore the state of a checkpoint in memory, and return it."""
        state = self._checkpoints.read_shared(step, self._ranks).state
        self._engine.restore(state)
        return state

    def _warn_of_collapse(self, what: str, collapse: Sequence[str]) -> None:
        words = f"{what}: {'; '.join(collapse)} (curriculum.roll_back=true would undo a stage that does this)"
        self._emit(Notice(words, warning=True))

    def _after_topic(
        self, plan: StagePlan, position: Position, state: TrainingState, outcome: tuple[Outcome, tuple[str, ...]]
    ) -> tuple[Position, TrainingState]:
        verdict, reasons = outcome
        why = "; ".join(reasons)
        # A topic that could not be evaluated is not tried again: it would not be evaluated then either.
        if verdict == "failed" and plan.attempt <= self._settings.retries:
            return self._again(plan, position, why)
        if verdict != "measured":
            self._decide(Decision(VERDICTS[verdict], position.step, plan.topic, why, attempt=plan.attempt))
        ended = self._ended(plan, position.step, "topic" if verdict == "failed" else None)
        # A gate that closes ends its topic, so the next stage is that of another topic.
        following = len(self._prepared.plans) if ended else self._index_after(plan.topic)
        return Position(following, position.step, 1, position.step), state

    def _again(self, plan: StagePlan, position: Position, why: str) -> tuple[Position, TrainingState]:
        change = {"learning_rate": self._settings.retry_learning_rate}
        first = position.topic_step + 1
        decision = Decision("retry", position.step, plan.topic, why, None, plan.attempt, first, position.step, change)
        self._decide(decision)
        if self._ranks.first:
            self._folder.mark_rolled_back(first, position.step)
        index = next(planned.index for planned in self._prepared.plans if planned.topic == plan.topic)
        return replace(position, index=index, attempt=plan.attempt + 1), self._restored(position.topic_step)

    def _ended(self, plan: StagePlan, step: int, failed: Level | None) -> bool:
        """Evaluate the chapter and unit that end with a topic. Return whether a failure ends the run."""
        failures = [(failed, plan.topic)] if failed else []
        for part in self._prepared.outline.ending_with(plan.topic):
            if self._evaluation.happens(part.level):
                examined = self._examine(part.level, part.name, part.topics, each=True)
                outcome = judged(self._evaluation.thresholds(part.level), examined.figures)
                # Only units look back: it costs an evaluation of every earlier topic.
                earlier = self._earlier(part.name, plan.topic, part.topics, examined) if part.level == "unit" else ()
                self._record(part.level, part.name, step, examined, outcome, earlier=earlier)
                failures += [(part.level, part.name)] if outcome[0] == "failed" else []
        for level, name in failures:
            if level == self._settings.stop_after:
                self._decide(
                    Decision("stop", step, plan.topic, f"{level} {name} failed and curriculum.stop_after is set")
                )
                return True
        return False

    def _earlier(self, unit: str, topic: str, inside: Sequence[str], examined: Examined) -> tuple[Forgetting, ...]:
        """Compare every topic trained before `topic` with itself right after its training."""
        trained = self._trained()
        before = trained[: trained.index(topic)]
        outside = [earlier for earlier in before if earlier not in inside]
        others = self._examine("unit", unit, outside, each=True).topics if outside else {}
        return self._forgotten(before, replace(examined, topics={**others, **examined.topics}))

    def _forgotten(self, topics: Sequence[str], examined: Examined) -> tuple[Forgetting, ...]:
        # Only the first rank records what was forgotten, and has the file.
        evaluations = self._folder.evaluations() if self._ranks.first else []
        # The last record of a topic wins, which is that of the attempt that was kept.
        then = {past.name: past.figures for past in evaluations if past.level == "topic" and past.stage}
        none = Figures()
        return tuple(
            Forgetting(
                topic,
                then.get(topic, none).voice,
                examined.topics[topic].voice,
                then.get(topic, none).perplexity,
                examined.topics[topic].perplexity,
            )
            for topic in topics
        )

    def _trained(self) -> list[str]:
        """Return the topics with a step in metrics.jsonl, in order."""
        # Not from the plan: a gate or an early end may have left topics out.
        taken = self._ranks.from_first(lambda: list({line["topic"] for line in self._folder.read_steps()}))
        return [topic for topic in dict.fromkeys(plan.topic for plan in self._prepared.plans) if topic in taken]

    def _last_step(self) -> int:
        return self._ranks.from_first(lambda: max((line["step"] for line in self._folder.read_steps()), default=0))

    def _index_after(self, topic: str) -> int:
        return max(plan.index for plan in self._prepared.plans if plan.topic == topic) + 1

    def _record(
        self,
        level: Level,
        name: str,
        step: int,
        examined: Examined,
        outcome: tuple[Outcome, tuple[str, ...]] = ("measured", ()),
        plan: StagePlan | None = None,
        earlier: tuple[Forgetting, ...] = (),
    ) -> None:
        stage, attempt = (plan.stage, plan.attempt) if plan else (None, 1)
        self._write(
            EvaluationRecord(level, name, step, stage, attempt, *outcome, examined.collapse, examined.figures, earlier)
        )

    def _write(self, record: EvaluationRecord) -> None:
        if self._ranks.first:
            self._folder.append_evaluation(record)
        self._emit(Evaluated(record))

    def _decide(self, decision: Decision, ended: StagePlan | None = None) -> None:
        """Record and tell a decision. `ended` is the stage after which it was made, where the topic continues."""
        if self._ranks.first:
            self._folder.append_decision(decision)
        self._emit(Decided(decision, self._planned_steps(decision, ended)))

    def _planned_steps(self, decision: Decision, ended: StagePlan | None) -> int:
        """Count the run's optimizer steps as now planned: those taken, and those of the stages still to come."""
        plans = self._prepared.plans
        if decision.decision == "stop":
            return decision.step
        topic = [plan for plan in plans if plan.topic == decision.topic]
        remaining: list[StagePlan] = []
        if decision.decision == "retry":
            remaining = topic
        elif decision.decision in ("train", "roll back") and ended:
            remaining = [plan for plan in topic if plan.index > ended.index]
        return decision.step + total_steps([*remaining, *plans[self._index_after(decision.topic) :]])
