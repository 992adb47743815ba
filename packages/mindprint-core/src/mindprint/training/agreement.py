"""Agreement of the ranks: that all of them train the same, before the first step and at every one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from mindprint._version import __version__
from mindprint.config import Config
from mindprint.contract import StepMetrics
from mindprint.errors import BackendError, RankError
from mindprint.events import Notice
from mindprint.models.engine import Placement, Placements
from mindprint.plugins.launched import launched
from mindprint.plugins.ranks import Ranks
from mindprint.training.prepare import Prepared

OF_ONE_MACHINE = frozenset({"machine", "python", "threads"})
"""Facts of the environment in which ranks on unlike machines may differ: they change no number beyond rounding."""

PATHS = frozenset(
    {
        "model.name",
        "data.path",
        "data.sft",
        "data.preferences",
        "data.heldout",
        "adapter.start_from",
        "voice.background",
        "trackers",
    }
)
"""Settings that may differ: paths, whose content is compared by digests, and trackers, which only rank 0 has."""

MOST_NAMED = 3
"""The differences that a refusal names."""


def joined_ranks(config: Config, placements: Placements) -> Ranks:
    """Return the ranks that a launcher started, or one alone. A backend is loaded only where there are several.

    Raises:
        BackendError: The launcher's environment is half set, or the backend does not train in several processes.
    """
    (_, size), _ = launched()
    return Ranks() if size == 1 else placements.resolve_training(config.backend).backend.ranks


def check_ranks(prepared: Prepared, placements: Sequence[Placement]) -> None:
    """Raise `RankError` if the ranks would train different things, or are more than there is work for.

    Raises:
        RankError: They would.
        BackendError: A single process was to hold a part of the base.
    """
    ranks = placements[0].backend.ranks
    if ranks.alone:
        if any(placement.shard for placement in placements):
            raise BackendError(
                "backend.shard divides the base among several processes, and this is one: start them with "
                "`mindprint launch -n 2`, or set backend.shard=false"
            )
        return
    names = dict.fromkeys(placement.backend.name for placement in placements)
    if len(names) > 1:
        raise _on_first(ranks, f"several ranks train all stages on one backend, not on {' and '.join(names)}")
    refuse_differences(ranks, dict(_facts(prepared, placements[0])))
    rows = max((len(prepared.examples_of(plan)) for plan in prepared.plans), default=0)
    if ranks.size > rows:
        raise _on_first(
            ranks, f"there are {ranks.size} ranks and {rows} rows in the largest stage: start no more ranks than rows"
        )


def idle_ranks(prepared: Prepared, ranks: Ranks) -> Iterator[Notice]:
    """Warn of stages whose steps have fewer micro-batches than there are ranks."""
    told = set()
    for plan in prepared.plans:
        busy = len(plan.order.micro_batches(0))
        if busy < ranks.size and plan.stage not in told:
            told.add(plan.stage)
            yield Notice(
                f"a step of {plan.stage} has {busy} micro-batches, so only {busy} of {ranks.size} ranks work: set "
                f"{plan.stage}.gradient_accumulation to {ranks.size} or more, with a smaller "
                f"{plan.stage}.batch_size for the same step",
                warning=True,
            )


def refuse_differences(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raise `RankError` if a fact of another rank is not that of rank 0. Rank 0 names fact, rank and both values."""
    every = ranks.gather(dict(facts))
    for rank, others in enumerate(every):
        differing = [name for name in every[0] if others.get(name) != every[0][name]]
        if differing:
            named = "; ".join(
                f"{name} is {others.get(name, 'missing')} there and {every[0][name]} on rank 0"
                for name in islice(differing, MOST_NAMED)
            )
            more = f"; and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
            raise _on_first(ranks, f"rank {rank} of {ranks.size} differs from rank 0: {named}{more}")


def shared_metrics(ranks: Ranks, metrics: StepMetrics, pairs: Sequence[int]) -> StepMetrics:
    """Return a step's metrics with the log-probs of the pairs of all ranks, in the order of the micro-batches.

    `pairs` are the pairs of each micro-batch of the whole step.

    Raises:
        RankError: The ranks have another loss or norm of the gradient: their adapters are no longer the same.
    """
    sums = [metrics.chosen_log_probs, metrics.rejected_log_probs]
    # Both numbers are of sums over all ranks. Compared at each step, they find a rank that computes something else.
    told = ranks.gather([metrics.loss, metrics.grad_norm, *(None if s is None else s.tolist() for s in sums)])
    refuse_differences_of_step(ranks, [(loss, norm) for loss, norm, _, _ in told])
    if sums[0] is None:
        return metrics
    places = [(place % ranks.size, place // ranks.size) for place in range(len(pairs))]
    every = []
    for which in (2, 3):
        parts = [
            np.split(np.array(values[which], np.float32), np.cumsum(pairs[rank :: ranks.size]))
            for rank, values in enumerate(told)
        ]
        every.append(np.concatenate([parts[rank][place] for rank, place in places]))
    return replace(metrics, chosen_log_probs=every[0], rejected_log_probs=every[1])


def refuse_differences_of_step(ranks: Ranks, numbers: Sequence[tuple[float, float]]) -> None:
    """Raise `RankError` if loss and norm of the gradient are not the same numbers on all ranks."""
    for rank, (loss, norm) in enumerate(numbers):
        # As text, for which NaN is NaN.
        if str((loss, norm)) != str(numbers[0]):
            raise _on_first(
                ranks,
                f"the ranks do not agree any more: loss {loss!r} and gradient norm {norm!r} on rank {rank}, "
                f"{numbers[0][0]!r} and {numbers[0][1]!r} on rank 0; the last checkpoint is kept: start ranks on "
                "like machines with the same libraries and thread counts",
            )


def _on_first(ranks: Ranks, message: str) -> RankError:
    """Return the error of every rank. Only the first one says what it is."""
    return RankError(message if ranks.first else "")


def _facts(prepared: Prepared, placement: Placement) -> Iterator[tuple[str, str]]:
    yield "mindprint", __version__
    yield "backend", placement.backend.name
    for name, value in placement.environment().items():
        if name not in OF_ONE_MACHINE:
            yield name, value
    for name, setting in _settings(prepared.config.model_dump(mode="json")):
        if name not in PATHS:
            yield name, json.dumps(setting)
    yield from prepared.identity.items()
    held_out = json.dumps([list(prepared.split.facts.held_out), list(prepared.people)])
    yield "held-out text", hashlib.blake2b(held_out.encode(), digest_size=8).hexdigest()


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
