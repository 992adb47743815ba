"""Model folders: from a name in the configuration to a checked folder in Hugging Face layout, and its contents.

Nothing here loads a model. Weights are looked at through their safetensors headers.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any

from mindprint.config import ModelConfig
from mindprint.contract import QuantizeMethod
from mindprint.data.tokenizer import TOKENIZER_FILES
from mindprint.errors import ModelError, first_line
from mindprint.input_files import INFINITIES, LARGEST_FILE, read_object, resolve_path
from mindprint.models.tensor_files import TensorFileError, TensorInfo, read_header

BUILTIN = ("tiny",)
"""Models that come with the package, named `builtin:NAME`."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX_FILE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Files that are downloaded of a hub model: no pickles, no second copy of the weights in another format."""


@dataclass(frozen=True)
class ModelFolder:
    """A complete model folder. `name` is what other tools load it by, `revision` only a hub model's.

    `quantize` is how a run packs it while loading it.
    """

    path: Path
    name: str
    revision: str | None = None
    quantize: QuantizeMethod | None = None


def resolve_model(config: ModelConfig, folder: Path) -> ModelFolder:
    """Return the checked folder of a configured model: built in, on disk (relative to `folder`), or from the hub.

    Raises `ModelError` with one line for a name that leads nowhere, a failed download, or an incomplete folder.
    """
    if config.name.startswith("builtin:"):
        return ModelFolder(check_model_folder(_builtin(config.name)), config.name, quantize=config.quantize)
    try:
        path = resolve_path(folder, config.name)
    except ValueError as error:
        raise ModelError(f"model.name: {error}; name a folder, or a hub model as owner/name") from error
    if path.is_dir():
        if config.revision is not None:
            raise ModelError(f"{path}: is a folder, and model.revision is for models on the hub: remove it")
        return ModelFolder(check_model_folder(path), str(path), quantize=config.quantize)
    if _looks_like_path(config.name) or is_gguf(path):
        raise ModelError(f"{config.name}: {_no_folder(path)}; a hub model is written owner/name")
    downloaded = check_model_folder(_download(config.name, config.revision))
    return ModelFolder(downloaded, config.name, config.revision, config.quantize)


GGUF = "is a GGUF file, which llama.cpp runs and nothing here trains"


def is_gguf(path: Path) -> bool:
    """Return whether a file is in llama.cpp's format, by its name or by its first four bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def check_model_folder(folder: Path) -> Path:
    """Return the folder if config, weights and tokenizer are there and whole. Raises `ModelError` naming the fault."""
    model_config(folder)
    _refuse_special_files(folder)
    tensors(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json): copy its files into the model folder")
    return folder


def _refuse_special_files(folder: Path) -> None:
    """Raise `ModelError` for a pipe, a device or a huge file under the name of a file that a library will read."""
    for pattern in NEEDED_FILES:
        for path in folder.glob(pattern):
            # A library that opens such a file would wait for ever on a pipe.
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ModelError(f"{path}: is not a regular file: copy the model's own file into the folder")
            if path.suffix in (".json", ".jinja", ".txt") and path.is_file() and path.stat().st_size > LARGEST_FILE:
                raise ModelError(f"{path}: is larger than {LARGEST_FILE:,} bytes: download it again")


def model_config(folder: Path) -> dict[str, Any]:
    """Return the values of config.json. Raises `ModelError` where it is missing, broken, or names no `model_type`."""
    file = folder / "config.json"
    config = read_object(file, ModelError, missing=f"{folder}: {_no_config(folder)}", constants=INFINITIES)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file}: has no model_type: it must say which architecture this is")
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that a base consists of: the one rule for digests, merges, checks and loading.

    It is transformers' rule: `model.safetensors` if there is one, otherwise the files that the index names. Other
    files of a similar name are not part of the base. Raises `ModelError` naming a file that is missing or outside.
    """
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(f"{folder}: {_no_weights(folder)}")
    shards = read_object(folder / INDEX_FILE, ModelError).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{folder / INDEX_FILE}: has no weight_map: download the model again")
    # The index names a file once for each tensor in it.
    names = sorted(set(map(str, shards.values())))
    # The index comes with a download. A name such as `../other` in it must not reach files elsewhere.
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{folder / INDEX_FILE}: {outside[0]!r} leads out of the folder: download the model again")
    if other := [name for name in names if not name.endswith(".safetensors")]:
        raise ModelError(f"{folder / INDEX_FILE}: {other[0]!r} is not a safetensors file: download the model again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}")
    return tuple(folder / name for name in names)


def tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a model folder by name, from the headers alone.

    Raises `ModelError` for one that two files have: readers differ in which of the two they take.
    """
    found: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in _tensors_of(file).items():
            if name in found:
                raise ModelError(f"{file}: {name} is in {found[name].file.name} as well: download the model again")
            found[name] = info
    return found


def quantization(folder: Path) -> str | None:
    """Return the quantization that config.json states (`bitsandbytes`, `mlx-4bit`), None for full precision."""
    config = model_config(folder)
    scheme = config.get("quantization_config") or config.get("quantization")
    if not scheme:
        return None
    # mlx-lm writes its bits without a method, and copies them under both keys.
    if isinstance(scheme, dict) and "quant_method" not in scheme and "bits" in scheme:
        return f"mlx-{scheme['bits']}bit"
    return str(scheme.get("quant_method", "unknown")) if isinstance(scheme, dict) else str(scheme)


# All three can change when the same model is saved again, by another version or through another class.
_VOLATILE = ("_name_or_path", "transformers_version", "architectures")
_SAMPLE = 256


def config_digest(folder: Path) -> str:
    """Return blake2b over config.json's values, without those that only say where it came from."""
    config = {key: value for key, value in model_config(folder).items() if key not in _VOLATILE}
    return blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=32).hexdigest()


def base_digest(folder: Path) -> str:
    """Return a cheap digest of a base: `config_digest`, and of every tensor name, dtype, shape and 768 bytes of data.

    The bytes are 256 at its start, middle and end; so a merged, re-quantized or otherwise rewritten base differs, and
    the same weights in other shards do not. A change that touches none of the samples goes unseen.
    """
    digest = blake2b(config_digest(folder).encode(), digest_size=32)
    for name, info in sorted(tensors(folder).items()):
        digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
        for sample in _samples(info):
            digest.update(sample)
    return digest.hexdigest()


def _samples(info: TensorInfo) -> Iterator[bytes]:
    # Start, middle and end: a merge or a cast changes all of them, and few bytes are read.
    middle = info.start + (info.end - info.start) // 2
    with info.file.open("rb") as file:
        for start in (info.start, middle, max(info.start, info.end - _SAMPLE)):
            file.seek(start)
            yield file.read(min(_SAMPLE, info.end - start))


def _tensors_of(path: Path) -> dict[str, TensorInfo]:
    """Return a file's tensors, after checking that the file is as long as its header says."""
    try:
        return read_header(path)
    except TensorFileError as error:
        remedy = "" if "git lfs" in str(error) else ": download it again"
        raise ModelError(f"{path}: {error}{remedy}") from error


def _no_config(folder: Path) -> str:
    """Return words for a folder without config.json."""
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        return (
            f"holds a model in GGUF ({ggufs[0]}), which cannot be trained: make a folder of it with transformers and "
            f"the package gguf (AutoModelForCausalLM.from_pretrained(folder, gguf_file={ggufs[0]!r}), then "
            "save_pretrained, and the same with AutoTokenizer)"
        )
    return "no config.json: this is not a model folder"


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"has its weights as a pickle ({pickles[0]}), which can run code when loaded and is refused: save them as "
            f"safetensors (transformers: model.save_pretrained(folder))"
        )
    if (folder / "adapter_config.json").is_file():
        return "is an adapter, no base model: give its base as model.name"
    return f"has no weights ({SINGLE_FILE}, or {INDEX_FILE} with its shards)"


def _builtin(name: str) -> Path:
    short = name.removeprefix("builtin:")
    if short not in BUILTIN:
        known = ", ".join(f"builtin:{known}" for known in BUILTIN)
        raise ModelError(f"{name}: no such built-in model; known: {known}")
    return Path(str(files("mindprint").joinpath("resources", short)))


def _looks_like_path(name: str) -> bool:
    # Old names of the hub without an owner (`gpt2`) count as paths: they look like the name of a folder here.
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/") or "\\" in name


def _no_folder(path: Path) -> str:
    """Return words for a folder that does not exist, and the one that is perhaps meant."""
    if is_gguf(path):
        return f"{GGUF}; name the Hugging Face folder that it was made from"
    if path.is_file():
        return "is a file, not a model folder"
    siblings = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    return f"no such folder ({path})" + (f", did you mean {path.parent / near[0]}?" if near else "")


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub  # noqa: PLC0415 (0.3 s, and a local model needs none of it)
    from huggingface_hub import errors  # noqa: PLC0415

    at = f" at revision {revision}" if revision else ""
    try:
        path = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(NEEDED_FILES))
    except errors.GatedRepoError as error:
        raise ModelError(f"{name}: is gated: accept its terms on huggingface.co, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: no such model on the hub and no such folder (private ones: `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name}: has no revision {revision!r} on the hub: correct model.revision") from error
    except Exception as error:  # huggingface_hub, httpx and the file system each have other errors
        raise ModelError(
            f"{name}{at}: is not a folder here and cannot be downloaded from the hub: {first_line(error)}"
        ) from error
    return Path(path)
