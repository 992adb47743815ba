"""The values that cross the border between core and plugins.

Frozen dataclasses over NumPy and nothing else: no framework type, no dict with agreed keys. The arrays that core hands
over are inputs, and neither side writes into them. Shapes use these letters: `r` rank, `T` tokens, `P` prompt tokens,
`C` completion tokens. Token ids and lengths are int32, log-probs and adapter tensors float32, masks bool.
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
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

Dtype = Literal["float32", "bfloat16", "float16"]
StageName = Literal["sft", "dpo"]
# Derived from the type, so that a stage cannot be in one of the two and not in the other.
STAGES: tuple[StageName, ...] = get_args(StageName)
"""The stages in the order in which a topic takes them."""
QuantizeMethod = Literal["nf4", "4bit", "8bit"]
SiteKind = Literal["linear", "embedding", "experts"]

QUANTIZED_FORMATS = ("affine", "mxfp4", "mxfp8", "nvfp4", "nf4", "fp4", "int8")
"""The formats of quantized bases. `mindprint.models.quantized` defines the numbers of each."""

CAPABILITIES = frozenset(
    {
        "dropout",
        "bfloat16",
        "float16",
        "sampling",
        "filters",
        "mixed",
        "streaming",
        "embedding",
        "experts",
        "quantize",
        "gguf",
        "ranks",
        "shard",
        "devices",
        *QUANTIZED_FORMATS,
    }
)
"""The optional parts of the contract, beyond the minimum of float32, greedy generation and LoRA on linear layers.

- `dropout`: LoRA dropout in SFT steps, keyed by `Update.seed` and the index of the micro-batch.
- `bfloat16`, `float16`: a base in that dtype, adapter and moments in float32, and for float16 a dynamic loss scale.
- `sampling`: draws at a temperature above 0 and with `top_p`, reproducible for a seed.
- `filters`: `top_k`, `min_p` and `repetition_penalty` of `Sampling`. `mindprint.sampling` defines them.
- `mixed`: `Sampling.rows`, other settings for each prompt. Core calls any other backend once for each of the settings.
- `streaming`: `on_token` of `mindprint_generate`, called for each token as soon as it is known. Core passes a callback
  only to backends that claim this. For the others it calls its own when the answers are there.
- `embedding`: sites of the kind `embedding`, and LoRA on them.
- `affine`, `mxfp4`, `mxfp8`, `nvfp4`, `nf4`, `fp4`, `int8`: a base quantized in that format, with the numbers that
  core's dequantizer gives. A backend without a kernel for packed weights may take them from `load_dense`.
- `quantize`: a full-precision base whose linear layers are packed while they are loaded, as `ModelSpec.quantize` says.
- `gguf`: a GGUF file of llama.cpp's in place of a folder as `ModelSpec.path`. It has no adapter sites.
- `ranks`: several processes that train one adapter together, each on its share of the micro-batches. The backend states
  its place among them in `BackendInfo.world`, and implements `mindprint_gather`.
