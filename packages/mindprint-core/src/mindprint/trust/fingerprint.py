"""The fingerprint of an adapter: its identity and its effect, recorded after training (format: docs/fingerprint.md).

Exact digests first, then the probe's log-probs with the base alone and with the adapter, and the noise of measuring.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindprint._version import __version__
from mindprint.contract import Dtype, Float32
from mindprint.errors import AdapterError
from mindprint.input_files import MALFORMED, read_json, typed
from mindprint.trust.changes import Change
from mindprint.trust.digests import WeightsDigest
from mindprint.trust.probe import DECIMALS, Noise, Probe, Source

FILE_NAME = "fingerprint.json"
FORMAT = 2
"""Format 1 had no digest of the whole, and none of rounded factors, of the decoder and of template variables."""


@dataclass(frozen=True)
class AdapterRecord:
    """The adapter: digest of its canonical float32 tensors and scales, its LoRA facts, and each module's change.

    `rounded` has the digests of the same adapter with its factors in bfloat16 and float16, empty in format 1.
    """

    digest: str
    r: int
    alpha: float
    use_rslora: bool
    changes: Mapping[str, Change]
    rounded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseRecord:
    """The base: its name, what its config.json says about computing, and digests of its weights."""

    name: str
    settings: Mapping[str, Any]
    weights: WeightsDigest


@dataclass(frozen=True)
class TokenizerRecord:
    """Digests of tokenizer and chat template, and the tokens that end an answer.

    `decoder` is of the part that turns tokens into text, `variables` of the special tokens that the template writes.
    Both are empty in format 1.
    """

    digest: str
    template: str
    stop_token_ids: tuple[int, ...]
    decoder: str = ""
    variables: str = ""


@dataclass(frozen=True)
class Measurement:
    """The probe's log-probs, float32 `[probe.tokens]`, without and with the adapter, and where they were computed."""

    backend: str
    device: str
    dtype: Dtype
    libraries: Mapping[str, str]
    base: Float32
    adapter: Float32
    noise: Noise

    @property
    def effect(self) -> float:
        """Return the mean |log p(with) - log p(without)|, nats a token."""
        return mean_effect(self.base, self.adapter)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that `mindprint verify` compares with. `measurements` are by dtype, the trained one first."""

    adapter: AdapterRecord
    base: BaseRecord
    tokenizer: TokenizerRecord
    probe: Probe
    measurements: tuple[Measurement, ...]
    mindprint: str = __version__

    def measurement(self, dtype: Dtype) -> Measurement:
        """Return the measurement in this dtype, or else the finest that there is."""
        order = {"float32": 0, "float16": 1, "bfloat16": 2}
        return min(self.measurements, key=lambda one: (one.dtype != dtype, order[one.dtype]))


def mean_effect(base: Float32, adapter: Float32) -> float:
    """Return the mean absolute difference of two arrays of log-probs, nats a token."""
    return float(np.abs(adapter.astype(np.float64) - base).mean())


def fingerprint_json(fingerprint: Fingerprint) -> str:
    """Return the content of fingerprint.json: one line a part, one a module, one a measurement."""
    content = {
        "format": FORMAT,
        "mindprint": fingerprint.mindprint,
        "adapter": asdict(fingerprint.adapter),
        "base": asdict(fingerprint.base),
        "tokenizer": asdict(fingerprint.tokenizer),
        "probe": {"source": fingerprint.probe.source, "rows": [row.tolist() for row in fingerprint.probe.rows]},
        "measurements": [_measurement_values(measurement) for measurement in fingerprint.measurements],
    }
    # The digest is of the values as a reader gets them, tuples as lists.
    return _lines({**content, "digest": _content_digest(json.loads(json.dumps(content)))}) + "\n"


def _content_digest(values: Mapping[str, Any]) -> str:
    """Return a digest of everything in a fingerprint but the digest itself, in any order and layout."""
    content = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """Return the fingerprint in an adapter's folder, None without one. Raises `AdapterError` if it cannot be read."""
    file = folder / FILE_NAME
    # A broken link or a pipe is not the absence of a fingerprint: reading it fails, in one line.
    if not os.path.lexists(file):
        return None
    try:
        values = read_json(file)
        if values["format"] not in (1, FORMAT):
            raise AdapterError(
                f"{file}: is in fingerprint format {values['format']}, this Mindprint reads formats 1 and {FORMAT}"
            )
        # An edited part would decide what is found. Without this check only a part that contradicts another shows.
        if values["format"] != 1 and values["digest"] != _content_digest(values):
            raise ValueError("its content does not have the digest that it states")
        return _fingerprint(values)
    except (OSError, *MALFORMED) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{file}: is truncated or edited ({type(error).__name__}: {error}); restore it, or delete it to have the "
            "adapter checked without"
        ) from error


@dataclass(frozen=True)
class _ProbeFacts:
    """The probe as the file has it."""

    rows: tuple[tuple[int, ...], ...]
    source: Source


@dataclass(frozen=True)
class _Where:
    """The place of a measurement, as the file has it."""

    backend: str
    device: str
    dtype: Dtype
    libraries: Mapping[str, str]


def _measurement_values(measurement: Measurement) -> dict[str, Any]:
    return {
        **asdict(measurement),
        "base": [round(float(value), DECIMALS) for value in measurement.base],
        "adapter": [round(float(value), DECIMALS) for value in measurement.adapter],
        "effect": measurement.effect,
    }


def _fingerprint(values: Mapping[str, Any]) -> Fingerprint:
    probe = typed(_ProbeFacts, values["probe"])
    for change in values["adapter"]["changes"].values():
        _require_finite(change)
    found = Fingerprint(
        typed(AdapterRecord, values["adapter"]),
        typed(BaseRecord, values["base"]),
        typed(TokenizerRecord, values["tokenizer"]),
        Probe(tuple(np.array(row, np.int32) for row in probe.rows), probe.source),
        tuple(map(_measurement, values["measurements"])),
        typed(str, values["mindprint"]),
    )
    if any(len(row) < 2 for row in found.probe.rows):
        raise ValueError("a row of the probe is too short to predict anything")
    if not found.measurements or any(len(each.base) != found.probe.tokens for each in found.measurements):
        raise ValueError("the measurements do not belong to the probe")
    return found


def _require_finite(change: Mapping[str, Any]) -> None:
    if not all(math.isfinite(number) for number in [change["scale"], change["norm"], *change["traces"]]):
        raise ValueError("a change is not finite")


def _measurement(values: Mapping[str, Any]) -> Measurement:
    base, adapter = (np.array(values[name], np.float32) for name in ("base", "adapter"))
    if base.shape != adapter.shape or not (np.isfinite(base).all() and np.isfinite(adapter).all()):
        raise ValueError("a measurement's log-probs are not finite, or not as many with the adapter as without")
    if base.ndim != 1:
        raise ValueError("a measurement's log-probs are not a list of numbers")
    where = typed(_Where, values)
    return Measurement(
        where.backend, where.device, where.dtype, where.libraries, base, adapter, typed(Noise, values["noise"])
    )


def _lines(value: Any, depth: int = 3, indent: str = "") -> str:
    """Return JSON with one entry a line down to `depth`, for people who look and for version control."""
    inner = indent + " "
    if depth and isinstance(value, Mapping) and value:
        entries = [f"{inner}{json.dumps(key)}: {_lines(item, depth - 1, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    # Rows of numbers stay on one line each: a line for every number would make the file unreadable.
    if depth and isinstance(value, list | tuple) and value and isinstance(value[0], list | dict):
        return "[\n" + ",\n".join(inner + _lines(item, depth - 2, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)
