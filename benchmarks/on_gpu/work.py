"""The work on a GPU: Llama-shaped models with random weights, rows of one length, and the operations that they need."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, BETA = 16, 32.0, 0.1
EOS, PAD, FIRST_WORD = 0, 1, 2
SHARD_BYTES = 2 << 30
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool

    @property
    def key_weights(self) -> int:
        """The elements of the weights that make a layer's keys and values."""
        return 2 * self.hidden * (self.hidden // self.heads) * self.key_heads

    @property
    def layer_weights(self) -> int:
        """The elements of a layer's linear weights."""
        return 2 * self.hidden * self.hidden + self.key_weights + 3 * self.hidden * self.inner


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),  # Llama 3.2 1B
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, tied=False),  # Llama 3.1 8B
    "small": Shape(512, 1536, 6, 8, 2, 8192, tied=False),
    "tiny": Shape(64, 128, 2, 4, 2, 512, tied=True),
}


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its completions. SFT uses `chosen` alone."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def rows_of_length(length: int, count: int, stage: str, vocabulary: int, seed: int = 7) -> list[Row]:
    """Return rows whose prompt and completion have `length` tokens together: the same rows for everybody.

    The prompt is a quarter of an SFT row, and half of each sequence of a pair.
    """
    prompt = length // 4 if stage == "sft" else length // 2
    return random_rows([(prompt, length - prompt, length - prompt)] * count, vocabulary, seed)


def ragged_rows(count: int, longest: int, vocabulary: int, seed: int = 7) -> list[Row]:
    """Return rows of many lengths, each part between an eighth of `longest` and half of it."""
    draw = np.random.default_rng(seed).integers(longest // 8, longest // 2, (count, 3))
    return random_rows([(int(first), int(second), int(third)) for first, second, third in draw], vocabulary, seed)


def random_rows(lengths: Sequence[tuple[int, int, int]], vocabulary: int, seed: int) -> list[Row]:
    """Return rows of random tokens, with the lengths of prompt, chosen and rejected completion."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in rng.integers(FIRST_WORD, vocabulary, count)]

    return [
        Row(ids(prompt), [*ids(chosen - 1), EOS], [*ids(rejected - 1), EOS]) for prompt, chosen, rejected in lengths
    ]


def useful_flops(rows: Sequence[Row], shape: Shape, *, preference: bool) -> float:
    """Return the operations that a step on these rows needs, whoever takes it.

    A multiplication and an addition count as two. Each base weight multiplies once forward, and once backward for the
    gradient by its input. Its own gradient is not needed. That makes 4 operations a weight and token, compared with 6
    in full training. Attention has two products forward and four backward, all of which LoRA needs. Under the causal
    mask a token sees half of its sequence on average. The output layer reads completion tokens only, and a prompt
    counts once for both completions. Of the last layer, keys and values count for all tokens, and the rest for those
    of completions. The low-rank products (1 to 2 %), recomputed layers and reference passes do not count: they are no
    progress, so the share of the peak is lower where they are done.
    """
    total = 0.0
    for row in rows:
        completions = (row.chosen, row.rejected) if preference else (row.chosen,)
        prompt, own = len(row.prompt), [len(completion) for completion in completions]
        seen_by_own = sum(length * prompt + length**2 / 2 for length in own)
        read, others = prompt + sum(own), shape.layers - 1
        total += 4 * (others * shape.layer_weights + shape.key_weights) * read
        total += 4 * (shape.layer_weights - shape.key_weights) * sum(own)
        total += 3 * 4 * shape.hidden * (others * (prompt**2 / 2 + seen_by_own) + seen_by_own)
        total += 4 * shape.hidden * shape.vocabulary * sum(own)
    return total


def model_folder(name: str, needed_bytes: float) -> Path:
    """Return a folder for a model's files: in memory if they fit there, else on the disk.

    Raises:
        OSError: If they fit nowhere.
    """
    for parent in (Path("/dev/shm"), Path(tempfile.gettempdir())):  # noqa: S108  (a file system in memory)
        if parent.is_dir() and shutil.disk_usage(parent).free > 1.2 * needed_bytes:
            return parent / f"mindprint-gpu-{name}"
    raise OSError(f"{needed_bytes / 1e9:.1f} GB for the model {name} fit neither into /dev/shm nor into the disk")


def parameter_count(shape: Shape) -> int:
    """Return a model's elements, norms included."""
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return embeddings + shape.layers * (shape.layer_weights + 2 * shape.hidden) + shape.hidden


def write_model(name: str, dtype_name: str, device: str) -> Path:
    """Write a random model and a tokenizer, or return the folder in which they are already.

    Values are drawn on the device, as transformers initialises a Llama: normal with deviation 0.02, norms 1.
    """
    import torch  # noqa: PLC0415

    shape, dtype = SHAPES[name], getattr(torch, dtype_name)
    folder = model_folder(f"{name}-{dtype_name}", parameter_count(shape) * dtype.itemsize)
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(shape, dtype_name)
    config.save_pretrained(folder)
    _write_weights(folder, config, dtype, device)
    write_tokenizer(folder)
    (folder / "complete").touch()
    return folder


def llama_config(shape: Shape, dtype_name: str) -> Any:
    """Return transformers' configuration of a shape."""
    from transformers import LlamaConfig  # noqa: PLC0415

    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, architectures=["LlamaForCausalLM"], dtype=dtype_name,
    )  # fmt: skip


def _write_weights(folder: Path, config: Any, dtype: Any, device: str) -> None:
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    left_out = {"lm_head.weight"} if config.tie_word_embeddings else set()
    sizes = {key: value.shape for key, value in empty.state_dict().items() if key not in left_out}
    generator = torch.Generator(device).manual_seed(0)
    shards = list(_shards(sizes, dtype.itemsize))
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    # Files are written by threads, while the next values are drawn.
    with ThreadPoolExecutor(4) as writers:
        written = []
        for name, keys in zip(names, shards, strict=True):
            tensors = {}
            for key in keys:
                tensor = torch.empty(sizes[key], dtype=dtype, device=device)
                tensors[key] = (
                    tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(0.0, 0.02, generator=generator)
                ).cpu()
            written.append(writers.submit(save_file, tensors, folder / name, {"format": "pt"}))
        for each in written:
            each.result()
    weights = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(sizes: dict[str, Any], item_bytes: int) -> Iterator[list[str]]:
    keys: list[str] = []
    held = 0
    for key, size in sizes.items():
        keys.append(key)
        held += int(np.prod(size)) * item_bytes
        if held >= SHARD_BYTES:
            yield keys
            keys, held = [], 0
    if keys:
        yield keys


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer that has little more than the special tokens: rows come as token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    words = {"<eos>": EOS, "<pad>": PAD, **{f"w{word}": word for word in range(FIRST_WORD, 256)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")  # noqa: S106
    wrapped.save_pretrained(folder)
