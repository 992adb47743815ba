"""A backend's answers are checked, and the best backend is chosen, by rules that a test can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindprint.contract import (
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
from mindprint.errors import AdapterError, BackendError, ContractError
from mindprint.hookspecs import REQUIRED_HOOKS
from mindprint.losses import PreferenceLoss
from mindprint.plugins import choosing
from mindprint.plugins.backend import Backend
from mindprint.plugins.choosing import choose_backend
from mindprint.plugins.entries import Plugin

MODEL = LoadedModel(object(), "cpu", "float32", 1, 10)
IDS, LENGTHS = np.ones((2, 3), np.int32), np.full(2, 3, np.int32)
BATCH = TokenBatch(IDS, LENGTHS, np.array([[False, True, True]] * 2))
PAIRS = PreferenceBatch(IDS, LENGTHS, IDS, LENGTHS, IDS, LENGTHS)
ADAPTER = AdapterState(LoraConfig(2, 4.0, ()), {})
CPU = DeviceInfo("cpu", None)


def make(*devices: DeviceInfo, name: str = "acme", **hooks: Any) -> Backend:
    answers = {f"mindprint_{hook}": partial(always, answer) for hook, answer in hooks.items()}
    info = BackendInfo(name, devices or (CPU,))
    plugin = Plugin("mindprint.backends", name, "module", "acme-backend", "3.1")
    return Backend(plugin, SimpleNamespace(mindprint_backend_info=lambda: info, **answers))


def always(answer: object, **_: object) -> object:
    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (np.zeros((2, 3)), r"mindprint_log_probs returned log-probs as float64\[2, 3\], .* asks for float32\[2, 3\]"),
        (np.zeros((2, 2), np.float32), r"returned log-probs as float32\[2, 2\]"),
        ([[0.0] * 3] * 2, "returned log-probs as a list"),
        (np.full((2, 3), np.nan, np.float32), "returned log-probs that are not finite"),
    ],
)
def test_log_probs_of_the_wrong_kind(answer: object, words: str) -> None:
    with pytest.raises(ContractError, match=f"backend 'acme': .*{words}"):
        make(log_probs=answer).log_probs(MODEL, BATCH)


def test_a_preference_step_must_answer_for_every_pair() -> None:
    short = StepMetrics(0.7, 1.0, chosen_log_probs=np.zeros(1, np.float32), rejected_log_probs=np.zeros(2, np.float32))
    with pytest.raises(ContractError, match=r"mindprint_dpo_step returned chosen_log_probs as float32\[1\]"):
        make(dpo_step=short).dpo_step(MODEL, [PAIRS], PreferenceLoss(), Update(1e-3, 6, 2))


def test_a_step_must_return_metrics() -> None:
    with pytest.raises(ContractError, match="mindprint_sft_step returned dict, the contract asks for StepMetrics"):
        make(sft_step={"loss": 1.0}).sft_step(MODEL, [BATCH], Update(1e-3, 4))


def test_log_probs_of_pairs_must_be_finite() -> None:
    sums = np.array([-1.0, np.inf], np.float32)
    metrics = StepMetrics(0.7, 1.0, chosen_log_probs=sums, rejected_log_probs=-np.ones(2, np.float32))
    with pytest.raises(ContractError, match="mindprint_dpo_step returned chosen_log_probs that are not finite"):
        make(dpo_step=metrics).dpo_step(MODEL, [PAIRS], PreferenceLoss(), Update(1e-3, 6, 2))


@pytest.mark.parametrize(
    ("a", "moment", "words"),
    [
        (np.zeros((3, 4), np.float32), None, r"q_proj.A as float32\[3, 4\], the contract asks for float32\[2, 4\]"),
        (np.zeros((2, 4)), None, r"q_proj.A as float64\[2, 4\]"),
        (np.full((2, 4), np.nan, np.float32), None, "values of q_proj.A that are not finite"),
        (np.zeros((2, 4), np.float32), np.zeros((4, 2), np.float32), r"first moment of q_proj.A as float32\[4, 2\]"),
    ],
)
def test_a_saved_state_of_the_wrong_kind(a: np.ndarray, moment: np.ndarray | None, words: str) -> None:
    """Rank 2, four features in, three out: A is [2, 4], B [3, 2], and so are their moments."""
    b = np.zeros((3, 2), np.float32)
    adapter = AdapterState(LoraConfig(2, 4.0, ("q_proj",)), {"q_proj": LoraFactors(a, b)})
    moments = {} if moment is None else {"q_proj": LoraFactors(moment, b)}
    with pytest.raises(ContractError, match=f"backend 'acme': mindprint_save returned {words}"):
        make(save=TrainingState(adapter, moments, moments, len(moments))).save(MODEL)


def test_generated_tokens_are_int32() -> None:
    answer = Generation(np.zeros(2, np.int64), "length")
    with pytest.raises(ContractError, match=r"mindprint_generate returned tokens as int64\[2\]"):
        make(generate=[answer]).generate(MODEL, [IDS[0]], Sampling(5, (1,)))


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_filters_need_a_backend_that_has_them(filters: dict[str, Any]) -> None:
    backend = make(generate=[Generation(np.zeros(2, np.int32), "length")])
    with pytest.raises(BackendError, match="backend 'acme' knows neither top_k nor min_p nor repetition_penalty"):
        backend.generate(MODEL, [IDS[0]], Sampling(2, (1,), **filters))
    assert backend.generate(MODEL, [IDS[0]], Sampling(2, (1,), top_k=0, min_p=0.0, repetition_penalty=1.0))


def test_a_backend_that_writes_into_its_input() -> None:
    """Core's rows are used again in the next epoch: the finding names hook and array."""
    batch = TokenBatch(IDS.copy(), LENGTHS, BATCH.loss_mask)

    def writing(batches: Any, **_: Any) -> StepMetrics:
        batches[0].tokens[0, 0] = 9
        return StepMetrics(1.0, 1.0)

    backend = make()
    backend._hook.mindprint_sft_step = writing
    with pytest.raises(ContractError, match=r"mindprint_sft_step wrote into its input TokenBatch\.tokens"):
        backend.sft_step(MODEL, [batch], Update(1e-3, 4))


