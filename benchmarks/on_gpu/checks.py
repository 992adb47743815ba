"""Calls about one contestant, ours: packed bases, experts, the plan's memory, and where a step's time goes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from on_gpu import ours, work
from on_gpu.clock import seconds_of, spread, wait_for
from on_gpu.packed_base import write_twins

# ruff: noqa: PLC0415  the process that orders the measurements imports no framework

KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "::mm", "addmm", "::bmm", "splitk"),
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn"),
    "copies": ("memcpy", "memset", "copy"),
    "reductions": ("reduce", "softmax", "::mean", "::sum"),
    "elementwise": ("elementwise", "vectorized", "::mul", "::add", "silu", "cat", "index", "gather", "scatter"),
}
"""Kinds of kernels, by parts of their names. The first that fits counts."""


def compare_packed(shape: str, device: str, dtype: str, steps: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Return losses, seconds of a step and memory on a base in packed 4 bits, and on the same numbers in `dtype`."""
    result: dict[str, Any] = {}
    for name, folder in zip(("packed", "dense"), write_twins(shape, dtype, device), strict=True):
        opened = ours.open_model(folder, device, dtype)
        losses = ours.take_steps(opened, "sft", _ragged_batches(steps, 256, work.SHAPES[shape].vocabulary), 1e-3)
        ours.start_again(opened)
        result[name] = {"losses": losses["losses"], "base_gib": opened.base_gib, **ours.measure_cell(opened, cell)}
        ours.close(opened)
    return result


def compare_experts(device: str, steps: int) -> dict[str, Any]:
    """Return how far LoRA on stacks of experts is from the CPU's: the greatest deviation of losses over 1 + loss."""
    from mindprint_testing.tiny import VOCABULARY, write_tiny_mixture

    losses = []
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_mixture(Path(folder))
        for where in ("cpu", device):
            opened = ours.open_model(Path(folder), where, "float32", target_parameters=["experts"])
            stacks = sum(name.endswith("gate_up_proj") for name in opened.adapter.tensors)
            both = {}
            for stage, rate in (("sft", 1e-2), ("dpo", 1e-3)):
                ours.start_again(opened)
                both[stage] = np.array(
                    ours.take_steps(opened, stage, _ragged_batches(steps, 48, VOCABULARY), rate)["losses"]
                )
            losses.append(both)
            ours.close(opened)
    first, second = losses
    return {"stacks": stacks} | {
        stage: float(np.max(np.abs(first[stage] - second[stage]) / (1 + np.abs(first[stage])))) for stage in first
    }


