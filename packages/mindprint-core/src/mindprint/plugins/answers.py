"""Checks of a backend's answers, field by field, before any of them reaches a file or decides anything.

Dataclasses check no types, and NumPy takes almost anything for a number. Without these checks a nonsense value would
surface far from its hook: as a traceback of core, or as an adapter that nobody can use. Each check raises
`ContractError` in one line that names the hook, the field, and the value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import NoReturn, get_args

import numpy as np

from mindprint.contract import (
    AdapterFacts,
    AdapterSite,
    AdapterState,
    Dtype,
    Float32,
    Generation,
    LoadedModel,
    LoraConfig,
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    Sampling,
    SiteKind,
    StepMetrics,
    TokenBatch,
    TrainingState,
)
from mindprint.errors import ContractError, NotFiniteError
from mindprint.input_files import shortened
from mindprint.tolerances import LOG_PROB_EXCESS

STOP_REASONS = ("stop", "length")


class Answer:
    """The answer of one hook of one backend, as the checks name it."""

    def __init__(self, backend: str, hook: str) -> None:
        self._backend = backend
        self._hook = hook

    def refuse(self, finding: str) -> NoReturn:
        """Raise `ContractError`."""
        raise ContractError(f"backend {self._backend!r}: {self._hook} {finding}")

    def refuse_value(self, subject: str, value: object, expected: str) -> NoReturn:
        """Raise `ContractError` for a part of the answer that the contract does not allow."""
        self.refuse(f"returned {subject} = {quoted(value)}, the contract asks for {expected}")

    def instance(self, value: object, expected: type, subject: str = "") -> None:
        """Require an instance of a type."""
        if not isinstance(value, expected):
            # The type says more than the value where a whole dataclass is expected.
            returned = "None" if value is None else type(value).__name__
            self.refuse(
                f"returned {f'{subject} as ' if subject else ''}{returned}, the contract asks for {expected.__name__}"
            )

    def text(self, subject: str, value: object) -> None:
        """Require a text that is not empty."""
        if not isinstance(value, str) or not value:
            self.refuse_value(subject, value, "text")

    def texts(self, subject: str, value: object) -> None:
        """Require a sequence of texts."""
        # A text is a sequence of texts too: its letters must not pass as names.
        if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
            self.refuse_value(subject, value, "a tuple of text")

    def one_of(self, subject: str, value: object, choices: Collection[str]) -> None:
        """Require one of a few words."""
        # A list is not hashable, so it is compared and not looked up.
        if not isinstance(value, str) or value not in choices:
            self.refuse_value(subject, value, f"one of {', '.join(choices)}")

    def count(self, subject: str, value: object, *, least: int = 0) -> int:
        """Require a whole number. Return it as Python's own."""
        # True is an Integral of Python's, and no number of anything.
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            self.refuse_value(subject, value, f"a whole number of at least {least}")
        return int(value)

    def number(self, subject: str, value: object) -> float:
        """Require a number, possibly NaN or infinite. Return it as a Python float."""
        # NumPy's scalars are Reals. They are returned as floats, because json cannot write them.
        if isinstance(value, bool) or not isinstance(value, Real):
            self.refuse_value(subject, value, "a number")
        return float(value)

    def flag(self, subject: str, value: object) -> bool:
        """Require True or False. Return it as Python's own."""
        if not isinstance(value, bool | np.bool_):
            self.refuse_value(subject, value, "True or False")
        return bool(value)

    def array(self, subject: str, value: object, shape: tuple[int, ...], dtype: type) -> None:
        """Require an array of a shape and a dtype."""
        if isinstance(value, np.ndarray) and value.dtype == dtype and value.shape == shape:
            return
        returned = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        self.refuse(f"returned {subject} as {returned}, the contract asks for {np.dtype(dtype)}{list(shape)}")

    def finite(self, subject: str, values: np.ndarray) -> None:
        """Require that no element is NaN or infinite."""
        if not np.isfinite(values).all():
            raise NotFiniteError(f"backend {self._backend!r}: {self._hook} returned {subject} that are not finite")

    def distinct(self, subject: str, names: Sequence[str]) -> None:
        """Require that no name is there twice."""
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            self.refuse(f"returned {subject} {quoted(twice[0])} twice, the contract asks for each one once")


def check_model(answer: Answer, model: LoadedModel, spec: ModelSpec) -> LoadedModel:
    """Check the facts about a loaded model. Return it with Python's own numbers."""
    if model.device != spec.device:
        answer.refuse_value("device", model.device, f"{spec.device!r}, on which the model was to be loaded")
    if model.dtype != spec.dtype:
        answer.refuse_value("dtype", model.dtype, f"{spec.dtype!r}, in which the model was to be loaded")
    answer.texts("notes", model.notes)
    parameters = answer.count("parameters", model.parameters, least=1)
    vocabulary = answer.count("vocab_size", model.vocab_size, least=1)
    return replace(model, parameters=parameters, vocab_size=vocabulary)


