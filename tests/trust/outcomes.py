"""What the trust suite saw, for the table at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

_SEEN: dict[str, Counter[str]] = {"faults": Counter(), "found": Counter(), "sound": Counter(), "alarms": Counter()}


def fault(kind: str, *, found: bool) -> None:
    """A fault was tried; whether it was found, by its right name."""
    _SEEN["faults"][kind] += 1
    _SEEN["found"][kind] += found


def sound(kind: str, *, alarm: bool) -> None:
    """A sound artefact was verified; whether something failed."""
    _SEEN["sound"][kind] += 1
    _SEEN["alarms"][kind] += alarm


def seen() -> dict[str, dict[str, int]]:
    """All of it as plain values, for another process."""
    return {name: dict(counter) for name, counter in _SEEN.items()}


def add(others: Mapping[str, Mapping[str, int]]) -> None:
    """Add what another process saw."""
    for name, counts in others.items():
        _SEEN[name].update(counts)


def table() -> list[str]:
    """The lines of the table; none if nothing was tried."""
    faults, found, sounds, alarms = (_SEEN[name] for name in ("faults", "found", "sound", "alarms"))
    if not faults and not sounds:
        return []
    lines = ["", "trust: what verify finds", f"{'':24s}{'faults':>8s}{'found':>8s}{'sound':>8s}{'alarms':>8s}"]
    lines += [
        f"{kind:24s}{faults[kind]:8d}{found[kind]:8d}{sounds[kind]:8d}{alarms[kind]:8d}"
        for kind in sorted(faults | sounds)
    ]
    total = [sum(counter.values()) for counter in (faults, found, sounds, alarms)]
    lines.append(f"{'all':24s}{total[0]:8d}{total[1]:8d}{total[2]:8d}{total[3]:8d}")
    rate = 100 * total[1] / total[0] if total[0] else 100.0
    lines.append(f"detection {rate:.0f}%, false alarms {total[3]} of {total[2]}")
    return lines