def test_what_a_hook_raises_names_backend_and_hook() -> None:
    def failing(**_: Any) -> StepMetrics:
        raise MemoryError("no room")

    backend = make()
    backend._hook.mindprint_sft_step = failing
    words = r"backend 'acme' \(acme-backend 3.1\): mindprint_sft_step raised MemoryError: no room; the last checkpoint"
    with pytest.raises(BackendError, match=words):
        backend.sft_step(MODEL, [BATCH], Update(1e-3, 4))


CALLS: dict[str, Callable[[Backend], object]] = {
    "load_model": lambda backend: backend.load_model(ModelSpec("", "cpu", "float32")),
    "release": lambda backend: backend.release(MODEL),
    "adapter_sites": lambda backend: backend.adapter_sites(MODEL),
    "base_digest": lambda backend: backend.base_digest(MODEL),
    "inject_adapter": lambda backend: backend.inject_adapter(MODEL, ADAPTER),
    "sft_step": lambda backend: backend.sft_step(MODEL, [BATCH], Update(1e-3, 4)),
    "dpo_step": lambda backend: backend.dpo_step(MODEL, [PAIRS], PreferenceLoss(), Update(1e-3, 6, 2)),
    "log_probs": lambda backend: backend.log_probs(MODEL, BATCH),
    "generate": lambda backend: backend.generate(MODEL, [IDS[0]], Sampling(5, (1,))),
    "save": lambda backend: backend.save(MODEL),
    "restore": lambda backend: backend.restore(MODEL, TrainingState(ADAPTER)),
}


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), BaseException("odd"), MemoryError("no room")])
@pytest.mark.parametrize("hook", CALLS)
def test_no_hook_can_end_the_process(hook: str, error: BaseException) -> None:
    """A library that calls `sys.exit(0)` would end a run as if it had succeeded; only KeyboardInterrupt passes."""
    assert {f"mindprint_{name}" for name in CALLS} | {"mindprint_backend_info"} == set(REQUIRED_HOOKS)
    words = rf"backend 'acme' \(acme-backend 3.1\): mindprint_{hook} raised {type(error).__name__}"
    with pytest.raises(BackendError, match=words):
        CALLS[hook](raising(hook, error))
    with pytest.raises(KeyboardInterrupt):
        CALLS[hook](raising(hook, KeyboardInterrupt()))
    with pytest.raises(AdapterError, match="^as it was raised$"):
        CALLS[hook](raising(hook, AdapterError("as it was raised")))


@pytest.mark.parametrize("hook", ["adapter_sites", "generate"])
def test_a_generator_of_a_plugin_is_read_under_guard(hook: str) -> None:
    """Its code runs when it is read, after the hook has returned."""

    def answers() -> Iterator[object]:
        raise SystemExit(0)
        yield

    with pytest.raises(BackendError, match=f"mindprint_{hook} raised SystemExit: 0"):
        CALLS[hook](make(**{hook: answers()}))
    with pytest.raises(ContractError, match=f"mindprint_{hook} returned int, the contract asks for tuple"):
        CALLS[hook](make(**{hook: 3}))


