"""The calls that a worker answers. Arguments and results are JSON."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from on_gpu import checks, ours, peers, work
from on_gpu.clock import peak_gib, seconds_of, spread, start_peak, wait_for

# ruff: noqa: PLC0415  the process that orders the measurements imports no framework

LOADED: dict[str, Any] = {}
"""The contestant of this process, under the name `contestant`."""


def import_everything() -> None:
    """Import what any call needs. No call before the first may touch the GPU."""
    for module in ("torch", "transformers", "peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"):
        import_module(module)
    import_module("mindprint_torch.steps")
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def free_memory() -> None:
    """Give memory back that a call left to be collected."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def forget() -> None:
    """Drop the contestant, so that somebody else can use this process."""
    LOADED.clear()
    free_memory()


def about() -> dict[str, Any]:
    """Return the device and the versions that decide the figures."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions: dict[str, Any] = {}
    for name in (
        "torch", "transformers", "trl", "peft", "accelerate", "triton", "liger-kernel", "bitsandbytes", "unsloth",
        "mindprint-core", "mindprint-torch",
    ):  # fmt: skip
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    if not torch.cuda.is_available():
        return {"device": "cpu", "name": "CPU", "versions": versions}
    facts = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "name": facts.name,
        "gib": facts.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def peaks(device: str, size: int, copied_bytes: int) -> dict[str, float]:
    """Return the rates of a bfloat16 matrix product of random numbers, and of a copy within the device's memory."""
    import torch

    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(first)
    seconds = spread(seconds_of(device, lambda: torch.mm(first, second, out=product), 10, 3))["seconds"]
    source = torch.randint(0, 255, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = spread(seconds_of(device, lambda: target.copy_(source), 10, 3))["seconds"]
    return {"flops": 2 * size**3 / seconds, "copy_bytes": 2 * copied_bytes / copying}


def write_model(name: str, dtype: str, device: str) -> dict[str, Any]:
    """Write a random model's files. Return their folder, and how long that took."""
    started = perf_counter()
    folder = work.write_model(name, dtype, device)
    return {"folder": str(folder), "seconds": perf_counter() - started}


def open_contestant(name: str, folder: str, device: str, dtype: str, four_bits: bool = False) -> dict[str, Any]:
    """Load a contestant, instead of the one before."""
    forget()
    started = perf_counter()
    start_peak(device)
    if name.startswith("mindprint"):
        # Before anything is loaded: our layers compute with Triton's kernels or with torch's operations.
        os.environ["MINDPRINT_TRITON"] = "0" if name == "mindprint, no kernels" else "1"
        LOADED["contestant"] = ours.open_model(Path(folder), device, dtype, quantize="nf4" if four_bits else None)
    else:
        LOADED["contestant"] = peers.open_peer(
            Path(folder), device, dtype, liger=name.endswith("liger"), four_bits=four_bits
        )
    wait_for(device)
    return {"seconds": perf_counter() - started, "gib": peak_gib(device)}


def cell_batches(cell: dict[str, Any]) -> list[list[work.Row]]:
    """Return the rows of each step of a cell: a stage at one length."""
    steps = cell["warm_up"] + cell["steps"]
    rows = work.rows_of_length(
        cell["length"], steps * cell["rows"], cell["stage"], work.SHAPES[cell["shape"]].vocabulary
    )
    return [rows[start : start + cell["rows"]] for start in range(0, len(rows), cell["rows"])]


def measure_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return seconds of a step, peak memory, tokens and useful operations of a stage at one length."""
    contestant = LOADED["contestant"]
    measure = ours.measure_cell if isinstance(contestant, ours.Opened) else peers.measure_cell
    result = measure(contestant, cell)
    batch = cell_batches({**cell, "steps": 1, "warm_up": 0})[0]
    preference = cell["stage"] == "dpo"
    result["tokens"] = sum(
        len(row.prompt) * (1 + preference) + len(row.chosen) + preference * len(row.rejected) for row in batch
    )
    result["flops"] = work.useful_flops(batch, work.SHAPES[cell["shape"]], preference=preference)
    return result


def compare_losses(folder: str, device: str, dtype: str, shape: str, steps: int, longest: int) -> dict[str, Any]:
    """Return the losses and gradient norms of the first steps, ours and TRL's, of SFT and DPO from one adapter."""
    from mindprint.adapter.peft_format import write_adapter

    opened = ours.open_model(Path(folder), device, dtype)
    rows = work.ragged_rows(4 * steps, longest, work.SHAPES[shape].vocabulary)
    batches = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as adapter:
        write_adapter(Path(adapter), opened.adapter, folder)
        for stage, rate in (("sft", 1e-3), ("dpo", 1e-4)):
            ours.start_again(opened)
            result[stage] = {"mindprint": ours.take_steps(opened, stage, batches, rate)}
        del opened
        free_memory()
        peer = peers.open_peer(Path(folder), device, dtype)
        for stage, rate in (("sft", 1e-3), ("dpo", 1e-4)):
            result[stage]["trl"] = peers.train(peer, stage, batches, rate, adapter=Path(adapter))
    return result


def compare_devices(folder: str, device: str, shape: str, steps: int) -> dict[str, Any]:
    """Return how far the device's float32 numbers are from the CPU's: losses, log-probs and greedy tokens."""
    both = [_numbers(folder, where, shape, steps) for where in ("cpu", device)]
    first, second = both
    result: dict[str, Any] = {
        stage: float(np.max(np.abs(first[stage] - second[stage]) / (1 + np.abs(first[stage]))))
        for stage in ("sft", "dpo")
    }
    difference = np.abs(first["log_probs"] - second["log_probs"])
    result |= {"log_probs_mean": float(difference.mean()), "log_probs_greatest": float(difference.max())}
    same = [bool(np.array_equal(*tokens)) for tokens in zip(first["tokens"], second["tokens"], strict=True)]
    result["same_generations"] = f"{sum(same)} of {len(same)}"
    return result


def _numbers(folder: str, device: str, shape: str, steps: int) -> dict[str, Any]:
    from mindprint.contract import Sampling
    from mindprint.data.collate import sft_batch

    opened = ours.open_model(Path(folder), device, "float32")
    rows = work.ragged_rows(4 * steps, 96, work.SHAPES[shape].vocabulary)
    batches = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    numbers: dict[str, Any] = {}
    for stage, rate in (("sft", 1e-3), ("dpo", 1e-4)):
        ours.start_again(opened)
        numbers[stage] = np.array(ours.take_steps(opened, stage, batches, rate)["losses"])
    batch = sft_batch([ours._single(row) for row in rows[:8]], work.PAD)
    numbers["log_probs"] = opened.backend.log_probs(opened.model, batch)[batch.loss_mask]
    prompts = [ours._ids(row.prompt) for row in rows[:8]]
    generations = opened.backend.generate(opened.model, prompts, Sampling(24, (work.EOS,)))
    numbers["tokens"] = [generation.tokens for generation in generations]
    return numbers


def compare_heads(device: str, dtype: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Return time, memory and errors of the ways to log-probs: TRL's fused head, ours, and float64 as the truth."""
    import torch
    from torch import nn

    from mindprint_torch import logprobs

    generator = torch.Generator(device).manual_seed(0)
    layer = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=getattr(torch, dtype)).requires_grad_(False)
    layer.weight.normal_(0, 0.05, generator=generator)
    states = torch.randn(tokens, hidden, device=device, dtype=layer.weight.dtype, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    outer = torch.randn(tokens, device=device, generator=generator)
    head: Any = _PlainHead(layer, vocabulary)
    ways: dict[str, Callable[[Any], Any]] = {
        "fused (TRL's kernels)": lambda x: logprobs.fused_log_probs(layer, x, targets),
        "frozen (ours)": lambda x: logprobs._FrozenHead.apply(x, targets, head),
    }
    some = slice(0, min(256, tokens))
    exact = states[some].double().requires_grad_()
    truth = torch.log_softmax(exact @ layer.weight.double().T, 1).gather(1, targets[some, None]).squeeze(1)
    (truth * outer[some]).sum().backward()
    result: dict[str, Any] = {}
    for name, way in ways.items():
        leaf = states.clone().requires_grad_()

        def once(way: Callable[[Any], Any] = way, leaf: Any = leaf) -> Any:
            leaf.grad = None
            values = way(leaf)
            (values * outer).sum().backward()
            return values

        start_peak(device)
        timed = spread(seconds_of(device, once, 5, 2))
        memory = peak_gib(device)
        values = once().detach()[some].double()
        gradient, expected = leaf.grad[some].double(), exact.grad
        result[name] = {
            **timed,
            "gib": memory,
            "value_error": float((values - truth.detach()).abs().max()),
            "gradient_error": float((gradient - expected).norm() / expected.norm()),
        }
    return result


class _PlainHead:
    """A head that is its output layer alone (`mindprint_torch.head.Head`)."""

    plain, trainable = True, False

    def __init__(self, layer: Any, vocabulary: int) -> None:
        self.layer, self.vocabulary = layer, vocabulary

    def __call__(self, hidden: Any) -> Any:
        return self.layer(hidden)


def generate(prompts: int, prompt_tokens: int, new_tokens: int, shape: str) -> dict[str, Any]:
    """Return the seconds of continuing prompts, ours and transformers' on the same network with PEFT's adapter."""
    import torch
    from transformers import GenerationConfig

    from mindprint.contract import Sampling

    contestant = LOADED["contestant"]
    rng = np.random.default_rng(3)
    tokens = rng.integers(work.FIRST_WORD, work.SHAPES[shape].vocabulary, (prompts, prompt_tokens)).astype(np.int32)
    made = 0
    if isinstance(contestant, ours.Opened):
        device = contestant.device

        def action() -> None:
            nonlocal made
            sampling = Sampling(new_tokens, (work.EOS,))
            generations = contestant.backend.generate(contestant.model, list(tokens), sampling)
            made = sum(len(each.tokens) for each in generations)
    else:
        device = contestant.device
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=work.EOS, pad_token_id=work.PAD
        )

        def action() -> None:
            nonlocal made
            with torch.no_grad():
                output = contestant.network.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
                )
            made = int((output[:, prompt_tokens:] != work.PAD).sum())

    start_peak(device)
    timed = spread(seconds_of(device, action, 2, 1))
    return {**timed, "tokens": made, "gib": peak_gib(device)}


def wrap_with_adapter() -> None:
    """Put PEFT's adapter around a peer's network, as someone who generates with transformers has it."""
    import peft

    peer = LOADED["contestant"]
    config = peft.LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, target_modules=list(work.TARGETS))
    peer.network = peft.get_peft_model(peer.network, config).eval()


CALLS: dict[str, Callable[..., Any]] = {
    call.__name__: call
    for call in (
        forget, about, peaks, write_model, open_contestant, measure_cell, compare_losses, compare_devices,
        compare_heads, generate, wrap_with_adapter, checks.compare_packed, checks.compare_experts, checks.compare_plan,
        checks.profile_steps, checks.compare_kernels,
    )
}  # fmt: skip
