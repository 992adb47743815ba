"""The time that a step on PyTorch on a CPU takes without one of its savings, in turns within one process.

    OMP_NUM_THREADS=1 python benchmarks/step_savings.py --stage sft

Each round takes one step with all savings, one without each of them, and one without any. Ratios are of processor time
within a round, so that what else the machine does hits all alike. All rows have the same lengths.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

from mindprint_torch import gated, logprobs, lora
from side_by_side import contestants, work

ALL, NONE = "all savings", "without any"


def main() -> None:
    """Print the median step with all savings, and how much longer it is without one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--shape", choices=("147+73", "32+200"), default="147+73")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work.write_model(Path(folder))
        backend, model = contestants.loaded("torch", Path(folder), options.dtype)
    switches = savings(model.handle.network)
    step = next(contestants.steps_of(backend, model, options.stage, options.shape))
    seconds: dict[str, list[float]] = {name: [] for name in (ALL, *switches, NONE)}
    for _ in range(1 + options.rounds):
        for name, times in seconds.items():
            for switch, turn in switches.items():
                turn(name not in (switch, NONE))
            started = process_time()
            step()
            times.append(process_time() - started)
    print(
        f"{options.stage}, {options.shape}, {options.dtype}: {statistics.median(seconds[ALL][1:]):.3f} s of processor"
    )
    for name in (*switches, NONE):
        # The first round warms up.
        ratios = [without / both for without, both in zip(seconds[name][1:], seconds[ALL][1:], strict=True)]
        print(f"  {name:28s} {statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f})")


def savings(network: Any) -> dict[str, Callable[[bool], None]]:
    """Return the switch of each saving, by the name of a step without it."""
    fused = {module: forward for module in network.modules() if (forward := _fused_norm(module)) is not None}
    narrow, asking = lora.narrow_product, logprobs.asking

    def norms(on: bool) -> None:
        for module, forward in fused.items():
            module.forward = forward if on else partial(type(module).forward, module)

    def products(on: bool) -> None:
        for module in (lora, gated):
            module.narrow_product = narrow if on else (lambda rows, factor: rows @ factor.T)

    def places(on: bool) -> None:
        logprobs.asking = asking if on else (lambda _: nullcontext())

    return {"last layer everywhere": places, "low-rank products as columns": products, "norms of transformers": norms}


def _fused_norm(module: Any) -> Any:
    return vars(module).get("forward") if type(module).__name__.endswith("RMSNorm") else None


if __name__ == "__main__":
    main()
