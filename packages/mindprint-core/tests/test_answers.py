"""Nonsense that a backend may answer: each kind is one line that names backend, hook and value, not a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindprint.contract import (
    AdapterFacts,
    AdapterSite,
    AdapterState,
    BackendInfo,
    DeviceInfo,
    Generation,
    LoadedModel,
    LoraConfig,
    LoraFactors,
    ModelSpec,
    PreferenceBatch,
    Sampling,
    StepMetrics,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.errors import BackendError, ContractError
from mindprint.losses import PreferenceLoss
from mindprint.models.engine import Engine, Placement, check_restored, check_vocabulary
from mindprint.models.folder import ModelFolder
from mindprint.plugins.backend import Backend
from mindprint.plugins.entries import Plugin

IDS, LENGTHS = np.ones((2, 3), np.int32), np.full(2, 3, np.int32)
BATCH = TokenBatch(IDS, LENGTHS, np.array([[False, True, True]] * 2))
PAIRS = PreferenceBatch(IDS, LENGTHS, IDS, LENGTHS, IDS, LENGTHS)
MODEL = LoadedModel(object(), "cpu", "float32", 1, 10)
SITE = AdapterSite("m.q", "linear", 4, 3)
FACTORS = LoraFactors(np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
STATE = TrainingState(AdapterState(LoraConfig(2, 4.0, ("m.q",)), {"m.q": FACTORS}))
SUMS = -np.ones(2, np.float32)
STEP = StepMetrics(1.0, 0.5)
PAIR_STEP = replace(STEP, chosen_log_probs=SUMS, rejected_log_probs=SUMS)
LOG_PROBS = np.where(BATCH.loss_mask, np.float32(-1), np.float32(0))

CALLS: dict[str, Callable[[Backend], Any]] = {
    "load_model": lambda backend: backend.load_model(ModelSpec("", "cpu", "float32")),
    "adapter_sites": lambda backend: backend.adapter_sites(MODEL),
    "base_digest": lambda backend: backend.base_digest(MODEL),
    "inject_adapter": lambda backend: backend.inject_adapter(MODEL, STATE.adapter),
    "sft_step": lambda backend: backend.sft_step(MODEL, [BATCH], Update(1e-3, 4)),
    "dpo_step": lambda backend: backend.dpo_step(MODEL, [PAIRS], PreferenceLoss(), Update(1e-3, 6, 2)),
    "log_probs": lambda backend: backend.log_probs(MODEL, BATCH),
    "generate": lambda backend: backend.generate(MODEL, [IDS[0]], Sampling(3, (1,))),
    "save": lambda backend: backend.save(MODEL),
}

SOUND: dict[str, Any] = {
    "load_model": MODEL,
    "adapter_sites": [SITE],
    "base_digest": "abc",
    "inject_adapter": AdapterFacts(("m.q",), 14),
    "sft_step": STEP,
    "dpo_step": PAIR_STEP,
    "log_probs": LOG_PROBS,
    "generate": [Generation(np.array([5], np.int32), "stop")],
    "save": STATE,
}


def backend_with(**hooks: Any) -> Backend:
    answers = {f"mindprint_{hook}": partial(always, answer) for hook, answer in hooks.items()}
    info = BackendInfo("acme", (DeviceInfo("cpu", None),))
    plugin = Plugin("mindprint.backends", "acme", "module", "acme-backend", "3.1")
    return Backend(plugin, SimpleNamespace(mindprint_backend_info=lambda: info, **answers))


def always(answer: object, **_: object) -> object:
    return answer


def answered(*tokens: int, stop_reason: Any = "stop") -> list[Generation]:
    return [Generation(np.array(tokens, np.int32), stop_reason)]


def tensors(**sites: Any) -> TrainingState:
    return replace(
        STATE, adapter=replace(STATE.adapter, tensors={name.replace("_", "."): f for name, f in sites.items()})
    )


def values(**fields: Any) -> dict[str, Any]:
    return fields


MOMENTS = {"m.q": FACTORS}
NEGATIVE = {"m.q": LoraFactors(-FACTORS.a, FACTORS.b)}

NONSENSE: list[tuple[str, Any, str]] = [
    *((hook, None, "None") for hook in CALLS),
    *((hook, {"loss": 1}, "returned dict|(sites|generate) returned str|as a dict") for hook in CALLS),
    # Loading.
    ("load_model", replace(MODEL, vocab_size=-3), "vocab_size = -3, .* a whole number of at least 1"),
    ("load_model", replace(MODEL, vocab_size=10.5), "vocab_size = 10.5"),
    ("load_model", replace(MODEL, parameters="many"), "parameters = 'many'"),
    ("load_model", replace(MODEL, parameters=True), "parameters = True"),
    ("load_model", replace(MODEL, parameters=float("nan")), "parameters = nan"),
    ("load_model", replace(MODEL, device="gpu"), "device = 'gpu', .* 'cpu'"),
    ("load_model", replace(MODEL, dtype="float8"), "dtype = 'float8', .* 'float32'"),
    ("load_model", replace(MODEL, notes="careful"), "notes = 'careful'"),
    # Sites.
    ("adapter_sites", [SITE, SITE], "the site 'm.q' twice"),
    ("adapter_sites", [SITE, "m.k"], "returned str, the contract asks for AdapterSite"),
    ("adapter_sites", [replace(SITE, name="")], "name = ''"),
    ("adapter_sites", [replace(SITE, name=["m.q"])], r"name = \['m.q'\]"),
    ("adapter_sites", [replace(SITE, kind="conv")], "m.q: kind = 'conv', .* one of linear, embedding, experts"),
    ("adapter_sites", [replace(SITE, kind=[])], r"kind = \[\]"),
    ("adapter_sites", [replace(SITE, in_features=0)], "in_features = 0"),
    ("adapter_sites", [replace(SITE, out_features=-4)], "out_features = -4"),
    ("adapter_sites", [replace(SITE, out_features=None)], "out_features = None"),
    ("adapter_sites", [replace(SITE, experts=2)], "experts = 2, .* None"),
    ("adapter_sites", [replace(SITE, kind="experts")], "experts = None"),
    # Injection.
    ("inject_adapter", AdapterFacts(("m.q",), -14), "trainable_elements = -14"),
    ("inject_adapter", AdapterFacts(("m.q", "m.q"), 14), "the site 'm.q' twice"),
    ("inject_adapter", AdapterFacts("m.q", 14), "sites = 'm.q'"),  # type: ignore[arg-type]
    ("inject_adapter", AdapterFacts(([],), 14), r"sites = \(\[\],\)"),  # type: ignore[arg-type]
    # Steps.
    *(
        (hook, replace(step, **change), words)
        for hook, step in (("sft_step", STEP), ("dpo_step", PAIR_STEP))
        for change, words in (
            (values(loss="low"), "loss = 'low', .* a number"),
            (values(loss=None), "loss = None"),
            (values(loss=np.ones(3)), r"loss = array\(\[1"),
            (values(loss=True), "loss = True"),
            (values(grad_norm=-1.0), "grad_norm = -1.0, .* not negative"),
            (values(grad_norm=[1.0]), r"grad_norm = \[1.0\]"),
            (values(skipped="no"), "skipped = 'no'"),
            (values(skipped=True), "skipped = True, .* False in float32"),
            (values(loss_scale=2.0), "loss_scale = 2.0, .* None in float32"),
        )
    ),
    ("dpo_step", STEP, "chosen_log_probs as a NoneType"),
    ("dpo_step", replace(PAIR_STEP, chosen_log_probs=[-1.0, -1.0]), "chosen_log_probs as a list"),
    ("dpo_step", replace(PAIR_STEP, rejected_log_probs=-SUMS), "rejected_log_probs of 1 nats, above 0"),
    # Log-probs.
    ("log_probs", -LOG_PROBS, "log-probs of 1 nats, above 0: no probability is above 1"),
    ("log_probs", LOG_PROBS - 1, "a log-prob of -1 outside the mask"),
    # Generation.
    ("generate", answered(999999), "token 999999, the model has 10 tokens"),
    ("generate", answered(-1), "token -1"),
    ("generate", answered(2, 1), "the stop token 1 as part of an answer"),
    ("generate", answered(2, 3, 4, 5), "4 tokens, the limit was 3"),
    ("generate", answered(2, stop_reason="eos"), "stop_reason = 'eos', .* one of stop, length"),
    ("generate", answered(2, stop_reason=None), "stop_reason = None"),
    ("generate", answered(2, stop_reason=["stop"]), r"stop_reason = \['stop'\]"),
    ("generate", [*answered(2), *answered(2)], "answered 2 of 1 prompts"),
    ("generate", [Generation([2], "stop")], "tokens as a list"),  # type: ignore[arg-type]
    ("generate", [Generation([[2], [2, 3]], "stop")], "tokens as a list"),  # type: ignore[arg-type]
    ("generate", [Generation(np.ones((1, 1), np.int32), "stop")], r"tokens as int32\[1, 1\]"),
    # State.
    ("save", tensors(), "adapter.tensors without 'm.q', of 1 target modules"),
    ("save", tensors(m_q=FACTORS, m_k=FACTORS), "adapter.tensors of 'm.k', not among the 1 target modules"),
    ("save", tensors(m_q=tuple(FACTORS)), "m.q as tuple, the contract asks for LoraFactors"),
    ("save", tensors(m_q=LoraFactors([[1.0]], FACTORS.b)), "m.q.A as a list"),  # type: ignore[arg-type]
    ("save", tensors(m_q=LoraFactors(FACTORS.a, None)), "m.q.B as a NoneType"),  # type: ignore[arg-type]
    ("save", replace(STATE, adapter=None), "adapter as None, the contract asks for AdapterState"),
    ("save", replace(STATE, adapter=replace(STATE.adapter, tensors=[FACTORS])), "adapter.tensors as list"),
    ("save", replace(STATE, adapter=replace(STATE.adapter, config={})), "adapter.config as dict"),
    ("save", replace(STATE, first_moments={"m.k": FACTORS}), "first_moments without 'm.q'"),
    ("save", replace(STATE, first_moments=None), "first_moments as None"),
    ("save", replace(STATE, first_moments=MOMENTS), "moments of one order without those of the other"),
    ("save", replace(STATE, first_moments=MOMENTS, second_moments=NEGATIVE), "-1 in second moment of m.q.A"),
    ("save", replace(STATE, optimizer_steps=-1), "optimizer_steps = -1"),
    ("save", replace(STATE, optimizer_steps=1.5), "optimizer_steps = 1.5"),
    ("save", replace(STATE, loss_scale=2.0), "loss_scale = 2.0, .* None in float32"),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "answer", "words"), NONSENSE)
def test_nonsense_is_one_line_that_names_hook_and_value(hook: str, answer: Any, words: str) -> None:
    with pytest.raises(ContractError, match=f"^backend 'acme': mindprint_{hook} ") as caught:
        CALLS[hook](backend_with(**{hook: answer}))
    assert "\n" not in str(caught.value)
    caught.match(words)


@pytest.mark.parametrize("hook", CALLS)
def test_a_sound_answer_passes(hook: str) -> None:
    CALLS[hook](backend_with(**{hook: SOUND[hook]}))


def test_numbers_of_numpy_become_pythons_own() -> None:
    """json writes no np.float32, and a metric that ended there would lose the step."""
    step = StepMetrics(np.float32(1.5), np.float64(0.5), np.False_)  # type: ignore[arg-type]
    metrics = CALLS["sft_step"](backend_with(sft_step=step))
    assert json.dumps([metrics.loss, metrics.grad_norm, metrics.skipped]) == "[1.5, 0.5, false]"
    model = replace(MODEL, parameters=np.int64(7), vocab_size=np.int32(10))  # type: ignore[arg-type]
    loaded = CALLS["load_model"](backend_with(load_model=model))
    assert json.dumps([loaded.parameters, loaded.vocab_size]) == "[7, 10]"


@pytest.mark.parametrize("scale", [None, -1.0, float("inf"), "2"])
def test_float16_has_a_loss_scale(scale: Any) -> None:
    half = replace(MODEL, dtype="float16")
    backend = backend_with(sft_step=replace(STEP, loss_scale=scale))
    with pytest.raises(ContractError, match="mindprint_sft_step returned loss_scale = "):
        backend.sft_step(half, [BATCH], Update(1e-3, 4))
    skipped = replace(STEP, loss_scale=65536.0, skipped=True)
    assert backend_with(sft_step=skipped).sft_step(half, [BATCH], Update(1e-3, 4)) == skipped


def test_code_of_an_answers_own_class_is_guarded() -> None:
    """A class of the plugin that raises when it is read is an error of the plugin."""

    class Odd:
        def __eq__(self, _: object) -> bool:
            raise SystemExit(0)

        __hash__ = None  # type: ignore[assignment]

    odd = replace(MODEL, device=Odd())  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"backend 'acme' .*mindprint_load_model's answer raised SystemExit: 0"):
        CALLS["load_model"](backend_with(load_model=odd))


def engine_with(**hooks: Any) -> Engine:
    """Return an engine in which STATE's adapter is injected, without loading a model."""
    backend = backend_with(restore=True, inject_adapter=AdapterFacts(("m.q",), 14), **hooks)
    engine = Engine(ModelFolder(Path(), "base"))
    engine._placement, engine._model = Placement(backend, "cpu", "float32"), MODEL
    engine.inject(STATE.adapter)
    return engine


