"""Quantized bases: equal bits, memory, and the time of a training step, on both backends.

    python benchmarks/quantized.py [--only bits memory step] [--smollm2 FOLDER] [--turns 5]

`bits` compares core's numbers with those of `mx.dequantize` and of both backends' packed layers, bit for bit, for
random weights in every format of MLX, and for SmolLM2 in 4 bits if the folder of the full-precision model is given.
`memory` loads a base of 500 million random parameters in float16 and in 4 bits, each in a separate process, and prints
how much its resident memory grew. `step` trains a base of 37 million parameters packed and dense, taking turns, and
prints the ratio of the processor times of a step.
"""
# ruff: noqa: PLC0415  each part runs in a process that needs one backend alone

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BACKENDS = ("torch", "mlx")
ROWS, WIDTH = 4, 256
GROUP = 64


def llama(hidden: int, inner: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


LARGE, MIDDLE = llama(1536, 4096, 16, 32000), llama(576, 1536, 8, 8192)


def matrices(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{path}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj"] = (hidden, inner)
    return shapes


def write_base(folder: Path, config: dict[str, Any], packed: bool) -> Path:
    """Write a base of random weights in float16, or of random elements of 4 bits."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    tensors = {}
    for path, (rows, columns) in matrices(config).items():
        if packed:
            words = random.integers(0, 1 << 32, (rows, columns // 8), dtype=np.uint32)
            scales = np.full((rows, columns // GROUP), 0.004, np.float16)
            tensors |= {f"{path}.weight": words, f"{path}.scales": scales, f"{path}.biases": -7.5 * scales}
        else:
            values = random.standard_normal((rows, columns), dtype=np.float32)
            tensors[f"{path}.weight"] = (0.02 * values).astype(np.float16)
    norms = [f"model.layers.{layer}.{name}_layernorm" for layer in range(config["num_hidden_layers"])
             for name in ("input", "post_attention")]  # fmt: skip
    tensors |= {f"{name}.weight": np.ones(config["hidden_size"], np.float16) for name in [*norms, "model.norm"]}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx" if packed else "pt"})
    section = {"quantization": {"group_size": GROUP, "bits": 4, "mode": "affine"}} if packed else {}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16", **section}))
    return folder


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def print_memory(backend: str, folder: str) -> None:
    """Load a base and print how much resident memory grew by, after a forward pass has read every weight."""
    from mindprint.contract import ModelSpec, TokenBatch
    from mindprint.plugins.backend import load_backend

    opened = load_backend(backend)
    # Libraries are loaded with the first model. Only the second is measured.
    small = write_base(Path(tempfile.mkdtemp()) / "small", llama(64, 128, 1, 64), packed=False)
    opened.release(opened.load_model(ModelSpec(str(small), "cpu", "float16")))
    before = resident()
    model = opened.load_model(ModelSpec(folder, "cpu", "float16"))
    loaded = resident() - before
    tokens = np.arange(3, 11, dtype=np.int32)[None]
    batch = TokenBatch(tokens, np.array([8], np.int32), np.arange(8)[None] > 0)
    opened.log_probs(model, batch, adapter=False)
    print(json.dumps({"parameters": model.parameters, "loaded": loaded, "after": resident() - before}))


def measure_memory(work: Path) -> None:
    folders = {kind: write_base(work / kind, LARGE, kind == "packed") for kind in ("dense", "packed")}
    for backend in BACKENDS:
        sizes = {}
        for kind, folder in folders.items():
            command = [sys.executable, __file__, "--child-memory", backend, str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            sizes[kind] = json.loads(output.splitlines()[-1])
            print(f"memory, {backend}, {kind}: {sizes[kind]}")
        ratio = sizes["packed"]["loaded"] / sizes["dense"]["loaded"]
        print(f"memory, {backend}: 4 bits take {ratio:.3f} of float16")


def print_steps(backend: str, work: str, turns: int) -> None:
    from mindprint.adapter.initial import initial_adapter
    from mindprint.adapter.targets import resolve_targets
    from mindprint.contract import LoraConfig, ModelSpec, TokenBatch, Update
    from mindprint.plugins.backend import load_backend

    opened = load_backend(backend)
    random = np.random.default_rng(1)
    tokens = random.integers(3, MIDDLE["vocab_size"], (ROWS, WIDTH)).astype(np.int32)
    mask = np.broadcast_to(np.arange(WIDTH) >= WIDTH // 2, tokens.shape).copy()
    batch = TokenBatch(tokens, np.full(ROWS, WIDTH, np.int32), mask)
    models, times = {}, {"dense": [], "packed": []}
    for kind in times:
        model = opened.load_model(ModelSpec(str(Path(work) / kind), "cpu", "float32"))
        sites = opened.adapter_sites(model)
        adapter = LoraConfig(8, 16.0, resolve_targets(sites, "all-linear"))
        opened.inject_adapter(model, initial_adapter(sites, adapter, seed=0))
        models[kind] = model
    for turn in range(turns + 1):
        for kind, model in models.items():
            start = time.process_time()
            opened.sft_step(model, [batch], Update(1e-4, tokens=batch.loss_tokens))
            # The first turn compiles, allocates, and starts threads.
            if turn:
                times[kind].append(time.process_time() - start)
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"step, {backend}: {ROWS} rows of {WIDTH} tokens, dense {middle['dense']:.2f} s, packed "
          f"{middle['packed']:.2f} s of processor time, ratio {middle['packed'] / middle['dense']:.2f}")  # fmt: skip


def measure_steps(work: Path, turns: int) -> None:
    for kind in ("dense", "packed"):
        write_base(work / kind, MIDDLE, kind == "packed")
    for backend in BACKENDS:
        subprocess.run([sys.executable, __file__, "--child-step", backend, str(work), str(turns)], check=True)


def compare_bits(work: Path, smollm2: Path | None) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    formats = [("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
    formats += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
    random = np.random.default_rng(2)
    for method, bits, size in formats:
        settings: dict[str, Any] = {"group_size": size, "bits": bits, "mode": method}
        tensors = {}
        for number in range(4):
            weight = mx.array(random.standard_normal((64, 384), dtype=np.float32)).astype(mx.bfloat16)
            parts = mx.quantize(weight, **settings)
            roles = ("weight", "scales", "biases")
            tensors |= {f"w{number}.{role}": part for role, part in zip(roles, parts, strict=False)}
        folder = work / f"{method}{bits}-{size}"
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": settings}))
        print(f"bits, random, {method}, {bits} bits, groups of {size}: {equal_tensors(folder)}")
    if smollm2:
        from mlx_lm.utils import load_model, quantize_model, save_config, save_model

        module, config = quantize_model(*load_model(smollm2), 64, 4)
        save_model(work / "smollm2", module)
        save_config(config, work / "smollm2" / "config.json")
        print(f"bits, SmolLM2 in 4 bits: {equal_tensors(work / 'smollm2')}")


def equal_tensors(folder: Path) -> str:
    """Return how many tensors are the same in core as in MLX and in both backends' packed layers."""
    import mlx.core as mx
    import torch

    from mindprint.models.quantized import quantized_weights
    from mindprint_mlx.quantized import split_packed
    from mindprint_torch.quantized import read_weight

    stored: Any = mx.load(str(folder / "model.safetensors"))
    lazy = split_packed(folder, dict(stored), mx.float32, mx.Device(mx.cpu))
    ours = {weight.weight.name: weight for _, weight in lazy.by_array.values()}
    counts = {"mx.dequantize": 0, "torch": 0, "mlx": 0}
    weights = quantized_weights(folder)
    for name, weight in weights.items():
        expected = weight.values().tobytes()
        module, scheme = name.removesuffix(".weight"), weight.scheme
        # Scales of 16 bits are cast first: MLX would round the product and then the sum.
        floats = [
            values if values.dtype == mx.uint8 else values.astype(mx.float32)
            for role in ("scales", "biases")
            if (values := stored.get(f"{module}.{role}")) is not None
        ]
        theirs = mx.dequantize(
            stored[name], *floats, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.method, dtype=mx.float32
        )
        on_torch = read_weight(weight, torch.float32, torch.device("cpu"))
        values = {
            "mx.dequantize": np.array(theirs),
            "torch": on_torch.rows(0, weight.shape[0]).numpy(),
            "mlx": np.array(ours[name].packed.values(ours[name].parts)),
        }
        for where, array in values.items():
            counts[where] += array.tobytes() == expected
    return ", ".join(f"{where} {count} of {len(weights)}" for where, count in counts.items())


def main() -> None:
    if sys.argv[1:2] == ["--child-memory"]:
        return print_memory(*sys.argv[2:4])
    if sys.argv[1:2] == ["--child-step"]:
        return print_steps(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("bits", "memory", "step"), default=("bits", "memory", "step"))
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            work = Path(folder) / name
            work.mkdir()
            if name == "bits":
                compare_bits(work, options.smollm2)
            elif name == "memory":
                measure_memory(work)
            else:
                measure_steps(work, options.turns)
    return None


if __name__ == "__main__":
    main()
