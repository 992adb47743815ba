"""Work that is divided over processes of this machine, one for each core.

A worker is a new Python process and not a fork, because a fork of a process with threads (those of a tokenizer or a
framework) can hang. It is not `multiprocessing` either, which runs the user's script again in each process unless the
script guards against it.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from mindprint.errors import MindprintError

_MAIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mindprint.data.processes import serve; serve()"


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    # Not everywhere can a process be bound to some of the cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def results_in_order(factory: str, arguments: tuple[Any, ...], items: Iterable[Any]) -> Iterator[Any]:
    """Yield `factory(*arguments)(item)` for each item, in order, computed by a process for each core.

    `factory` is `module:function`, imported in each process. An error that an item raises is raised here. Raises
    `MindprintError` if a process ends too early.
    """
    count = available_cores()
    if count == 1:
        yield from map(_imported(factory)(*arguments), items)
        return
    workers = [Worker(factory, arguments) for _ in range(count)]
    try:
        # Each worker has one item at a time: neither side ever waits for the other to read.
        busy: deque[Worker] = deque()
        for number, item in enumerate(items):
            worker = workers[number] if number < count else busy.popleft()
            result = worker.receive() if number >= count else None
            # The next item first: the worker computes while the caller uses the result.
            worker.send(item)
            busy.append(worker)
            if number >= count:
                yield result
        while busy:
            yield busy.popleft().receive()
    finally:
        for worker in workers:
            worker.end()


class Worker:
    """One process, which answers items through pipes."""

    def __init__(self, factory: str, arguments: tuple[Any, ...]) -> None:
        # One thread each: the processes share the cores.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _MAIN, json.dumps(sys.path)]
        # This program, with a text from this module.
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.send((factory, arguments))

    def send(self, item: Any) -> None:
        """Send an item. Its answer must be received before the next one is sent."""
        assert self._process.stdin is not None
        try:
            pickle.dump(item, self._process.stdin, protocol=5)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> Any:
        """Return the answer to the item that was sent, or raise what it raised."""
        assert self._process.stdout is not None
        try:
            error, result = pickle.load(self._process.stdout)  # noqa: S301 (from a process of our own)
        except EOFError:
            raise self._ended() from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """End the process. Nothing happens if it has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # Items that an ended process did not read cannot be written any more.
                _close(pipe)

    def _ended(self) -> MindprintError:
        return MindprintError(
            f"a process that prepares rows ended early (exit code {self._process.wait()}): was it killed, or is the "
            "memory full? Run the command again: rows that were read before are kept"
        )


def serve() -> None:
    """Answer items on standard input until it ends: with the main process, however that ends."""
    import signal  # noqa: PLC0415 (for workers only)

    # Ctrl-C reaches every process of a terminal. The main process decides, and its end ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not come between the results.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    items = sys.stdin.buffer
    factory, arguments = pickle.load(items)  # noqa: S301 (from the main process)
    function: Callable[[Any], Any] | None = None
    while True:
        try:
            item = pickle.load(items)  # noqa: S301 (from the main process)
        except EOFError:
            return
        try:
            function = function or _imported(factory)(*arguments)
            answer: tuple[Exception | None, Any] = (None, function(item))
        except Exception as error:  # noqa: BLE001 (the main process raises it)
            answer = (error, None)
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


def _imported(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    result: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return result


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return
