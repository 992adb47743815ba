"""Bases on several devices: the numbers of one device, each tensor where it has to be, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_devices import pretended_devices
from quantized_bases import save_pair

from mindprint.contract import (
    AdapterState,
    LoadedModel,
    ModelSpec,
    PreferenceBatch,
    Sampling,
    TokenBatch,
    TrainingState,
    Update,
)
from mindprint.errors import ModelError
from mindprint.losses import PreferenceLoss
from mindprint.models.folder import quantization
from mindprint.plugins.backend import Backend
from mindprint_torch import device_map
from mindprint_torch.device_map import share_layers
from mindprint_torch.model import TorchModel
from mindprint_torch.prompts import attends_without_mask

Folders = Callable[[str], Path]
MakeAdapter = Callable[..., AdapterState]
Outcome = tuple[list[Any], TrainingState]

ONE, SEVERAL = ("cpu:0",), ("cpu:0", "cpu:1", "cpu:2")
ARCHITECTURES = ("qwen2", "gemma2", "gpt2", "qwen2_moe", "bloom", "lfm2")
STEPS = 2


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretended devices, in this thread alone."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with pretended_devices():
        yield


@pytest.fixture
def whole_run(
    backend: Backend,
    make_adapter: MakeAdapter,
    token_batch: Callable[..., TokenBatch],
    preference_batch: Callable[..., PreferenceBatch],
) -> Callable[..., Outcome]:
    """Everything that a run asks of a backend, on a base that is on these devices."""

    def run(folder: Path, devices: tuple[str, ...], *, recomputes: bool = False) -> Outcome:
        model = load_on(backend, folder, devices)
        adapter = make_adapter(model, dropout=0.2)
        backend.inject_adapter(model, adapter)
        told: list[Any] = [backend.base_digest(model), model.parameters]
        sft = [token_batch(seed=1), token_batch(seed=2)]
        told += [backend.log_probs(model, sft[0]), backend.log_probs(model, sft[0], adapter=False)]
        for step in range(STEPS):
            tokens = sum(batch.loss_tokens for batch in sft)
            update = Update(1e-2, tokens, max_grad_norm=0.5, seed=step, gradient_checkpointing=recomputes)
            told.append(backend.sft_step(model, sft, update))
        pairs = [preference_batch(seed=3), preference_batch(seed=4)]
        for shares in (True, False):
            update = Update(1e-2, 20, 6, share_prompts=shares, gradient_checkpointing=recomputes)
            told.append(backend.dpo_step(model, pairs, PreferenceLoss(), update))
        prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 7, 5)]
        for temperature in (0.0, 1.0):
            told.append(backend.generate(model, prompts, Sampling(4, (2,), temperature=temperature, seed=5)))
        # Whoever listens is in a conversation, whose keys and values are kept for the next turn.
        long = np.arange(3, 23, dtype=np.int32)
        for prompt in (long, np.append(long, np.arange(5, 9, dtype=np.int32))):
            told.append(backend.generate(model, [prompt], Sampling(3, ()), on_token=lambda *_: True))
        state = backend.save(model)
        backend.restore(model, state)
        told.append(backend.sft_step(model, sft, Update(1e-2, 40, seed=9)))
        told.append(backend.base_digest(model))
        return told, backend.save(model)

    return run


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """Compare two runs bit for bit."""
    for value, wanted in zip(flat(outcome), flat(expected), strict=True):
        np.testing.assert_array_equal(value, wanted)


def flat(value: Any) -> list[Any]:
    """Return all numbers, arrays and texts within tuples, lists, mappings and dataclasses, in their order."""
    if isinstance(value, dict):
        return [part for key, entry in value.items() for part in (key, *flat(entry))]
    if isinstance(value, (tuple, list)):
        return [part for entry in value for part in flat(entry)]
    return flat(vars(value)) if hasattr(value, "__dataclass_fields__") else [value]


def test_the_numbers_are_those_of_one_device(whole_run: Callable[..., Outcome], folders: Folders) -> None:
    """The CPU named three times: what moves nothing changes nothing."""
    assert_same(whole_run(folders("llama"), ("cpu", "cpu", "cpu")), whole_run(folders("llama"), ("cpu",)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("pretended")
def test_every_tensor_is_moved_to_where_it_is_needed(
    architecture: str, whole_run: Callable[..., Outcome], folders: Folders
) -> None:
    """On three devices that refuse each other's tensors, a run gives the numbers of one, bit for bit."""
    assert_same(whole_run(folders(architecture), SEVERAL), whole_run(folders(architecture), ONE))


