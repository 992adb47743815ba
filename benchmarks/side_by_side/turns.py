"""Processes that take turns at steps, so that whatever else the machine does hits all alike.

A turn is three steps, and the last counts: while a process waits, caches and mapped weights go cold, which a training
loop never sees. A process ends its turn when it is ready for the next, so that work in between, such as fetching a
batch, is in nobody's time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import IO, Any

from side_by_side import contestants, work
from side_by_side.work import DEVICE, DTYPE, MLX_DEVICES

HERE = Path(__file__).parents[1]
STEPS_A_TURN = 3
WARM_UP = 1
"""Turns that do not count."""


@dataclass
class Contestant:
    """A process that waits for its turn, with its answers: seconds and processor seconds of each turn's last step."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    loaded_mib: float = 0.0
    blas: str = ""

    def take_turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        report = self.answer()
        self.seconds.append(report["seconds"])
        self.processor.append(report["processor"])
        self.peak_mib, self.loaded_mib, self.blas = report["peak_mib"], report["loaded_mib"], report["blas"]

    def answer(self) -> dict[str, Any]:
        """Read its next answer: that it is loaded, or the time of its step."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended before its step was done; MINDPRINT_BENCH_LOG=1 shows why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(title: str, ours: str, *peers: str) -> None:
    """Time contestants in turn, for every shape of the work, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=title)
    most = work.STEPS // STEPS_A_TURN - WARM_UP
    parser.add_argument("--turns", type=int, default=5, choices=range(1, most + 1), metavar=f"1..{most}")
    parser.add_argument("--shapes", nargs="+", default=list(work.SHAPES), choices=list(work.SHAPES))
    parser.add_argument("--alone", action="store_true", help="all turns of one process, then all of the next")
    if "mlx" in ours:
        parser.add_argument("--device", default="cpu", choices=("cpu", "metal"), help="metal: the GPU of a Mac")
        parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    # Contestants are separate processes, which inherit this.
    os.environ |= {DEVICE: vars(options).get("device", "cpu"), DTYPE: vars(options).get("dtype", "float32")}
    # Alone, a group has one process: nothing waits while it runs.
    groups = [[name] for name in (ours, *peers)] if options.alone else [[ours, *peers]]
    with tempfile.TemporaryDirectory() as folder:
        work.write_model(Path(folder))
        for shape in options.shapes:
            print(f"{title}, {shape} tokens, {options.turns} turns{' of each alone' * options.alone}")
            report(
                [contestant for names in groups for contestant in run(names, Path(folder), shape, options.turns)], shape
            )


def run(names: list[str], folder: Path, shape: str, turns: int) -> list[Contestant]:
    """Start the contestants and let them take their turns, one after the other."""
    started = [Contestant(name, _start(name, folder, shape)) for name in names]
    try:
        # All are loaded before the first turn, so that no loading falls into anybody's step.
        for contestant in started:
            contestant.answer()
        for _ in range(WARM_UP + turns):
            for contestant in started:
                contestant.take_turn()
    finally:
        for contestant in started:
            contestant.process.kill()
            contestant.process.wait()
    return started


def report(timed: list[Contestant], shape: str) -> None:
    """Print medians of steps, and of the ratios of neighbouring steps, with the least and the greatest of them."""
    ours = timed[0]
    stage = "dpo" if "dpo" in ours.name else "sft"
    batches = contestants.batches(shape, stage)[STEPS_A_TURN - 1 :: STEPS_A_TURN]
    flops = [work.useful_flops(batch, preference=stage == "dpo") for batch in batches]
    rate = statistics.median(f / s / 1e9 for f, s in zip(flops[WARM_UP:], ours.seconds[WARM_UP:], strict=False))
    for contestant in timed:
        seconds, processor = contestant.seconds[WARM_UP:], contestant.processor[WARM_UP:]
        line = f"  {contestant.name:24s} {statistics.median(seconds):7.3f} s  {statistics.median(processor):7.3f} cpu s"
        line += f"  peak {contestant.peak_mib:6.0f} MiB ({contestant.peak_mib - contestant.loaded_mib:+.0f} by steps)"
        if contestant is not ours:
            # Of steps that were taken one after the other, so that a slow moment of the machine is in both.
            ratios = [peers / own for own, peers in zip(ours.seconds[WARM_UP:], seconds, strict=True)]
            processors = statistics.median(processor) / statistics.median(ours.processor[WARM_UP:])
            line += f"  = {statistics.median(ratios):.2f} x ours ({min(ratios):.2f} to {max(ratios):.2f}"
            line += (
                f"; processor {processors:.2f} x); ours takes {ours.peak_mib / contestant.peak_mib:.2f} of its memory"
            )
        line += f"  [{contestant.blas}]" if "mlx" in contestant.name else ""
        print(line, flush=True)
    if reference := [contestant for contestant in timed if contestant.name.endswith("-reference")]:
        end_to_end(ours, reference[0], [peer for peer in timed[1:] if peer is not reference[0]])
    print(f"  useful work {rate:.1f} GFLOP/s; a product of two matrices: {peak(ours.name):.1f}", flush=True)


