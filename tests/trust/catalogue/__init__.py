"""Every known way in which an adapter, a base, a backend or a merge goes wrong in silence, one small function each.

A function takes a good artefact and breaks it. Its entry has what `mindprint verify` must say (a code of
`mindprint.trust.report`, or the words of a refusal), and where it was seen: a public report, or why it can happen.
"""

from __future__ import annotations

from catalogue import (  # noqa: F401 (importing a module enters its faults)
    adapter_settings,
    adapter_strength,
    adapter_tensors,
    adapter_values,
    backends,
    bases,
    conversions,
    fingerprints,
    merges,
)
from catalogue.entry import FAULTS, Fault
from catalogue.thorough import THOROUGH

__all__ = ["FAULTS", "THOROUGH", "Fault"]
