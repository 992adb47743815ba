"""The bench of every conformance test: one backend, the model it is tested on, and seeded samples for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.adapter.initial import factor_shapes
from mindprint.adapter.targets import resolve_targets
from mindprint.contract import (
    AdapterSite,
    AdapterState,
    Dtype,
    Float32,
    Int32,
    LoadedModel,
    LoraConfig,
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    StepMetrics,
    TokenBatch,
    Update,
)
from mindprint.losses import PreferenceLoss
from mindprint.models.folder import quantization
from mindprint.plugins.backend import Backend


@dataclass
class Bench:
    """A backend and a model folder. Everything it makes follows from seeds.

    Models are left to Python to free: releasing each would cost some backends more than all tests together.
    """

    backend: Backend
    folder: Path
    device: str = "cpu"

    def load(self, dtype: Dtype = "float32", folder: Path | None = None) -> LoadedModel:
        """Load the bare base."""
        folder = folder or self.folder
        return self.backend.load_model(ModelSpec(str(folder), self.device, dtype, quantization(folder)))

    def ready(self, dtype: Dtype = "float32", *, seed: int = 0, **config: Any) -> LoadedModel:
        """Load a base with an adapter on all linear sites. Its B is not zero, so that every factor has a gradient."""
        model = self.load(dtype)
        self.backend.inject_adapter(model, self.adapter(self.linear_sites(model), seed=seed, **config))
        return model

    def linear_sites(self, model: LoadedModel) -> tuple[AdapterSite, ...]:
        """Return the sites that core resolves `all-linear` to."""
        sites = self.backend.adapter_sites(model)
        targets = set(resolve_targets(sites, "all-linear"))
        return tuple(site for site in sites if site.name in targets)

    def adapter(
        self, sites: Sequence[AdapterSite], *, r: int = 3, alpha: float = 6.0, seed: int = 0, **config: Any
    ) -> AdapterState:
        """Return an adapter with random factors, B not zero. `config` holds other fields of `LoraConfig`."""
        # The second number is different for each purpose, so that no two draws of one seed are alike.
        random = np.random.default_rng([seed, 11])
        lora = LoraConfig(r, alpha, tuple(site.name for site in sites), **config)

        def factors(site: AdapterSite) -> LoraFactors:
            a, b = factor_shapes(site, lora.rank(site.name))
            return LoraFactors(_normal(random, *a), _normal(random, *b))

        return AdapterState(lora, {site.name: factors(site) for site in sites})

    @cached_property
    def vocab_size(self) -> int:
        return self.load().vocab_size

    def tokens(self, *shape: int, seed: int = 1) -> Int32:
        """Return random token ids, int32."""
        # From 3, because ids 0 to 2 are often special tokens.
        return np.random.default_rng([seed, 12]).integers(3, self.vocab_size, shape).astype(np.int32)

    def token_batch(self, rows: int = 4, width: int = 12, seed: int = 1) -> TokenBatch:
        """Return ragged rows. The first third of each is prompt, and the padding is an id that also occurs in them."""
        lengths = np.random.default_rng([seed, 13]).integers(width // 2, width + 1, rows).astype(np.int32)
        # One row fills the width, so that the batch is as narrow as it can be, and the others are shorter.
        lengths[0] = width
        columns = np.arange(width)
        tokens = self.tokens(rows, width, seed=seed)
        # An id that also occurs in rows: a backend that recognises padding by its id would fail.
        tokens[columns >= lengths[:, None]] = 7
        return TokenBatch(tokens, lengths, (columns >= width // 3) & (columns < lengths[:, None]))

    def preference_batch(self, pairs: int = 3, seed: int = 2, *, reference: bool = True) -> PreferenceBatch:
        """Return ragged pairs. The made-up reference is about as likely as a random model's answers."""
        random = np.random.default_rng([seed, 14])

        def part(width: int, offset: int) -> tuple[Int32, Int32]:
            return self.tokens(pairs, width, seed=seed + offset), random.integers(1, width + 1, pairs).astype(np.int32)

        (prompt, prompts), (chosen, chosens), (rejected, rejecteds) = part(5, 100), part(6, 200), part(4, 300)
        # A random model gives each token about log(1 / vocabulary): the log-ratios are then of the size of real ones.
        nats = np.log(self.vocab_size)
        values = [(-nats * lengths + random.normal(0, 1, pairs)).astype(np.float32) for lengths in (chosens, rejecteds)]
        return PreferenceBatch(
            prompt, prompts, chosen, chosens, rejected, rejecteds, *(values if reference else (None, None))
        )

    def sft_step(self, model: LoadedModel, *batches: TokenBatch, **changes: Any) -> StepMetrics:
        """Take one step on these micro-batches. `changes` replace fields of `sft_update`."""
        return self.backend.sft_step(model, batches, replace(sft_update(*batches), **changes))

    def dpo_step(
        self, model: LoadedModel, *batches: PreferenceBatch, loss: PreferenceLoss | None = None, **changes: Any
    ) -> StepMetrics:
        """Take one preference step on these micro-batches. `changes` replace fields of `dpo_update`."""
        return self.backend.dpo_step(model, batches, loss or PreferenceLoss(), replace(dpo_update(*batches), **changes))


def sft_update(*batches: TokenBatch, **changes: Any) -> Update:
    """Return the settings of a step on these micro-batches, with the normalizers that core would state."""
    return replace(Update(learning_rate=1e-2, tokens=sum(batch.loss_tokens for batch in batches)), **changes)


def dpo_update(*batches: PreferenceBatch, **changes: Any) -> Update:
    """Return the settings of a preference step on these micro-batches, with core's normalizers."""
    tokens = sum(int(batch.chosen_lengths.sum()) for batch in batches)
    pairs = sum(batch.pairs for batch in batches)
    return replace(Update(learning_rate=1e-2, tokens=tokens, pairs=pairs), **changes)


def rows_of(batch: TokenBatch) -> list[TokenBatch]:
    """Return each row as a batch by itself, without padding."""
    return [
        TokenBatch(batch.tokens[row : row + 1, :n], batch.lengths[row : row + 1], batch.loss_mask[row : row + 1, :n])
        for row, n in enumerate(batch.lengths)
    ]


def pairs_of(batch: PreferenceBatch) -> list[PreferenceBatch]:
    """Return each pair as a batch by itself."""

    def only(pair: int) -> dict[str, Any]:
        return {name: None if values is None else values[pair : pair + 1] for name, values in vars(batch).items()}

    return [PreferenceBatch(**only(pair)) for pair in range(batch.pairs)]


def _normal(random: np.random.Generator, *shape: int) -> Float32:
    return random.normal(scale=0.2, size=shape).astype(np.float32)
