"""The loop over one stage's optimizer steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import FrameType

from mindprint.events import StepDone
from mindprint.models.engine import Engine
from mindprint.training import guards
from mindprint.training.stages import Stage, StepOutcome


def run_stage(
    engine: Engine,
    stage: Stage,
    first_step: int,
    on_step: Callable[[StepDone], None],
    save: Callable[[int], None],
    save_every: int,
    stop_requested: Callable[[], bool],
) -> bool:
    """Take the steps from `first_step` (from 0) to the end of the stage. Return False if it was asked to stop before.

    `save(steps_done)` is called every `save_every` steps of the run, and when the stage stops early. It is not
    called at the stage's end, because the next stage saves its start.
    """
    plan = stage.plan
    # Proven once a stage, because it costs two copies of the adapter.
    unproven = first_step == 0
    for step in range(first_step, plan.steps):
        before = engine.save().adapter if unproven else None
        started = perf_counter()
        outcome = stage.take_step(engine, step)
        # Metrics are NumPy values, so the step has ended here, also on a backend that evaluates lazily.
        seconds = perf_counter() - started
        guards.check_step(outcome.metrics, outcome.origins)
        # A warm-up begins with a rate of 0, and a skipped float16 step applies nothing: neither proves anything.
        if before is not None and plan.learning_rate(step) > 0 and not outcome.metrics.skipped:
            guards.check_first_update(before, engine.save().adapter, outcome.metrics)
            unproven = False
        # The line is written before the checkpoint: on resume a line too many is dropped, one too few would be missing.
        on_step(_event(engine, stage, step, outcome, seconds))
        done = step + 1
        if done == plan.steps:
            break
        stopping = stop_requested()
        # Counted over the run and not over the stage, so that short stages do not add up to long gaps.
        if stopping or (plan.first_step + done) % save_every == 0:
            save(done)
        if stopping:
            return False
    return True


def _event(engine: Engine, stage: Stage, step: int, outcome: StepOutcome, seconds: float) -> StepDone:
    plan, metrics, rewards = stage.plan, outcome.metrics, outcome.rewards
    return StepDone(
        topic=plan.topic,
        stage=plan.stage,
        backend=engine.backend.name,
        step=plan.first_step + step + 1,
        stage_step=step + 1,
        loss=metrics.loss,
        learning_rate=plan.learning_rate(step),
        grad_norm=metrics.grad_norm,
        tokens=outcome.tokens,
        seconds=round(seconds, 6),
        padding=round(outcome.padding, 4),
        skipped=metrics.skipped,
        loss_scale=metrics.loss_scale,
        reward_chosen=rewards.chosen if rewards else None,
        reward_rejected=rewards.rejected if rewards else None,
        reward_margin=rewards.margin if rewards else None,
        reward_accuracy=rewards.accuracy if rewards else None,
        attempt=plan.attempt if plan.attempt > 1 else None,
    )


@contextmanager
def stop_on_signal(
    acknowledge: Callable[[], None] = lambda: None, patience: float = 0.0
) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request that is seen after a step or a batch of an evaluation.

    `acknowledge` is called at once, from the signal handler: a step or a batch can take minutes.

    A second Ctrl-C or SIGTERM ends at once. SIGHUP never does: a terminal that closes sends it more than once, and
    service managers send it along with SIGTERM. SIGHUP stays ignored where it is, as `nohup` has it. Signals within
    `patience` seconds of the first one are the same request.
    """
    # Python lets only the main thread set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    first_received = 0.0

    def remember(number: int, _frame: FrameType | None) -> None:
        nonlocal first_received
        again = number != signal.SIGHUP and any(earlier != signal.SIGHUP for earlier in received)
        if again and perf_counter() - first_received >= patience:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:
            first_received = perf_counter()
            # Whoever was just writing cannot be interrupted by another write, and the line is left out.
            with suppress(RuntimeError):
                acknowledge()

    heard = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # A shell starts background jobs with SIGINT ignored, and whoever sends it to one still means it.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, remember) for number in heard}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
