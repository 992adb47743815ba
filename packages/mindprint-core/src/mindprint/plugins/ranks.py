"""The ranks: processes that train one adapter together. Each has its share of the work, and they exchange the results.

A backend moves bytes between them (`mindprint_gather`). Everything else is here: whose turn it is, the values that are
exchanged, and agreement on a stop. A process that is alone exchanges nothing, and takes the same path.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from mindprint.contract import UInt8
from mindprint.errors import MindprintError, RankError

T = TypeVar("T")
Item = TypeVar("Item")

FRAME = struct.Struct("<Q?")
"""Before the bytes of a rank: their number, and whether the rank was asked to stop."""

BLOCK = 1024
"""The bytes of the first exchange, of which most need no other one: a call costs more than its bytes."""

PIECE = 2**24
"""The most bytes of a further exchange, in which every rank holds that many of each other one."""


def _refuse(_: UInt8) -> UInt8:
    raise AssertionError("a single rank has nobody to exchange with")


def to_json(value: Any) -> bytes:
    """Encode a value that JSON knows. Floats keep every bit, NaN and infinity included."""
    return json.dumps(value).encode()


class Ranks:
    """This process among those that train one adapter together.

    All methods that exchange anything are called by every rank, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, gather: Callable[[UInt8], UInt8] = _refuse) -> None:
        self.rank = rank
        self.size = size
        self._gather = gather
        self._stopping = False
        self.asked_to_stop: Callable[[], bool] = lambda: False
        """Returns whether this rank was asked to stop."""

    @property
    def alone(self) -> bool:
        """Whether this is the only rank."""
        return self.size == 1

    @property
    def world(self) -> tuple[int, int]:
        """This rank, and the number of ranks."""
        return self.rank, self.size

    @property
    def first(self) -> bool:
        """Whether this rank writes the files and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of this rank: every `size`-th one."""
        return items[self.rank :: self.size]

    def stop_requested(self) -> bool:
        """Return whether any rank had been asked to stop at the last exchange, on which all of them agree."""
        # Signals reach the processes at different moments. A rank that stopped a step before the others would leave
        # them waiting.
        return self.asked_to_stop() if self.alone else self._stopping

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order. A value is one that JSON knows."""
        return [value] if self.alone else [json.loads(content) for content in self.gather_bytes(to_json(value))]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return the bytes of all ranks, in their order. Each rank may have another number of them."""
        if self.alone:
            return [content]
        frame = FRAME.pack(len(content), self.asked_to_stop()) + content
        rows = self._gather(_padded(frame[:BLOCK], BLOCK))
        facts = [FRAME.unpack(row[: FRAME.size].tobytes()) for row in rows]
        self._stopping = any(stop for _, stop in facts)
        longest = FRAME.size + max(length for length, _ in facts)
        parts = [rows]
        # In pieces: while they are exchanged, each rank holds those of all others.
        for start in range(BLOCK, longest, PIECE):
            end = min(start + PIECE, longest)
            parts.append(self._gather(_padded(frame[start:end], end - start)))
        every = np.concatenate(parts, axis=1)
        return [row[FRAME.size : FRAME.size + length].tobytes() for row, (length, _) in zip(every, facts, strict=True)]

    def from_first(
        self,
        make: Callable[[], T],
        encode: Callable[[T], bytes] = to_json,
        decode: Callable[[bytes], T] = json.loads,
    ) -> T:
        """Return the value that the first rank makes. The others do not call `make`.

        Raises:
            MindprintError: `make` raised it on the first rank. The others raise `RankError` without a message.
        """
        if self.alone:
            return make()
        content, error = b"", None
        if self.first:
            try:
                made = make()
                content = b"+" + encode(made)
            except MindprintError as raised:
                error, content = raised, b"-"
        told = self.gather_bytes(content)[0]
        if error is not None:
            raise error
        if told[:1] == b"-":
            raise RankError("")
        return made if self.first else decode(told[1:])

    def together(self, make: Callable[[], T]) -> T:
        """Return `make()` if no rank failed in it.

        Raises:
            MindprintError: It failed on some rank. The first rank says on which and why, and the others nothing.
        """
        if self.alone:
            return make()
        error = None
        try:
            made = make()
        except MindprintError as raised:
            error = raised
        messages = self.gather(None if error is None else str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return made
        if not self.first:
            raise RankError("")
        # The same mistake on all ranks is told as a single process tells it.
        raise error or RankError(f"rank {failed[0]} of {self.size}: {messages[failed[0]]}")

    def divide(
        self,
        items: Sequence[Item],
        work: Callable[[Item], T],
        before: Callable[[int], None] = lambda _: None,
        encode: Callable[[T], Any] = lambda value: value,
        decode: Callable[[Any], T] = lambda value: value,
    ) -> Iterator[tuple[Item, T]]:
        """Yield each item with the result of `work`, in order. Each rank works on its share, and gets all results.

        `before` receives the number of items that are done, on every rank at the same moments. What it raises ends the
        work. Results travel as JSON: `encode` makes a value for it, and `decode` reads it.
        """
        for start in range(0, len(items), self.size):
            before(start)
            turn = items[start : start + self.size]
            if self.alone:
                yield turn[0], work(turn[0])
                continue
            # At the end there may be fewer items than ranks.
            result = encode(work(turn[self.rank])) if self.rank < len(turn) else None
            yield from zip(turn, map(decode, self.gather(result)[: len(turn)]), strict=True)


def _padded(content: bytes, length: int) -> UInt8:
    values = np.zeros(length, np.uint8)
    values[: len(content)] = np.frombuffer(content, np.uint8)
    return values