- `shard`: a base whose weights are divided among the ranks, as `ModelSpec.shard` says.
- `devices`: a base whose layers are on several devices of one process, as `ModelSpec.devices` says.
- `experts`: sites of the kind `experts` where a base has stacks of experts, and LoRA on them.
"""


@dataclass(frozen=True)
class DeviceInfo:
    """One kind of device, as this backend sees it on this machine.

    Args:
        name: The word that a user writes as `backend.device` (`cpu`, `cuda`, `mps`, `metal`, or any other).
        reason: Why it cannot be used here. None exactly when it can.
        detail: More about it for the user, such as the name of the GPU.
        dtypes: The dtypes in which the backend trains on it.
        default_dtype: The dtype that `dtype: auto` means: the fastest one that trains well on it.
        accelerator: Whether it is much faster than this machine's CPU. Under `backend: auto` a backend with an
            accelerator is preferred to one without. A backend that does not say so is treated as a CPU.
        auto: Whether `backend: auto` and `device: auto` may choose it. False for a device that works and that nobody
            should get without asking for it.
    """

    name: str
    reason: str | None
    detail: str = ""
    dtypes: tuple[Dtype, ...] = ("float32",)
    default_dtype: Dtype = "float32"
    # Added after version 1 was written down, so with defaults: the safe answers for a backend that does not know them.
    accelerator: bool = False
    auto: bool = True

    @property
    def usable(self) -> bool:
        """Whether it can be used here."""
        return self.reason is None


@dataclass(frozen=True)
class BackendInfo:
    """A backend's account of itself on this machine.

    Args:
        name: The backend's name.
        devices: Its devices, in its order of preference.
        capabilities: The optional parts of the contract that it claims, of `CAPABILITIES`.
        libraries: The versions that decide its numbers. They are recorded in the manifest and compared on resume.
        notes: Sentences for the user, which `mindprint plugins --check` prints.
        training: Whether it trains. A backend that does not may leave out `hookspecs.TRAINING_HOOKS`. Core takes it for
            evaluation, verification and answers, and says so where training is asked of it.
        world: The rank of this process, from 0, and the number of processes that train one adapter together, as their
            launcher says. A number above 1 needs the capability `ranks`.
    """

    name: str
    devices: tuple[DeviceInfo, ...]
    capabilities: frozenset[str] = frozenset()
    libraries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    # Added in version 2 with a default, so that a backend that does not mention it trains.
    training: bool = True
    world: tuple[int, int] = (0, 1)

    def device(self, name: str) -> DeviceInfo | None:
        """Return the device called `name`, if the backend states one."""
        return next((device for device in self.devices if device.name == name), None)


@dataclass(frozen=True)
class ModelSpec:
    """A base model to load.

    Args:
        path: A local folder in Hugging Face layout. Core has resolved names of the hub. For a backend that claims
            `gguf` it may be a GGUF file.
        device: The device's name, never `auto`.
        dtype: The dtype of the base's weights, never `auto`.
        quantization: The base's own quantization scheme as its config.json states it. None for full precision. A
            backend that cannot train on it raises `ModelError`.
        quantize: How to pack the linear layers of a full-precision base while it is loaded. Core asks only backends
            that claim `quantize` for it. `nf4` is NF4 with double quantization, `4bit` and `8bit` are MLX's affine
            format in groups of 64. Embeddings, routers and the output layer stay in full precision.
        shard: Whether each rank holds a part of the weights. Core asks only backends that claim `shard` for it. All
            ranks load, inject, take steps and ask for the digest at the same moments. For log-probs and answers a rank
            may be alone, with another number of rows, while the others wait in `mindprint_gather`. The backend makes
            sure that it gets their parts of the weights.
        devices: The devices of one process among which the layers are divided, in their order: each is `device`, a
            colon and a number, or `device` alone. Empty for a base on one device. Core asks only backends that claim
            `devices` for it. The numbers are those of one device.
    """

    path: str
    device: str
    dtype: Dtype
    quantization: str | None = None
    quantize: QuantizeMethod | None = None
    # Added in version 2 with a default: only those who ask for it set it.
    shard: bool = False
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A loaded base model.

    Args:
        handle: The backend's object, which core hands back unread as `model`.
        device: The device's name.
        dtype: The dtype of the weights.
        parameters: The number of elements of all weights. Tied weights count once.
        vocab_size: The number of tokens that the model can predict.
        notes: Sentences for the user.
    """

    handle: Any
    device: str
    dtype: Dtype
    parameters: int
    vocab_size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSite:
    """A place that can take LoRA, under the name that it has in transformers.

    Args:
        name: The module's path in transformers' class for the base, such as `model.layers.0.self_attn.q_proj`. For a
            stack of experts the parameter's path, such as `model.layers.0.mlp.experts.gate_up_proj`.
        kind: `linear` for a weight `[out, in]`, `embedding` for a table `[in, out]` with the vocabulary as `in`,
            `experts` for a stack of weights `[out, in]`, whichever way round the stack is stored.
        in_features: `in`.
        out_features: `out`.
        experts: The number of weights in a stack of experts, else None.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    experts: int | None = None


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) as PEFT writes it.

    Args:
        r: Rank.
        alpha: Numerator of the scale. Use `scale`, which knows the denominator.
        target_modules: The full site names, which core has resolved. Stacks of experts are among them.
        dropout: Share of a site's inputs that is dropped in SFT steps. 0 where a stack of experts is a target.
        use_rslora: Whether the scale is that of rank-stabilized LoRA.
        rank_pattern: Ranks that differ from `r`, by full site name.
        alpha_pattern: Alphas that differ from `alpha`, by full site name.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, site: str) -> int:
        """Return the rank at a site."""
        return self.rank_pattern.get(site, self.r)

    def scale(self, site: str) -> float:
        """Return the factor of `B @ A` at a site: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank, alpha = self.rank(site), self.alpha_pattern.get(site, self.alpha)
        return float(alpha) / (sqrt(rank) if self.use_rslora else rank)


