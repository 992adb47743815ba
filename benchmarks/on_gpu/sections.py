"""The sections of `benchmarks/gpu.py`: each asks workers for figures, prints them, and survives their failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from on_gpu.workers import CallError, Worker, Workers

REPOSITORY = Path(__file__).parents[2]
LIGER = "trl+liger"
CONTESTANTS = ("mindprint", "trl", LIGER)
PLAIN = "mindprint, no kernels"
LEAST_SECONDS = 8.0
"""With less time left, nothing new is begun."""

KERNELS, OPERATIONS, NAME_CHARACTERS = 24, 40, 150
"""The lines of a profile that are printed. `gpu.json` has more."""


class OutOfTime(Exception):  # noqa: N818  (it is an end, not an error)
    """The time of the whole run is over."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the work: those of a GPU, or tiny ones that try the same code anywhere."""

    models: tuple[str, str]
    lengths: tuple[int, ...]
    step_tokens: int
    steps: int
    warm_up: int
    product: int
    copied_bytes: int
    head: tuple[int, int, int]
    small: str
    loss_steps: int
    loss_length: int
    prompts: tuple[int, ...]
    new_tokens: int


FULL = Sizes(
    models=("1b", "8b"), lengths=(2048, 8192, 512), step_tokens=8192, steps=4, warm_up=2, product=8192,
    copied_bytes=1 << 30, head=(4096, 2048, 128256), small="small", loss_steps=10, loss_length=512, prompts=(1, 64),
    new_tokens=64,
)  # fmt: skip
TINY = Sizes(
    models=("tiny", "tiny"), lengths=(64, 128, 32), step_tokens=128, steps=2, warm_up=1, product=512,
    copied_bytes=1 << 20, head=(64, 64, 512), small="tiny", loss_steps=3, loss_length=64, prompts=(1, 4), new_tokens=4,
)  # fmt: skip


@dataclass
class Run:
    """One run of the script: its device, time, workers and results."""

    out: Path
    workers: Workers
    sizes: Sizes
    seconds: float
    patience: float = 1.0
    device: str = "cpu"
    peak_flops: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=perf_counter)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (perf_counter() - self.started)

    def ask(self, worker: Worker, call: str, seconds: float, **arguments: Any) -> Any:
        """Return the result of a call, within the time that the run has.

        Raises:
            OutOfTime: If too little is left to begin.
            CallError: If the call fails.
        """
        if self.left < LEAST_SECONDS:
            raise OutOfTime
        return worker.ask(call, min(seconds * self.patience, self.left), **arguments)

    def keep(self, section: str, **figures: Any) -> None:
        """Keep figures, in the file at once: whatever happens later, they are there."""
        self.results.append({"section": section, "at": round(perf_counter() - self.started, 1), **figures})
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1))

    def fail(self, section: str, subject: str, error: CallError) -> None:
        """Keep and print a failure: its last line, and the frames that lead to it."""
        self.failures.append(f"{section}: {subject}: {error}")
        self.keep(section, subject=subject, error=str(error), frames=error.frames)
        say(f"  {subject:34s} FAILED: {error}")
        for frame in error.frames:
            say("      " + frame.rstrip().replace("\n", "\n      "))

    @contextmanager
    def surviving(self, section: str, subject: str) -> Iterator[None]:
        """Print a failure of the calls within this context, and continue after it."""
        try:
            yield
        except CallError as error:
            self.fail(section, subject, error)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def title(run: Run, text: str) -> None:
    """Print a section's title, with the time that has passed."""
    say(f"\n== {text} (after {perf_counter() - run.started:.0f} s)")


