"""An entry of the catalogue: a fault, the finding that it must lead to, and where it was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mindprint.trust.report import Code

Kind = Literal["adapter", "adapter, no fingerprint", "base", "backend", "conversion", "merge"]


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. `finds` is the code that verify must fail with, `refusal` the words of an error instead.

    `factor` is what a `scale` finding must estimate. A fault of a backend wraps the backend; one of a conversion breaks
    an adapter that was converted to mlx-lm's format.
    """

    name: str
    kind: Kind
    source: str
    apply: Callable[[Any], Any]
    finds: Code | None = None
    refusal: str = ""
    factor: float | None = None


FAULTS: list[Fault] = []


def fault(
    kind: Kind, source: str, finds: Code | None = None, *, refusal: str = "", factor: float | None = None
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Enter a function into the catalogue under its own name."""

    def enter(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = function.__name__.replace("_", " ")
        FAULTS.append(Fault(name, kind, source, function, finds, refusal, factor))
        return function

    return enter