def check_sites(answer: Answer, sites: Sequence[AdapterSite]) -> None:
    """Check the places that can take LoRA."""
    for number, site in enumerate(sites):
        answer.text(f"sites[{number}].name", site.name)
        of_site = f"{site.name}: "
        answer.one_of(f"{of_site}kind", site.kind, get_args(SiteKind))
        answer.count(f"{of_site}in_features", site.in_features, least=1)
        answer.count(f"{of_site}out_features", site.out_features, least=1)
        if site.kind == "experts":
            answer.count(f"{of_site}experts", site.experts, least=1)
        elif site.experts is not None:
            answer.refuse_value(f"{of_site}experts", site.experts, f"None for a site of the kind {site.kind}")
    # Names are the keys of every file: the second of two would replace the first in silence.
    answer.distinct("the site", [site.name for site in sites])


def check_facts(answer: Answer, facts: AdapterFacts) -> None:
    """Check the report after an injection. `models.engine.check_injection` compares it with the adapter."""
    answer.texts("sites", facts.sites)
    answer.distinct("the site", facts.sites)
    answer.count("trainable_elements", facts.trainable_elements)


def check_metrics(answer: Answer, metrics: StepMetrics, dtype: Dtype) -> StepMetrics:
    """Check the result of a step on a base in `dtype`. Return it with Python's own numbers.

    A loss or a norm that is not finite passes: the loop reports it, because it knows the rows of the batch.
    """
    loss, norm = answer.number("loss", metrics.loss), answer.number("grad_norm", metrics.grad_norm)
    if norm < 0:
        answer.refuse_value("grad_norm", metrics.grad_norm, "a norm, which is not negative")
    scale = _checked_scale(answer, metrics.loss_scale, dtype)
    skipped = answer.flag("skipped", metrics.skipped)
    # A backend that skips every step trains nothing, and no other guard looks at a skipped step.
    if skipped and dtype != "float16":
        answer.refuse_value("skipped", metrics.skipped, f"False in {dtype}: only float16 has a loss scale to overflow")
    return replace(metrics, loss=loss, grad_norm=norm, skipped=skipped, loss_scale=scale)


def check_sums(answer: Answer, metrics: StepMetrics, batches: Sequence[PreferenceBatch]) -> None:
    """Check the log-probs of a preference step: a sum for each pair."""
    pairs = sum(batch.pairs for batch in batches)
    for field in ("chosen_log_probs", "rejected_log_probs"):
        values = getattr(metrics, field)
        answer.array(field, values, (pairs,), np.float32)
        # A step whose loss is not finite is the loop's to report: it knows the rows of the batch.
        if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm) and not metrics.skipped:
            answer.finite(field, values)
            lengths = [getattr(batch, field.replace("log_probs", "lengths")) for batch in batches]
            _check_probabilities(answer, field, values, np.concatenate(lengths) if lengths else values)


def check_log_probs(answer: Answer, values: Float32, batch: TokenBatch) -> None:
    """Check per-token log-probs."""
    answer.array("log-probs", values, batch.tokens.shape, np.float32)
    answer.finite("log-probs", values)
    _check_probabilities(answer, "log-probs", values, np.ones(1))
    outside = values[~batch.loss_mask]
    if outside.any():
        value = outside[outside.nonzero()][0]
        answer.refuse(f"returned a log-prob of {value:.4g} outside the mask, the contract asks for 0 there")


def check_generations(
    answer: Answer, generations: Sequence[Generation], samplings: Sequence[Sampling], vocabulary: int
) -> None:
    """Check generated answers: one for each prompt's settings, within the vocabulary and the limit."""
    # A missing answer would move all later ones to other prompts.
    if len(generations) != len(samplings):
        answer.refuse(f"answered {len(generations)} of {len(samplings)} prompts")
    for generation, sampling in zip(generations, samplings, strict=True):
        tokens = generation.tokens
        # The contract leaves the number of tokens open, so an array's own size is the expected one.
        answer.array("tokens", tokens, (tokens.size if isinstance(tokens, np.ndarray) else 0,), np.int32)
        # A token that the tokenizer does not know would end evaluation with an error that names no backend.
        unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if unknown.size:
            answer.refuse(f"returned token {int(unknown[0])}, the model has {vocabulary} tokens")
        if tokens.size > sampling.max_new_tokens:
            answer.refuse(f"returned {tokens.size} tokens, the limit was {sampling.max_new_tokens}")
        stops = tokens[np.isin(tokens, sampling.stop_token_ids)]
        if stops.size:
            answer.refuse(f"returned the stop token {int(stops[0])} as part of an answer, which ends before it")
        answer.one_of("stop_reason", generation.stop_reason, STOP_REASONS)


