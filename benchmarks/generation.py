"""Greedy generation next to transformers and mlx-lm: tokens per second for 1 and 16 prompts.

    python benchmarks/generation.py MODEL [--backend torch] [--prompts 1 16] [--tokens 64] [--turns 3]
    python benchmarks/generation.py MODEL --backend mlx --device metal --dtype bfloat16

MODEL is the folder of a base model, such as SmolLM2-135M-Instruct. Prompts are random ids. Each backend is measured in
its own process, in turns with its peer: `transformers.generate`, and mlx-lm's `generate_step` for one prompt and
`batch_generate` for several. Ours generates as the base model and with an adapter of rank 16 on all linear layers. The
figures are those of the best turn, by wall time and by processor time. The exit code says whether the base model alone
is at least 1.1 times as fast as the peer by wall time, for each count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from each_backend import each_backend
from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.contract import Int32, LoraConfig, ModelSpec, Sampling
from mindprint.plugins.backend import load_backend

AT_LEAST = 1.1
PEERS = {"torch": "transformers", "mlx": "mlx-lm"}
BASE, ADAPTED = "mindprint", "mindprint, with an adapter"

Run = Callable[[list[Int32]], int]
"""Generates for prompts, and returns the number of new tokens."""


def main() -> int:
    """Print the tokens per second of every contestant. Exit with 1 if a peer is nearer than 1.1."""
    options = arguments()
    if options.measure:
        print(json.dumps(measured(options)))
        return 0
    holds = []
    for backend, found in each_backend(options.backend or PEERS):
        for count, rates in found.items():
            print(f"{backend}, {count} prompts of {options.length} tokens, {options.tokens} new tokens each")
            for name, (wall, processor) in rates.items():
                print(f"  {name:28s}{wall:8.1f} tokens/s{processor:8.1f} for each second of processor")
            ratio = rates[BASE][0] / rates[PEERS[backend]][0]
            holds.append(ratio >= AT_LEAST)
            print(
                f"  {'ok' if holds[-1] else 'MISSED'}: {ratio:.2f} x {PEERS[backend]}, at least {AT_LEAST}", flush=True
            )
    return 0 if all(holds) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a base model")
    parser.add_argument("--backend", action="append", choices=PEERS, help="may be given again; default: both")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, metal (MLX on a Mac), mps or cuda (PyTorch)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--measure", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace) -> dict[str, dict[str, tuple[float, float]]]:
    """Return tokens per second of wall and of processor time, by number of prompts and by contestant."""
    # Ours first: it decides what MLX multiplies matrices with.
    runs = {**ours(options), PEERS[options.measure]: PEER[options.measure](options)}
    rng = np.random.default_rng(0)
    result = {}
    for count in options.prompts:
        prompts = [rng.integers(100, 10_000, options.length).astype(np.int32) for _ in range(count)]
        best = dict.fromkeys(runs, (0.0, 0.0))
        for turn in range(options.turns + 1):
            for name, run in runs.items():
                wall, processor = time.perf_counter(), time.process_time()
                made = run(prompts)
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                if made != count * options.tokens:
                    raise SystemExit(f"{name} made {made} tokens, and not {count * options.tokens}")
                if turn:  # the first turn warms up
                    best[name] = max(best[name][0], made / wall), max(best[name][1], made / processor)
        result[str(count)] = best
    return result


def ours(options: argparse.Namespace) -> dict[str, Run]:
    """Return a run of the base model and one with an adapter."""
    backend = load_backend(options.measure)
    model = backend.load_model(ModelSpec(options.model, options.device, options.dtype))
    sites = backend.adapter_sites(model)
    backend.inject_adapter(
        model, initial_adapter(sites, LoraConfig(16, 32.0, resolve_targets(sites, "all-linear")), seed=0)
    )
    sampling = Sampling(options.tokens, ())

    def runs(*, adapter: bool) -> Run:
        return lambda prompts: sum(
            len(answer.tokens) for answer in backend.generate(model, prompts, sampling, adapter=adapter)
        )

    return {BASE: runs(adapter=False), ADAPTED: runs(adapter=True)}


def with_transformers(options: argparse.Namespace) -> Run:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.to(options.device)
    config = GenerationConfig(max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)

    def run(prompts: list[Int32]) -> int:
        tokens = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(options.device)
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
        return int(out[:, tokens.shape[1] :].numel())

    return run


def with_mlx_lm(options: argparse.Namespace) -> Run:
    import mlx.core as mx  # noqa: PLC0415
    from mlx_lm import batch_generate, load  # noqa: PLC0415
    from mlx_lm.generate import generate_step  # noqa: PLC0415

    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    model, tokenizer = load(options.model)
    model.set_dtype(getattr(mx, options.dtype))
    # Every token is to be made, as ours is asked to.
    tokenizer._eos_token_ids = set()

    def run(prompts: list[Int32]) -> int:
        if len(prompts) == 1:
            return sum(1 for _ in generate_step(mx.array(prompts[0]), model, max_tokens=options.tokens))
        done = batch_generate(model, tokenizer, [prompt.tolist() for prompt in prompts], max_tokens=options.tokens)
        return done.stats.generation_tokens

    return run


PEER = {"torch": with_transformers, "mlx": with_mlx_lm}

if __name__ == "__main__":
    sys.exit(main())