@pytest.mark.usefixtures("pretended")
def test_activations_are_computed_again_on_their_device(whole_run: Callable[..., Outcome], folders: Folders) -> None:
    runs = [whole_run(folders("llama"), devices, recomputes=True) for devices in (SEVERAL, ONE)]
    assert_same(*runs)


@pytest.mark.usefixtures("pretended")
def test_rows_that_attention_reads_without_a_mask_are_moved(
    backend: Backend,
    folders: Folders,
    make_adapter: MakeAdapter,
    preference_batch: Callable[..., PreferenceBatch],
) -> None:
    """As on a GPU, where a mask is not values but the places of tokens."""
    runs = []
    for devices in (SEVERAL, ONE):
        model = load_on(backend, folders("llama"), devices)
        model.handle.masks_forks = not attends_without_mask(model.handle.head)
        assert not model.handle.masks_forks
        backend.inject_adapter(model, make_adapter(model))
        metrics = backend.dpo_step(model, [preference_batch()], PreferenceLoss(), Update(1e-2, 20, 3))
        runs.append(([metrics], backend.save(model)))
    assert_same(*runs)


@pytest.mark.usefixtures("pretended")
def test_each_part_is_on_its_device(
    backend: Backend, folders: Folders, make_adapter: MakeAdapter, token_batch: Callable[..., TokenBatch]
) -> None:
    """Weights, factors, gradients, moments, keys and values of a layer are together, the rest on the first device."""
    model = load_on(backend, folders("llama"), SEVERAL)
    backend.inject_adapter(model, make_adapter(model))
    backend.sft_step(model, [token_batch()], Update(1e-2, 20))
    handle: TorchModel = model.handle
    adapter = handle.adapter
    assert adapter is not None
    homes = {"model.layers.0": "cpu:1", "model.layers.1": "cpu:2"}
    for name, weight in handle.network.state_dict(keep_vars=True).items():
        assert str(weight.device) == homes.get(name[: len("model.layers.0")], "cpu:0"), name
    for name, layer in adapter.layers.items():
        for factor in layer.factors:
            held = (factor, *adapter.optimizer.moments(factor))
            assert {str(each.device) for each in held} == {homes[name[: len("model.layers.0")]]}
    prompt = np.arange(3, 23, dtype=np.int32)
    backend.generate(model, [prompt], Sampling(3, ()), on_token=lambda *_: True)
    found = handle.kept.find(prompt, adapter=True)
    assert found is not None
    assert [[str(half.device) for half in layer] for layer in found[1]] == [["cpu:1"] * 2, ["cpu:2"] * 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"enter": lambda _, __, ___, args, kwargs: (args, kwargs)},
        {"enter": lambda self, device, _, args, kwargs: (self._on(device, args), kwargs)},
        {"enter": lambda self, device, _, args, kwargs: (args, {k: self._on(device, v) for k, v in kwargs.items()})},
        {"leave": lambda _, __, ___, ____, output: output},
    ],
    ids=["no inputs", "no masks and angles", "no hidden states", "no last hidden states"],
)
@pytest.mark.usefixtures("pretended")
def test_a_move_that_is_missing_is_noticed(
    changes: dict[str, Any], backend: Backend, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: without any of the moves, the first pass of a base raises as on real devices."""
    for name, method in changes.items():
        monkeypatch.setattr(device_map._Moves, name, method)
    with pytest.raises(
        ModelError, match=r"the model does not run: MixedDevicesError: .* got tensors on cpu:0, cpu:[12]"
    ):
        load_on(backend, folders("llama"), SEVERAL)


@pytest.mark.usefixtures("pretended")
def test_a_mask_moves_to_a_device_once() -> None:
    """Angles and masks are inputs of every layer, and are not copied for each of them."""
    moves = device_map._Moves()
    device, mask = torch.device("cpu:1"), torch.zeros(2).to("cpu:0")
    copies = [moves.enter(device, torch.nn.Identity(), (), {"mask": mask})[1]["mask"] for _ in range(2)]
    assert copies[0] is copies[1]
    moves.leave(torch.device("cpu:0"), torch.nn.Identity(), (), copies[0])
    assert moves.enter(device, torch.nn.Identity(), (), {"mask": mask})[1]["mask"] is not copies[0]


@pytest.mark.parametrize("method", ["nf4", "affine"])
@pytest.mark.usefixtures("pretended")
def test_packed_weights_are_on_the_device_of_their_layer(method: str, backend: Backend, tmp_path: Path) -> None:
    base = save_pair(tmp_path, method) / "packed"
    models = [load_on(backend, base, devices) for devices in (SEVERAL, ONE)]
    batch = TokenBatch(np.arange(3, 15, dtype=np.int32)[None], np.array([12], np.int32), np.ones((1, 12), bool))
    batch.loss_mask[:, 0] = False
    np.testing.assert_array_equal(*(backend.log_probs(model, batch, adapter=False) for model in models))
    assert backend.base_digest(models[0]) == backend.base_digest(models[1])


@pytest.mark.parametrize(
    ("sizes", "rest", "devices", "expected"),
    [
        ([1] * 4, 0, 2, [2, 2]),
        ([1] * 5, 0, 3, [1, 2, 2]),
        ([1] * 8, 2, 2, [3, 5]),
        ([1] * 8, 100, 3, [0, 4, 4]),
        ([5, 1, 1, 1], 0, 2, [1, 3]),
        ([1, 1], 0, 3, [0, 1, 1]),
        ([3, 3, 3], 1, 1, [3]),
    ],
)
def test_devices_hold_about_as_much_as_each_other(
    sizes: list[int], rest: int, devices: int, expected: list[int]
) -> None:
    assert share_layers(sizes, rest, devices) == expected


def test_what_cannot_be_divided_is_refused(backend: Backend, folders: Folders) -> None:
    spec = ModelSpec(str(folders("llama")), "cpu", "float32", devices=("cpu", "cpu"), shard=True)
    with pytest.raises(ModelError, match="not divided among ranks and among devices of one: set backend.shard=false"):
        backend.load_model(spec)
    with pytest.raises(ModelError, match="names 'cuda:7', and 0 CUDA devices are visible here"):
        device_map.named_devices(["cuda:7"])
    with pytest.raises(ModelError, match="names 'cpu:1', of which there is one here: write 'cpu'"):
        device_map.named_devices(["cpu", "cpu:1"])
    with pytest.raises(ModelError, match="names 'cuda' without a number: write cuda:0"):
        device_map.named_devices(["cuda"])
    with pytest.raises(ModelError, match="Linear has no decoder layers that are known here: set backend.device"):
        dict(device_map._decoder_layers(torch.nn.Linear(2, 2)))


def load_on(backend: Backend, folder: Path, devices: tuple[str, ...]) -> LoadedModel:
    """Load a base on these devices, or on the only one."""
    device, named = ("cpu", devices) if len(devices) > 1 else (devices[0], ())
    return backend.load_model(ModelSpec(str(folder), device, "float32", quantization(folder), devices=named))
