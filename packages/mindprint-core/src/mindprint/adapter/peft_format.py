"""The one adapter file: PEFT's folder of `adapter_config.json` and `adapter_model.safetensors`.

Any LoRA adapter that PEFT writes for a causal language model is read. The tensors' names decide
where it goes. An adapter that is written names every target in full.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mindprint.adapter.peft_settings import MATCHING_SECONDS, PeftSettings, name_ends, read_settings
from mindprint.adapter.targets import STACKED_PARAMETERS, in_order, is_router, is_stack
from mindprint.contract import AdapterState, Float32, LoraConfig, LoraFactors
from mindprint.errors import AdapterError, TransposedError
from mindprint.limits import LimitError, limited
from mindprint.models.layer_names import EMBEDDINGS, LM_HEADS, is_embedding
from mindprint.models.tensor_files import TensorFileError, TensorInfo, read_float32, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PREFIX = "base_model.model."

_NESTED = ".base_layer"
_FACTOR = re.compile(r"(?P<host>.+)\.lora_(?:(?P<letter>[AB])\.weight|embedding_(?P<embedded>[AB]))")
_COPY = re.compile(rf"{re.escape(PREFIX)}(?P<site>(.+\.)?({'|'.join(EMBEDDINGS + LM_HEADS)}))(\.base_layer)?\.weight")


def tensor_names(site: str, sites: Sequence[str] = ()) -> tuple[str, str]:
    """Return the names of a site's A and B in PEFT's file, among those of all `sites` of the adapter.

    The parameters of one stack of experts lie in each other: the last one that is adapted is outermost.
    """
    if is_embedding(site):
        return f"{PREFIX}{site}.lora_embedding_A", f"{PREFIX}{site}.lora_embedding_B"
    if is_stack(site):
        host, _, parameter = site.rpartition(".")
        after = STACKED_PARAMETERS[STACKED_PARAMETERS.index(parameter) + 1 :]
        site = host + _NESTED * sum(f"{host}.{other}" in sites for other in after)
    return f"{PREFIX}{site}.lora_A.weight", f"{PREFIX}{site}.lora_B.weight"


def to_tensors(factors: Mapping[str, LoraFactors], prefix: str = "") -> dict[str, np.ndarray]:
    """Flatten factors by site into named tensors, each name with `prefix` before PEFT's."""
    flat = {}
    for site, pair in factors.items():
        for name, values in zip(tensor_names(site, tuple(factors)), _flat(pair), strict=True):
            flat[prefix + name] = np.ascontiguousarray(values, np.float32)
    return flat


def from_tensors(flat: Mapping[str, np.ndarray], ranks: Mapping[str, int], prefix: str = "") -> dict[str, LoraFactors]:
    """Undo `to_tensors` for these sites, given their ranks. Raises `AdapterError` naming a tensor that is missing."""
    factors = {}
    for site, rank in ranks.items():
        names = [prefix + name for name in tensor_names(site, tuple(ranks))]
        missing = [name for name in names if name not in flat]
        if missing:
            raise AdapterError(f"tensor {missing[0]} is missing")
        a, b = (flat[name] for name in names)
        factors[site] = _unflat(a, b, rank) if is_stack(site) else LoraFactors(a, b)
    return factors


def _flat(factors: LoraFactors) -> tuple[Float32, Float32]:
    """Return factors as PEFT's file has them: of stacked experts A is `[experts · r, in]`, B `[out, r · experts]`."""
    if factors.a.ndim == 2:
        return factors
    experts, rank, columns = factors.a.shape
    rows = factors.b.shape[1]
    return factors.a.reshape(-1, columns), factors.b.transpose(1, 2, 0).reshape(rows, rank * experts)


def _unflat(a: Float32, b: Float32, rank: int) -> LoraFactors:
    experts = len(a) // rank
    stacked = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
    return LoraFactors(a.reshape(experts, rank, -1), np.ascontiguousarray(stacked))


