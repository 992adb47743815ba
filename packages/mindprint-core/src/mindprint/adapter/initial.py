"""The adapter that training starts from: the same values on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np

from mindprint.adapter.targets import is_stack
from mindprint.contract import AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.draws import uniform
from mindprint.errors import AdapterError


def initial_adapter(sites: Sequence[AdapterSite], config: LoraConfig, seed: int) -> AdapterState:
    """Return the adapter that training starts with: A uniform over ±1/sqrt(in), B zero, so that it changes nothing.

    The distribution is PEFT's (`kaiming_uniform_` with a = sqrt(5)); the values follow from seed and site name alone.
    """
    by_name = {site.name: site for site in sites}
    return AdapterState(config, {name: _factors(by_name[name], config, seed) for name in config.target_modules})


def factor_shapes(site: AdapterSite, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B at a site: `[r, in]` and `[out, r]`, in a stack of experts one pair for each."""
    experts = () if site.experts is None else (site.experts,)
    return (*experts, rank, site.in_features), (*experts, site.out_features, rank)


def started_adapter(start: AdapterState, config: LoraConfig, folder: Path) -> AdapterState:
    """Return an existing adapter to continue from. Raises `AdapterError` for settings that differ."""
    made = start.config
    for name in ("r", "alpha", "use_rslora"):
        here, there = getattr(config, name), getattr(made, name)
        if here != there:
            raise AdapterError(
                f"{folder}: adapter.{name} is {_yaml(here)} and this adapter has {_yaml(there)}: "
                f"set adapter.{name}={_yaml(there)}"
            )
    # A start on other modules would leave some at zero in silence, or train some that nobody named.
    if other := sorted(set(config.target_modules) ^ set(start.tensors)):
        what = "has no tensors for" if other[0] in config.target_modules else "is also on"
        setting = "target_parameters" if is_stack(other[0]) else "target_modules"
        raise AdapterError(f"{folder}: {what} {other[0]}, adapter.{setting} says otherwise ({len(other)} differ)")
    kept = replace(config, rank_pattern=made.rank_pattern, alpha_pattern=made.alpha_pattern)
    return AdapterState(kept, {site: start.tensors[site] for site in config.target_modules})


def _yaml(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _factors(site: AdapterSite, config: LoraConfig, seed: int) -> LoraFactors:
    rank = config.rank(site.name)
    # kaiming_uniform_ (He et al. 2015, section 2.2) with a = sqrt(5), as in PEFT:
    # sqrt(6 / ((1 + a²) · fan_in)) = 1 / sqrt(fan_in).
    bound = 1.0 / sqrt(site.in_features)
    # Keyed by the site's name: adding a target does not change the start of the others.
    a_shape, b_shape = factor_shapes(site, rank)
    draws = uniform(a_shape, seed, "lora_A", site.name)
    a = ((2.0 * draws - 1.0) * bound).astype(np.float32)
    return LoraFactors(a, np.zeros(b_shape, np.float32))
