"""Several ranks against one, on this machine: the numbers, runs that are killed and resumed, and the bytes of a step.

    python benchmarks/ranks.py steps                     # 2 and 3 ranks, both backends, SFT and DPO, dropout on and off
    python benchmarks/ranks.py steps --backends torch --ranks 2 --steps 3
    python benchmarks/ranks.py resume                    # 2 ranks, then 1; 1, then 3; sharded, then whole
    python benchmarks/ranks.py kill --kills 10           # kill -9 of one rank at ten moments
    python benchmarks/ranks.py rounding                  # what AdamW makes of rounding, at a higher rate
    python benchmarks/ranks.py shard                     # PyTorch's base divided between ranks: numbers, and memory
    python benchmarks/ranks.py bytes                     # bytes that a rank sends in a step, next to the formula
    python benchmarks/ranks.py paper                     # the formula for real bases and links; nothing is run

Every part asserts its bounds and prints its figures. All ranks are on this machine and talk over loopback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.config import DataConfig, ModelConfig
from mindprint.contract import LoadedModel, LoraConfig, LoraFactors, ModelSpec, TrainingState, Update
from mindprint.data.collate import preference_batch, sft_batch
from mindprint.data.render import render_preferences, render_sft
from mindprint.data.row_files import Origin
from mindprint.data.rows import PreferenceRow, SftRow
from mindprint.data.tokenizer import load_tokenizer
from mindprint.losses import PreferenceLoss
from mindprint.models.folder import resolve_model
from mindprint.plugins.backend import Backend, load_backend
from mindprint.training.agreement import shared_metrics

CASES = {"sft": ("sft", 0.0), "sft with dropout": ("sft", 0.2), "dpo": ("dpo", 0.0), "dpo with dropout": ("dpo", 0.2)}
"""Stage and dropout of each case. Preference steps have no dropout, whatever the adapter's is."""

MICRO_BATCHES, ROWS = 7, 2
"""Of a step: a number that neither two nor three ranks divide."""

GRADIENT, LOSS, ADAPTER = 1e-6, 1e-6, 1e-5
"""Bounds: of the first gradient relative to its norm, of a loss times (1 + loss), of an element of the adapter."""

NORM = 0.5
"""The norm to which a step's gradient is clipped."""

RATE, HIGH_RATE = 3e-4, 1e-3
"""Learning rates: that of SFT in a new project, and one at which rounding shows (`rounding`).

AdamW's first step for an element is about as long as the rate, however small its gradient is.
"""

RESIDENT = 0.6
"""Bound: the resident memory of one of two ranks that divide a base, next to that of one process."""

SECONDS_TO_END = 15.0
"""Time in which all ranks have ended after one of them was killed."""

SHAPES = {
    "1B": (16, 2048, 512, 8192),
    "3B": (28, 3072, 1024, 8192),
    "8B": (32, 4096, 1024, 14336),
    "70B": (80, 8192, 1024, 28672),
}
"""Layers, width, width of keys and values, width of the feed-forward block, of the Llama 3 models of these sizes."""

LINKS = {"10 GbE": 10, "Thunderbolt 4": 40, "Thunderbolt 5": 80, "NVLink 4": 3600}
"""Nominal rates in one direction, in Gbit/s. NVLink's is that of all links of an H100."""

RANK = 8

TCP_INFO, BYTES_ACKED = 11, 120
"""The option of a socket, and the place of a count in it: `tcpi_bytes_acked` of linux/tcp.h."""


class World(NamedTuple):
    """The ranks of a run, and whether they divide the base."""

    size: int
    shard: bool = False

    @property
    def settings(self) -> list[str]:
        """The settings on the command line. A run that continues would keep those that it began with."""
        return [f"backend.shard={str(self.shard).lower()}"]

    def __str__(self) -> str:
        return f"{self.size} rank{'s' if self.size > 1 else ''}" + (" that divide the base" if self.shard else "")


CHANGES = {
    "torch": ((World(2), World(1)), (World(1), World(3)), (World(2, True), World(1)), (World(1), World(2, True))),
    "mlx": ((World(2), World(1)), (World(1), World(3))),
}
"""The ranks that a run is started with, and those that it continues with, by backend."""

PROJECT = """model: {name: "builtin:tiny"}
backend: {device: cpu, dtype: float32}
data: {path: data, max_length: 96}
adapter: {r: 4, alpha: 8, dropout: 0.1}
sft: {steps_per_topic: 10, batch_size: 2, gradient_accumulation: 3, learning_rate: 3e-4}
dpo: {steps_per_topic: 10, batch_size: 2, gradient_accumulation: 2, learning_rate: 1e-4}
evaluation: {levels: []}
checkpoints: {every: 5}
"""
"""A small run of 20 steps, as the bounds are meant, at `RATE`."""


