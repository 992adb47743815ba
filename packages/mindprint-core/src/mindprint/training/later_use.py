"""Uses of an adapter that would be refused after its training, found before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindprint.adapter.base_facts import read_base_facts
from mindprint.adapter.initial import factor_shapes
from mindprint.adapter.weight_changes import weight_changes
from mindprint.contract import AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError
from mindprint.models.quantized import dense_weights


def refused_uses(base: Path, sites: Sequence[AdapterSite], lora: LoraConfig) -> str | None:
    """Return why `merge` and `convert` would refuse an adapter on these sites, None if they would not.

    It is a warning and not an error: PEFT and Mindprint compute with such an adapter.
    """
    by_name = {site.name: site for site in sites}
    factors = {name: _factors(by_name[name], lora) for name in lora.target_modules}
    adapter = AdapterState(lora, factors)
    try:
        weight_changes(adapter, dense_weights(base), read_base_facts(base))
    except AdapterError as error:
        return (
            f"merge and convert will refuse this adapter: {error}. If you need them, leave the module out of "
            "adapter.target_modules and adapter.target_parameters"
        )
    return None


def _factors(site: AdapterSite, lora: LoraConfig) -> LoraFactors:
    # Only the shapes are looked at. One zero that is seen everywhere takes no memory.
    a, b = (np.broadcast_to(np.float32(0), shape) for shape in factor_shapes(site, lora.rank(site.name)))
    return LoraFactors(a, b)
