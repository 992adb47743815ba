"""The identity of a base: digests of its weights part by part, and its configuration in one spelling.

A base of up to `READ_WHOLE` bytes is read whole: SHA-256 takes 1.8 GB/s a core, from the memory that loading has just
filled. Of a larger one 4 KiB of every MiB of every tensor are read, and its end: 60 MB of 15 GB. So nothing that
rewrites more than a MiB can go unseen (a merge, a quantization, another checkpoint, a broken download), but a single
changed number can; the fingerprint says which of the two it is. What is digested are the stored bytes by tensor name;
how tensors lie in shards does not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mindprint.input_files import MALFORMED
from mindprint.models.folder import ModelFolder, model_config, tensors
from mindprint.models.quantized import read_quantization
from mindprint.models.tensor_files import TensorInfo

READ_WHOLE = 4 * 2**30
STRIDE, BLOCK = 2**20, 2**12

Method = Literal["whole", "sampled"]


@dataclass(frozen=True)
class PartDigest:
    """A part of a base (one layer, the embedding, ...): `layout` of its tensors' names, dtypes and shapes; `values`."""

    layout: str
    values: str


@dataclass(frozen=True)
class WeightsDigest:
    """A base's weights by part, whether every byte was read or samples, and the dtype of most tensors."""

    method: Method
    dtype: str
    parts: Mapping[str, PartDigest]


def digest_weights(folder: Path, method: Method | None = None) -> WeightsDigest:
    """Return digests of a model folder's weights. `method` is chosen by size. Raises `ModelError` if unreadable."""
    found = tensors(folder)
    if method is None:
        method = "whole" if sum(info.end - info.start for info in found.values()) <= READ_WHOLE else "sampled"
    names = sorted(found)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = dict(zip(names, pool.map(lambda name: _tensor_digest(found[name], method), names), strict=True))
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(part_of(name), []).append(name)
    dtype = Counter(info.dtype for info in found.values()).most_common(1)[0][0]
    return WeightsDigest(method, dtype, {part: _part_digest(inside, found, digests) for part, inside in parts.items()})


def part_of(tensor: str) -> str:
    """Return the part that a tensor belongs to: its name up to the layer's number, or all but its last word."""
    words = tensor.split(".")
    # Parts by layer keep a fingerprint short and still say where a base was changed.
    numbered = next((index for index, word in enumerate(words) if word.isdigit()), None)
    return ".".join(words[:-1] if numbered is None else words[: numbered + 1]) or tensor


def _part_digest(names: list[str], found: Mapping[str, TensorInfo], digests: Mapping[str, bytes]) -> PartDigest:
    layout, values = hashlib.sha256(), hashlib.sha256()
    # Names, dtypes and shapes go into one digest and bytes into another: a cast or a rename is told from other values.
    for name in names:
        layout.update(f"{name}\0{found[name].dtype}\0{found[name].shape}\0".encode())
        values.update(digests[name])
    return PartDigest(layout.hexdigest()[:16], values.hexdigest()[:32])


def _tensor_digest(info: TensorInfo, method: Method) -> bytes:
    digest = hashlib.sha256()
    with info.file.open("rb") as file:
        for start, length in _stretches(info.end - info.start, method):
            file.seek(info.start + start)
            digest.update(file.read(length))
    return digest.digest()


def _stretches(size: int, method: Method) -> Iterator[tuple[int, int]]:
    """Yield the stretches to read, as (start, length) within a tensor of `size` bytes."""
    length = STRIDE if method == "whole" else BLOCK
    for start in range(0, size, STRIDE):
        yield start, min(length, size - start)
    # The end too: what was cut off or appended shows there.
    if method == "sampled" and size > BLOCK:
        yield size - BLOCK, BLOCK


ROPE = "rope"

QUANTIZATION = "quantization"
"""The setting that names the quantization of a base."""

_NOT_COMPUTED = frozenset(
    (
        "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob",
        "attn_implementation", "attn_pdrop", "auto_map", "bos_token_id", "chunk_size_feed_forward",
        "classifier_dropout", "dtype", "embd_pdrop", "embedding_dropout", "eos_token_id", "gradient_checkpointing",
        "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
        "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
        "problem_type", "quantization_config", "resid_pdrop", "residual_dropout", "return_dict",
        "router_aux_loss_coef", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
    )
)  # fmt: skip
"""Settings that do not affect a frozen model's computation. The tokens that end an answer are compared apart."""

_ROPE_NAMES = {
    "rope_theta": "rope.rope_theta",
    "rotary_emb_base": "rope.rope_theta",
    "rope_local_base_freq": "rope.sliding_attention.rope_theta",
    "partial_rotary_factor": "rope.partial_rotary_factor",
    "rotary_pct": "rope.partial_rotary_factor",
}