# A tuple and not a dataclass: checks, gradients and moments go through both factors in one loop.
class LoraFactors(NamedTuple):
    """The two factors of a site: `a` `[r, in]` and `b` `[out, r]`, float32. The weight changes by `scale * b @ a`.

    For a stack of experts `a` is `[experts, r, in]` and `b` is `[experts, out, r]`, and the weight of each expert
    changes by `scale * b[expert] @ a[expert]`. The rows of `b` are in the order of transformers' parameter: in
    `gate_up_proj` the gate comes before up, and in GPT-OSS the two take turns.
    """

    a: Float32
    b: Float32


@dataclass(frozen=True)
class AdapterState:
    """An adapter as values: its configuration, and the factors of each site by its name."""

    config: LoraConfig
    tensors: Mapping[str, LoraFactors]

    @property
    def elements(self) -> int:
        """The number of elements of all factors."""
        return sum(factors.a.size + factors.b.size for factors in self.tensors.values())


@dataclass(frozen=True)
class AdapterFacts:
    """A backend's report after an injection: the sites that it adapted, and the number of elements it will train."""

    sites: tuple[str, ...]
    trainable_elements: int


@dataclass(frozen=True)
class TrainingState:
    """Everything that training continues from, portable between backends.

    Args:
        adapter: The adapter's configuration and factors.
        first_moments: AdamW's first moments, by site and in the layout of the factors. Empty before the first step.
        second_moments: AdamW's second moments, likewise.
        optimizer_steps: The number of updates that were applied.
        loss_scale: None unless the base is float16. It starts at 2^16, halves (to no less than 1) when a step
            overflows, which is then skipped, and doubles at every 2000th applied update. So `optimizer_steps` is the
            only counter it needs.
    """

    adapter: AdapterState
    first_moments: Mapping[str, LoraFactors] = field(default_factory=dict)
    second_moments: Mapping[str, LoraFactors] = field(default_factory=dict)
    optimizer_steps: int = 0
    loss_scale: float | None = None

    def without_optimizer(self) -> TrainingState:
        """Return the same adapter as a stage starts with it: no moments, no steps."""
        # Moments average the gradients of one loss. The next stage has another loss, so they would mislead its first
        # steps.
        return TrainingState(self.adapter)