def write_adapter(folder: Path, adapter: AdapterState, base_model: str, revision: str | None = None) -> None:
    """Write the two files into an existing folder."""
    (folder / WEIGHTS_FILE).write_bytes(save(to_tensors(adapter.tensors), metadata={"format": "pt"}))
    config = peft_config(adapter.config, base_model, revision)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def peft_config(config: LoraConfig, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """Return `adapter_config.json` as PEFT reads it. Every target is written out."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": config.r,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": [site for site in config.target_modules if not (is_stack(site) or is_router(site))],
        "target_parameters": list(_parameters(config.target_modules)) or None,
        "rank_pattern": {_pattern(site): rank for site, rank in config.rank_pattern.items()},
        "alpha_pattern": {_pattern(site): _plain(alpha) for site, alpha in config.alpha_pattern.items()},
        "bias": "none",
        # PEFT turns it on by itself for Conv1D, and warns if a file says so of other layers.
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _parameters(sites: Sequence[str]) -> Iterator[str]:
    """Return sites whose weight is a parameter rather than a module that PEFT knows: stacks of experts, and routers."""
    for site in sites:
        if is_stack(site):
            yield site
        elif is_router(site):
            yield f"{site}.weight"


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _pattern(site: str) -> str:
    """Return a key that matches a name whole: PEFT takes keys as regular expressions that may match a name's end."""
    return "^" + re.escape(site)


def read_adapter(folder: Path, modules: Collection[str] | None = None) -> tuple[AdapterState, str]:
    """Read a LoRA adapter of PEFT's: the adapter, and the base model it names (empty if it names none).

    `modules` are the names of the base's modules that have a matrix, if they are known. PEFT ignores a name in
    `target_modules` that none of them has. Without them every target must have tensors. Factors come in float32
    whatever dtype they have in the file. Raises `AdapterError` naming the file and its fault: more than LoRA, tensors
    that no target names or that are missing, or shapes that contradict `r`.
    """
    settings = read_settings(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    try:
        tensors = adapter_tensors(folder, WEIGHTS_FILE)
        # The patterns are somebody else's regular expressions: some take longer than the universe has.
        with limited(MATCHING_SECONDS):
            places = _places(tensors, settings, modules)
            ranks = {site: settings.rank(site) for site in places}
            alphas = {site: settings.alpha_of(site) for site in places}
        factors = {site: _read_factors(site, pair, ranks[site]) for site, pair in places.items()}
    except TransposedError as error:
        raise TransposedError(f"{weights}: {error}") from error
    except LimitError as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: matching its patterns {error}: write plain names") from error
    except (TensorFileError, AdapterError, OSError) as error:
        raise AdapterError(f"{weights}: {error}") from error
    return AdapterState(_lora_config(settings, ranks, alphas), factors), settings.base


def base_copies(folder: Path) -> dict[str, TensorInfo]:
    """Return the base's own weights that PEFT saved along (it does with embeddings), by site.

    PEFT puts them into the base when it loads the adapter. If they differ from the base's, this is more than LoRA.
    """
    tensors = adapter_tensors(folder, WEIGHTS_FILE)
    found = {name: _COPY.fullmatch(name) for name in tensors}
    return {match["site"]: tensors[name] for name, match in found.items() if match}


def adapter_tensors(folder: Path, name: str) -> dict[str, TensorInfo]:
    """Return the tensors of an adapter's file, from its header. Its errors do not name the file."""
    file = folder / name
    if file.is_symlink() and not file.is_file():
        raise AdapterError("is a link that leads nowhere")
    if not file.is_file():
        pickles = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}"))
        if pickles:
            raise AdapterError(
                f"no such file; {pickles[0]} is a pickle, which can run code when loaded and is refused: save the "
                "adapter as safetensors"
            )
        raise AdapterError(f"no such file; an adapter is a folder with it and {CONFIG_FILE}")
    return read_header(file)


def unmatched_targets(folder: Path, modules: Collection[str]) -> tuple[str, ...]:
    """Return the names in `target_modules` that none of the base's `modules` has: PEFT ignores them."""
    targets = read_settings(folder / CONFIG_FILE).target_modules
    ends = _all_ends(modules)
    return () if isinstance(targets, str) else tuple(target for target in targets if not _is_module(target, ends))


def _places(
    tensors: Mapping[str, TensorInfo], settings: PeftSettings, modules: Collection[str] | None
) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Return A and B of every site, in order. Raises `AdapterError` for tensors and targets that do not fit."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        found = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if found is not None and name.startswith(PREFIX):
            letter = found["letter"] or found["embedded"]
            pairs.setdefault(_site(found["host"], settings), {})[letter] = info
        elif _COPY.fullmatch(name) is None:
            raise AdapterError(f"tensor {name} is not part of a LoRA adapter for a causal language model")
    for site, pair in pairs.items():
        if len(pair) != 2:
            letter = "B" if "A" in pair else "A"
            raise AdapterError(f"tensor {letter} of {site} is missing")
    _require_all(settings, tuple(pairs), modules)
    _require_applied(settings, tuple(pairs))
    return {site: (pairs[site]["A"], pairs[site]["B"]) for site in _ordered(settings, pairs)}


def _site(host: str, settings: PeftSettings) -> str:
    """Return the site whose factors are under a module: the module, or its parameter that is adapted at this depth."""
    module = host
    # PEFT wraps a module once for each adapted parameter: `base_layer` repeats, and the depth says which one is meant.
    while module.endswith(_NESTED):
        module = module.removesuffix(_NESTED)
    depth = (len(host) - len(module)) // len(_NESTED)
    parameters = settings.parameters(module)
    if parameters and depth < len(parameters):
        # The wrapper that was put on last is outermost, so depth counts the parameters from the end.
        parameter = parameters[len(parameters) - 1 - depth]
        return module if parameter == "weight" else f"{module}.{parameter}"
    if depth or not settings.targets(module):
        raise AdapterError(f"has tensors for {host}, which {CONFIG_FILE} does not target")
    return module


def _require_all(settings: PeftSettings, sites: Sequence[str], modules: Collection[str] | None) -> None:
    """Raise if a target that is a name has no tensors: PEFT would leave it at its start, with only a warning."""
    targets = () if isinstance(settings.target_modules, str) else settings.target_modules
    parameters = (target.removesuffix(".weight") for target in settings.target_parameters)
    adapted, ends = _all_ends(sites), None if modules is None else _all_ends(modules)
    for target in (*targets, *parameters):
        # A name that the base lacks adapts nothing, in PEFT as here: lists are often written for many families.
        if target not in adapted and (ends is None or target in settings.target_parameters or _is_module(target, ends)):
            raise AdapterError(f"has no tensors for {target}, which {CONFIG_FILE} targets")
    if not settings.starts_at_zero:
        for module in () if modules is None else modules:
            if settings.targets(module) and settings.left_out_by(module) is None and module not in adapted:
                raise AdapterError(
                    f"has no tensors for {module}, which {CONFIG_FILE} targets: PEFT would start it at random values, "
                    "for init_lora_weights is not true"
                )
    if not sites:
        raise AdapterError("has no LoRA tensors")


def _require_applied(settings: PeftSettings, sites: Sequence[str]) -> None:
    """Raise if PEFT would leave tensors of this file aside: it would compute something else than they say."""
    for site in sites:
        field = None if is_stack(site) or is_router(site) else settings.left_out_by(site)
        if field is not None:
            raise AdapterError(
                f"has tensors for {site}, which {field} in {CONFIG_FILE} leaves out: PEFT computes without them"
            )


def _all_ends(names: Collection[str]) -> frozenset[str]:
    """Return the names and all their ends after a dot, which is how PEFT's targets name modules."""
    return frozenset(end for name in names for end in name_ends(name))


def _is_module(target: str, ends: Collection[str]) -> bool:
    # A checkpoint may lack the first component of its modules' names (`transformer.`, `model.`).
    return target in ends or target.partition(".")[2] in ends


def _ordered(settings: PeftSettings, sites: Mapping[str, Any]) -> Sequence[str]:
    """Return the order of the file where it names its sites one by one, else that of layers and names."""
    targets = settings.target_modules
    return targets if isinstance(targets, tuple) and set(targets) == set(sites) else in_order(tuple(sites))


def _read_factors(site: str, infos: tuple[TensorInfo, TensorInfo], rank: int) -> LoraFactors:
    a, b = (info.shape for info in infos)
    whole = len(a) == len(b) == 2 and a[0] == b[1]
    # A square A or B can hide a transpose from this test. Then the rank decides in the next one.
    if len(a) == len(b) == 2 and a[1] == b[0] == rank != a[0]:
        raise TransposedError(
            f"{site}: A is {list(a)} and B {list(b)}: they are transposed (mlx-lm's layout under PEFT's names); "
            "convert the original with: mindprint convert"
        )
    if not whole or (a[0] % rank if is_stack(site) else a[0] != rank):
        raise AdapterError(
            f"{site}: A is {list(a)} and B {list(b)}, and {CONFIG_FILE} says rank {rank}: they contradict each other"
        )
    values = [read_float32(info) for info in infos]
    return _unflat(values[0], values[1], rank) if is_stack(site) else LoraFactors(*values)


def _lora_config(settings: PeftSettings, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    return LoraConfig(
        r=settings.r,
        alpha=settings.alpha,
        target_modules=tuple(ranks),
        dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        rank_pattern={site: rank for site, rank in ranks.items() if rank != settings.r},
        alpha_pattern={site: alpha for site, alpha in alphas.items() if alpha != settings.alpha},
    )


def adapter_digest(adapter: AdapterState) -> str:
    """Return a digest of an adapter's values and scales, independent of files and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(to_tensors(adapter.tensors).items()):
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.tobytes())
    scales = {site: adapter.config.scale(site) for site in sorted(adapter.tensors)}
    digest.update(json.dumps(scales).encode())
    return digest.hexdigest()
