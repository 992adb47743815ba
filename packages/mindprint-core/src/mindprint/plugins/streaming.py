"""Tokens on their way from a backend to whoever listens, while answers are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mindprint.contract import Generation, OnToken
from mindprint.errors import ContractError


class TokenRelay:
    """The callback that a backend gets instead of the listener itself.

    It remembers the tokens, to compare them with the answers. It also keeps the listener's exceptions from the backend:
    raised there, they would be reported as the backend's. All rows end instead, and `error` is raised afterwards.
    """

    def __init__(self, on_token: OnToken, rows: int) -> None:
        self._on_token = on_token
        self.told: list[list[int]] = [[] for _ in range(rows)]
        self.ended: set[int] = set()
        self.error: BaseException | None = None

    def __call__(self, row: int, token: int, /) -> bool:
        if not 0 <= row < len(self.told):
            raise ContractError(f"mindprint_generate told a token of row {row}, there are {len(self.told)} rows")
        # A backend that does not listen to False must not reach the listener again.
        if row in self.ended:
            raise ContractError(f"mindprint_generate told another token of row {row}, which on_token had ended")
        self.told[row].append(int(token))
        if self.error is None:
            try:
                if self._on_token(row, int(token)) is not False:
                    return True
            # KeyboardInterrupt too: some frameworks turn it into an error of theirs on its way through.
            except BaseException as error:  # noqa: BLE001 (raised again by whoever called the backend)
                self.error = error
        self.ended.add(row)
        return False


def replay(generations: Sequence[Generation], on_token: OnToken) -> tuple[Generation, ...]:
    """Tell the tokens of finished answers, and cut each answer where the listener ends it."""
    heard = []
    for row, generation in enumerate(generations):
        answer = generation
        for place, token in enumerate(generation.tokens.tolist()):
            if on_token(row, token) is False:
                answer = replace(generation, tokens=generation.tokens[: place + 1], stop_reason="stop")
                break
        heard.append(answer)
    return tuple(heard)