def raising(hook: str, error: BaseException) -> Backend:
    def implementation(**_: Any) -> object:
        raise error

    backend = make()
    setattr(backend._hook, f"mindprint_{hook}", implementation)
    return backend


def test_every_prompt_gets_an_answer() -> None:
    with pytest.raises(ContractError, match="mindprint_generate answered 0 of 1 prompts"):
        make(generate=[]).generate(MODEL, [IDS[0]], Sampling(5, (1,)))


def test_a_device_that_is_not_there_gets_its_reason() -> None:
    backend = make(DeviceInfo("cuda", "no NVIDIA driver"), CPU)
    assert backend.device("auto").name == "cpu"
    with pytest.raises(BackendError, match=r"cannot use device 'cuda' here: no NVIDIA driver \(usable: cpu\)"):
        backend.device("cuda")
    with pytest.raises(BackendError, match=r"knows no device 'tpu' \(usable here: cpu\)"):
        backend.device("tpu")


def test_a_dtype_that_does_not_train_there() -> None:
    backend = make()
    assert backend.dtype(CPU, "auto") == "float32"
    with pytest.raises(BackendError, match=r"does not train in float16 on cpu \(it can: float32\)"):
        backend.dtype(CPU, "float16")


def test_a_device_that_must_be_named_is_never_chosen_unasked() -> None:
    backend = make(MPS, CPU)
    assert backend.device("auto").name == "cpu"
    assert backend.device("mps").name == "mps"
    with pytest.raises(BackendError, match=r"backend 'acme' has no usable device here \(mps: must be named\)"):
        make(MPS).device("auto")


CUDA, METAL = (DeviceInfo(name, None, accelerator=True) for name in ("cuda", "metal"))
MPS = DeviceInfo("mps", None, accelerator=True, auto=False)
NO_CUDA = DeviceInfo("cuda", "no NVIDIA driver", accelerator=True)
RANKS = {"Linux": {"torch": 20.0, "mlx": 10.0}, "Darwin": {"torch": 10.0, "mlx": 20.0}}
"""As the plugins state them."""


@pytest.mark.parametrize(
    ("system", "devices", "chosen", "loaded"),
    [
        ("Linux", {"mlx": (CPU,), "torch": (NO_CUDA, CPU)}, "torch", ["torch", "mlx"]),
        ("Linux", {"mlx": (CPU,), "torch": (CUDA, CPU)}, "torch", ["torch"]),
        ("Linux", {"mlx": (CUDA, CPU), "torch": (NO_CUDA, CPU)}, "mlx", ["torch", "mlx"]),
        ("Darwin", {"mlx": (METAL, CPU), "torch": (MPS, CPU)}, "mlx", ["mlx"]),
        ("Darwin", {"mlx": (CPU,), "torch": (MPS, CPU)}, "mlx", ["mlx", "torch"]),
        ("Linux", {"acme": (CUDA,), "torch": (CPU,)}, "acme", ["torch", "acme"]),
        ("Linux", {"mlx": (CPU,)}, "mlx", []),
    ],
)
def test_the_best_backend_for_the_hardware(
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    devices: dict[str, tuple[DeviceInfo, ...]],
    chosen: str,
    loaded: list[str],
) -> None:
    """An accelerator first, else the platform's own; and no framework is loaded that need not be asked."""
    asked = pretend(monkeypatch, devices)
    choice = choose_backend(asked, lambda name: RANKS[system].get(name, 0))
    assert choice.name == chosen
    assert choice.reason
    assert asked.names == loaded


def test_a_broken_candidate_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"torch": (), "mlx": (CPU,)})

    def load(name: str) -> Backend:
        if name == "torch":
            raise BackendError("backend 'torch' failed to import")
        return make(CPU, name=name)

    choice = choose_backend(load, RANKS["Linux"].__getitem__)
    assert choice.name == "mlx"
    assert "left out: backend 'torch' failed to import" in choice.reason


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    with pytest.raises(BackendError, match=r'no backend is installed; pip install "mindprint-core\[torch\]"'):
        choose_backend()


def pretend(monkeypatch: pytest.MonkeyPatch, devices: dict[str, tuple[DeviceInfo, ...]]) -> Any:
    class Asked:
        def __init__(self) -> None:
            self.names: list[str] = []

        def __call__(self, name: str) -> Backend:
            self.names.append(name)
            return make(*devices[name], name=name)

    monkeypatch.setattr(choosing, "installed_names", lambda group: tuple(sorted(devices)))
    return Asked()
