"""LoRA on stacked experts: torch, MLX and PEFT compute the same, and so does the base with the adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import SMALL, TEN_STEPS, saved, ten_losses
from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.merging import merged_folder
from mindprint.adapter.module_names import FAMILIES
from mindprint.adapter.peft_format import read_adapter, write_adapter
from mindprint.adapter.targets import STACKED_FAMILIES, resolve_targets
from mindprint.contract import AdapterState, LoraConfig, LoraFactors, ModelSpec, TokenBatch, Update
from mindprint.models.folder import ModelFolder
from mindprint.plugins.backend import load_backend
from mindprint.trust.merged import merge_findings
from parity_cases import Opened, open_model, relative_difference, stirred, token_batch

PEFT_WARNINGS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


DEMANDED = ("gpt_oss", "mixtral", "qwen3_moe")
"""The families that are also trained here. The others have the layout of one of them."""


@dataclass(frozen=True)
class Case:
    """A mixture, an adapter on its attention and on all of its stacks, and both on both backends."""

    folder: Path
    adapter: AdapterState
    torch: Opened
    mlx: Opened

    @property
    def both(self) -> tuple[Opened, Opened]:
        return self.torch, self.mlx

    @property
    def batch(self) -> TokenBatch:
        return token_batch(1, (23, 9, 14), SMALL["vocab_size"])


@pytest.fixture(scope="module", params=STACKED_FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = saved(tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=2).folder
    (folder / "tokenizer.json").write_text("{}")
    sites = open_model("torch", folder, None).model.handle.sites
    targets = resolve_targets(sites, ["q_proj"], ["experts"])
    # Another rank and another alpha at one stack: neither may be that of all.
    odd = next(name for name in targets if name.endswith("experts.down_proj"))
    lora = LoraConfig(3, 5.0, targets, rank_pattern={odd: 2}, alpha_pattern={odd: 7.0})
    adapter = stirred(initial_adapter(sites, lora, seed=3), size=0.3)
    opened = Case(folder, adapter, open_model("torch", folder, adapter), open_model("mlx", folder, adapter))
    yield opened
    for each in opened.both:
        each.backend.release(each.model)


@pytest.fixture
def fresh(case: Case) -> Iterator[None]:
    """Let each test start from the same adapter, and leave it."""
    states = [each.save() for each in case.both]
    yield
    for each, state in zip(case.both, states, strict=True):
        each.restore(state)


def test_the_families_are_those_of_the_table_and_gpt_oss() -> None:
    assert set(STACKED_FAMILIES) == {name for name, family in FAMILIES.items() if family.experts} | {"gpt_oss"}


def test_stacks_have_the_same_names_and_sizes(case: Case) -> None:
    torch_stacks, mlx_stacks = (
        {site.name: site for site in each.backend.adapter_sites(each.model) if site.kind == "experts"}
        for each in case.both
    )
    assert torch_stacks == mlx_stacks
    assert len(torch_stacks) == 2 * 2


def test_log_probs_are_those_of_the_other_backend(case: Case) -> None:
    torch_side, mlx_side = (each.backend.log_probs(each.model, case.batch) for each in case.both)
    base = case.torch.backend.log_probs(case.torch.model, case.batch, adapter=False)
    assert np.abs(torch_side - mlx_side).max() < 1e-4
    assert np.abs(torch_side - base).max() > 0.05


@PEFT_WARNINGS
def test_the_saved_adapter_computes_the_same_in_peft(case: Case, tmp_path: Path) -> None:
    """Log-probs through transformers' class with the folder that Mindprint writes, loaded by PEFT."""
    wrapped = in_peft(case, tmp_path)
    expected = log_probs(wrapped, case.batch)
    for each in case.both:
        assert np.abs(each.backend.log_probs(each.model, case.batch) - expected).max() < 1e-4
    named = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    assert set(named) == {name for name in case.adapter.tensors if "experts" in name}