def main() -> None:
    """Run one part."""
    options = arguments()
    if options.part == "worker":
        work(options)
        return
    if options.part == "rounding":
        options.cases, options.ranks, options.steps, options.rate = ["sft with dropout"], [2], 2, HIGH_RATE
    if options.part == "shard":
        options.shard, options.backends, options.ranks = True, ["torch"], [2]
    if options.part == "paper":
        print_paper()
        return
    with tempfile.TemporaryDirectory() as kept:
        for backend in options.backends:
            PARTS[options.part](backend, Path(kept) / backend, options)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of these words, or of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("steps", "resume", "kill", "bytes", "paper", "rounding", "shard", "worker"))
    parser.add_argument("--backends", nargs="+", default=["torch", "mlx"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of the steps")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--into", type=Path, help="of a worker: the folder of its results")
    parser.add_argument("--shard", action="store_true", help="of a worker: divide the base between the ranks")
    parser.add_argument("--model", default="builtin:tiny", help="of a worker: the base")
    return parser.parse_args(words)


def compare_steps(backend: str, folder: Path, options: argparse.Namespace) -> None:
    """Print how far several ranks are from one, and assert the bounds."""
    alone = run_workers(backend, 1, folder / "1", options)[0]
    for size in options.ranks:
        ranks = run_workers(backend, size, folder / str(size), options)
        for case in options.cases:
            compared = compare_case(alone[case], [rank[case] for rank in ranks])
            print(f"{backend}, {size} ranks, {case}, {options.steps} steps: {compared}", flush=True)


def show_rounding(backend: str, folder: Path, options: argparse.Namespace) -> None:
    """Print how far one and two ranks are apart after two steps at a high rate, and the gradient where it is most."""
    alone, two = (run_workers(backend, size, folder / str(size), options)[0]["sft with dropout"] for size in (1, 2))
    apart = np.abs(alone["adapter"] - two["adapter"])
    worst = int(apart.argmax())
    # B begins at 0. So A's first gradient is 0, and its first moment a tenth of the second one.
    gradients = [10 * float(run["moments"][worst]) for run in (alone, two)]
    print(
        f"{backend}, rate {options.rate:g}: {int((apart > ADAPTER).sum())} of {apart.size:,} elements are more than "
        f"{ADAPTER:g} apart, 99.9 % at most {np.quantile(apart, 0.999):.1e}, the greatest {apart[worst]:.1e}. "
        f"There the gradient is {gradients[0]:.2e} and {gradients[1]:.2e}, of all elements a norm of {NORM:g}",
        flush=True,
    )


def compare_sharded(backend: str, folder: Path, options: argparse.Namespace) -> None:
    """Print how far ranks that divide the base are from one, and the memory of a rank next to that of one process."""
    compare_steps(backend, folder, options)
    model = make_large_model(folder / "large")
    options.model, options.cases, options.steps = str(model), ["sft"], 2
    alone = run_workers(backend, 1, folder / "large-1", options)[0]["sft"]
    ranks = [rank["sft"] for rank in run_workers(backend, 2, folder / "large-2", options)]
    print(f"{backend}, a base of {alone['parameters'] / 1e6:.0f}M parameters, float32:", flush=True)
    for kind in ("resident", "peak"):
        most = max(rank[kind] for rank in ranks)
        print(
            f"  {kind} memory: {alone[kind] / 2**20:,.0f} MiB in one process, {most / 2**20:,.0f} MiB on a rank of 2 "
            f"({most / alone[kind]:.2f})",
            flush=True,
        )
        assert most / alone[kind] <= RESIDENT


def make_large_model(folder: Path) -> Path:
    """Write a Llama of half a billion random parameters, with the tokenizer of the built-in model."""
    # Imported here: this process and most parts need no framework.
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    tiny = resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd()).path
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = json.loads((tiny / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=39,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def compare_case(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    """Return how far several ranks are from one, and assert the bounds."""
    assert len({rank["digest"] for rank in ranks}) == 1, "the ranks have unlike adapters"
    first = ranks[0]
    assert {rank["base"] for rank in ranks} == {alone["base"]}, "the base has another digest"
    gradient = np.linalg.norm(alone["gradient"] - first["gradient"]) / np.linalg.norm(alone["gradient"])
    losses = np.array(alone["losses"]), np.array(first["losses"])
    loss = float((np.abs(losses[0] - losses[1]) / (1 + losses[0])).max())
    adapter = float(np.abs(alone["adapter"] - first["adapter"]).max())
    assert gradient <= GRADIENT
    assert loss <= LOSS
    assert adapter <= ADAPTER
    return f"first gradient {gradient:.1e}, losses {loss:.1e}, adapter {adapter:.1e}; ranks bit-equal"


def count_bytes(backend: str, folder: Path, options: argparse.Namespace) -> None:
    """Print the bytes that a rank sends in a step, next to those of the formula."""
    options.cases = ["sft"]
    for size in options.ranks:
        sent = [rank["sft"] for rank in run_workers(backend, size, folder / str(size), options)]
        elements = len(sent[0]["adapter"])
        formula = bytes_of_a_step(elements, size)
        measured = np.mean([rank["bytes"] / options.steps for rank in sent])
        print(
            f"{backend}, {size} ranks, {elements:,} elements: a rank sends {measured:,.0f} bytes in a step, the "
            f"formula says {formula:,.0f} for the gradient ({measured / formula:.2f})",
            flush=True,
        )


def bytes_of_a_step(elements: int, size: int) -> float:
    """Return the bytes that a rank of a ring sends in a step: an all-reduce of the adapter's gradient and the loss."""
    # Patarasuk & Yuan 2009: (N - 1) / N of the data for each of reduce-scatter and all-gather.
    return 2 * (size - 1) / size * 4 * (elements + 1)


def adapter_elements(base: str) -> int:
    """Return the elements of an adapter on all linear layers."""
    layers, width, keys, inner = SHAPES[base]
    # LoRA on a layer has rank * (in + out) elements: q and o, k and v, and the three of the feed-forward block.
    return RANK * layers * (2 * (width + width) + 2 * (width + keys) + 3 * (width + inner))


def print_paper() -> None:
    """Print the bytes and the times of a step for real bases and links."""
    print(f"| base | elements | ranks | bytes of a rank | {' | '.join(LINKS)} |")
    print(f"|{'---|' * (4 + len(LINKS))}")
    for base in SHAPES:
        elements = adapter_elements(base)
        for size in (2, 4):
            sent = bytes_of_a_step(elements, size)
            times = " | ".join(f"{sent * 8 / rate / 1e6:.2f} ms" for rate in LINKS.values())
            print(f"| {base} | {elements / 1e6:.1f}M | {size} | {sent / 1e6:.1f} MB | {times} |")


def compare_resumed(backend: str, folder: Path, _: argparse.Namespace) -> None:
    """Print how far runs that changed their number of ranks are from one that did not, and assert the bound."""
    project = make_project(folder)
    whole = folder / "whole"
    end(start_ranks(backend, 1, train(project, whole)))
    for number, (first, then) in enumerate(CHANGES[backend]):
        run = folder / str(number)
        start_and_kill(backend, project, run, first, step=5)
        end(start_ranks(backend, then.size, [*train(project, run), "--resume", *then.settings]))
        print(f"{backend}: {first}, then {then}: {compare_runs(whole, run)}", flush=True)


def start_and_kill(backend: str, project: Path, run: Path, world: World, step: int) -> None:
    """Start a run on some ranks, and kill all of them as soon as the checkpoint of `step`, or a later one, is there."""
    processes = start_ranks(backend, world.size, [*train(project, run), *world.settings])
    wait_for_checkpoint(run, step)
    for process in processes:
        process.kill()
    end(processes, expect_success=False)


def kill_ranks(backend: str, folder: Path, options: argparse.Namespace) -> None:
    """Kill one of two ranks at random moments: all end, and the run that continues ends where a whole one does."""
    project = make_project(folder)
    whole = folder / "whole"
    end(start_ranks(backend, 2, train(project, whole)))
    rng = random.Random(backend)  # noqa: S311 (moments, not secrets)
    for kill in range(options.kills):
        run, victim = folder / f"kill-{kill}", kill % 2
        processes = start_ranks(backend, 2, train(project, run))
        wait_for_checkpoint(run, 0)
        # The run takes 20 steps.
        wait_for_steps(run, rng.randrange(1, 18))
        processes[victim].kill()
        killed = time.monotonic()
        end(processes, expect_success=False, seconds=SECONDS_TO_END)
        took = time.monotonic() - killed
        end(start_ranks(backend, 2, [*train(project, run), "--resume"]))
        print(f"{backend}: rank {victim} killed, all ended in {took:.1f} s: {compare_runs(whole, run)}", flush=True)


def run_workers(backend: str, size: int, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cases on `size` ranks, and return the results of each rank by case."""
    folder.mkdir(parents=True)
    words = ["worker", "--backends", backend, "--steps", str(options.steps), "--into", str(folder)]
    words += ["--rate", str(options.rate), "--model", options.model]
    words += ["--shard"] if options.shard and size > 1 else []
    end(start_ranks(backend, size, [*words, "--cases", *options.cases], program=[sys.executable, __file__]))
    return read_results(folder, size)


def read_results(folder: Path, size: int) -> list[dict[str, Any]]:
    """Return the files of the workers: the results of each rank by case."""
    results = []
    for rank in range(size):
        facts = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
        arrays = np.load(folder / f"{rank}.npz")
        for case in facts:
            facts[case] |= {name: arrays[f"{case} {name}"] for name in ("gradient", "moments", "adapter")}
        results.append(facts)
    return results


def work(options: argparse.Namespace) -> None:
    """Take the steps of every case as one rank, and write what came of them."""
    backend = load_backend(options.backends[0])
    ranks = backend.ranks
    facts, arrays = {}, {}
    # Connected before the bytes are counted.
    ranks.gather(None)
    for case in options.cases:
        stage, dropout = CASES[case]
        before = bytes_sent()
        loaded = load_base(backend, options.model, shard=options.shard)
        losses, gradient, state = take_steps(backend, loaded, stage, dropout, options)
        adapter, moments = flattened(state.adapter.tensors), flattened(state.first_moments)
        digest = hashlib.sha256(adapter.tobytes()).hexdigest()
        facts[case] = {"losses": losses, "digest": digest, "bytes": bytes_sent() - before, **memory()}
        facts[case] |= {"parameters": loaded.parameters, "base": backend.base_digest(loaded)}
        # All ranks are here: a rank that were ahead would not lend its share of the base to the others.
        ranks.gather(None)
        backend.release(loaded)
        arrays |= {f"{case} gradient": gradient, f"{case} moments": moments, f"{case} adapter": adapter}
    np.savez(options.into / f"{ranks.rank}.npz", **arrays)
    (options.into / f"{ranks.rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    # A rank that ends takes the others with it, while they may still be at work.
    ranks.gather(None)


def load_base(backend: Backend, name: str, *, shard: bool) -> LoadedModel:
    path = resolve_model(ModelConfig(name=name), Path.cwd()).path
    return backend.load_model(ModelSpec(str(path), "cpu", "float32", shard=shard))


def memory() -> dict[str, int]:
    """Return the resident memory of this process, now and at most, in bytes, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
              if name in ("VmRSS", "VmHWM")}  # fmt: skip
    return {"resident": values["VmRSS"], "peak": values["VmHWM"]}


def take_steps(
    backend: Backend, model: LoadedModel, stage: str, dropout: float, options: argparse.Namespace
) -> tuple[list[float], np.ndarray[Any, Any], TrainingState]:
    """Take steps on this rank's share. Return the losses, the first gradient and the last state."""
    tokenizer = load_tokenizer(resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd()).path)
    sites = backend.adapter_sites(model)
    lora = LoraConfig(4, 8.0, resolve_targets(sites, "all-linear"), dropout)
    backend.inject_adapter(model, initial_adapter(sites, lora, seed=0))
    batches = sft_batches(tokenizer) if stage == "sft" else dpo_batches(tokenizer)
    ranks = backend.ranks
    share = ranks.share(batches)
    places = () if ranks.alone else tuple(ranks.share(range(len(batches))))
    losses, gradient = [], np.zeros(0)
    for step in range(options.steps):
        update = Update(options.rate, tokens=0, max_grad_norm=NORM, seed=step, micro_batches=places)
        if stage == "sft":
            tokens = sum(batch.loss_tokens for batch in batches)
            metrics = backend.sft_step(model, share, replace(update, tokens=tokens))
        else:
            tokens = sum(int(batch.chosen_lengths.sum()) for batch in batches)
            update = replace(update, tokens=tokens, pairs=sum(batch.pairs for batch in batches), share_prompts=False)
            metrics = backend.dpo_step(model, share, PreferenceLoss(), update)
        if not ranks.alone:
            metrics = shared_metrics(ranks, metrics, [getattr(batch, "pairs", 0) for batch in batches])
        losses.append(metrics.loss)
        if step == 0:
            # The first moment is (1 - beta1) times the clipped gradient, whose scale cancels in a relative error.
            gradient = flattened(backend.save(model).first_moments)
    return losses, gradient, backend.save(model)


def flattened(factors: dict[str, LoraFactors] | Any) -> np.ndarray[Any, Any]:
    return np.concatenate([part.ravel() for site in sorted(factors) for part in factors[site]])


def sample_rows(name: str) -> list[dict[str, Any]]:
    text = files("mindprint").joinpath(f"resources/curriculum/{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[: MICRO_BATCHES * ROWS]]


def sft_batches(tokenizer: Any) -> list[Any]:
    rows = [
        SftRow("t", row["prompt"], row["completion"], Origin("rows", number))
        for number, row in enumerate(sample_rows("sft"))
    ]
    examples = render_sft(rows, tokenizer, DataConfig()).examples
    return [sft_batch(examples[at : at + ROWS], tokenizer.pad_id) for at in range(0, len(examples), ROWS)]


def dpo_batches(tokenizer: Any) -> list[Any]:
    rows = [
        PreferenceRow("t", row["prompt"], row["chosen"], row["rejected"], Origin("rows", number))
        for number, row in enumerate(sample_rows("preferences"))
    ]
    examples = render_preferences(rows, tokenizer, DataConfig()).examples
    # A made-up reference, so that pairs weigh unlike.
    sums = [np.linspace(-40, -60, len(examples)), np.linspace(-55, -45, len(examples))]
    return [
        preference_batch(examples[at : at + ROWS], tokenizer.pad_id, (sums[0][at : at + ROWS], sums[1][at : at + ROWS]))
        for at in range(0, len(examples), ROWS)
    ]


def bytes_sent() -> int:
    """Return the bytes that the TCP connections of this process have sent, as the kernel counts them."""
    total = 0
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):
            if str(descriptor.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
                    info = copy.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 192)
                    total += struct.unpack_from("<Q", info, BYTES_ACKED)[0]
    return total


def make_project(folder: Path) -> Path:
    """Write a small project with the rows of the sample curriculum under one topic."""
    project = folder / "project"
    (project / "data").mkdir(parents=True)
    for name in ("sft", "preferences"):
        rows = ({**row, "topic": "all"} for row in sample_rows(name))
        (project / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (project / "mindprint.yaml").write_text(PROJECT, encoding="utf-8")
    return project


def train(project: Path, run: Path) -> list[str]:
    return ["train", str(project), "--run", str(run)]


def start_ranks(
    backend: str, size: int, words: list[str], program: list[str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start the processes as the backend's launcher would, with its environment and without its process."""
    processes = []
    for variables in launcher_variables(backend, size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        chosen = [] if program else [f"backend.type={backend}"]
        command = [*(program or [sys.executable, "-m", "mindprint"]), *words, *chosen]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    return processes


def launcher_variables(backend: str, size: int) -> list[dict[str, str]]:
    """Return the environment variables that a launcher sets, for each rank."""
    if size == 1:
        return [{}]
    if backend == "torch":
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    hosts = Path(tempfile.mkdtemp()) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(size)]), encoding="utf-8")
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(size)]


def end(processes: list[subprocess.Popen[bytes]], *, expect_success: bool = True, seconds: float = 3600.0) -> None:
    """Wait for all processes, and assert how they ended."""
    deadline = time.monotonic() + seconds
    try:
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            succeeded = process.returncode == 0
            assert succeeded == expect_success, (
                f"rank {rank} ended with {process.returncode}: {errors.decode()[-2000:]}"
            )
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_checkpoint(run: Path, step: int) -> None:
    deadline = time.monotonic() + 1200
    while not any(int(path.name) >= step for path in (run / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 1200
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "no step came"
        time.sleep(0.005)


def compare_runs(whole: Path, run: Path) -> str:
    """Return how far a run's losses and adapter are from the whole run's, within the bounds."""
    losses = [
        np.array([json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()])
        for path in (whole, run)
    ]
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (whole, run)]
    loss = float((np.abs(losses[0] - losses[1]) / (1 + losses[0])).max())
    adapter = max(float(np.abs(adapters[0][name] - adapters[1][name]).max()) for name in adapters[0])
    figures = f"losses {loss:.1e}, adapter {adapter:.1e}"
    assert loss <= LOSS, figures
    assert adapter <= ADAPTER, figures
    return figures


PARTS = {
    "steps": compare_steps,
    "resume": compare_resumed,
    "kill": kill_ranks,
    "bytes": count_bytes,
    "rounding": show_rounding,
    "shard": compare_sharded,
}

if __name__ == "__main__":
    main()
