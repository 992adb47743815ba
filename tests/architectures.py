"""The matrix of architectures: small random models that transformers saves, and how far MLX computes from them.

Each model has a rope base that no library has as its default. `compare` computes one row of the matrix and
`architectures_page` makes the documentation's page of all rows. The tests assert on the same rows and hold
docs/architectures.md against the same page, so that the documentation shows what the tests saw.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mindprint.adapter.targets import STACKED_FAMILIES
from mindprint.contract import AdapterSite, LoadedModel, ModelSpec, Update
from mindprint.models.layer_names import is_fused_output
from mindprint_mlx import model
from parity_cases import Opened, open_model, token_batch

RELATIVE = 1e-4
"""Greatest relative distance of logits (DESIGN.md's matrix). 1e-6 is seen."""

TEN_STEPS = 1e-5
"""Greatest deviation of an SFT loss, over 1 + loss, in ten steps (DESIGN.md's table)."""

TOKENS = 24

SMALL: Mapping[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

MIXTURE = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
GRANITE = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
}
LAYER_INPUTS = {
    "head_dim": 16,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 131,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 2.0,
}

RECURRENT: Mapping[str, Mapping[str, Any]] = {
    "granitemoehybrid": {
        **GRANITE,
        "num_local_experts": 4,
        "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_multiple_of": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen3_5_text": HYBRID,
    "qwen3_next": {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 48},
}
"""Families with layers that are not attention."""

MATRIX: Mapping[str, Mapping[str, Any]] = {
    **RECURRENT,
    "apertus": {},
    "bitnet": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"head_dim": 16, "sliding_window": 8, "logit_scale": 0.3},
    "deepseek_v2": {**LATENT, **MIXTURE, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, **MIXTURE},
    "dots1": {**MIXTURE, "head_dim": 16, "sliding_window": 8, "max_window_layers": 2},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {"head_dim": 16, "sliding_window": 8},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "hidden_size": 72},
    "gemma3n_text": {**LAYER_INPUTS, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": {**LAYER_INPUTS, "global_head_dim": 32, "use_double_wide_mlp": True},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**MIXTURE, "head_dim": 16},
    "gpt2": {},
    "gpt_bigcode": {"n_inner": 112},
    "gpt_neox": {"intermediate_size": 256},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gptj": {"rotary_dim": 8, "n_inner": 256},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "internlm3": {"head_dim": 16},
    "llama": {},
    "ministral3": {"head_dim": 16, "sliding_window": 16},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {},
    "olmo": {"clip_qkv": 0.3},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "olmoe": EXPERTS,
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
}


@dataclass(frozen=True)
class Reference:
    """A model that transformers saved: its folder, its logits `[rows, tokens, vocabulary]`, and its linear layers.

    Layers that a kernel reads are not among them.
    """

    folder: Path
    tokens: np.ndarray
    logits: np.ndarray
    linears: frozenset[str]


def saved(folder: Path, model_type: str, base: float = 500000.0, tokens: int = TOKENS, **changes: Any) -> Reference:
    """Save a random model of a family and compute its logits with transformers on two rows of tokens."""
    torch.manual_seed(0)
    fields = {**SMALL, **MATRIX[model_type], **changes}
    for kinds in ("layer_types", "layers_block_type"):
        if kinds in fields:
            fields[kinds] = fields[kinds][: fields["num_hidden_layers"]]
    config = CONFIG_MAPPING[model_type](**fields)
    set_rope_base(config, base)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            # Norms and biases too: they start at 1 and 0, where a layer that left one out would not show.
            parameter.add_(0.05 * torch.randn_like(parameter))
        reference.save_pretrained(folder)
        rows = torch.randint(3, 131, (2, tokens))
        logits = reference(rows).logits.float().numpy()
    linears = {
        name
        for name, module in reference.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and not is_fused_output(model_type, name)
    }
    return Reference(folder, rows.numpy(), logits, frozenset(linears))


def set_rope_base(config: Any, base: float) -> None:
    """Give every kind of layer the same rope base."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for entry in nested or [parameters]:
        entry["rope_theta"] = base


def rewritten(folder: Path, change: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Change and remove fields of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | dict(change)
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))


def loaded(folder: Path) -> LoadedModel:
    """Load a folder on MLX."""
    return model.load_model(ModelSpec(str(folder), "cpu", "float32"))


def distance(reference: Reference) -> float:
    """Return the relative distance of MLX's logits from the reference."""
    handle = loaded(reference.folder).handle
    with handle.in_use():
        logits = np.array(handle.module(mx.array(reference.tokens)))
    return relative_distance(logits, reference.logits)


def relative_distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))


@dataclass(frozen=True)
class Compared:
    """One row of the matrix.

    `logits` is the relative distance of MLX's logits from those of transformers, `same_sites` whether LoRA goes on the
    same modules under the same names, `ten_steps` the greatest deviation of ten SFT losses from torch's over 1 + loss,
    and `mlx_lm` what mlx-lm's own loader computes from the same folder.
    """

    model_type: str
    logits: float
    same_sites: bool
    ten_steps: float
    mlx_lm: str

    @property
    def right(self) -> bool:
        return self.logits < RELATIVE and self.same_sites and self.ten_steps < TEN_STEPS