def compare_plan(folder: str, device: str, dtype: Any, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the memory that a plan states for steps of each cell, and their measured peak, in GiB."""
    import torch

    opened = ours.open_model(Path(folder), device, dtype)
    results = []
    for cell in cells:
        need = ours.stated_memory(opened, Path(folder), dtype, cell)
        ours.start_again(opened)
        figures = ours.measure_cell(opened, cell)
        reserved = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else None
        parts = {part: size / 2**30 for part, size in need.items()}
        results.append({"stated": sum(parts.values()), "parts": parts, "peak": figures["gib"], "reserved": reserved})
    ours.close(opened)
    return results


def profile_steps(folder: str, device: str, dtype: Any, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return where the device's time of one step goes: by kind, by kernel, and by operation and shapes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from on_gpu.calls import cell_batches

    opened = ours.open_model(Path(folder), device, dtype)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    results = []
    for cell in cells:
        batches, chosen = cell_batches({**cell, "warm_up": 2, "steps": 1}), {"checkpointing": cell["checkpointing"]}
        taken = ours.take_steps(opened, cell["stage"], batches[:2], 1e-4, **chosen)
        # The profile of a step on pairs has the pass for their reference in it.
        with profile(activities=activities, record_shapes=True) as seen:
            ours.take_steps(opened, cell["stage"], batches[2:], 1e-4, **chosen)
            wait_for(device)
        on_device = device == "cuda"
        events = seen.key_averages()
        kernels = [event for event in events if (event.device_type == torch.autograd.DeviceType.CUDA) is on_device]
        rows = [(event.key, _own_time(event, on_device), event.count) for event in kernels]
        operations = [
            (f"{event.key} {_short(event.input_shapes)}", _own_time(event, on_device), event.count)
            for event in seen.key_averages(group_by_input_shape=True)
            if event.device_type == torch.autograd.DeviceType.CPU
        ]
        kinds: dict[str, float] = {}
        for name, seconds, _ in rows:
            kinds[_kind(name)] = kinds.get(_kind(name), 0.0) + seconds
        results.append({
            "step_seconds": taken["step_seconds"][-1],
            "device_seconds": sum(seconds for _, seconds, _ in rows),
            "launches": sum(count for _, _, count in rows),
            "kinds": kinds,
            "kernels": sorted(rows, key=lambda row: -row[1])[:40],
            "operations": sorted(operations, key=lambda row: -row[1])[:60],
        })  # fmt: skip
    ours.close(opened)
    return results


def compare_kernels(device: str, tokens: int, hidden: int, inner: int, heads: int) -> list[dict[str, Any]]:
    """Return each Triton kernel's seconds and those of torch's operations, and how far their numbers are apart."""
    import torch

    from mindprint_torch.elementwise import SWITCH

    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, action in _kernel_cases(torch.device(device), dtype, tokens, hidden, inner, heads):
            both: dict[str, Any] = {}
            for switch in ("0", "1"):
                os.environ[SWITCH] = switch
                both[switch] = action(), spread(seconds_of(device, action, 10, 3))["seconds"]
            (expected, plain_seconds), (computed, seconds) = both["0"], both["1"]
            pairs = [(first.double(), second.double()) for first, second in zip(computed, expected, strict=True)]
            error = max(float((first - second).norm() / second.norm()) for first, second in pairs)
            results.append({
                "kernel": name, "dtype": str(dtype).removeprefix("torch."), "seconds": seconds,
                "plain_seconds": plain_seconds, "error": error,
            })  # fmt: skip
    return results


def _kernel_cases(
    device: Any, dtype: Any, tokens: int, hidden: int, inner: int, heads: int
) -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
    """Yield what the kernels compute, as functions that use them or torch, as the switch says."""
    import torch

    from mindprint_torch import elementwise, gated, packed

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    x, outer, weight = draw(tokens, hidden), draw(tokens, hidden), draw(hidden)
    for name, variant in (("Llama", (False, True)), ("Gemma", (True, False))):
        kind = dict(zip(("plus_one", "rounds_first"), variant, strict=True))
        _, inverse = elementwise.normalise(x, weight, 1e-6, **kind)
        yield f"norm, {name}'s", lambda kind=kind: elementwise.normalise(x, weight, 1e-6, **kind)
        yield (
            f"norm, {name}'s, backward",
            lambda kind=kind, inverse=inverse: (elementwise.normalise_back(outer, x, weight, inverse, **kind),),
        )
    gate, up, by_inner, low = draw(tokens, inner), draw(tokens, inner), draw(tokens, inner), draw(tokens, work.RANK)
    yield "SwiGLU", lambda: (gated._inner_product(gate, up),)
    yield "SwiGLU, backward", lambda: gated._inner_gradients(gate, up, by_inner.clone(), low)[:2]
    size = hidden // heads
    states = draw(1, tokens, heads, size).transpose(1, 2)
    cosine, sine = draw(1, tokens, size), draw(1, tokens, size)
    for back in (False, True):
        name = "rotation" + ", backward" * back
        yield name, lambda back=back: (elementwise.rotate(states, cosine, sine, back=back),)
    words = torch.randint(-(1 << 31), 1 << 31, (inner, hidden // 8), dtype=torch.int32, device=device)
    parts = {"weight": words, "scales": draw(inner, hidden // 64), "biases": draw(inner, hidden // 64)}
    affine = packed.AffineWeight((inner, hidden), dtype, parts, 4)
    yield "affine 4 bits to numbers", lambda: (affine.rows(0, inner),)
    if device.type == "cuda":
        from mindprint_torch.quantizing import _nf4

        blocks = _nf4((inner, hidden), dtype, torch.randn((inner, hidden), device=device, generator=generator))
        yield "NF4 to numbers", lambda: (blocks.rows(0, inner),)


def _own_time(event: Any, on_device: bool) -> float:
    return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def _short(shapes: Any) -> str:
    return " ".join("x".join(map(str, shape)) for shape in shapes if shape)


def _ragged_batches(steps: int, longest: int, vocabulary: int) -> list[list[work.Row]]:
    rows = work.ragged_rows(4 * steps, longest, vocabulary)
    return [rows[start : start + 4] for start in range(0, len(rows), 4)]