@pytest.mark.usefixtures("fresh")
@PEFT_WARNINGS
def test_gradients_are_autograds_through_the_materialised_change(case: Case, tmp_path: Path) -> None:
    """PEFT forms `W + scale · B @ A` of every expert, and autograd differentiates that."""
    wrapped = in_peft(case, tmp_path, is_trainable=True)
    update = Update(1e-3, tokens=case.batch.loss_tokens, max_grad_norm=None)
    moments = [take(each, case, update) for each in case.both]
    loss = torch_loss(wrapped, case.batch)
    loss.backward()
    expected = {
        name: parameter.grad.numpy() for name, parameter in wrapped.named_parameters() if parameter.requires_grad
    }
    for side in moments:
        write_adapter(tmp_path, replace(case.adapter, tensors=dict(side)), "base")
        gradient_of = peft_tensors(tmp_path)
        assert gradient_of.keys() == {name.replace(".default", "") for name in expected}
        for name, values in expected.items():
            # AdamW's first moment after one step is 0.1 times the gradient.
            assert relative_difference(0.1 * values, gradient_of[name.replace(".default", "")]) < 1e-4, name


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("case", DEMANDED, indirect=True)
def test_ten_steps_are_those_of_the_other_backend(case: Case) -> None:
    curves = [ten_losses(each) for each in case.both]
    assert np.max(np.abs(curves[0] - curves[1]) / (1 + np.abs(curves[0]))) < TEN_STEPS
    ends = [each.save() for each in case.both]
    # The state of one continues on the other, and a restored state is the saved one, bit for bit.
    case.mlx.restore(ends[0])
    again = case.mlx.save()
    for before, after in (
        (ends[0].adapter.tensors, again.adapter.tensors),
        (ends[0].second_moments, again.second_moments),
    ):
        for site, pair in before.items():
            assert all(map(np.array_equal, pair, after[site]))
    case.torch.restore(ends[0])
    update = Update(1e-3, tokens=case.batch.loss_tokens)
    now, then = (each.backend.sft_step(each.model, [case.batch], update).loss for each in case.both)
    assert abs(now - then) < TEN_STEPS * (1 + now)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    """On PyTorch. MLX has no product of experts in bfloat16 on a CPU, and refuses the base when it loads it."""
    folder = saved(tmp_path, "mixtral", num_hidden_layers=2).folder
    batch, backend, values = token_batch(1, (23, 9, 14), SMALL["vocab_size"]), load_backend("torch"), []
    exact, rounded = (backend.load_model(ModelSpec(str(folder), "cpu", dtype)) for dtype in ("float32", "bfloat16"))
    sites = backend.adapter_sites(exact)
    targets = resolve_targets(sites, "all-linear", ["experts"])
    adapter = stirred(initial_adapter(sites, LoraConfig(4, 8.0, targets), seed=3), size=0.1)
    for model in (exact, rounded):
        backend.inject_adapter(model, adapter)
        values.append(backend.log_probs(model, batch))
    assert np.abs(values[0] - values[1])[batch.loss_mask].mean() < 0.05
    metrics = backend.sft_step(rounded, [batch], Update(1e-3, tokens=batch.loss_tokens))
    assert 0 < metrics.grad_norm < np.inf
    assert backend.save(rounded).first_moments[targets[-1]].a.dtype == np.float32


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("case", DEMANDED, indirect=True)
def test_checkpointing_changes_no_gradient(case: Case) -> None:
    for each in case.both:
        moments = []
        for checkpointing in (False, True):
            each.restore(replace(each.save().without_optimizer(), adapter=case.adapter))
            update = Update(0.0, case.batch.loss_tokens, max_grad_norm=None, gradient_checkpointing=checkpointing)
            moments.append(take(each, case, update))
        for site, pair in moments[0].items():
            for values, others in zip(pair, moments[1][site], strict=True):
                assert relative_difference(values, others) < 1e-5


def test_merging_gives_the_adapter_and_verifies(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    write_adapter(tmp_path, case.adapter, "base")
    with merged_folder(out, ModelFolder(case.folder, "base"), read_adapter(tmp_path)[0], tmp_path):
        pass
    assert not [
        finding for finding in merge_findings(out, case.folder, case.adapter) if getattr(finding, "fails", True)
    ]
    expected = log_probs(AutoModelForCausalLM.from_pretrained(out), case.batch)
    for each in case.both:
        assert np.abs(each.backend.log_probs(each.model, case.batch) - expected).max() < 1e-4


def in_peft(case: Case, folder: Path, **options: bool) -> torch.nn.Module:
    write_adapter(folder, case.adapter, "base")
    network = AutoModelForCausalLM.from_pretrained(case.folder)
    return peft.PeftModel.from_pretrained(network, folder, **options).eval()


def peft_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def torch_loss(network: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    total = torch.zeros(())
    # Row by row, so that no padding is read.
    for row, length in enumerate(batch.lengths):
        values = network(tokens[row : row + 1, :length]).logits[0].log_softmax(-1)
        picked = values[:-1].gather(1, tokens[row, 1:length, None])[:, 0]
        total = total - picked[torch.tensor(batch.loss_mask[row, 1:length])].sum()
    return total / batch.loss_tokens


@torch.no_grad()
def log_probs(network: torch.nn.Module, batch: TokenBatch) -> np.ndarray:
    tokens, result = torch.tensor(batch.tokens, dtype=torch.long), np.zeros(batch.tokens.shape, np.float32)
    for row, length in enumerate(batch.lengths):
        values = network(tokens[row : row + 1, :length]).logits[0].log_softmax(-1)
        result[row, 1:length] = values[:-1].gather(1, tokens[row, 1:length, None])[:, 0].numpy()
    return np.where(batch.loss_mask, result, 0)


def take(each: Opened, case: Case, update: Update) -> dict[str, LoraFactors]:
    """Take one SFT step, and return the first moments."""
    each.backend.sft_step(each.model, [case.batch], update)
    return dict(each.save().first_moments)
