"""The adapter that training starts from: the same values on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from mindprint.contract import AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.data.order import uniform


def initial_adapter(sites: Sequence[AdapterSite], config: LoraConfig, seed: int) -> AdapterState:
    """A from the uniform distribution over ±1/sqrt(in), B zero, so that the adapter starts by changing nothing.

    The distribution is PEFT's (`kaiming_uniform_` with a = sqrt(5)); the values follow from seed and site name alone.
    """
    by_name = {site.name: site for site in sites}
    return AdapterState(config, {name: _factors(by_name[name], config, seed) for name in config.target_modules})


def _factors(site: AdapterSite, config: LoraConfig, seed: int) -> LoraFactors:
    rank = config.rank(site.name)
    bound = 1.0 / sqrt(site.in_features)
    draws = uniform((rank, site.in_features), seed, "lora_A", site.name)
    a = ((2.0 * draws - 1.0) * bound).astype(np.float32)
    return LoraFactors(a, np.zeros((site.out_features, rank), np.float32))
