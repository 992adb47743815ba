"""Requests that wait for the model, answered together where they can be. No HTTP here.

A model computes one batch at a time, in the thread that loaded it. Requests come from other threads and wait. When the
model is free it takes the oldest one, together with all others that ask for the same model, each with its settings. An
answer does not depend on its neighbours but for rounding, which the contract promises.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mindprint.contract import Generation, Int32, Sampling
from mindprint.data.text_stream import TextStream, answer_stream, finished_answer
from mindprint.errors import DataError, first_line
from mindprint.runs.opened import OpenedModel
from mindprint.serving.protocol import DEFAULT_LIMITS, Asked, Limits, RequestError, Usage

GATHER_SECONDS = 0.01
"""Time that the model waits for further requests, so that requests which are sent at once share a batch."""


@dataclass(frozen=True)
class Finished:
    """The end of an answer: its whole text, why it ended, and its numbers of tokens."""

    text: str
    reason: Literal["stop", "length"]
    usage: Usage


Event = str | Finished | RequestError
"""A piece of an answer's text, its end, or its failure. Nothing follows an end or a failure."""

Listener = Callable[[Event], None]
"""Takes the events of one request, in the model's thread. It must not wait."""


class Job:
    """A request on its way. `cancel` ends it, from any thread: while it waits at once, and otherwise within a token."""

    def __init__(self, asked: Asked, listener: Listener) -> None:
        self.asked = asked
        self._listener = listener
        self.cancelled = False
        self.prompt: Int32 | None = None
        """The prompt's tokens, once it has been rendered."""

    def cancel(self) -> None:
        """Give the answer up. The job counts no longer."""
        self.cancelled = True

    def tell(self, event: Event) -> None:
        """Hand an event to the listener. A listener that fails has left, and must not end the answers of others."""
        try:
            self._listener(event)
        except Exception:  # noqa: BLE001 (of a closed event loop, mostly)
            self.cancelled = True


