"""A base model's files compared with its record in the fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindprint.data.tokenizer import load_tokenizer
from mindprint.models import folder as models
from mindprint.models.tensor_files import FLOATS, read_float32
from mindprint.trust.digests import (
    QUANTIZATION,
    Difference,
    WeightsDigest,
    base_settings,
    differences,
    digest_weights,
    part_of,
)
from mindprint.trust.fingerprint import BaseRecord, TokenizerRecord
from mindprint.trust.measurement import record_tokenizer
from mindprint.trust.report import Finding, listed


@dataclass(frozen=True)
class Doubt:
    """A finding that files alone cannot decide: it is dropped if the probe shows the same log-probs."""

    finding: Finding

    def settled(self, *, same: bool) -> Finding:
        if not same:
            return self.finding
        message = f"{self.finding.message}; the probe is the same"
        return Finding("written_otherwise", message, fails=False, sites=self.finding.sites)


def base_findings(base: models.ModelFolder, recorded: BaseRecord) -> Iterator[Finding | Doubt]:
    """Compare weights and config.json with the record. Raises `ModelError` for files that cannot be read.

    The weights of a base that is quantized otherwise are other weights. The probe judges them (`other_quantization`).
    """
    if other_quantization(base, recorded) is None:
        yield from _weights(digest_weights(base.path, recorded.weights.method), recorded.weights, base)
    yield from settings_findings(differences(recorded.settings, base_settings(base)), "the base's")


def other_quantization(base: models.ModelFolder, recorded: BaseRecord) -> str | None:
    """Return words for a base that is quantized otherwise than the recorded one, None if it is not."""
    was, now = (settings.get(QUANTIZATION) or "full precision" for settings in (recorded.settings, base_settings(base)))
    return None if was == now else f"the adapter was trained on a base in {was}, and {base.name} is in {now}"


def _weights(found: WeightsDigest, recorded: WeightsDigest, base: models.ModelFolder) -> Iterator[Finding | Doubt]:
    parts = sorted(found.parts.keys() | recorded.parts.keys())
    other = [part for part in parts if found.parts.get(part) != recorded.parts.get(part)]
    changed = tuple(part for part in other if _laid_out_alike(part, found, recorded))
    # A fine-tuned base differs nearly everywhere, a damaged one in few places: the words should say which it is.
    if changed and len(changed) >= len(parts) / 2:
        yield Finding(
            "wrong_base", f"{base.name}: these weights are not those that the adapter was trained on", sites=changed
        )
    elif changed:
        message = f"{len(changed)} of the base's {len(parts)} parts have other weights ({listed(changed)})"
        yield Finding("base_changed", message, sites=changed)
        yield from _not_finite(base, changed)
    others = tuple(part for part in other if part not in changed)
    if others and found.dtype != recorded.dtype:
        message = f"the base is stored in {found.dtype}, where the adapter was trained in {recorded.dtype}"
        yield Doubt(Finding("wrong_base", message, sites=others))
    # Other names or shapes may be the same weights in another tool's layout: only the probe can tell.
    elif others:
        message = f"{len(others)} of the base's {len(parts)} parts have tensors of other names or shapes"
        yield Doubt(Finding("wrong_base", f"{message} ({listed(others)})", sites=others))


def _not_finite(base: models.ModelFolder, parts: Sequence[str]) -> Iterator[Finding]:
    """Report tensors of these parts that hold NaN or infinities."""
    inside = [(name, info) for name, info in models.tensors(base.path).items() if part_of(name) in parts]
    bad = tuple(name for name, info in inside if info.dtype in FLOATS and not np.isfinite(read_float32(info)).all())
    if bad:
        message = f"{len(bad)} of the base's tensors hold values that are NaN or infinite ({listed(bad)})"
        yield Finding("not_finite", message, sites=bad)


def _laid_out_alike(part: str, found: WeightsDigest, recorded: WeightsDigest) -> bool:
    one, other = found.parts.get(part), recorded.parts.get(part)
    return one is not None and other is not None and one.layout == other.layout


def settings_findings(changed: Sequence[Difference], whose: str) -> Iterator[Finding | Doubt]:
    """Report settings that differ. A one-sided one is left to the probe, unless it acts beyond the probe.

    Another quantization is not among them: what it does to the adapter is measured.
    """
    changed = [each for each in changed if each.setting != QUANTIZATION]
    for one_sided in (False, True):
        for of_rope in (True, False):
            these = [each for each in changed if (each.one_sided, each.of_rope) == (one_sided, of_rope)]
            if these:
                what = "rotary embedding" if of_rope else "configuration"
                message = f"{whose} {what} differs: {listed(list(map(str, these)))}"
                names = tuple(difference.setting for difference in these)
                finding = Finding("rope_differs" if of_rope else "config_differs", message, sites=names)
                # Beyond its longest row the probe shows nothing, so it cannot settle a setting that acts there.
                settles = one_sided and not any(map(_acts_beyond_the_probe, names))
                yield Doubt(finding) if settles else finding


def _acts_beyond_the_probe(setting: str) -> bool:
    """Return whether a setting can leave the first tokens of a text as they are and change later ones."""
    return setting.startswith("rope.") or any(
        word in setting for word in ("position", "window", "chunk", "layer_types")
    )


def tokenizer_findings(model: models.ModelFolder, recorded: TokenizerRecord) -> Iterator[Finding]:
    """Compare tokenizer, chat template and the tokens that end an answer with the record."""
    found = record_tokenizer(load_tokenizer(model.path))
    if found.digest != recorded.digest:
        yield Finding("tokenizer_changed", f"{model.name}: the tokenizer is another one, text becomes other tokens")
    # Empty: a fingerprint of format 1 did not record it.
    if recorded.decoder and found.decoder != recorded.decoder:
        yield Finding(
            "tokenizer_changed", f"{model.name}: the tokenizer's decoder is another one, tokens become other text"
        )
    if recorded.variables and found.variables != recorded.variables:
        message = "the special tokens that the chat template writes (such as bos_token) are others than in training"
        yield Finding("template_changed", f"{model.name}: {message}")
    if found.template != recorded.template:
        yield Finding("template_changed", f"{model.name}: the chat template is another one than in training")
    was, now = sorted(recorded.stop_token_ids), sorted(found.stop_token_ids)
    if was != now:
        yield Finding("stop_tokens_differ", f"{model.name}: answers end at the tokens {now}, in training at {was}")