def end_to_end(ours: Contestant, reference: Contestant, peers: list[Contestant]) -> None:
    """Print how much longer peers take for whole epochs, our reference pass included, without start-up."""
    medians = {c.name: statistics.median(c.seconds[WARM_UP:]) for c in (ours, reference, *peers)}
    for peer in peers:
        ratios = [n * medians[peer.name] / (n * medians[ours.name] + medians[reference.name]) for n in (1, 3)]
        print(f"  {peer.name:24s} with our reference pass: {ratios[0]:.2f} x over 1 epoch, {ratios[1]:.2f} x over 3")


def peak(name: str) -> float:
    """Return the GFLOP/s of a matrix product in the contestant's framework, the best of many, now and here."""
    code = (
        "import torch; a = torch.randn(2048, 2048); f = lambda: a @ a"
        if "torch" in name
        else "import mindprint_mlx\nfrom mindprint_mlx.blas import prepare\nprepare()\nimport mlx.core as mx\n"
        f"mx.set_default_device({MLX_DEVICES[os.environ.get(DEVICE, 'cpu')]})\n"
        f"a = mx.random.normal((2048, 2048)).astype(mx.{os.environ.get(DTYPE, 'float32')}); f = lambda: mx.eval(a @ a)"
    )
    # The best of many: a product that something else interrupted is not this machine's speed.
    timing = "\nimport timeit; print(2 * 2048**3 / min(timeit.repeat(f, number=1, repeat=15)) / 1e9)"
    done = subprocess.run([sys.executable, "-c", code + timing], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _start(name: str, folder: Path, shape: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "side_by_side.turns", name, str(folder), shape]
    log = subprocess.DEVNULL if "MINDPRINT_BENCH_LOG" not in os.environ else None
    return subprocess.Popen(
        command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


class Turns:
    """The turns of this process: `with turns():` around each step."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._loaded_mib = 0.0
        self._steps = 0
        self._last: dict[str, Any] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Take one step, as a turn begins after the answer to the one before. Ends the process when nobody asks."""
        # The peak at the first turn is that of loading: what steps add is the difference.
        self._loaded_mib = self._loaded_mib or _peak_mib()
        if self._steps % STEPS_A_TURN == 0:
            self.answer()
            if not sys.stdin.readline():
                raise SystemExit
        started, processor = perf_counter(), process_time()
        yield
        self._last = {"seconds": perf_counter() - started, "processor": process_time() - processor}
        self._last |= {"peak_mib": _peak_mib(), "loaded_mib": self._loaded_mib, "blas": _blas()}
        self._steps += 1

    def answer(self) -> None:
        """Answer with the time of the last step, and with nothing before the first one."""
        self._out.write(json.dumps(self._last) + "\n")
        self._out.flush()


def _blas() -> str:
    """Return the fast libraries for matrix products that this process has mapped, by file name."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    names = {Path(line.split()[-1]).name for line in lines}
    return ", ".join(sorted(name for name in names if name.startswith(("libopenblas", "libmkl_rt"))))


def _peak_mib() -> float:
    # macOS counts bytes, Linux KiB. MLX counts buffers on a GPU, which may not be in the process's memory.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    mlx: Any = sys.modules.get("mlx.core")
    return peak if mlx is None or os.environ.get(DEVICE, "cpu") == "cpu" else max(peak, mlx.get_peak_memory() / 2**20)


if __name__ == "__main__":
    # The output of trainers must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    turns = Turns(answers)
    contestants.CONTESTANTS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3], turns)
    turns.answer()
