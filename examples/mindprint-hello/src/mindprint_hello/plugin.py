"""A whole backend in NumPy: every hook of the contract, on a model small enough to read.

The model predicts the next token from the present one and the mean of all so far, through one hidden layer:
`x = e[t] + mean(e[..t])`, `h = x + down(tanh(up(x)))`, `logits = h @ head.T`. `up`, `down` and `head` can take LoRA.
The gradients are written out by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mindprint.contract import (
    AdapterFacts,
    AdapterSite,
    AdapterState,
    BackendInfo,
    DeviceInfo,
    Float32,
    Generation,
    Int32,
    LoadedModel,
    LoraFactors,
    ModelSpec,
    OnToken,
    PreferenceBatch,
    Sampling,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.errors import AdapterError, ModelError
from mindprint.hookspecs import hookimpl
from mindprint.layouts import preference_rows
from mindprint.losses import NUMPY, PairLogProbs, PreferenceLoss
from mindprint.models.quantized import METHODS, load_dense

MINDPRINT_HOOK_APIS = (2,)

EMBEDDING = "embed_tokens"
SITES = UP, DOWN, HEAD = "layers.0.up_proj", "layers.0.down_proj", "lm_head"
Array = NDArray[np.float64]
Factors = dict[str, LoraFactors]


@dataclass
class HelloModel:
    """The handle. Weights are `[out, in]`. They, the adapter and its moments are float32, and computing is float64."""

    weights: dict[str, Float32]
    adapter: AdapterState | None = None
    first: Factors = field(default_factory=dict)
    second: Factors = field(default_factory=dict)
    steps: int = 0


@hookimpl
def mindprint_backend_info() -> BackendInfo:
    cpu, able = DeviceInfo("cpu", None, "NumPy"), frozenset({"sampling", "streaming", *METHODS})
    return BackendInfo("hello", (cpu,), able, {"numpy": np.__version__}, ("it is an example",))


@hookimpl
def mindprint_load_model(spec: ModelSpec) -> LoadedModel:
    kind = json.loads((Path(spec.path) / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "hello":
        raise ModelError(f"{spec.path}: backend 'hello' computes only models of type 'hello', this is {kind!r}")
    weights = {name.removesuffix(".weight"): values for name, values in load_dense(spec.path).items()}
    if missing := {EMBEDDING, *SITES} - set(weights):
        raise ModelError(f"{spec.path}: the weights of {', '.join(sorted(missing))} are missing")
    elements = sum(values.size for values in weights.values())
    return LoadedModel(HelloModel(weights), spec.device, spec.dtype, elements, len(weights[HEAD]))


@hookimpl
def mindprint_release(model: HelloModel) -> bool:
    model.weights.clear()
    return True


@hookimpl
def mindprint_adapter_sites(model: HelloModel) -> Sequence[AdapterSite]:
    return [AdapterSite(name, "linear", *model.weights[name].shape[::-1]) for name in SITES]


@hookimpl
def mindprint_base_digest(model: HelloModel) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(model.weights):
        digest.update(name.encode() + model.weights[name].tobytes())
    return digest.hexdigest()


@hookimpl
def mindprint_inject_adapter(model: HelloModel, adapter: AdapterState) -> AdapterFacts:
    if model.adapter is not None:
        raise AdapterError("the model has an adapter already")
    if set(adapter.tensors) != set(adapter.config.target_modules):
        raise AdapterError("the adapter's tensors are not those of its target modules")
    for site, (a, b) in adapter.tensors.items():
        if site not in SITES or (len(b), a.shape[1]) != model.weights[site].shape:
            raise AdapterError(f"site {site!r} does not exist, or its factors have another shape")
    if adapter.config.dropout:
        raise AdapterError("backend 'hello' has no dropout: set adapter.dropout=0")
    model.adapter = adapter
    return AdapterFacts(tuple(adapter.tensors), adapter.elements)


@hookimpl
def mindprint_sft_step(model: HelloModel, batches: Sequence[TokenBatch], update: Update) -> StepMetrics:
    loss, gradients, tokens = 0.0, _zeros(model), max(update.tokens, 1)
    for batch in batches:
        pass_ = _Pass(model, batch.tokens, adapter=True)
        loss -= float(pass_.picked[batch.loss_mask].sum()) / tokens
        pass_.add_gradients(gradients, batch.loss_mask / -tokens)
    return StepMetrics(loss, _apply(model, gradients, update))


@hookimpl
def mindprint_dpo_step(
    model: HelloModel, batches: Sequence[PreferenceBatch], loss: PreferenceLoss, update: Update
) -> StepMetrics:
    total, gradients, reported = 0.0, _zeros(model), [np.zeros((2, 0))]
    for batch in batches:
        layout = preference_rows(batch)
        mask = np.zeros(layout.tokens.shape, np.bool_)
        mask.flat[layout.sources + 1] = True  # a source predicts the token behind it
        pass_ = _Pass(model, layout.tokens, adapter=True)
        chosen, rejected = np.split((pass_.picked * mask).sum(axis=1), 2)
        value, slopes = _preference(loss, batch, chosen, rejected, update)
        total += value
        pass_.add_gradients(gradients, mask * slopes[:, None])
        reported.append(np.stack([chosen, rejected]))
    norm = _apply(model, gradients, update)
    sums = np.concatenate(reported, axis=1).astype(np.float32)
    return StepMetrics(total, norm, chosen_log_probs=sums[0], rejected_log_probs=sums[1])


@hookimpl
def mindprint_log_probs(model: HelloModel, batch: TokenBatch, adapter: bool) -> Float32:
    return np.where(batch.loss_mask, _Pass(model, batch.tokens, adapter=adapter).picked, 0).astype(np.float32)


@hookimpl
def mindprint_generate(
    model: HelloModel, prompts: Sequence[Int32], sampling: Sampling, adapter: bool, on_token: OnToken | None
) -> Sequence[Generation]:
    answers = []
    for row, prompt in enumerate(prompts):
        tokens, random = prompt.tolist(), np.random.default_rng([sampling.seed, *prompt.tolist()])
        stopped = False
        while not stopped and len(tokens) < len(prompt) + sampling.max_new_tokens:
            last = _Pass(model, np.array([tokens], np.int32), adapter=adapter).log_probs[0, -1]
            token = _draw(last, sampling, random)
            stopped = token in sampling.stop_token_ids
            if not stopped:
                tokens.append(token)
                stopped = on_token is not None and on_token(row, token) is False
        answers.append(Generation(np.array(tokens[len(prompt) :], np.int32), "stop" if stopped else "length"))
    return answers


@hookimpl
def mindprint_save(model: HelloModel) -> TrainingState:
    return TrainingState(_adapter(model), dict(model.first), dict(model.second), model.steps)


@hookimpl
def mindprint_restore(model: HelloModel, state: TrainingState) -> bool:
    if _adapter(model).config != state.adapter.config:
        raise AdapterError("the state is of another adapter configuration than the injected adapter")
    model.adapter = state.adapter
    model.first, model.second = dict(state.first_moments), dict(state.second_moments)
    model.steps = state.optimizer_steps if state.first_moments else 0
    return True


class _Pass:
    """One forward pass over `tokens` [rows, T], which keeps the arrays that its backward pass needs."""

    def __init__(self, model: HelloModel, tokens: Int32, *, adapter: bool) -> None:
        self.model, self.tokens, self.adapted = model, tokens, adapter and model.adapter is not None
        # In float64, because the order of sums depends on the batch's shape: rounding to float32 hides the difference.
        seen = model.weights[EMBEDDING][tokens].astype(np.float64)
        self.x = seen + np.cumsum(seen, axis=1) / np.arange(1, tokens.shape[1] + 1)[:, None]
        self.z = np.tanh(self.x @ self._weight(UP).T)
        self.h = self.x + self.z @ self._weight(DOWN).T
        logits = self.h @ self._weight(HEAD).T
        shifted = logits - logits.max(axis=-1, keepdims=True)  # the same softmax, without overflow
        # Of the next token, `[rows, T, vocabulary]`, and of the tokens themselves, `[rows, T]`: 0 for the first.
        self.log_probs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        self.picked: Array = np.zeros(tokens.shape)
        self.picked[:, 1:] = np.take_along_axis(self.log_probs[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]

    def add_gradients(self, gradients: dict[str, list[Array]], slopes: Array) -> None:
        """Add to `gradients` for a loss whose derivative by `picked` is `slopes` [rows, T]."""
        # The derivative of log p[token] by the logits is onehot(token) - softmax(logits). The softmax comes first.
        by_logits = -np.exp(self.log_probs) * np.pad(slopes[:, 1:], ((0, 0), (0, 1)))[..., None]
        index = np.indices(self.tokens[:, 1:].shape)
        by_logits[index[0], index[1], self.tokens[:, 1:]] += slopes[:, 1:]
        by_hidden = by_logits @ self._weight(HEAD)
        by_inner = (by_hidden @ self._weight(DOWN)) * (1 - self.z**2)  # tanh'(u) = 1 - tanh(u)^2
        self._add(gradients, HEAD, self.h, by_logits)
        self._add(gradients, DOWN, self.z, by_hidden)
        self._add(gradients, UP, self.x, by_inner)

    def _weight(self, site: str) -> Array:
        weight = self.model.weights[site].astype(np.float64)
        adapter = self.model.adapter if self.adapted else None
        if adapter is None or site not in adapter.tensors:
            return weight
        a, b = adapter.tensors[site]
        return weight + adapter.config.scale(site) * (b.astype(np.float64) @ a)

    def _add(self, gradients: dict[str, list[Array]], site: str, inputs: Array, by_output: Array) -> None:
        if site in gradients:
            adapter = _adapter(self.model)
            a, b = adapter.tensors[site]
            by_weight = adapter.config.scale(site) * np.einsum("rto,rti->oi", by_output, inputs)
            # The weight is W + scale * B @ A: the gradient of A is scale * B^T @ dW, that of B scale * dW @ A^T.
            gradients[site][0] += b.T @ by_weight
            gradients[site][1] += by_weight @ a.T


def _draw(log_probs: Array, sampling: Sampling, random: np.random.Generator) -> int:
    if not sampling.temperature:
        return int(log_probs.argmax())
    weights = np.exp((log_probs - log_probs.max()) / sampling.temperature)
    # The nucleus: tokens in falling order, as long as those before them do not fill top_p. It is never empty.
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) / weights.sum() - weights[order] / weights.sum()
    kept = order[before < sampling.top_p]
    return int(random.choice(kept, p=weights[kept] / weights[kept].sum()))


def _adapter(model: HelloModel) -> AdapterState:
    if model.adapter is None:
        raise AdapterError("the model has no adapter: inject one first")
    return model.adapter


def _zeros(model: HelloModel) -> dict[str, list[Array]]:
    return {site: [np.zeros(part.shape) for part in pair] for site, pair in _adapter(model).tensors.items()}


def _apply(model: HelloModel, gradients: dict[str, list[Array]], update: Update) -> float:
    """Clip, then update as `torch.optim.AdamW` does. Return the norm before clipping."""
    adapter = _adapter(model)
    norm = float(np.sqrt(sum((part**2).sum() for pair in gradients.values() for part in pair)))
    factor = 1.0 if update.max_grad_norm is None else min(1.0, update.max_grad_norm / (norm + 1e-6))
    model.steps += 1
    tensors: Factors = {}
    for site, pair in adapter.tensors.items():
        zeros = LoraFactors(np.zeros_like(pair.a), np.zeros_like(pair.b))
        moments = model.first.get(site, zeros), model.second.get(site, zeros)
        parts = zip(pair, (part * factor for part in gradients[site]), *moments, strict=True)
        new = [_adamw(*part, update, model.steps) for part in parts]
        tensors[site], model.first[site], model.second[site] = (LoraFactors(*side) for side in zip(*new, strict=True))
    model.adapter = AdapterState(adapter.config, tensors)
    return norm


def _adamw(
    value: Float32, gradient: Array, first: Float32, second: Float32, update: Update, step: int
) -> tuple[Float32, Float32, Float32]:
    settings, rate = update.optimizer, update.learning_rate
    (one, two), decay = settings.betas, settings.weight_decay
    mean = one * first.astype(np.float64) + (1 - one) * gradient
    square = two * second.astype(np.float64) + (1 - two) * gradient**2
    change = (mean / (1 - one**step)) / (np.sqrt(square / (1 - two**step)) + settings.eps)
    moved = value.astype(np.float64) * (1 - rate * decay) - rate * change
    return moved.astype(np.float32), mean.astype(np.float32), square.astype(np.float32)


def _preference(
    loss: PreferenceLoss, batch: PreferenceBatch, chosen: Array, rejected: Array, update: Update
) -> tuple[float, Array]:
    """Return the loss, and its derivatives by the chosen, then the rejected log-probs, `[2 * pairs]`.

    A pair's loss depends on its two sums alone, so two central differences give all of them, exact to about 1e-8.
    """

    def per_pair(chosen: Array, rejected: Array) -> Array:
        reference = batch.reference_chosen, batch.reference_rejected
        pairs = PairLogProbs(chosen, rejected, *reference, batch.chosen_lengths, batch.rejected_lengths)
        values = loss.per_pair(NUMPY, pairs) / update.pairs
        return np.asarray(values - loss.sft_weight * chosen / update.tokens, np.float64)

    h = 1e-4
    by_chosen = (per_pair(chosen + h, rejected) - per_pair(chosen - h, rejected)) / (2 * h)
    by_rejected = (per_pair(chosen, rejected + h) - per_pair(chosen, rejected - h)) / (2 * h)
    return float(per_pair(chosen, rejected).sum()), np.concatenate([by_chosen, by_rejected])