@dataclass(frozen=True)
class Difference:
    """A setting of config.json that is not as recorded; a side that does not have it has None."""

    setting: str
    recorded: Any
    found: Any

    @property
    def one_sided(self) -> bool:
        """Return whether only one side states it: the other may mean the same by silence."""
        return self.recorded is None or self.found is None

    @property
    def of_rope(self) -> bool:
        return self.setting.startswith(ROPE + ".")

    def __str__(self) -> str:
        return f"{self.setting} is {self.found!r}, was {self.recorded!r}"


def computed_settings(folder: Path) -> dict[str, Any]:
    """Return config.json's settings of the computation, in one spelling: old names of rope settings become new ones.

    `quantization` is there only for a quantized base, and in words: two libraries write the same in other ways.
    """
    config = {name: value for name, value in model_config(folder).items() if name != QUANTIZATION}
    stated = read_quantization(folder)
    # By layer the packed tensors tell, and their digests are recorded as well.
    return _in_one_spelling(config if stated is None else {**config, QUANTIZATION: str(stated)})


def base_settings(base: ModelFolder) -> dict[str, Any]:
    """Return `computed_settings` of a base as a run loads it: one that is packed at loading is quantized as well."""
    settings = computed_settings(base.path)
    return settings if base.quantize is None else {**settings, QUANTIZATION: f"{base.quantize} at loading"}


def _in_one_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for name, value in config.items():
        if value is None or name in _NOT_COMPUTED:
            continue
        # transformers 4 wrote `rope_scaling` and `rope_theta`, transformers 5 writes `rope_parameters` for both.
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            settings |= _rope_settings(value)
        elif name in _ROPE_NAMES:
            old[_ROPE_NAMES[name]] = value
        else:
            settings[name] = value
    for name, value in old.items():
        # Where the new form has a base for each type of layer, the old name means that of full attention.
        by_layer = f"{ROPE}.full_attention.{name.removeprefix(f'{ROPE}.')}"
        settings[by_layer if by_layer in settings else name] = value
    return dict(sorted(settings.items()))


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return settings in which two configurations differ, in the form of `computed_settings`.

    A setting that only one of them states has its default in the other one. transformers knows the defaults. Where it
    knows none, the setting is returned as one-sided.
    """
    stated = _unequal(recorded, found)
    if not any(difference.one_sided for difference in stated):
        return stated
    then, now = _completed(recorded), _completed(found)
    if then is None or now is None:
        return stated
    # Names that no class of transformers has remain: another tool's, or old ones that the class has translated.
    unknown = (each for each in stated if each.setting not in then and each.setting not in now)
    return (*_unequal(then, now), *unknown)


def _unequal(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[Difference, ...]:
    names = sorted(recorded.keys() | found.keys())
    pairs = (Difference(name, recorded.get(name), found.get(name)) for name in names)
    return tuple(pair for pair in pairs if pair.recorded != pair.found)


def _completed(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return settings with every default that transformers' class of this model has, None where there is no class."""
    # Importing takes seconds, and most configurations state the same names.
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415
    from transformers import CONFIG_MAPPING  # noqa: PLC0415

    values: dict[str, Any] = {name: value for name, value in settings.items() if not name.startswith(f"{ROPE}.")}
    if rope := _nested_rope(settings):
        values["rope_parameters"] = rope
    try:
        # Through JSON: a class keeps tuples where a file has lists.
        complete = json.loads(json.dumps(CONFIG_MAPPING[str(values["model_type"])](**values).to_dict()))
        declared = CONFIG_MAPPING[str(values["model_type"])]().to_dict().keys()
    # Each class checks its settings in its own way. One that it refuses is left to the plain comparison.
    except (*MALFORMED, StrictDataclassError):
        return None
    return _in_one_spelling({name: value for name, value in complete.items() if name in declared})


def _nested_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope settings as config.json has them, from flat names."""
    rope: dict[str, Any] = {}
    for name, value in settings.items():
        if name.startswith(f"{ROPE}."):
            *kinds, last = name.split(".")[1:]
            # By layer type there is one more level.
            place = rope.setdefault(kinds[0], {}) if kinds else rope
            place[last] = value
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if any(not isinstance(value, dict) for value in part.values()):
            part.setdefault("rope_type", "default")
    return rope


def _rope_settings(values: Mapping[str, Any], prefix: str = ROPE) -> dict[str, Any]:
    """Return rope settings flat, by layer type where they are so. Silence means the default type."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _rope_settings(value, f"{prefix}.{name}")
        elif value is not None and (name, value) not in (("rope_type", "default"), ("type", "default")):
            flat[f"{prefix}.{'rope_type' if name == 'type' else name}"] = value
    return flat