def compare(model_type: str, folder: Path) -> Compared:
    """Save a random model of a family into `folder`, and compute one row of the matrix."""
    reference = saved(folder, model_type)
    torch_side, mlx_side = opened = open_model("torch", folder), open_model("mlx", folder)
    curves = [ten_losses(each) for each in opened]
    deviation = float(np.max(np.abs(curves[0] - curves[1]) / (1 + np.abs(curves[0]))))
    same_sites = linear_sites(torch_side) == linear_sites(mlx_side)
    return Compared(model_type, distance(reference), same_sites, deviation, mlx_lm_alone(reference))


def mlx_lm_alone(reference: Reference) -> str:
    """Return a word for the logits that a user of mlx-lm gets from the same folder: right, wrong, or an error."""
    from mlx_lm.utils import load_model  # imports all of mlx-lm, torch included

    try:
        # A class may print, and end the process (OLMo's does both).
        with redirect_stdout(io.StringIO()):
            module, _ = load_model(reference.folder)
            logits = np.array(module(mx.array(reference.tokens)).astype(mx.float32))
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it raises is what its user sees
        return f"does not load ({type(error).__name__})"
    return "right" if relative_distance(logits, reference.logits) < RELATIVE else "wrong logits, no message"


def linear_sites(opened: Opened) -> dict[str, AdapterSite]:
    """Return the linear sites by name, without the head: a tied one is not a layer on MLX, and nobody adapts it."""
    sites = opened.backend.adapter_sites(opened.model)
    return {site.name: site for site in sites if site.kind == "linear" and site.name not in ("lm_head", "embed_out")}


def ten_losses(opened: Opened) -> np.ndarray:
    """Return the losses of ten optimizer steps of two ragged micro-batches, float64 `[10]`."""
    losses = []
    for step in range(10):
        batches = [
            token_batch(2 * step, (23, 9, 14), SMALL["vocab_size"]),
            token_batch(2 * step + 1, (7, 19), SMALL["vocab_size"]),
        ]
        update = Update(1e-3, tokens=sum(batch.loss_tokens for batch in batches))
        losses.append(opened.backend.sft_step(opened.model, batches, update).loss)
    return np.array(losses)


PAGE_START = """# Architectures

This page shows that MLX computes a model that transformers saved as transformers computes it. The models are {count}
architectures, small and random, with a rope base of 500000. You can make the page again with:

<!-- not run: trains each architecture on both backends, which takes minutes; a test compares its rows and this page -->

    python benchmarks/parity.py architectures > docs/architectures.md

`tests/parity/test_architectures.py` computes every row and compares this whole page with the one that the program
prints.

- **logits**: the relative norm of the difference between MLX's logits and those of transformers is below
  {relative:.0e}. About 1e-6 is seen. Figures that small differ between machines, so the page says whether the bound
  holds.
- **same LoRA modules**: `all-linear` names the same modules with the same sizes on both backends.
- **ten steps**: in ten optimizer steps no SFT loss differs between the backends by
  {ten_steps:.0e} · (1 + loss) or more.
- **mlx-lm alone**: the result of `mlx_lm.utils.load_model` on the same folder. mlx-lm looks for the rope base where
  transformers 4 wrote it. Where one of its classes does not find it, the class takes a default and says nothing.

Versions: transformers {transformers}, mlx {mlx}, mlx-lm {mlx_lm}.

| architecture | logits | same LoRA modules | ten steps | verdict | mlx-lm alone |
|---|---|---|---|---|---|
"""

PAGE_END = """
You can train other families too. A family that passes every check of
[mindprint-mlx](../packages/mindprint-mlx/README.md#which-models) is loaded with a note that it is not in this table.
If the class would drop or default a field of your configuration that changes the computation, loading stops and names
field and value.

Both backends also train the stacked experts of {mixtures}, if you
[ask for them](adapters.md#stacked-experts). `tests/parity/test_experts.py` compares their numbers with those of PEFT.
"""


def architectures_page(rows: Sequence[Compared]) -> str:
    """Return docs/architectures.md, made of the rows of the matrix."""
    libraries = {name.replace("-", "_"): version(name) for name in ("transformers", "mlx", "mlx-lm")}
    start = PAGE_START.format(count=len(rows), relative=RELATIVE, ten_steps=TEN_STEPS, **libraries)
    right, alone = sum(row.right for row in rows), sum(row.mlx_lm == "right" for row in rows)
    total = f"| **right** | | | | **{right} of {len(rows)}** | **{alone} of {len(rows)}** |\n"
    return (
        start + "".join(_table_row(row) for row in rows) + total + PAGE_END.format(mixtures=", ".join(STACKED_FAMILIES))
    )


def _table_row(row: Compared) -> str:
    marks = [
        "yes" if holds else "**NO**" for holds in (row.logits < RELATIVE, row.same_sites, row.ten_steps < TEN_STEPS)
    ]
    return f"| {row.model_type} | {' | '.join(marks)} | {'right' if row.right else '**WRONG**'} | {row.mlx_lm} |\n"
