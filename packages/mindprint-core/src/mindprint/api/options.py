"""Arguments that several functions of the API share, in the form that the rooms below take."""

from __future__ import annotations

from collections.abc import Callable

from mindprint.config import BackendConfig
from mindprint.contract import Dtype
from mindprint.events import Notice

OnNotice = Callable[[Notice], None]
"""A function that receives messages for a person, as soon as they are known."""


class Notices:
    """A collection of notices that also hands each one on as it comes."""

    def __init__(self, on_notice: OnNotice | None) -> None:
        self._on_notice = on_notice
        self._heard: list[Notice] = []

    def __call__(self, message: str, *, warning: bool = False) -> None:
        notice = Notice(message, warning)
        # Kept before it is handed over: a listener that raises must not lose it.
        self._heard.append(notice)
        if self._on_notice is not None:
            self._on_notice(notice)

    @property
    def heard(self) -> tuple[Notice, ...]:
        """All notices so far, in order."""
        return tuple(self._heard)


def backend_section(backend: str | None, device: str | None, dtype: Dtype | None = None) -> BackendConfig | None:
    """Return the backend section that a caller asks for, or None to leave the choice to the run."""
    # A dtype alone is ignored: it would silently replace the run's backend by "auto".
    if backend is None and device is None:
        return None
    return BackendConfig(type=backend or "auto", device=device or "auto", dtype=dtype or "auto")
