"""What crosses the border between core and a backend.

Frozen dataclasses over NumPy, nothing else: no framework type, no dict with agreed keys. Arrays that cross are
inputs; neither side writes into them. Shapes use these letters: `r` rank, `T` tokens, `P` prompt tokens, `C`
completion tokens. Token ids and lengths are int32, log-probs and adapter tensors float32, masks bool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

Dtype = Literal["float32", "bfloat16", "float16"]
StageName = Literal["sft", "dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which a topic takes them."""
SiteKind = Literal["linear", "embedding", "experts"]


# --- what a backend is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceInfo:
    """One kind of device as this backend sees it on this machine.

    `name` is what a user writes as `backend.device` (`cpu`, `cuda`, `mps`, `metal`). `reason` says why it cannot be
    used and is None exactly when it can. `default_dtype` is what `dtype: auto` means there: the fastest dtype that
    trains well on it.
    """

    name: str
    reason: str | None
    detail: str = ""
    dtypes: tuple[Dtype, ...] = ("float32",)
    default_dtype: Dtype = "float32"

    @property
    def usable(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class BackendInfo:
    """What a backend can do here. `devices` is in the backend's own order of preference.

    `capabilities` are the optional parts of the contract that it claims, by the names in `CAPABILITIES`;
    `libraries` are the versions that decide its numbers, recorded in the manifest and compared on resume.
    """

    name: str
    devices: tuple[DeviceInfo, ...]
    capabilities: frozenset[str] = frozenset()
    libraries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def device(self, name: str) -> DeviceInfo | None:
        return next((device for device in self.devices if device.name == name), None)


CAPABILITIES = frozenset({"dropout", "bfloat16", "float16", "sampling", "embedding", "experts"})
"""What a backend may claim beyond the required minimum (float32, greedy generation, LoRA on linear layers).

`experts` is reserved: core does not train stacked experts yet.
"""


@dataclass(frozen=True)
class ModelSpec:
    """A base model to load. `path` is a local folder in Hugging Face layout: core resolves hub names before this.

    `device` and `dtype` are concrete (core has resolved `auto`). `quantization` is the base's own scheme as its
    config.json states it, None for full precision; a backend that cannot train on it raises `ModelError`.
    """

    path: str
    device: str
    dtype: Dtype
    quantization: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A loaded base. `handle` is the backend's own and opaque; the rest are facts that core records."""

    handle: Any
    device: str
    dtype: Dtype
    parameters: int
    vocab_size: int
    notes: tuple[str, ...] = ()


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSite:
    """A place that can take LoRA, under the name that the module has in transformers.

    `linear`: a weight `[out, in]`. `embedding`: a table `[in, out]` with `in` the vocabulary. `experts`: a stack
    of `experts` weights `[out, in]`.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    experts: int | None = None


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021) as PEFT writes it. `target_modules` are the full site names, resolved by core.

    `rank_pattern` and `alpha_pattern` map full site names to what differs from `r` and `alpha`.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, site: str) -> int:
        return self.rank_pattern.get(site, self.r)

    def scale(self, site: str) -> float:
        """What `B @ A` is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank, alpha = self.rank(site), self.alpha_pattern.get(site, self.alpha)
        return float(alpha) / (sqrt(rank) if self.use_rslora else rank)


class LoraFactors(NamedTuple):
    """`a` is `[r, in]`, `b` is `[out, r]`, float32; the change of the weight is `scale * b @ a`.

    Of a stack of experts `a` is `[experts, r, in]` and `b` `[experts, out, r]`. Only adapters that others made have
    such factors (under the name of the stack's parameter, `...experts.gate_up_proj`); no backend trains them.
    """

    a: Float32
    b: Float32


@dataclass(frozen=True)
class AdapterState:
    """An adapter as values: its configuration and the factors of each site."""

    config: LoraConfig
    tensors: Mapping[str, LoraFactors]

    @property
    def elements(self) -> int:
        return sum(factors.a.size + factors.b.size for factors in self.tensors.values())


@dataclass(frozen=True)
class AdapterFacts:
    """What a backend says after injection: where the adapter went, and how many elements will be trained."""

    sites: tuple[str, ...]
    trainable_elements: int


@dataclass(frozen=True)
class TrainingState:
    """All that training continues from, portable between backends.

    `first_moments` and `second_moments` are AdamW's, by site and in the layout of the factors; empty before the
    first step. `optimizer_steps` counts the updates that were applied. `loss_scale` is None unless the base is
    float16; it starts at 2^16, halves (to no less than 1) when a step overflows, which is then skipped, and doubles at
    every 2000th applied update: so it needs no counter of its own.
    """

    adapter: AdapterState
    first_moments: Mapping[str, LoraFactors] = field(default_factory=dict)
    second_moments: Mapping[str, LoraFactors] = field(default_factory=dict)
    optimizer_steps: int = 0
    loss_scale: float | None = None

    def without_optimizer(self) -> TrainingState:
        """The same adapter, as a stage starts with it: no moments, no steps."""
        return TrainingState(self.adapter)


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenBatch:
    """Whole sequences, padded on the right with any valid id.

    `tokens` int32 `[rows, T]`; `lengths` int32 `[rows]`; `loss_mask` bool `[rows, T]` is True for every token whose
    log-prob counts. It is never True in column 0 (nothing predicts the first token) nor in padding.

    `shared`, int32 `[rows / 2]`, says that row k and row rows / 2 + k begin with the same `shared[k]` tokens, at least
    one and none of them under the mask: a backend may read them once. The log-probs are the same.
    """

    tokens: Int32
    lengths: Int32
    loss_mask: Bool
    shared: Int32 | None = None

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of completions of one prompt, each part apart: how they are laid out for the model is the backend's choice.

    Each of `prompt`, `chosen` and `rejected` is int32 `[pairs, width]`, padded on the right with any valid id, with
    int32 `[pairs]` lengths, none of them 0. Every completion token counts. `reference_chosen` and
    `reference_rejected` are float32 `[pairs]`, the summed log-probs under the reference; None where the loss takes
    no reference.
    """

    prompt: Int32
    prompt_lengths: Int32
    chosen: Int32
    chosen_lengths: Int32
    rejected: Int32
    rejected_lengths: Int32
    reference_chosen: Float32 | None = None
    reference_rejected: Float32 | None = None

    @property
    def pairs(self) -> int:
        return len(self.prompt_lengths)


@dataclass(frozen=True)
class AdamW:
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019): bias-corrected moments, decoupled decay, on every factor."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Update:
    """How one optimizer step is taken.

    The step's loss is a sum over all its micro-batches (and ranks) divided by the global normalizers: `tokens` (loss
    tokens; of the chosen answers in a preference step) and `pairs`. `max_grad_norm` clips by global norm as
    `torch.nn.utils.clip_grad_norm_` (factor `max / (norm + 1e-6)`, at most 1); None leaves gradients alone.
    `seed` keys dropout together with the index of the micro-batch.

    `share_prompts` allows a preference step to read each prompt once for both of its completions. It changes no numbers
    but their rounding, and a backend may do without.

    `gradient_checkpointing` asks for less memory at the price of time (Chen et al. 2016, arXiv 1604.06174): activations
    within a layer are computed again on the way back instead of being kept. It changes no numbers but their rounding
    (dropout masks are the same again), and a backend may do without.
    """

    learning_rate: float
    tokens: int
    pairs: int = 0
    optimizer: AdamW = AdamW()
    max_grad_norm: float | None = 1.0
    seed: int = 0
    share_prompts: bool = True
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class StepMetrics:
    """What a step did. `grad_norm` is the global norm before clipping.

    `skipped` is True when no update was applied because scaled float16 gradients overflowed. A preference step also
    returns the summed log-probs of the policy before the update, float32 `[pairs]`, in the order of its batches.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    loss_scale: float | None = None
    chosen_log_probs: Float32 | None = None
    rejected_log_probs: Float32 | None = None


# --- generation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. `temperature` 0 is greedy; otherwise draws are reproducible for a `seed`."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """`tokens` int32 `[new]`, without the stop token. `stop_reason` is `stop` (a stop token came) or `length`."""

    tokens: Int32
    stop_reason: Literal["stop", "length"]


# --- measures of a voice ----------------------------------------------------------------------------------------------


class Fitted(Protocol):
    """A measure that knows a person."""

    def __call__(self, texts: Sequence[str], /) -> Float64:
        """A number a text, float64 `[texts]`: higher is more like the person."""


class Measure(Protocol):
    """A way to look at a text. Scorer plugins provide these too."""

    @property
    def name(self) -> str:
        """How results call it."""

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Learn to tell the person's texts from others'. Neither is empty."""
