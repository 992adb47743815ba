"""The two backends read side by side: the same modules, and in them the same functions for the same work."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
TORCH, MLX = (PACKAGES / f"mindprint-{name}" / "src" / f"mindprint_{name}" for name in ("torch", "mlx"))

SHARED = {
    "adapter": {"inject", "require_adapter"},
    "asked": {"skip_unasked"},
    "devices": {"backend_info"},
    "digest": {"base_digest"},
    "generation": {"generate"},
    "head": {"Head", "read_head"},
    "logprobs": {"LOGITS_BYTES", "batch_layouts", "layout_log_probs", "log_probs", "log_softmax_at"},
    "model": {"Adapter", "load_model", "release"},
    "prompts": {"longest_shared"},
    "ranks": {"gather", "sum_over_ranks"},
    "recompute": {"recomputed"},
    "rope": {"read_rotary_limit"},
    "state": {"restore", "save"},
    "steps": {"dpo_step", "sft_step"},
}
"""Names of each module that both packages define. The rest is how each framework does it."""


def defined(path: Path) -> set[str]:
    """Return the names that a module defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("module", sorted(SHARED))
def test_shared_names(module: str) -> None:
    for package in (TORCH, MLX):
        assert SHARED[module] <= defined(package / f"{module}.py")


def test_the_hooks_are_the_same_but_for_the_name_of_the_package() -> None:
    torch, mlx = (
        [line for line in (package / "plugin.py").read_text(encoding="utf-8").splitlines() if "AUTO" not in line]
        for package in (TORCH, MLX)
    )
    renamed = [line.replace("mindprint_torch", "mindprint_mlx").replace("TorchModel", "MlxModel") for line in torch]
    different = [pair for pair in zip(renamed, mlx, strict=True) if pair[0] != pair[1] and "auto" not in pair[0]]
    assert different == []
