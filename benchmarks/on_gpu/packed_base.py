"""A random base in MLX's affine format, 4 bits in groups of 64, and the dense base of the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from on_gpu import work

BITS, GROUP_SIZE = 4, 64
LEVELS = 1 << BITS


def write_twins(name: str, dtype_name: str, device: str) -> tuple[Path, Path]:
    """Write both bases, or return the folders in which they are already: the packed one and the dense one.

    As in the folders of mlx-community, the embedding is packed too, and so is the output layer, which is tied to it.
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    shape, dtype = work.SHAPES[name], getattr(torch, dtype_name)
    needed = work.parameter_count(shape) * dtype.itemsize
    packed, dense = (work.model_folder(f"{name}-{dtype_name}-{kind}", needed) for kind in ("packed", "unpacked"))
    if (dense / "complete").exists():
        return packed, dense
    config = work.llama_config(shape, dtype_name)
    with torch.device("meta"):
        sizes = {key: value.shape for key, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        del sizes["lm_head.weight"]
    generator = torch.Generator(device).manual_seed(0)
    files: dict[Path, dict[str, Any]] = {packed: {}, dense: {}}
    for key, size in sizes.items():
        if len(size) == 1:
            files[packed][key] = files[dense][key] = torch.ones(size, dtype=dtype)
            continue
        words, scales, biases = _random_parts(size, dtype, device, generator)
        path = key.removesuffix("weight")
        files[packed] |= {
            key: words.cpu().view(torch.uint32), f"{path}scales": scales.cpu(), f"{path}biases": biases.cpu()
        }  # fmt: skip
        files[dense][key] = _numbers(words, scales, biases).to(dtype).cpu()
    for folder, tensors in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        work.write_tokenizer(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stated = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    stated["quantization"] = {"group_size": GROUP_SIZE, "bits": BITS}
    (packed / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    (dense / "complete").touch()
    return packed, dense


def _random_parts(size: Any, dtype: Any, device: str, generator: Any) -> tuple[Any, Any, Any]:
    """Return words of random levels, and scales and biases under which values have the deviation of a Llama's, 0.02."""
    import torch  # noqa: PLC0415

    rows, columns = size
    words = torch.randint(
        -(1 << 31), 1 << 31, (rows, columns * BITS // 32), dtype=torch.int32, device=device, generator=generator
    )
    # Levels are uniform, and a uniform number has the deviation of its range over the root of 12.
    usual = 0.02 * 12**0.5 / (LEVELS - 1)
    drawn = torch.rand((rows, columns // GROUP_SIZE), device=device, generator=generator)
    scales = (usual * (0.75 + drawn / 2)).to(dtype)
    return words, scales, (-(LEVELS - 1) / 2 * scales.float()).to(dtype)


def _numbers(words: Any, scales: Any, biases: Any) -> Any:
    """Return `scale * level + bias` in float32, as MLX defines it. An element is in the bits from `4 * index` on."""
    import torch  # noqa: PLC0415

    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    levels = (words.unsqueeze(-1) >> shifts & (LEVELS - 1)).float().view(*scales.shape, GROUP_SIZE)
    return (levels * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).view(len(words), -1)