def check_told(
    answer: Answer, generations: Sequence[Generation], told: Sequence[Sequence[int]], ended: Collection[int]
) -> None:
    """Check that the tokens told while generating are those of the answers, and that rows ended where they had to."""
    for row, (generation, tokens) in enumerate(zip(generations, told, strict=True)):
        if generation.tokens.tolist() != list(tokens):
            answer.refuse(
                f"told {len(tokens)} tokens of row {row} to on_token and returned {generation.tokens.size} or others"
            )
        if row in ended and generation.stop_reason != "stop":
            answer.refuse_value("stop_reason", generation.stop_reason, f"'stop': on_token ended row {row}")


def check_state(answer: Answer, state: TrainingState, dtype: Dtype) -> TrainingState:
    """Check a saved state: every target module with factors, and moments in the same layout. Return plain numbers."""
    answer.instance(state.adapter, AdapterState, "adapter")
    config, tensors = state.adapter.config, state.adapter.tensors
    answer.instance(config, LoraConfig, "adapter.config")
    _check_sites_of(answer, "adapter.tensors", tensors, config.target_modules)
    for order, moments in (("first", state.first_moments), ("second", state.second_moments)):
        # There are none before the first step of a stage.
        if not isinstance(moments, Mapping) or moments:
            _check_sites_of(answer, f"{order}_moments", moments, config.target_modules)
    if bool(state.first_moments) != bool(state.second_moments):
        answer.refuse("returned moments of one order without those of the other: AdamW continues from both or none")
    for site, factors in tensors.items():
        answer.instance(factors, LoraFactors, site)
        rank = config.rank(site)
        # Moments must have the factors' layout, or another backend would continue from the wrong ones.
        # A third axis is that of a stack's experts. Which sites are stacks, the comparison with the injected tells.
        experts = (_size(factors.a, 0),) if np.ndim(factors.a) == 3 else ()
        shapes = (*experts, rank, _size(factors.a, -1)), (*experts, _size(factors.b, -2), rank)
        _check_factors(answer, site, factors, shapes)
        if state.first_moments:
            _check_factors(answer, f"first moment of {site}", state.first_moments[site], shapes)
            _check_factors(answer, f"second moment of {site}", state.second_moments[site], shapes, least=0.0)
    steps = answer.count("optimizer_steps", state.optimizer_steps)
    return replace(state, optimizer_steps=steps, loss_scale=_checked_scale(answer, state.loss_scale, dtype))


def quoted(value: object) -> str:
    """Return a value's text for the middle of a line, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 (a plugin's own class may raise anything)
        text = f"a {type(value).__name__}"
    return shortened(" ".join(text.split()))


def _checked_scale(answer: Answer, value: object, dtype: Dtype) -> float | None:
    """Return a loss scale, which exactly a float16 base has."""
    if dtype != "float16":
        if value is not None:
            answer.refuse_value("loss_scale", value, f"None in {dtype}")
        return None
    if value is None:
        answer.refuse_value("loss_scale", value, "a number in float16")
    scale = answer.number("loss_scale", value)
    if not (scale > 0 and math.isfinite(scale)):
        answer.refuse_value("loss_scale", value, "a number above 0")
    return scale


def _check_probabilities(answer: Answer, subject: str, values: Float32, tokens: np.ndarray) -> None:
    """Require that no sum of `tokens` log-probs is above 0 by more than rounding: none of them is a probability."""
    above = values > LOG_PROB_EXCESS * tokens
    if above.any():
        answer.refuse(f"returned {subject} of {values[above][0]:.4g} nats, above 0: no probability is above 1")


def _check_sites_of(answer: Answer, subject: str, tensors: object, targets: Sequence[str]) -> None:
    """Require exactly the adapter's sites: what `save` forgets is missing from every file."""
    answer.instance(tensors, Mapping, subject)
    assert isinstance(tensors, Mapping)
    missing, unknown = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets), key=str)
    if missing:
        answer.refuse(f"returned {subject} without {_named(missing)}, of {len(targets)} target modules")
    if unknown:
        answer.refuse(f"returned {subject} of {_named(unknown)}, not among the {len(targets)} target modules")


def _size(values: object, axis: int) -> int:
    """Return the size of an axis, 0 for a value without it: comparing shapes then refuses the value."""
    known = isinstance(values, np.ndarray) and -values.ndim <= axis < values.ndim
    return int(values.shape[axis]) if isinstance(values, np.ndarray) and known else 0


def _named(names: Sequence[object]) -> str:
    shown = ", ".join(quoted(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _check_factors(
    answer: Answer,
    subject: str,
    factors: LoraFactors,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    least: float = -math.inf,
) -> None:
    answer.instance(factors, LoraFactors, subject)
    for letter, values, shape in zip("AB", factors, shapes, strict=True):
        answer.array(f"{subject}.{letter}", values, shape, np.float32)
        answer.finite(f"values of {subject}.{letter}", values)
        if values.size and values.min() < least:
            answer.refuse(f"returned a value of {values.min():.4g} in {subject}.{letter}, which holds squares")
