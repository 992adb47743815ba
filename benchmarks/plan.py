"""The memory that `mindprint plan` states next to that of a measured run: five configurations of each backend.

    python benchmarks/plan.py [--backend torch] [--only long] [--device cpu] [--model smollm2=FOLDER]

Each run is a new process that takes two steps, with the checks and the fingerprint of every run. On a CPU its peak is
the most memory that was resident, less the memory that libraries, tokenizer and rows took before the base loaded. On
CUDA it is torch's `max_memory_allocated`, on Metal MLX's `get_peak_memory`. The models have random weights, unless
folders of real ones are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mindprint
from mindprint.contract import LoadedModel, ModelSpec
from side_by_side import work

BOUND = 0.15
BACKENDS = ("torch", "mlx")


@dataclass(frozen=True)
class Case:
    """A configuration: a model, a stage, and micro-batches of rows that are cut at `length` tokens."""

    model: str
    stage: str
    batch: int
    length: int
    dtype: str = "float32"
    gradient_checkpointing: bool = False


CASES = {
    "short": Case("qwen2", "sft", 8, 56),
    "long": Case("smollm2", "sft", 1, 640),
    "pairs": Case("smollm2", "dpo", 2, 160),
    "recomputed": Case("gemma3", "sft", 2, 256, gradient_checkpointing=True),
    "bfloat16": Case("qwen2", "sft", 2, 32, dtype="bfloat16"),
}

PROMPT_WORDS = 10

MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    },
}  # fmt: skip
"""The shapes of SmolLM2 135M and Gemma 3 270M. The third model, `qwen2`, is that of the other benchmarks."""


class Memory:
    """An observer of the backend that notes the resident memory when the base begins to load."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before: int | None = None

    @mindprint.hookimpl(wrapper=True)
    def mindprint_load_model(self, spec: ModelSpec) -> Generator[None, LoadedModel, LoadedModel]:  # noqa: ARG002
        if self._before is None:
            self._before = _status("VmRSS")
        model = yield
        return model

    def peak(self) -> int:
        """Return the most bytes that the run took so far."""
        if self._device == "cuda":
            import torch  # noqa: PLC0415

            return torch.cuda.max_memory_allocated()
        if self._device == "metal":
            import mlx.core as mx  # noqa: PLC0415

            return mx.get_peak_memory()
        return _status("VmHWM") - (self._before or 0)


def main() -> int:
    """Print each configuration's estimate next to its measurement. Exit with 1 if one is further apart than 15 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be given again; default: both")
    parser.add_argument("--only", action="append", choices=CASES, help="may be given again; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(json.loads(arguments.measure))))
        return 0
    folders = dict(given.split("=", 1) for given in arguments.model)
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for backend in arguments.backend or BACKENDS:
            for name in arguments.only or CASES:
                case = CASES[name]
                folder = Path(folders.get(case.model) or written(case.model, Path(temporary)))
                found = in_own_process(case, backend, arguments.device, folder)
                apart = found["stated"] / found["peak"] - 1
                worst = max(worst, abs(apart))
                parts = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in found["parts"].items())
                print(
                    f"{backend} {name:10} stated {found['stated'] / 2**20:6.0f} MiB, measured "
                    f"{found['peak'] / 2**20:6.0f} MiB, {apart:+.1%}  ({found['rows']} x {found['longest']}; {parts})",
                    flush=True,
                )
    print(f"furthest apart: {worst:.1%} (at most {BOUND:.0%})")
    return 0 if worst <= BOUND else 1


def in_own_process(case: Case, backend: str, device: str, folder: Path) -> dict[str, Any]:
    """Call `measured` in a new process."""
    task = {**asdict(case), "backend": backend, "device": device, "folder": str(folder)}
    command = [sys.executable, __file__, "--measure", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes that a run needs by the plan, and those that it took."""
    rng = np.random.default_rng(7)

    def text(words: int) -> str:
        return work.text(rng.integers(work.FIRST_WORD, work.VOCABULARY, words).tolist())

    # A word is one token or more, so that every row is cut at the length.
    answers = ("completion",) if task["stage"] == "sft" else ("chosen", "rejected")
    rows = [
        {"prompt": text(PROMPT_WORDS), **{answer: text(task["length"]) for answer in answers}}
        for _ in range(2 * task["batch"])
    ]
    other = "dpo" if task["stage"] == "sft" else "sft"
    config = {
        "model": {"name": task["folder"]},
        "backend": {
            "type": task["backend"], "device": task["device"], "dtype": task["dtype"],
            "gradient_checkpointing": task["gradient_checkpointing"],
        },
        "data": {"path": None, "max_length": task["length"], "heldout_fraction": 0.0},
        task["stage"]: {"steps_per_topic": 2, "batch_size": task["batch"]},
        other: {"enabled": False},
        "evaluation": {"levels": []},
    }  # fmt: skip
    stage = mindprint.plan(config, rows=rows).stages[0]
    memory = Memory(task["device"])
    with tempfile.TemporaryDirectory() as folder:
        mindprint.train(config, rows=rows, run=Path(folder) / "run", observers=[memory], progress=False)
    parts = {name: size for name, size in asdict(stage.need).items() if name != "free"}
    return {
        "stated": stage.need.total, "peak": memory.peak(), "parts": parts,
        "rows": stage.rows, "longest": stage.longest,
    }  # fmt: skip


def written(name: str, temporary: Path) -> Path:
    """Return the folder of a model with random weights, written when it is first asked for."""
    folder = temporary / name
    if folder.exists():
        return folder
    # The tokenizer, with a word for each id, is that of the other benchmarks.
    work.write_model(folder)
    if name in MODELS:
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

        config = AutoConfig.for_model(**MODELS[name], tie_word_embeddings=True, max_position_embeddings=4096)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _status(field: str) -> int:
    """Return a size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    sys.exit(main())
