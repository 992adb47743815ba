"""Worker processes: each serves calls one after the other, and may run out of memory, hang or die without harm.

A worker imports everything before its first call and uses the GPU only in calls. So it can be started while another
one measures, and nobody waits for imports.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parents[1]
FRAMES = 6
"""The last lines of a traceback that are shown."""


class CallError(Exception):
    """A call that failed in its worker, with the error's last line and the frames that lead to it."""

    def __init__(self, message: str, frames: list[str]) -> None:
        super().__init__(message)
        self.frames = frames


class Worker:
    """A process that answers calls of `on_gpu.calls`. `reusable` says that nothing went wrong in it so far."""

    def __init__(self, log: Path) -> None:
        self.reusable = True
        self._log = log
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "on_gpu.workers"], cwd=HERE,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, call: str, seconds: float, **arguments: Any) -> Any:
        """Return the result of a call.

        Raises:
            CallError: If the call fails, takes longer than `seconds`, or ends the process.
        """
        reusable, self.reusable = self.reusable, False
        result = self._ask(call, seconds, arguments)
        self.reusable = reusable
        return result

    def _ask(self, call: str, seconds: float, arguments: dict[str, Any]) -> Any:
        if self._process.poll() is not None:
            raise CallError(f"the worker is dead (status {self._process.returncode})", self._log_end())
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise CallError(f"no answer in {seconds:.0f} s: stopped", self._log_end()) from None
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.stop()
            raise CallError(f"the worker died (status {self._process.returncode})", self._log_end())
        if "error" in answer:
            raise CallError(answer["error"], answer["frames"])
        return answer["result"]

    def stop(self) -> None:
        """End the process, and give its memory back."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def _log_end(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()[-FRAMES:]


class Workers:
    """The source of workers. Those that are done are used again, unless something went wrong in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._spare: list[Worker] = []

    def prepare(self, count: int) -> None:
        """Start workers ahead, so that `count` of them are importing or ready."""
        while len(self._spare) < count:
            self._spare.append(Worker(self._folder / f"worker-{self._count}.log"))
            self._count += 1

    def take(self) -> Worker:
        """Return a worker that nobody else has."""
        self.prepare(1)
        return self._spare.pop(0)

    def put_back(self, worker: Worker) -> None:
        """Take a worker back: for somebody else if it is sound, else to end it and import in a new one."""
        if worker.reusable:
            with suppress(CallError):
                worker.ask("forget", 60)
        if worker.reusable:
            self._spare.append(worker)
        else:
            worker.stop()
            self.prepare(1)

    @contextmanager
    def use(self) -> Iterator[Worker]:
        """Lend a worker for the time of this context."""
        worker = self.take()
        try:
            yield worker
        finally:
            self.put_back(worker)

    def stop(self) -> None:
        """End the workers that nobody took."""
        for worker in self._spare:
            worker.stop()


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer one call a line, until there are no more."""
    from on_gpu.calls import CALLS, free_memory, import_everything  # noqa: PLC0415

    import_everything()
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"result": CALLS[request["call"]](**request["arguments"])}
        except BaseException as error:  # noqa: BLE001  every failure is an answer here
            traceback.print_exc()
            frames = traceback.format_list(traceback.extract_tb(error.__traceback__))[-FRAMES:]
            message = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {message[0][:300]}", "frames": frames}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        free_memory()


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, channel)