def measure_peak(run: Run) -> None:
    """Print the device, its versions, and the rates that everything else is compared with."""
    title(run, "device, matrix product, copy")
    with run.workers.use() as worker:
        facts = run.ask(worker, "about", 120)
        run.device = facts["device"]
        run.keep("device", **facts)
        say(f"  {facts['name']}, {facts.get('gib', 0):.1f} GiB, CUDA {facts.get('cuda')}")
        say("  " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version))
        rates = run.ask(
            worker, "peaks", 60, device=run.device, size=run.sizes.product, copied_bytes=run.sizes.copied_bytes
        )
    run.peak_flops = rates["flops"]
    run.keep("peak", size=run.sizes.product, **rates)
    say(f"  bfloat16 product of {run.sizes.product}^3: {rates['flops'] / 1e12:.1f} TFLOP/s")
    say(f"  copy within memory, read and written: {rates['copy_bytes'] / 1e12:.2f} TB/s")


def compare_heads(run: Run) -> None:
    """Print the ways from hidden states to log-probs, with gradients, next to float64."""
    title(run, "output layer: log-probs and their gradient, forward and backward")
    tokens, hidden, vocabulary = run.sizes.head
    with run.workers.use() as worker:
        for dtype in ("bfloat16", "float32"):
            with run.surviving("heads", dtype):
                ways = run.ask(
                    worker, "compare_heads", 60,
                    device=run.device, dtype=dtype, tokens=tokens, hidden=hidden, vocabulary=vocabulary,
                )  # fmt: skip
                for way, figures in ways.items():
                    run.keep("heads", dtype=dtype, way=way, **figures)
                    say(
                        f"  {dtype:9s} {way:24s} {1e3 * figures['seconds']:8.2f} ms  {figures['gib']:6.2f} GiB"
                        f"  value error {figures['value_error']:.1e}  gradient error {figures['gradient_error']:.1e}"
                    )


def measure_speed(run: Run, which: int) -> None:
    """Print SFT and DPO steps of one model at each length: ours, then each peer, all loaded at once."""
    model, checkpointing = run.sizes.models[which], which == 1
    title(run, f"speed, {model}, bfloat16, gradient checkpointing {'on' if checkpointing else 'off'} for all")
    folder = prepare_model(run, model, "bfloat16")
    names = CONTESTANTS if run.device == "cuda" else CONTESTANTS[:2]
    run.workers.prepare(len(names))
    with opened(run, f"speed {model}", names, folder) as workers:
        say_columns()
        for length in run.sizes.lengths:
            for stage in ("sft", "dpo"):
                base = cell(run, model, stage, length, checkpointing=checkpointing)
                if which == 1:
                    # Steps of the larger model are long, and vary less.
                    base |= {"steps": min(base["steps"], 3), "warm_up": 1}
                first = length == run.sizes.lengths[0]
                # TRL hashes all weights before it precomputes a reference. With the larger model that outran a minute.
                for name, variant in variants(stage, apart=which == 0 or first, precomputed=which == 0 and first):
                    if name in workers:
                        measure_cell(run, f"speed {model}", workers[name], name, {**base, **variant})


def variants(stage: str, *, apart: bool, precomputed: bool) -> list[tuple[str, dict[str, bool]]]:
    """Return the contestants of a cell in turn, each with its special settings."""
    turns: list[tuple[str, dict[str, bool]]] = [(name, {}) for name in CONTESTANTS]
    if stage == "dpo" and apart:
        turns.insert(1, ("mindprint", {"share_prompts": False}))
    if stage == "dpo" and precomputed:
        turns.append(("trl", {"precompute": True}))
    return turns