class Batcher:
    """The queue between requests and the model.

    Args:
        opened: The model.
        sides: The names under which it is asked for, and whether each of them has the adapter.
        limits: The bounds of a request. The context is checked here, once a prompt's tokens are known.
        most_together: The largest batch.
        most_jobs: The most jobs that wait or are being answered. Further ones are refused.
    """

    def __init__(
        self,
        opened: OpenedModel,
        sides: Mapping[str, bool],
        limits: Limits = DEFAULT_LIMITS,
        *,
        most_together: int = 8,
        most_jobs: int = 64,
    ) -> None:
        self._opened = opened
        self._sides = sides
        self._limits = limits
        self._most_together = most_together
        self._most_jobs = most_jobs
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: tuple[Job, ...] = ()
        self._closed = False
        self.batches: list[int] = []
        """The sizes of the last batches, for health checks and tests."""

    @property
    def jobs(self) -> int:
        """The number of jobs that wait or are being answered."""
        with self._changed:
            return self._count()

    def submit(self, asked: Asked, listener: Listener) -> Job:
        """Queue a request. Raises `RequestError` if too many wait already, or if the server is being stopped."""
        job = Job(asked, listener)
        with self._changed:
            if self._closed:
                raise RequestError("the server is being stopped", 503, code="stopped")
            if self._count() >= self._most_jobs:
                raise RequestError(
                    f"{self._most_jobs} requests are waiting already: try again later", 429, code="too_many_requests"
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def close(self) -> None:
        """Refuse further requests, end the present ones, and let `run` return."""
        with self._changed:
            self._closed = True
            for job in (*self._running, *self._waiting):
                job.cancel()
            self._changed.notify_all()

    def run(self) -> None:
        """Answer requests until the queue is closed. Called in the thread that loaded the model."""
        try:
            while batch := self._next_batch():
                self._answer(batch)
                with self._changed:
                    self._running = ()
        finally:
            self.close()
            for job in (*self._running, *self._waiting):
                job.tell(RequestError("the server is being stopped", 503, code="stopped"))

    def _count(self) -> int:
        return sum(not job.cancelled for job in (*self._waiting, *self._running))

    def _next_batch(self) -> tuple[Job, ...]:
        """Wait for requests. Return those that are answered next, none if the queue is closed."""
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    # With a timeout, so that a Ctrl-C in this thread is seen on every system.
                    self._changed.wait(0.5)
                if self._closed:
                    return ()
            if len(self._waiting) < self._most_together:
                time.sleep(GATHER_SECONDS)
            with self._changed:
                self._waiting = [job for job in self._waiting if not job.cancelled]
                unread = [job for job in self._waiting if job.prompt is None]
            # Outside of the lock: templates take time, and requests must be able to come in.
            refused = {job for job in unread if not self._render(job)}
            with self._changed:
                self._waiting = [job for job in self._waiting if job not in refused and not job.cancelled]
                self._running = self._take_batch()
                if self._running:
                    return self._running

    def _take_batch(self) -> tuple[Job, ...]:
        """Take the oldest job that is ready out of the queue, and those that can share its batch."""
        batch: list[Job] = []
        for job in self._waiting:
            if len(batch) == self._most_together:
                break
            if job.prompt is not None and (not batch or job.asked.model == batch[0].asked.model):
                batch.append(job)
        self._waiting = [job for job in self._waiting if job not in batch]
        return tuple(batch)

    def _render(self, job: Job) -> bool:
        """Read a job's prompt as tokens, or tell that it is refused."""
        try:
            job.prompt = self._read_prompt(job.asked)
        except RequestError as error:
            job.tell(error)
        except DataError as error:
            job.tell(RequestError(str(error)))
        except Exception as error:  # noqa: BLE001 (likewise: a tokenizer's own libraries raise anything)
            job.tell(_failure(error))
        return job.prompt is not None

    def _read_prompt(self, asked: Asked) -> Int32:
        is_chat, longest = asked.kind == "chat", asked.settings.longest
        field = "messages" if is_chat else "prompt"
        prompt = self._opened.render(asked.prompt, data_format="chat" if is_chat else "raw")
        if not len(prompt):
            raise RequestError("the prompt has no tokens", param=field)
        if self._limits.context is not None and len(prompt) + longest > self._limits.context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the answer up to {longest}, together more than the "
                f"{self._limits.context} that this model can read",
                param=field,
                code="context_length_exceeded",
            )
        return prompt

    def _answer(self, batch: Sequence[Job]) -> None:
        prompts = [job.prompt for job in batch if job.prompt is not None]
        streams = [self._stream(job) for job in batch]

        def tell(row: int, token: int) -> bool:
            job, stream = batch[row], streams[row]
            if job.cancelled:
                return False
            if piece := stream.add(token):
                job.tell(piece)
            return not stream.stopped

        samplings = [self._sampling(job.asked) for job in batch]
        adapter = self._sides[batch[0].asked.model]
        backend, model = self._opened.backend, self._opened.model
        try:
            made = backend.generate(model, prompts, samplings, adapter=adapter, on_token=tell)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next request may be answered)
            for job in batch:
                job.tell(_failure(error))
            return
        self.batches = [*self.batches[-99:], len(batch)]
        for job, stream, generation in zip(batch, streams, made, strict=True):
            if not job.cancelled:
                self._finish(job, stream, generation)

    def _sampling(self, asked: Asked) -> Sampling:
        # Nobody who leaves the seed out expects the same answer twice.
        return self._opened.sampling(asked.settings, secrets.randbits(63) if asked.seed is None else asked.seed)

    def _stream(self, job: Job) -> TextStream:
        tokenizer = self._opened.tokenizer
        if job.asked.kind == "chat":
            assert job.prompt is not None
            return answer_stream(tokenizer, job.prompt, job.asked.stop)
        # A completion continues its prompt, so the space at its beginning belongs to it.
        return TextStream(tokenizer.decode, stop=job.asked.stop)

    def _finish(self, job: Job, stream: TextStream, generation: Generation) -> None:
        assert job.prompt is not None
        tokens = generation.tokens.tolist()
        tokenizer, is_chat = self._opened.tokenizer, job.asked.kind == "chat"
        text = finished_answer(tokenizer, job.prompt, tokens) if is_chat else tokenizer.decode(tokens)
        if rest := stream.finish(text):
            job.tell(rest)
        reason = "stop" if stream.stopped else generation.stop_reason
        job.tell(Finished(stream.cut(text)[0], reason, Usage(len(job.prompt), len(tokens))))


def _failure(error: Exception) -> RequestError:
    """Return the failure that a client is told: one line, which names the backend and the finding, and no traceback."""
    return RequestError(f"the model failed: {first_line(error)}", 500, code="model_failed")
