"""Fingerprints that were edited, cut off or lost."""

from __future__ import annotations

import shutil
from typing import Any

from artefacts import Artefact, edit_config, make_base

from catalogue.adapter_values import every_value_is_nan, factors_are_transposed, nothing_was_trained
from catalogue.edits import edit_fingerprint
from catalogue.entry import fault
from mindprint.trust.fingerprint import FILE_NAME


@fault("adapter", "one log-prob of the fingerprint edited", refusal="does not have the digest that it states")
def a_log_prob_of_the_fingerprint_is_edited(it: Artefact) -> None:
    edit_fingerprint(it, lambda found: found["measurements"][0]["adapter"].__setitem__(7, -1.5))


@fault("adapter", "the noise edited so that everything is within it", refusal="does not have the digest that it states")
def the_noise_of_the_fingerprint_is_edited(it: Artefact) -> None:
    edit_fingerprint(it, lambda found: found["measurements"][0]["noise"].update(mean=1.0, greatest=9.0))


@fault("adapter", "a part of the probe edited", refusal="does not have the digest that it states")
def the_probe_of_the_fingerprint_is_edited(it: Artefact) -> None:
    edit_fingerprint(it, lambda found: found["probe"]["rows"][0].__setitem__(3, 11))


@fault("adapter", "the base's settings edited", refusal="does not have the digest that it states")
def a_setting_of_the_fingerprint_is_edited(it: Artefact) -> None:
    edit_fingerprint(it, lambda found: found["base"]["settings"].update(rms_norm_eps=1e-9))


@fault("adapter", "the digests of the base's weights edited", refusal="does not have the digest that it states")
def a_digest_of_the_fingerprint_is_edited(it: Artefact) -> None:
    def edited(found: dict[str, Any]) -> None:
        next(iter(found["base"]["weights"]["parts"].values()))["values"] = "0" * 32

    edit_fingerprint(it, edited)


@fault("adapter", "the stop tokens edited", refusal="does not have the digest that it states")
def the_stop_tokens_of_the_fingerprint_are_edited(it: Artefact) -> None:
    edit_fingerprint(it, lambda found: found["tokenizer"].update(stop_token_ids=[1]))


@fault("adapter", "a change of one module edited", refusal="does not have the digest that it states")
def a_change_of_the_fingerprint_is_edited(it: Artefact) -> None:
    def edited(found: dict[str, Any]) -> None:
        next(iter(found["adapter"]["changes"].values()))["norm"] *= 1.5

    edit_fingerprint(it, edited)


@fault("adapter", "the fingerprint of a newer Mindprint", refusal="is in fingerprint format 9")
def the_fingerprint_is_of_another_format(it: Artefact) -> None:
    edit_fingerprint(it, lambda found: found.update(format=9))


@fault("adapter", "half of a fingerprint", refusal="is truncated or edited")
def the_fingerprint_is_truncated(it: Artefact) -> None:
    file = it.adapter / FILE_NAME
    file.write_text(file.read_text()[:3000])


@fault("adapter, no fingerprint", "unslothai/unsloth#2142: an adapter that changes nothing", "no_effect")
def without_fingerprint_nothing_was_trained(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    nothing_was_trained(it)


@fault("adapter, no fingerprint", "openvla/openvla#53: NaN after fine-tuning", "not_finite")
def without_fingerprint_values_are_nan(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    every_value_is_nan(it)


@fault("adapter, no fingerprint", "Blaizzy/mlx-vlm#841 at a usual alpha: stronger than the base itself", "scale")
def without_fingerprint_it_is_far_too_strong(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    edit_config(it, lora_alpha=400)


@fault("adapter, no fingerprint", "osaurus-ai/vmlx-swift#320", "transposed")
def without_fingerprint_factors_are_transposed(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    factors_are_transposed(it)


@fault(
    "adapter, no fingerprint", "unslothai/unsloth#237: an adapter of a base of another size", refusal="the model needs"
)
def without_fingerprint_it_is_of_another_base(it: Artefact) -> None:
    (it.adapter / FILE_NAME).unlink()
    shutil.rmtree(it.base)
    make_base(it.base, "qwen2", hidden_size=96, intermediate_size=80)
