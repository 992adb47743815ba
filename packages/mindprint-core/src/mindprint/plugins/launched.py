"""The place of this process among those that a launcher started, as the launcher's environment variables say.

Nothing is connected here: a backend does that at its first exchange. A launcher that was imitated by hand, or whose
variables a job hands over in part, is refused, before each process would train a run for itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mindprint.errors import BackendError

World = tuple[int, int]
"""A rank, from 0, and the number of ranks."""

ALONE: World = (0, 1)


def torchrun_world() -> World:
    """Return the world of `torchrun`, or of a program that sets the same variables.

    Raises:
        BackendError: Only some of them are set, or they contradict each other.
    """
    return _counted_world("torchrun", "RANK", "WORLD_SIZE", needed=("MASTER_ADDR", "MASTER_PORT"))


def mlx_world() -> World:
    """Return the world of `mlx.launch`: of its ring, of NCCL, or of RDMA over Thunderbolt.

    Raises:
        BackendError: Only some of its variables are set, or they contradict each other.
    """
    lists = [name for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES", "JACCL_IBV_DEVICES") if name in os.environ]
    if not lists:
        return _counted_world("mlx.launch", "MLX_RANK", "MLX_WORLD_SIZE", needed=("NCCL_HOST_IP", "NCCL_PORT"))
    rank = next((name for name in ("MLX_RANK", "JACCL_RANK") if name in os.environ), None)
    if rank is None:
        raise _half_set("mlx.launch", lists[0], "MLX_RANK")
    path = Path(os.environ[lists[0]])
    try:
        text = path.read_text(encoding="utf-8")
        # For a single process `mlx.launch` writes an empty file.
        hosts = json.loads(text) if text.strip() else ["alone"]
        count = len(hosts)
    except (OSError, ValueError, TypeError) as error:
        raise BackendError(
            f"{lists[0]} names {path}, which is not a list of hosts ({error}): start with mlx.launch, or unset it"
        ) from error
    return _checked(rank, lists[0], _number(rank), count)


def _mpi_world() -> World:
    return _counted_world("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


LAUNCHERS: Mapping[str, Callable[[], World]] = {
    "torchrun": torchrun_world,
    "mlx.launch": mlx_world,
    "mpirun": _mpi_world,
}
"""What each launcher says, by its name."""


def launched() -> tuple[World, str]:
    """Return the world of this process, and the launcher that says so. It is alone where no launcher says anything.

    Raises:
        BackendError: The variables of a launcher are set in part.
    """
    for name, world in LAUNCHERS.items():
        found = world()
        if found != ALONE:
            return found, name
    return ALONE, ""


def launched_here() -> int:
    """Return the number of ranks on this machine, as `torchrun` states it. Where nothing states it, this one alone."""
    stated = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(stated), 1) if stated.isdigit() else 1


def _counted_world(launcher: str, rank: str, size: str, needed: Sequence[str] = ()) -> World:
    """Return the world where one variable has the rank and another one the number of ranks."""
    if rank not in os.environ and size not in os.environ:
        return ALONE
    for present, absent in ((rank, size), (size, rank)):
        if absent not in os.environ:
            raise _half_set(launcher, present, absent)
    world = _checked(rank, size, _number(rank), _number(size))
    if world != ALONE:
        for name in needed:
            if name not in os.environ:
                raise _half_set(launcher, size, name)
    return world


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise BackendError(f"{name} is {os.environ[name]!r}, which is not a whole number: unset it") from None


def _checked(rank: str, size: str, number: int, count: int) -> World:
    if not 0 <= number < count:
        raise BackendError(
            f"{rank} is {number} and {size} says that there are {count} processes: ranks are counted from 0; start "
            "all processes with a launcher, or unset both variables"
        )
    return number, count


def _half_set(launcher: str, present: str, absent: str) -> BackendError:
    return BackendError(
        f"{present} is set and {absent} is not: the environment of {launcher} is half set; start all processes with "
        f"{launcher}, or unset {present}"
    )
