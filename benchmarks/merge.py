"""The speed and memory of merging an adapter into a sharded base of 2 GB, compared with copying its files.

    python benchmarks/merge.py [--gigabytes 2] [--rounds 3]

A random bfloat16 base in shards and an adapter of rank 8 on every linear layer. Copy and merge alternate, each flushed
to the disk and each in a separate process, whose greatest resident memory the kernel reports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mindprint.adapter.merging import merged_folder
from mindprint.adapter.peft_format import read_adapter, write_adapter
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.models import folder as models

HIDDEN, INNER, VOCABULARY = 2048, 8192, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LIMIT_MEMORY, LIMIT_SPEED = 600, 0.5


def main() -> None:
    """Print the figures of every round, their median, and the bounds that the design asks for."""
    options = argparse.ArgumentParser()
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.work:
        work(given.work[0], Path(given.work[1]), given.gigabytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a separate process, too: the kernel counts a parent's memory as its children's.
        size = int(measured("base", folder, given.gigabytes)["bytes"])
        print(f"base: {size / 1e9:.2f} GB in {len(models.weight_files(Path(folder) / 'base'))} shards, bfloat16")
        rounds = [(measured("copy", folder), measured("merge", folder)) for _ in range(given.rounds)]
    for copy, merge in rounds:
        both = ", ".join(f"{name} {figures['seconds']:.2f} s ({figures['cpu']:.2f} s of CPU)"
                         for name, figures in (("copy", copy), ("merge", merge)))  # fmt: skip
        print(f"{both}, peak {merge['megabytes']:.0f} MB")
    speed = statistics.median(copy["seconds"] / merge["seconds"] for copy, merge in rounds)
    memory = max(merge["megabytes"] for _, merge in rounds)
    print(f"merge at {speed:.2f} of the speed of copying (at least {LIMIT_SPEED}); peak {memory:.0f} MB "
          f"(below {LIMIT_MEMORY})")  # fmt: skip


def write_base(folder: Path, gigabytes: float) -> int:
    """Write a random base in shards of a layer or two each, and an adapter; return the base's bytes."""
    base = folder / "base"
    base.mkdir()
    random = np.random.default_rng(0)
    # Two bytes a number, for embedding and head as well.
    layer_bytes = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    names, total = {}, 0
    for number in range(layers + 1):
        tensors = shard(random, number - 1)
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_bfloat16(base / file, tensors)
        names |= dict.fromkeys(tensors, file)
        total += sum(values.nbytes for values in tensors.values())
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").write_text("{}")
    write_random_adapter(folder / "adapter", random, layers)
    return total


def shard(random: np.random.Generator, layer: int) -> dict[str, np.ndarray]:
    shapes = {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    if layer < 0:
        shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    return {name: (random.normal(0, 0.02, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            for name, shape in shapes.items()}  # fmt: skip


def save_bfloat16(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Save bits as bfloat16."""
    # safetensors for NumPy has no bfloat16: the same bytes under another name, whose letters the header's padding
    # takes.
    save_file(tensors, file)
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = bytes(content[8 : 8 + length]).replace(b'"U16"', b'"BF16"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(content[8 + length :]))


def write_random_adapter(folder: Path, random: np.random.Generator, layers: int) -> None:
    folder.mkdir()
    sites = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in SHAPES.items()}
    factors = {
        site: LoraFactors(*(random.normal(0, 0.01, part).astype(np.float32) for part in ((8, columns), (rows, 8))))
        for site, (rows, columns) in sites.items()
    }
    write_adapter(folder, AdapterState(LoraConfig(8, 16.0, tuple(sites)), factors), "base")


def measured(task: str, folder: str, gigabytes: float = 0.0) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", task, folder, "--gigabytes", str(gigabytes)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def work(task: str, folder: Path, gigabytes: float) -> None:
    """Copy or merge, then flush; print seconds and the process's peak memory."""
    if task == "base":
        print(json.dumps({"bytes": write_base(folder, gigabytes)}))
        return
    out = folder / task
    # Dirty pages of earlier work would be written at the expense of this one.
    os.sync()
    started, cpu = time.perf_counter(), time.process_time()
    if task == "copy":
        # Flushed file by file, as a merge flushes its shards.
        out.mkdir()
        for file in (folder / "base").iterdir():
            shutil.copyfile(file, out / file.name)
            with (out / file.name).open("rb") as opened:
                os.fsync(opened.fileno())
    else:
        adapter, _ = read_adapter(folder / "adapter")
        with merged_folder(out, models.ModelFolder(folder / "base", "base"), adapter, folder / "adapter"):
            pass
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": megabytes}))
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