def test_another_configuration_is_not_saved() -> None:
    other = replace(STATE.adapter, config=replace(STATE.adapter.config, alpha=32.0))
    words = "'acme': mindprint_save returned an adapter of another configuration .*: alpha = 32.0, not 4.0"
    with pytest.raises(ContractError, match=words):
        engine_with(save=replace(STATE, adapter=other)).save()


def moved(pair: LoraFactors) -> LoraFactors:
    return LoraFactors(pair.a, pair.b + np.float32(0.5))


TRAINED = replace(STATE, first_moments=MOMENTS, second_moments=MOMENTS, optimizer_steps=3)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (tensors(m_q=moved(FACTORS)), r"another m.q.B than was restored \(greatest difference 0.5\)"),
        (replace(TRAINED, first_moments={}, second_moments={}), "no first moment of m.q"),
        (replace(TRAINED, second_moments={"m.q": moved(FACTORS)}), "another second moment of m.q.B"),
        (replace(TRAINED, optimizer_steps=4), "optimizer_steps = 4, 3 were restored"),
    ],
)
def test_a_state_that_is_not_taken_over_stops_the_run(saved: TrainingState, words: str) -> None:
    with pytest.raises(ContractError, match=f"backend 'acme': mindprint_save after mindprint_restore returned {words}"):
        engine_with(save=saved).restore(TRAINED)
    engine_with(save=TRAINED).restore(TRAINED)


def test_the_loss_scale_is_restored_where_both_have_one() -> None:
    half = replace(TRAINED, loss_scale=64.0)
    check_restored("acme", half, replace(TRAINED, loss_scale=None))
    with pytest.raises(ContractError, match=r"loss_scale = 64.0, 2.0 was restored"):
        check_restored("acme", replace(half, loss_scale=2.0), half)


def test_the_vocabulary_is_that_of_the_embedding_table(toy_model: Path) -> None:
    """Token ids are compared with it, and an id behind the table reads foreign memory."""
    with pytest.raises(
        ContractError, match=r"'acme': mindprint_load_model returned vocab_size = 10, the .* has \d+ rows"
    ):
        check_vocabulary("acme", MODEL, toy_model)