def cell(run: Run, shape: str, stage: str, length: int, *, checkpointing: bool) -> dict[str, Any]:
    """Return what `calls.measure_cell` needs to know."""
    sequences = 2 if stage == "dpo" else 1
    return {
        "shape": shape,
        "stage": stage,
        "length": length,
        "rows": max(run.sizes.step_tokens // (length * sequences), 1),
        "steps": run.sizes.steps,
        "warm_up": run.sizes.warm_up,
        "checkpointing": checkpointing,
    }


def say_columns() -> None:
    """Print the columns of `measure_cell`."""
    say(
        f"  {'':34s} {'stage':5s} {'length':>6s} {'ms a step':>10s} {'(least-most)':>17s} {'tokens/s':>10s}"
        f" {'of product':>10s} {'GiB':>6s} {'loss':>8s}"
    )


def measure_cell(run: Run, section: str, worker: Worker, name: str, chosen: dict[str, Any]) -> None:
    """Print a contestant's line."""
    marks = {"share_prompts": ", prompts apart", "precompute": ", reference precomputed"}
    subject = name + "".join(text for key, text in marks.items() if key in chosen)
    with run.surviving(section, f"{subject} {chosen['stage']} {chosen['length']}"):
        figures = run.ask(worker, "measure_cell", 60, cell=chosen)
        share = figures["flops"] / figures["seconds"] / run.peak_flops
        rate = figures["tokens"] / figures["seconds"]
        run.keep(section, contestant=subject, **chosen, **figures, tokens_a_second=rate, share_of_product=share)
        line = (
            f"  {subject:34s} {chosen['stage']:5s} {chosen['length']:6d} {1e3 * figures['seconds']:10.1f}"
            f" ({1e3 * figures['least']:7.1f}-{1e3 * figures['greatest']:7.1f}) {rate:10.0f} {100 * share:9.1f}%"
            f" {figures['gib']:6.1f} {figures['loss']:8.4f}"
        )
        if "reference_seconds" in figures:
            line += f"  reference pass, once a run: {1e3 * figures['reference_seconds']:.1f} ms"
        say(line)


def prepare_model(run: Run, model: str, dtype: str) -> str:
    """Write a model's files in a process that then ends, and return their folder."""
    with run.workers.use() as worker:
        written = run.ask(worker, "write_model", 120, name=model, dtype=dtype, device=run.device)
    if written["seconds"] > 1:
        say(f"  (model {model} in {dtype} written to {written['folder']} in {written['seconds']:.0f} s)")
    return str(written["folder"])


@contextmanager
def opened(
    run: Run, section: str, names: Sequence[str], folder: str, four_bits: bool = False
) -> Iterator[dict[str, Worker]]:
    """Load contestants at the same time, each in another process. Those that fail are left out."""
    workers = {name: run.workers.take() for name in names}
    for name in workers.keys() & {LIGER, PLAIN}:
        # Liger replaces functions of transformers' modules, and the other has our kernels turned off: nobody else may
        # compute in that process.
        workers[name].reusable = False

    def load(name: str) -> Any:
        return run.ask(
            workers[name], "open_contestant", 120,
            name=name, folder=folder, device=run.device, dtype="bfloat16", four_bits=four_bits,
        )  # fmt: skip

    try:
        with ThreadPoolExecutor(len(names)) as loaders:
            loads = {name: loaders.submit(load, name) for name in names}
        ready = {}
        for name, loading in loads.items():
            with run.surviving(section, f"loading {name}"):
                figures = loading.result()
                ready[name] = workers[name]
                run.keep(section, loaded=name, **figures)
                say(f"  {name} loaded in {figures['seconds']:.1f} s, {figures['gib']:.1f} GiB")
        yield ready
    finally:
        for worker in workers.values():
            run.workers.put_back(worker)


def compare_losses(run: Run) -> None:
    """Print the first losses of SFT and DPO next to TRL's, from one adapter, in bfloat16 and float32."""
    shape = run.sizes.models[0]
    title(run, f"the first {run.sizes.loss_steps} losses, {shape}, next to TRL's")
    for dtype in ("float32", "bfloat16"):
        with run.surviving("losses", dtype):
            folder = prepare_model(run, shape, dtype)
            with run.workers.use() as worker:
                stages = run.ask(
                    worker, "compare_losses", 90, folder=folder, device=run.device, dtype=dtype, shape=shape,
                    steps=run.sizes.loss_steps, longest=run.sizes.loss_length,
                )  # fmt: skip
            for stage, both in stages.items():
                losses, expected = both["mindprint"]["losses"], both["trl"]["losses"]
                greatest = max(abs(a - b) / (1 + abs(b)) for a, b in zip(losses, expected, strict=True))
                run.keep("losses", dtype=dtype, stage=stage, deviation=greatest, mindprint=losses, trl=expected)
                say(f"  {stage} {dtype}: greatest deviation/(1 + loss) {greatest:.1e}")
                say("    mindprint " + " ".join(f"{loss:9.6f}" for loss in losses))
                say("    trl       " + " ".join(f"{loss:9.6f}" for loss in expected))


def compare_devices(run: Run) -> None:
    """Print how far the device's numbers are from the CPU's, in float32."""
    shape = run.sizes.small
    title(run, f"{run.device} next to cpu, {shape}, float32, {run.sizes.loss_steps} steps")
    with run.surviving("parity", shape):
        folder = prepare_model(run, shape, "float32")
        with run.workers.use() as worker:
            figures = run.ask(
                worker, "compare_devices", 90,
                folder=folder, device=run.device, shape=shape, steps=run.sizes.loss_steps,
            )  # fmt: skip
        run.keep("parity", **figures)
        say(f"  losses, deviation/(1 + loss): SFT {figures['sft']:.1e}, DPO {figures['dpo']:.1e}")
        say(f"  log-probs: {figures['log_probs_mean']:.1e} mean, {figures['log_probs_greatest']:.1e} greatest")
        say(f"  the same greedy generations: {figures['same_generations']}")


def compare_checkpointing(run: Run) -> None:
    """Print the larger model at the greatest length, each layer recomputed in the backward pass and not."""
    model, length = run.sizes.models[1], max(run.sizes.lengths)
    title(run, f"gradient checkpointing, {model} at {length} tokens")
    folder = prepare_model(run, model, "bfloat16")
    # One process at a time: without checkpointing, the activations may need all memory.
    for name in CONTESTANTS[:2]:
        with opened(run, "checkpointing", [name], folder) as workers:
            for checkpointing in (True, False):
                say(f"  checkpointing {'on' if checkpointing else 'off'}:")
                for stage in ("sft",):
                    chosen = cell(run, model, stage, length, checkpointing=checkpointing)
                    for worker in workers.values():
                        measure_cell(run, "checkpointing", worker, name, {**chosen, "steps": 2, "warm_up": 1})


def measure_generation(run: Run) -> None:
    """Print the speed of continuing prompts, next to transformers and PEFT."""
    shape = run.sizes.models[0]
    title(run, f"generation, {shape}, bfloat16, {run.sizes.new_tokens} new tokens a prompt")
    folder = prepare_model(run, shape, "bfloat16")
    with opened(run, "generation", CONTESTANTS[:2], folder) as workers:
        for name, worker in workers.items():
            label = "mindprint" if name == "mindprint" else "transformers + PEFT"
            with run.surviving("generation", label):
                if name != "mindprint":
                    run.ask(worker, "wrap_with_adapter", 30)
                for prompts in run.sizes.prompts:
                    figures = run.ask(
                        worker, "generate", 60,
                        prompts=prompts, prompt_tokens=128, new_tokens=run.sizes.new_tokens, shape=shape,
                    )  # fmt: skip
                    rate = figures["tokens"] / figures["seconds"]
                    run.keep("generation", contestant=label, prompts=prompts, tokens_a_second=rate, **figures)
                    say(f"  {label:24s} {prompts:4d} prompts {rate:10.1f} tokens/s {figures['gib']:6.1f} GiB")


def compare_nf4(run: Run) -> None:
    """Print SFT on a base in NF4, ours and TRL's with bitsandbytes. Whoever refuses it is printed as refusing."""
    shape, length = run.sizes.models[0], run.sizes.lengths[0]
    title(run, f"NF4 by bitsandbytes, {shape} at {length} tokens")
    folder = prepare_model(run, shape, "bfloat16")
    with opened(run, "nf4", CONTESTANTS[:2], folder, four_bits=True) as workers:
        say_columns()
        for name, worker in workers.items():
            measure_cell(run, "nf4", worker, name, cell(run, shape, "sft", length, checkpointing=False))


def compare_kernels(run: Run) -> None:
    """Print our Triton kernels next to torch's operations, and steps with and without them in turns."""
    tokens, hidden, _ = run.sizes.head
    title(run, "Triton's kernels next to torch's operations")
    if run.device == "cuda":
        with run.surviving("kernels", "one by one"), run.workers.use() as worker:
            for figures in run.ask(
                worker, "compare_kernels", 60,
                device=run.device, tokens=2 * tokens, hidden=hidden, inner=4 * hidden, heads=hidden // 64,
            ):  # fmt: skip
                run.keep("kernels", **figures)
                say(
                    f"  {figures['dtype']:9s} {figures['kernel']:28s} {1e6 * figures['seconds']:8.1f} us"
                    f" instead of {1e6 * figures['plain_seconds']:8.1f}, apart {figures['error']:.1e}"
                )
    for which, model in enumerate(run.sizes.models):
        folder = prepare_model(run, model, "bfloat16")
        run.workers.prepare(2)
        with opened(run, f"kernels {model}", ("mindprint", PLAIN), folder) as workers:
            say_columns()
            for stage in ("sft", "dpo"):
                chosen = cell(run, model, stage, run.sizes.lengths[0], checkpointing=which == 1)
                for name, worker in [*workers.items()] * 2:
                    measure_cell(run, f"kernels {model}", worker, name, chosen)


def compare_packed(run: Run) -> None:
    """Print a base in packed 4 bits next to the same numbers in bfloat16: losses, a step's time, memory."""
    shape, length = run.sizes.models[0], run.sizes.lengths[0]
    title(run, f"packed affine 4 bits, {shape}, next to the same numbers in bfloat16")
    with run.surviving("packed", shape), run.workers.use() as worker:
        figures = run.ask(
            worker, "compare_packed", 90, shape=shape, device=run.device, dtype="bfloat16", steps=run.sizes.loss_steps,
            cell=cell(run, shape, "sft", length, checkpointing=False),
        )  # fmt: skip
        run.keep("packed", **figures)
        packed, dense = figures["packed"], figures["dense"]
        apart = max(abs(a - b) / (1 + abs(b)) for a, b in zip(packed["losses"], dense["losses"], strict=True))
        say(f"  {run.sizes.loss_steps} SFT losses: greatest deviation/(1 + loss) {apart:.1e}")
        say(
            f"  step {1e3 * packed['seconds']:.1f} ms next to {1e3 * dense['seconds']:.1f}"
            f" ({packed['seconds'] / dense['seconds']:.2f} x), base in memory {packed['base_gib']:.2f} GiB next to"
            f" {dense['base_gib']:.2f} ({packed['base_gib'] / dense['base_gib']:.2f} x),"
            f" peak {packed['gib']:.1f} and {dense['gib']:.1f} GiB"
        )


def compare_experts(run: Run) -> None:
    """Print how far LoRA on stacks of experts is from the CPU's, in float32."""
    title(run, f"stacks of experts, {run.device} next to cpu, float32, {run.sizes.loss_steps} steps")
    with run.surviving("experts", "a tiny Mixtral"), run.workers.use() as worker:
        figures = run.ask(worker, "compare_experts", 60, device=run.device, steps=run.sizes.loss_steps)
        run.keep("experts", **figures)
        say(f"  losses, deviation/(1 + loss): SFT {figures['sft']:.1e}, DPO {figures['dpo']:.1e}")


def compare_plan(run: Run) -> None:
    """Print the memory that `mindprint plan` would state next to the measured peak of steps."""
    shape = run.sizes.models[0]
    title(run, f"the plan's memory, {shape}, bfloat16")
    folder = prepare_model(run, shape, "bfloat16")
    length, longest = run.sizes.lengths[0], max(run.sizes.lengths)
    chosen = [("sft", length, False), ("sft", length, True), ("dpo", length, False), ("sft", longest, False)]
    cells = [
        {**cell(run, shape, stage, tokens, checkpointing=checkpointing), "steps": 1, "warm_up": 1}
        for stage, tokens, checkpointing in chosen
    ]
    with run.surviving("plan", shape), run.workers.use() as worker:
        results = run.ask(worker, "compare_plan", 60, folder=folder, device=run.device, dtype="bfloat16", cells=cells)
        for chosen_cell, figures in zip(cells, results, strict=True):
            run.keep("plan", **chosen_cell, **figures)
            parts = ", ".join(f"{part} {gib:.2f}" for part, gib in figures["parts"].items())
            reserved = "" if figures["reserved"] is None else f", reserved {figures['reserved']:.2f}"
            say(
                f"  {chosen_cell['stage']} {chosen_cell['length']:5d}"
                f" {'recomputed' if chosen_cell['checkpointing'] else 'kept':10s} stated {figures['stated']:6.2f} GiB,"
                f" measured {figures['peak']:6.2f}{reserved}: {figures['stated'] / figures['peak'] - 1:+.1%}  ({parts})"
            )


def profile_steps(run: Run) -> None:
    """Print where the device's time of a step goes."""
    shape, length = run.sizes.models[0], run.sizes.lengths[0]
    title(run, f"profile of a step, {shape} at {length} tokens, bfloat16")
    folder = prepare_model(run, shape, "bfloat16")
    cells = [cell(run, shape, stage, length, checkpointing=False) for stage in ("sft", "dpo")]
    with run.surviving("profile", shape), run.workers.use() as worker:
        results = run.ask(worker, "profile_steps", 60, folder=folder, device=run.device, dtype="bfloat16", cells=cells)
        for stage, figures in zip(("sft", "dpo"), results, strict=True):
            run.keep("profile", stage=stage, **figures)
            total = figures["device_seconds"]
            kinds = sorted(figures["kinds"].items(), key=lambda pair: -pair[1])
            say(
                f"  {stage}: a step {1e3 * figures['step_seconds']:.1f} ms, on the device {1e3 * total:.1f} ms in"
                f" {figures['launches']} launches: "
                + ", ".join(f"{kind} {100 * seconds / total:.0f} %" for kind, seconds in kinds)
            )
            for name, seconds, count in [*figures["kernels"][:KERNELS], *figures["operations"][:OPERATIONS]]:
                say(f"    {1e3 * seconds:8.2f} ms {count:5d} x {name[:NAME_CHARACTERS]}")


def run_conformance(run: Run) -> None:
    """Run the suite that every backend must pass, on this device."""
    if run.left < LEAST_SECONDS:
        raise OutOfTime
    title(run, f"the conformance suite on {run.device}")
    tests = REPOSITORY / "packages" / "mindprint-torch" / "tests" / "test_conformance.py"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short"]
    if run.sizes.models == TINY.models and run.device == "cpu":
        command += ["-k", "devices_are_stated"]
    environment = {**os.environ, "MINDPRINT_TEST_DEVICE": run.device}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
            timeout=max(min(100.0 * run.patience, run.left), 1.0),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        run.fail("conformance", "pytest", CallError("took too long: stopped", printed.splitlines()[-6:]))
        return
    lines = done.stdout.splitlines()
    (run.out / "conformance.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        run.fail(
            "conformance", "pytest", CallError(f"status {done.returncode}", (lines or done.stderr.splitlines())[-30:])
        )
    else:
        run.keep("conformance", printed=lines[-1])
        say("  " + lines[-1])


SECTIONS: dict[str, Callable[[Run], None]] = {
    "heads": compare_heads,
    "speed-1b": lambda run: measure_speed(run, 0),
    "losses": compare_losses,
    "speed-8b": lambda run: measure_speed(run, 1),
    "parity": compare_devices,
    "generation": measure_generation,
    "kernels": compare_kernels,
    "profile": profile_steps,
    "plan": compare_plan,
    "packed": compare_packed,
    "experts": compare_experts,
    "checkpointing": compare_checkpointing,
    "nf4": compare_nf4,
    "conformance": run_conformance,
}
"""The sections after the first (`measure_peak`, which always runs), in order of value."""
