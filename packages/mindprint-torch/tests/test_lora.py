"""LoRA layers against PEFT's own, and in one piece."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch_samples import COMMON
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from mindprint.contract import AdapterSite, LoadedModel, LoraConfig, ModelSpec, PreferenceBatch, TokenBatch, Update
from mindprint.losses import PreferenceLoss
from mindprint.plugins.backend import Backend
from mindprint_torch import steps
from mindprint_torch.gated import fuse_gated
from mindprint_torch.lora import LoraLayer, attach
from mindprint_torch.recompute import recomputed

Load = Callable[..., LoadedModel]
MakeBatch = Callable[..., TokenBatch]
MakePairs = Callable[..., PreferenceBatch]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def answers_and_gradients(forward: Callable[[Tensor], Tensor], x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """The output of a layer, then the gradients of a weighted sum of it by `x` and by the factors."""
    answer = forward(x)
    weights = torch.linspace(-1, 1, answer.numel()).view(answer.shape).to(answer.dtype)
    return [answer, *torch.autograd.grad((weights * answer).sum(), [x, *factors])]


def hidden(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((2, 7, width), generator=generator).to(dtype).requires_grad_()


def factors_of(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def in_peft(module: Any, *, dropout: float = 0.0) -> Any:
    """PEFT's layer around the same weight, with the same factors."""
    layer: LoraLayer = module.lora
    base = copy.copy(module)
    vars(base).pop("forward")
    base._modules = {}
    rank = min(layer.lora_A.shape)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank * layer.scale,
        target_modules=["it"],
        lora_dropout=dropout,
        fan_in_fan_out=isinstance(module, Conv1D),
    )  # type: ignore[arg-type]
    wrapped: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"it": base}))["it"]  # type: ignore[index]
    for name in ("lora_A", "lora_B"):
        values = getattr(layer, name).detach()
        if isinstance(module, nn.Embedding):
            getattr(wrapped, name.replace("lora_", "lora_embedding_"))["default"].data = values.clone()
        else:
            getattr(wrapped, name)["default"].weight.data = values.clone()
    return wrapped.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_layer_in_one_piece_is_pefts_layer(train: Load, name: str, dtype: str, tolerance: float) -> None:
    """Of these q_proj has a bias."""
    layer: Any = train("qwen2", dtype).handle.network.get_submodule(f"model.layers.1.{name}")
    assert "forward" in vars(layer)
    x = hidden(layer.in_features, DTYPES[dtype])
    theirs = in_peft(layer)
    expected = answers_and_gradients(theirs, x, factors_of(theirs))
    assert_near(answers_and_gradients(layer, x, factors_of(layer)), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_gated_block_in_one_piece_is_the_block(train: Load, architecture: str, dtype: str, tolerance: float) -> None:
    block: Any = train(architecture, dtype).handle.network.get_submodule("model.layers.1.mlp")
    assert "forward" in vars(block)
    x = hidden(32, DTYPES[dtype])
    expected = answers_and_gradients(lambda x: type(block).forward(block, x), x, factors_of(block))
    assert_near(answers_and_gradients(block, x, factors_of(block)), expected, tolerance)


def test_blocks_that_compute_something_else_are_left_alone(train: Load) -> None:
    """Gemma's activation is GELU; GPT-2's block is not gated; a block may do more than its layers say."""
    gemma = train("gemma2").handle.network.get_submodule("model.layers.0.mlp")
    gpt2 = train("gpt2").handle.network.get_submodule("transformer.h.0.mlp")
    assert "forward" not in vars(gemma)
    assert "forward" not in vars(gpt2)
    block = train("llama").handle.network.get_submodule("model.layers.0.mlp")
    del block.forward
    doubled = type("Doubled", (type(block),), {"forward": lambda self, x: 2 * type(block).__mro__[1].forward(self, x)})
    block.__class__ = doubled
    fuse_gated(block)
    assert "forward" not in vars(block)


@pytest.mark.parametrize(
    ("architecture", "dtype", "name"),
    [
        ("gpt2", "float32", "transformer.h.1.attn.c_attn"),
        ("gpt2", "bfloat16", "transformer.h.1.mlp.c_proj"),
        ("llama", "float16", "model.layers.1.self_attn.q_proj"),
    ],
)
def test_transposed_layers_and_float16_are_computed_as_in_peft(
    train: Load, architecture: str, dtype: str, name: str
) -> None:
    layer: Any = train(architecture, dtype).handle.network.get_submodule(name)
    x, theirs = hidden(layer.lora.lora_A.shape[1], DTYPES[dtype]), in_peft(layer)
    expected = answers_and_gradients(theirs, x, factors_of(theirs))
    assert_near(answers_and_gradients(layer, x, factors_of(layer)), expected, 0.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dropout_draws_the_masks_of_peft(train: Load, architecture: str) -> None:
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[architecture]
    layer: Any = train(architecture, dropout=0.5).handle.network.get_submodule(name)
    theirs, x, found = in_peft(layer, dropout=0.5), hidden(layer.lora.lora_A.shape[1]), []
    without = layer(x)
    layer.lora.dropout.train()
    theirs.train()
    for module in (layer, theirs):
        torch.manual_seed(3)
        found.append(answers_and_gradients(module, x, factors_of(module)))
    assert_near(*found, tolerance=0.0)
    assert not torch.equal(found[0][0], without)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embedding_that_scales_its_rows_is_that_of_peft(dtype: str) -> None:
    torch.manual_seed(0)
    table = Gemma3TextScaledWordEmbedding(61, 32, padding_idx=0, embed_scale=32**0.5).to(DTYPES[dtype])
    table.requires_grad_(False)
    layer = attach(table, AdapterSite("embed_tokens", "embedding", 61, 32), LoraConfig(4, 8.0, ("embed_tokens",)))
    for factor in layer.factors:
        nn.init.normal_(factor)
    tokens, theirs, found = torch.arange(14).view(2, 7), in_peft(table), []
    for module in (table, theirs):
        answer = module(tokens)
        weights = torch.linspace(-1, 1, answer.numel()).view(answer.shape).to(answer.dtype)
        found.append([answer, *torch.autograd.grad((weights * answer).sum(), factors_of(module))])
    assert_near(*found, tolerance=0.0)
    # The row that fills a batch is not trained.
    assert not found[0][1][:, 0].any()
    layer.enabled = False
    assert torch.equal(table(tokens), type(table).forward(table, tokens))


def test_peft_is_not_imported(train: Load, tmp_path: Path) -> None:
    """With bitsandbytes installed it takes 1.5 seconds and loads torch's compiler, whatever is trained."""
    folder = Path(train("llama").handle.network.name_or_path)
    code = (
        "import sys\n"
        "import numpy as np\n"
        "from mindprint.contract import AdapterState, LoraConfig, LoraFactors, ModelSpec, TokenBatch, Update\n"
        "from mindprint.plugins.backend import load_backend\n"
        "backend, name = load_backend('torch'), 'model.layers.0.mlp.up_proj'\n"
        f"model = backend.load_model(ModelSpec({str(folder)!r}, 'cpu', 'float32'))\n"
        "factors = LoraFactors(np.ones((2, 32), np.float32), np.zeros((40, 2), np.float32))\n"
        "backend.inject_adapter(model, AdapterState(LoraConfig(2, 4.0, (name,)), {name: factors}))\n"
        "mask = np.array([[False, True, True, True]])\n"
        "batch = TokenBatch(np.ones((1, 4), np.int32), np.array([4], np.int32), mask)\n"
        "backend.sft_step(model, [batch], Update(1e-3, 3))\n"
        "print(sorted({'peft', 'bitsandbytes', 'torch._inductor.compile_fx'} & set(sys.modules)))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert answer.stdout.strip() == "[]"


def test_nothing_is_kept_for_the_frozen_weights(train: Load) -> None:
    """The backward pass gives the base no gradient, and none to an input that needs none."""
    layer: Any = train("llama").handle.network.get_submodule("model.layers.0.self_attn.q_proj")
    layer(hidden(32).detach()).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora.lora_A.grad.abs().max() > 0


def test_a_batch_in_parts_is_the_batch(
    backend: Backend,
    train: Load,
    token_batch: MakeBatch,
    preference_batch: MakePairs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses, gradient norms and the order of the pairs, whatever the parts."""
    rows, pairs = token_batch(rows=6), preference_batch(pairs=5)
    sft, dpo = Update(1e-3, rows.loss_tokens), Update(1e-3, int(pairs.chosen_lengths.sum()), 5)

    def both(most_tokens: int) -> tuple[Any, Any]:
        monkeypatch.setattr(steps, "TOKENS_AT_ONCE", most_tokens)
        monkeypatch.setattr(steps, "GROUP_OVERHEAD", 1000 if most_tokens > 1000 else 0)
        first, second = train("qwen2"), train("qwen2")
        return backend.sft_step(first, [rows], sft), backend.dpo_step(second, [pairs], PreferenceLoss(), dpo)

    whole, parts = both(10_000), both(25)
    for one, other in zip(whole, parts, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    np.testing.assert_allclose(parts[1].chosen_log_probs, whole[1].chosen_log_probs, atol=1e-5)
    np.testing.assert_allclose(parts[1].rejected_log_probs, whole[1].rejected_log_probs, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_number(
    backend: Backend, train: Load, token_batch: MakeBatch, architecture: str, dropout: float
) -> None:
    batch = token_batch()
    update = Update(1e-3, batch.loss_tokens, seed=4)
    kept = backend.sft_step(train(architecture, dropout=dropout), [batch], update)
    model = train(architecture, dropout=dropout)
    again = backend.sft_step(model, [batch], replace(update, gradient_checkpointing=True))
    assert again.loss == pytest.approx(kept.loss, abs=1e-6)
    assert again.grad_norm == pytest.approx(kept.grad_norm, rel=1e-5)


def test_checkpointing_keeps_less(train: Load) -> None:
    """Bytes that autograd holds on to between the passes."""

    def held(*, enabled: bool) -> int:
        model, found = train("qwen2").handle, {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        base = {tensor.untyped_storage().data_ptr() for tensor in model.network.parameters()}
        tokens = torch.arange(48)[None] % 61
        with (
            recomputed(model.network, enabled=enabled),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model.head.hidden_states(tokens)
        return sum(size for pointer, size in found.items() if pointer not in base)

    assert held(enabled=True) < 0.25 * held(enabled=False)


IN_PLACE: dict[str, dict[str, Any]] = {
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "head_dim": 8,
        "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0],
        "intermediate_size": [40, 40],
    },
}
"""Models that change the output of an adapted layer in place."""


@pytest.mark.parametrize("architecture", sorted(IN_PLACE))
def test_a_model_may_change_a_layers_output_in_place(
    architecture: str,
    backend: Backend,
    make_adapter: Any,
    token_batch: MakeBatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step's loss and gradients are those of layers that are not in one piece."""
    settings = {name: value for name, value in COMMON.items() if name != "rope_parameters"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**settings, **IN_PLACE[architecture]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    gradients = []
    for plain in (False, True):
        model = backend.load_model(ModelSpec(str(tmp_path), "cpu", "float32"))
        if plain:
            for module in ("lora", "gated"):
                monkeypatch.setattr(f"mindprint_torch.{module}.is_fusible", lambda _: False)
        backend.inject_adapter(model, make_adapter(model))
        batch = token_batch()
        metrics = backend.sft_step(model, [batch], Update(1e-3, batch.loss_tokens, max_grad_norm=None))
        gradients.append((metrics, backend.save(model).first_moments))
    (metrics, moments), (expected_metrics, expected) = gradients
    assert metrics.loss == pytest.approx(expected_metrics.loss, abs=1e-5)
    for site, factors in expected.items():
        for values, wanted in zip(moments[site], factors, strict=True):
            np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max() + 1e-9)
