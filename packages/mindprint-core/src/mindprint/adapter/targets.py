"""The choice of the sites that get LoRA: made from names, and so the same on every backend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from mindprint.contract import AdapterSite
from mindprint.errors import AdapterError
from mindprint.models.layer_names import is_embedding, is_lm_head

ALL_LINEAR = "all-linear"

STACKED_PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The parameters of a stack of experts, in the order in which transformers declares them."""

STACKED_FAMILIES = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next")
"""The families whose stacks of experts can take LoRA: how PEFT, mlx-lm and files keep them was compared."""

# Routers are left out of all-linear: training one shifts the load between experts, which the base was balanced for.
_ROUTER = re.compile(r"(^|\.)(router(\..*)?|(mlp|block_sparse_moe|feed_forward|moe)\.gate|shared_expert_gate)$")
_STACKED_EXPERTS = re.compile(r"\.experts(\.|$)")


def resolve_targets(
    sites: Sequence[AdapterSite], wanted: str | Sequence[str], parameters: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the full site names that the settings mean on this base, layer by layer, then by name.

    The order does not depend on the backend that listed the sites, so neither do the files.

    Args:
        sites: The places of the base that can take LoRA.
        wanted: `adapter.target_modules`. `all-linear` is attention, dense-MLP and shared-expert linears, never a
            router, the LM head or stacked experts. A list names sites in full or by their endings (`q_proj`,
            `mlp.down_proj`).
        parameters: `adapter.target_parameters`: stacks of experts, in full, by their endings, or by the ending of the
            module that holds them (`experts`).

    Raises:
        AdapterError: A name matches nothing, or there is no target at all.
    """
    modules = [site for site in sites if site.kind != "experts"]
    stacks = [site for site in sites if site.kind == "experts"]
    chosen = _named_stacks(stacks, parameters)
    if wanted == ALL_LINEAR:
        linear = [site.name for site in modules if _is_plain_linear(site)]
        if not linear:
            raise AdapterError("adapter.target_modules: all-linear matches nothing: this base has no linear layer")
        return in_order([*linear, *chosen])
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if not names and not chosen:
        raise AdapterError("adapter.target_modules is empty; name modules, or write all-linear")
    for name in names:
        _require_match(name, modules, stacks)
    named = [site for site in modules if any(_matches(site.name, name) for name in names)]
    for site in named:
        # PEFT's file names embedding factors differently, and a reader has only the name to tell them by.
        if (site.kind == "embedding") != is_embedding(site.name):
            raise AdapterError(
                f"adapter.target_modules: {site.name} cannot be adapted: its kind does not show in its name"
            )
    return in_order([*(site.name for site in named), *chosen])


def is_router(site: str) -> bool:
    """Return whether a site is a mixture's router, which is a parameter of a separate module in transformers."""
    return _ROUTER.search(site) is not None and not site.endswith("shared_expert_gate")


def is_stack(site: str) -> bool:
    """Return whether a site is the parameter of a stack of experts rather than a module."""
    host, _, parameter = site.rpartition(".")
    return parameter in STACKED_PARAMETERS and host.rpartition(".")[2] == "experts"


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Sort with numbers as numbers: layer 2 before layer 10."""
    return tuple(
        sorted(names, key=lambda name: [part.zfill(8) if part.isdigit() else part for part in name.split(".")])
    )


def _is_plain_linear(site: AdapterSite) -> bool:
    return (
        site.kind == "linear"
        and not is_lm_head(site.name)
        and not _ROUTER.search(site.name)
        and not _STACKED_EXPERTS.search(site.name)
    )


def _matches(site: str, name: str) -> bool:
    return site == name or site.endswith("." + name)


def _named_stacks(stacks: Sequence[AdapterSite], names: Sequence[str]) -> list[str]:
    """Return the stacks of experts that `adapter.target_parameters` names."""
    if names and not stacks:
        raise AdapterError(
            "adapter.target_parameters: this base has no stacked experts that this backend can adapt (families, in "
            f"full precision: {', '.join(STACKED_FAMILIES)}); leave the setting out"
        )
    for name in names:
        if not any(_is_named_stack(site.name, name) for site in stacks):
            endings = sorted({".".join(site.name.split(".")[-2:]) for site in stacks})
            raise AdapterError(
                f"adapter.target_parameters: no stack of experts of this base is called {name!r}; this base has: "
                f"{', '.join(endings)}, or experts for all of them"
            )
    return [site.name for site in stacks if any(_is_named_stack(site.name, name) for name in names)]


def _is_named_stack(site: str, name: str) -> bool:
    # PEFT names the parameter. The name of its module means all parameters in it.
    return _matches(site, name) or _matches(site.rpartition(".")[0], name)


def _require_match(name: str, sites: Sequence[AdapterSite], stacks: Sequence[AdapterSite]) -> None:
    if any(_matches(site.name, name) for site in sites):
        return
    if any(_is_named_stack(site.name, name) for site in stacks):
        raise AdapterError(
            f"adapter.target_modules: {name!r} is not a module but the parameters of stacked experts; name it in "
            "adapter.target_parameters"
        )
    endings = sorted({site.name.rpartition(".")[2] for site in sites})
    nearest = difflib.get_close_matches(name, endings, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"this base has: {', '.join(endings)}"
    raise AdapterError(f"adapter.target_modules: no module of this base is called {name!r}; {hint}")
