"""What the trust suite saw, for the table at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mindprint.trust.report import Report

_SEEN: dict[str, Counter[str]] = {
    "faults": Counter(),
    "found": Counter(),
    "sound": Counter(),
    "alarms": Counter(),
    "worst": Counter(),
}


def fault(kind: str, *, found: bool) -> None:
    """A fault was tried; whether it was found, by its right name."""
    _SEEN["faults"][kind] += 1
    _SEEN["found"][kind] += found


def sound(kind: str, report: Report) -> None:
    """A sound artefact was verified. An alarm is anything that failed."""
    _SEEN["sound"][kind] += 1
    _SEEN["alarms"][kind] += not report.ok
    for comparison in report.comparisons:
        allowed = comparison.tolerance
        share = max(comparison.mean / allowed.mean, comparison.greatest / allowed.greatest)
        # Whole numbers of a thousandth: the counters add up what several processes saw, and shares only grow.
        _SEEN["worst"][kind] = max(_SEEN["worst"][kind], round(1000 * share))


def seen() -> dict[str, dict[str, int]]:
    """All of it as plain values, for another process."""
    return {name: dict(counter) for name, counter in _SEEN.items()}


def add(others: Mapping[str, Mapping[str, int]]) -> None:
    """Add what another process saw."""
    for name, counts in others.items():
        if name == "worst":
            _SEEN[name] |= Counter(counts)
        else:
            _SEEN[name].update(counts)


def table() -> list[str]:
    """The lines of the table; none if nothing was tried."""
    faults, found, sounds, alarms, worst = (_SEEN[name] for name in ("faults", "found", "sound", "alarms", "worst"))
    if not faults and not sounds:
        return []
    heads = ("faults", "found", "sound", "alarms", "worst")
    lines = ["", "trust: what verify finds", f"{'':42s}" + "".join(f"{head:>8s}" for head in heads)]
    lines += [
        f"{kind:42s}{faults[kind]:8d}{found[kind]:8d}{sounds[kind]:8d}{alarms[kind]:8d}{_share(worst[kind])}"
        for kind in sorted(faults | sounds)
    ]
    total = [sum(counter.values()) for counter in (faults, found, sounds, alarms)]
    lines.append(f"{'all':42s}{total[0]:8d}{total[1]:8d}{total[2]:8d}{total[3]:8d}")
    rate = 100 * total[1] / total[0] if total[0] else 100.0
    lines.append(f"detection {rate:.0f}%, false alarms {total[3]} of {total[2]}")
    if total[2] and not total[3]:
        # The rule of three: none in n tries leaves a rate of up to 3 / n with 95% confidence.
        lines.append(f"false alarms are below {300 / total[2]:.1f}% with 95% confidence")
    lines.append("worst: the greatest difference of log-probs, as a share of its tolerance")
    return lines


def _share(thousandths: int) -> str:
    return f"{thousandths / 1000:8.2f}" if thousandths else f"{'':8s}"