@dataclass(frozen=True)
class TokenBatch:
    """Whole sequences, padded on the right with any valid id.

    Args:
        tokens: int32 `[rows, T]`.
        lengths: int32 `[rows]`, at most `T`.
        loss_mask: bool `[rows, T]`, True for every token whose log-prob counts. It is never True in column 0, because
            nothing predicts the first token, nor in padding.
        shared: int32 `[rows / 2]`, or None. Row k and row rows / 2 + k begin with the same `shared[k]` tokens, at least
            one, and none of them is under the mask. A backend may read them once: the log-probs are the same.
    """

    tokens: Int32
    lengths: Int32
    loss_mask: Bool
    shared: Int32 | None = None

    @property
    def loss_tokens(self) -> int:
        """The number of tokens whose log-prob counts."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of completions of one prompt, each part by itself: the backend chooses how the model reads them.

    Args:
        prompt: int32 `[pairs, P]`, padded on the right with any valid id.
        prompt_lengths: int32 `[pairs]`, none of them 0.
        chosen: int32 `[pairs, C]`, padded likewise. Every completion token counts.
        chosen_lengths: int32 `[pairs]`, none of them 0.
        rejected: int32 `[pairs, C']`, padded likewise.
        rejected_lengths: int32 `[pairs]`, none of them 0.
        reference_chosen: float32 `[pairs]`, the chosen completions' summed log-probs under the reference. None where
            the loss takes no reference.
        reference_rejected: float32 `[pairs]`, likewise for the rejected completions.
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
        """The number of pairs."""
        return len(self.prompt_lengths)


@dataclass(frozen=True)
class AdamW:
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019): bias-corrected moments, decoupled decay, on every factor."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Update:
    """The settings of one optimizer step.

    The step's loss is a sum over all its micro-batches (and ranks), divided by the global normalizers `tokens` and
    `pairs`. So it does not matter how a step is divided.

    Args:
        learning_rate: The rate of this step.
        tokens: Loss tokens of the whole step. In a preference step, those of the chosen completions.
        pairs: Pairs of the whole step. 0 in an SFT step.
        optimizer: AdamW's other settings.
        max_grad_norm: Limit of the global norm of the gradient, applied as `torch.nn.utils.clip_grad_norm_` does
            (factor `max / (norm + 1e-6)`, at most 1). None leaves gradients alone.
        seed: Keys dropout, together with the index of the micro-batch.
        share_prompts: Allows a preference step to read each prompt once for both of its completions. It changes no
            number except by rounding, and a backend may ignore it.
        gradient_checkpointing: Asks for less memory at the price of time (Chen et al. 2016, arXiv 1604.06174):
            activations within a layer are computed again in the backward pass instead of being kept. It changes no
            number except by rounding (dropout masks are the same), and a backend may ignore it.
        micro_batches: The index of each micro-batch of this process in the whole step. Empty where they are counted
            from 0, as in a single process.
    """

    learning_rate: float
    tokens: int
    pairs: int = 0
    # A shared default is safe, because the dataclass is frozen.
    optimizer: AdamW = AdamW()
    max_grad_norm: float | None = 1.0
    seed: int = 0
    share_prompts: bool = True
    gradient_checkpointing: bool = False
    micro_batches: tuple[int, ...] = ()

    def micro_batch(self, place: int) -> int:
        """Return the index in the whole step of the micro-batch at `place` in this process, which keys its dropout."""
        return self.micro_batches[place] if self.micro_batches else place


@dataclass(frozen=True)
class StepMetrics:
    """The result of a step.

    Args:
        loss: The step's loss before the update, in nats, under the normalizers of `Update`.
        grad_norm: The global norm of the gradient before clipping.
        skipped: True when no update was applied because scaled float16 gradients overflowed.
        loss_scale: The loss scale that the step used. None unless the base is float16.
        chosen_log_probs: In a preference step, the summed log-probs of the chosen completions before the update,
            float32 `[pairs]`, in the order of the batches.
        rejected_log_probs: The same for the rejected completions.
    """

    loss: float
    grad_norm: float
    skipped: bool = False
    loss_scale: float | None = None
    chosen_log_probs: Float32 | None = None
    rejected_log_probs: Float32 | None = None


@dataclass(frozen=True)
class Sampling:
    """The settings of generation.

    Args:
        max_new_tokens: Limit of new tokens.
        stop_token_ids: Ids of which any ends the answer.
        temperature: 0 is greedy.
        top_p: Share of probability from which a draw is taken, of what `top_k` leaves.
        seed: Makes draws reproducible.
        top_k: Number of the likeliest tokens from which a draw is taken. 0 is all.
        min_p: Least probability of a token that may be drawn, relative to the likeliest (Nguyen et al. 2024, arXiv
            2407.01082). 0 leaves all.
        repetition_penalty: Divides the logits above 0, and multiplies those below, of every token of the prompt and of
            the answer so far (Keskar et al. 2019, arXiv 1909.05858, section 4.1), before anything else and also in
            greedy generation. 1 changes nothing.
        rows: The settings of each prompt, if they are unlike. All others are then without effect. Empty for a backend
            without the capability `mixed`.
    """

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    rows: tuple[Sampling, ...] = ()

    @property
    def filters(self) -> bool:
        """Whether it asks for anything of the capability `filters`."""
        own = self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1
        return own or any(row.filters for row in self.rows)

    def of_each(self, prompts: int) -> tuple[Sampling, ...]:
        """Return the settings of each of several prompts."""
        return self.rows or (self,) * prompts


@dataclass(frozen=True)
class Generation:
    """A generated answer.

    Args:
        tokens: int32 `[new]`, without the stop token.
        stop_reason: `stop` when a stop token came or `on_token` returned False, `length` at the limit.
    """

    tokens: Int32
    stop_reason: Literal["stop", "length"]


class OnToken(Protocol):
    """A callback that follows generation, token by token."""

    def __call__(self, row: int, token: int, /) -> bool | None:
        """Take the next token of an answer, as soon as it is known.

        Args:
            row: The index of the prompt that is answered.
            token: The token's id. A stop token is not part of an answer, and is not told.

        Returns:
            False to end this answer with this token, which stays part of it. None and True let it continue.
        """


@dataclass(frozen=True)
class BaseSizes:
    """Sizes of a base model, from its config.json and the headers of its weight files. Nothing is loaded for them.

    Args:
        elements: The elements of all weights that training loads. Tied weights count once.
        largest: The elements of the largest weight.
        stored_dtype: The dtype of the files, None where they hold several or one that no base is computed in.
        packed_bytes: The bytes of the packed weights of a quantized base, 0 for full precision. `elements` leaves
            these weights out.
        layers: The number of layers.
        hidden: The width of the hidden states.
        inner: The width of a feed-forward block, of the experts that a token uses taken together.
        heads: The number of attention heads.
        key_heads: The number of heads of keys and values.
        head_size: The width of a head.
        vocabulary: The number of tokens.
        norms: The normalisations of hidden states in a layer.
        head_norms: Whether a layer also normalises queries and keys.
        config: The values of config.json, of its language model where it has several parts.
        layer_elements: The part of `elements` that is in the layers, which the ranks divide where a base is sharded.
    """

    elements: int
    largest: int
    stored_dtype: Dtype | None
    packed_bytes: int
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    norms: int
    head_norms: bool
    config: Mapping[str, Any]
    layer_elements: int = 0


@dataclass(frozen=True)
class MemoryRequest:
    """A run whose memory is asked for, before anything is loaded.

    Args:
        spec: The base model, as it would be loaded.
        base: Its sizes.
        sites: The sites that get LoRA.
        adapter: The adapter's configuration.
        batch: A micro-batch of a training step.
        update: The step's settings. Its learning rate and normalizers have no meaning here.
        read: The largest batch whose log-probs are taken without gradients, None if there is none.
        ranks: The number of processes that train together. The need is that of one of them.
    """

    spec: ModelSpec
    base: BaseSizes
    sites: Sequence[AdapterSite]
    adapter: LoraConfig
    batch: TokenBatch | PreferenceBatch
    update: Update
    read: TokenBatch | None = None
    ranks: int = 1


@dataclass(frozen=True)
class MemoryNeed:
    """The memory that a run needs at most, in bytes, by its parts. Libraries that are imported already are not in it.

    Args:
        weights: The base's weights, and whatever loading them holds at its peak.
        adapter: The adapter's factors, their gradients, AdamW's moments, and copies of them that a run keeps.
        activations: Arrays between the layers: those kept for the backward pass, and those of the layer in work.
        logits: Arrays of the size of the vocabulary.
        other: Everything else, such as pools of the framework.
        free: The bytes that are free on the device now. None if it uses the memory of the machine, which core reads.
    """

    weights: int
    adapter: int
    activations: int
    logits: int
    other: int = 0
    free: int | None = None

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.adapter + self.activations + self.logits + self.other


@dataclass(frozen=True)
class Block:
    """A paragraph of a text without its line breaks, or a heading, which no passage crosses."""

    text: str
    heading: bool = False


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation. `author` is None for the person whose export it is, where the file gives no name."""

    author: str | None
    text: str


@dataclass(frozen=True)
class Document:
    """A piece of writing, or a conversation, as a reader finds it in a file.

    Args:
        name: Where it is: the file, and behind a `#` its place in the file.
        author: Who wrote the blocks, as the file says. None where it does not say.
        blocks: A text, in its order.
        turns: A conversation, in its order. A document has blocks or turns, not both.
    """

    name: str
    author: str | None = None
    blocks: tuple[Block, ...] = ()
    turns: tuple[Turn, ...] = ()


class Fitted(Protocol):
    """A measure that knows a person's texts."""

    # Positional only, so that an implementation can name its argument as it likes.
    def __call__(self, texts: Sequence[str], /) -> Float64:
        """Return a number for each text, float64 `[texts]`. Higher is more like the person."""


class Measure(Protocol):
    """A way to look at a text. Core's measures and those of scorer plugins have this shape."""

    @property
    def name(self) -> str:
        """The measure's name in results."""

    def fit(self, own: Sequence[str], background: Sequence[str]) -> Fitted:
        """Learn to tell the person's texts from others.

        Args:
            own: Texts of the person, not empty.
            background: Texts of others, not empty.
        """
