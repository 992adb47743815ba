"""More rows than memory: the order, memory by rows, preparation, throughput and resume.

    python benchmarks/data.py order                       a step anywhere among 5 million rows
    python benchmarks/data.py memory [--rows 10000 100000]  resident memory of preparation and training, by rows
    python benchmarks/data.py preparation [--rows 1000000]  seconds to prepare rows, and to read them from the cache
    python benchmarks/data.py reading [--rows 50000]      microseconds to read a row from disk, and the memory it keeps
    python benchmarks/data.py throughput                  training on rows on disk, relative to rows in memory
    python benchmarks/data.py resume                      a run on rows on disk, killed and resumed, bit for bit

Rows are made here, in a temporary folder (`--folder` names another). `--model` and `--backend` choose what trains.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindprint
from mindprint.config import make_config
from mindprint.data import rows as rows_module
from mindprint.data.order import StageOrder
from mindprint.events import Event, StepDone
from mindprint.training.prepare import prepare

SETTLED = 20
"""Steps that are left out of throughput: pools and caches fill."""


def main() -> int:
    options = arguments()
    if options.folder is not None:
        return 0 if options.command(options, options.folder) else 1
    with tempfile.TemporaryDirectory() as name:
        return 0 if options.command(options, Path(name)) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, command, rows in (
        ("order", order, [5_000_000]),
        ("memory", memory, [10_000, 100_000, 1_000_000]),
        ("preparation", preparation, [1_000_000]),
        ("reading", reading, [50_000]),
        ("throughput", throughput, [3_000]),
        ("resume", resume, [21_000]),
        ("measure", measure, [10_000]),
    ):
        sub = commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0])
        sub.set_defaults(command=command)
        sub.add_argument("--rows", type=int, nargs="+", default=rows)
        sub.add_argument("--steps", type=int, default=200)
        sub.add_argument("--topics", type=int, default=1)
        sub.add_argument("--folder", type=Path)
        sub.add_argument("--model", default="builtin:tiny")
        sub.add_argument("--backend", default="torch")
    return parser.parse_args()


def order(options: argparse.Namespace, _folder: Path) -> bool:
    """Milliseconds of processor for a step anywhere in an epoch, and for the steps one after another."""
    good = True
    for version in (1, 2):
        for count in (100_000, *options.rows):
            stage = StageOrder(count, 8, 4, 0, "main", "sft", epochs=1, version=version)
            draw = random.Random(0)  # noqa: S311 (the same steps each time)
            before = resident()
            started = time.process_time()
            stage.micro_batches(0)
            first = time.process_time() - started
            places = [draw.randrange(stage.steps_per_epoch) for _ in range(200)]
            started = time.process_time()
            for step in places:
                stage.micro_batches(step)
            anywhere = (time.process_time() - started) / len(places)
            started = time.process_time()
            for step in range(200):
                stage.micro_batches(step)
            along = (time.process_time() - started) / 200
            print(
                f"order {version}, {count:9,} rows: first step {1000 * first:7.1f} ms, any other "
                f"{1000 * anywhere:.2f} ms, the next {1000 * along:.3f} ms, {peak():.0f} MB at most, "
                f"{resident() - before:+.0f} MB kept"
            )
            good = good and (version == 1 or anywhere < 0.005)
    return good


def memory(options: argparse.Namespace, folder: Path) -> bool:
    """Print resident memory by the number of rows, each in a separate process. The bound is 50 MB between any two."""
    figures = []
    for count in options.rows:
        command = [sys.executable, __file__, "measure", "--rows", str(count), "--steps", str(options.steps)]
        command += ["--folder", str(folder), "--model", options.model, "--backend", options.backend]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        figures.append(json.loads(shown))
        print(
            f"{count:9,} rows: " + ", ".join(f"{name} {value:.0f} MB" for name, value in figures[-1].items()),
            flush=True,
        )
    trained = [figure["training"] for figure in figures]
    print(f"training: {max(trained) - min(trained):.0f} MB between the least and the most")
    return max(trained) - min(trained) < 50


def measure(options: argparse.Namespace, folder: Path) -> bool:
    """The memory of one run in this process, as JSON."""
    project = project_of(folder, options.rows[0], options)
    memories: list[float] = []
    prepared = 0.0

    def note(event: Event) -> None:
        nonlocal prepared
        prepared = prepared or peak()
        if isinstance(event, StepDone):
            memories.append(resident())

    mindprint.train(configuration(project, options), run=project / f"run-{time.time_ns()}", on_event=note)
    print(json.dumps({"peak of preparation": prepared, "training": max(memories)}))
    return True


def preparation(options: argparse.Namespace, folder: Path) -> bool:
    """Seconds and processor seconds to prepare rows the first and the second time. Bound: 10 minutes."""
    good = True
    for count in options.rows:
        project = project_of(folder, count, options)
        for turn in ("first", "second"):
            if turn == "first":
                for entry in (project / ".mindprint").glob("*/meta.json"):
                    entry.unlink()
            before, started = processor(), time.perf_counter()
            prepared = prepare(make_config(configuration(project, options), project))
            seconds, computed = time.perf_counter() - started, processor() - before
            rows = sum(len(part) for part in prepared.examples["sft"].values())
            print(
                f"{count:9,} rows, {turn} time: {seconds:6.1f} s, {computed:6.1f} s of processor, "
                f"{peak():.0f} MB at most, its processes {peak(resource.RUSAGE_CHILDREN):.0f} MB; {rows:,} trained",
                flush=True,
            )
            good = good and seconds < 600
            del prepared
    return good


def reading(options: argparse.Namespace, folder: Path) -> bool:
    """Microseconds of processor to read a rendered row from disk, in another order than it is stored, and memory."""
    project = project_of(folder, options.rows[0], options)
    prepared = prepare(make_config(configuration(project, options), project))
    (rows,) = [part for part in prepared.examples["sft"].values() if len(part) > options.rows[0] // 2]
    before, started = resident(), time.process_time()
    tokens = sum(len(rows[index * 7 % len(rows)].tokens) for index in range(len(rows)))
    seconds = time.process_time() - started
    print(
        f"{len(rows):,} rows of {tokens / len(rows):.0f} tokens: {1e6 * seconds / len(rows):.0f} us each, "
        f"{resident() - before:+.1f} MB"
    )
    return resident() - before < 50


def throughput(options: argparse.Namespace, folder: Path) -> bool:
    """Tokens for each second of the processor, on disk relative to memory. Bound: 0.9."""
    project = project_of(folder, options.rows[0], options)
    rates: dict[str, list[float]] = {"memory": [], "disk": []}
    for _turn in range(2):
        for kind, found in rates.items():
            rows_module.IN_MEMORY = 0 if kind == "disk" else 10**9
            steps: list[tuple[float, int]] = []

            def note(event: Event, steps: list[tuple[float, int]] = steps) -> None:
                if isinstance(event, StepDone):
                    steps.append((time.process_time(), event.tokens))

            config = configuration(project, options)
            if kind == "memory":
                # An entry that is on disk already would be taken.
                rows_module.CACHED_BYTES = 10**9
            else:
                rows_module.CACHED_BYTES = 0
            mindprint.train(config, run=project / f"run-{time.time_ns()}", on_event=note)
            seconds = steps[-1][0] - steps[SETTLED][0]
            found.append(sum(tokens for _, tokens in steps[SETTLED + 1 :]) / seconds)
    memory, disk = (max(found) for found in rates.values())
    print(f"{memory:,.0f} tokens a second in memory, {disk:,.0f} on disk: {disk / memory:.3f}")
    return disk >= 0.9 * memory


def resume(options: argparse.Namespace, folder: Path) -> bool:
    """The adapter of a run on disk that was killed twice and resumed, next to that of a run in memory: equal bytes."""
    project = project_of(folder, options.rows[0], options)
    (project / "mindprint.yaml").write_text(json.dumps(configuration(project, options)), encoding="utf-8")
    rows_module.IN_MEMORY, rows_module.CACHED_BYTES = 10**9, 10**9
    mindprint.train(str(project), run=project / "whole")
    command = [sys.executable, "-m", "mindprint", "train", str(project), "--run", str(project / "killed")]
    for kill in (30, 90, None):
        done = sum(1 for _ in lines_of(project / "killed" / "metrics.jsonl"))
        process = subprocess.Popen([*command, *(["--resume"] if done else [])], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if kill is not None and sum(1 for _ in lines_of(project / "killed" / "metrics.jsonl")) >= kill:
                process.kill()
            time.sleep(0.05)
        print(f"killed at step {kill}" if kill else "resumed to the end", process.wait(), flush=True)
    adapters = [(project / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    print("the same bytes" if adapters[0] == adapters[1] else "OTHER BYTES")
    return adapters[0] == adapters[1]


def lines_of(file: Path) -> Iterator[str]:
    if file.exists():
        yield from file.read_text(encoding="utf-8").splitlines()


def configuration(project: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"name": options.model},
        "backend": options.backend,
        "data": {"sft": str(project / "sft.jsonl"), "heldout_fraction": 0.02},
        "sft": {"steps_per_topic": options.steps, "batch_size": 4},
        "dpo": {"enabled": False},
        "checkpoints": {"every": 25},
        "evaluation": {"levels": []},
    }


def project_of(folder: Path, count: int, options: argparse.Namespace) -> Path:
    """Return a folder with rows of made words, as unlike in frequency as those of a language."""
    project = folder / f"rows-{count}-{options.topics}"
    if not (project / "sft.jsonl").exists():
        project.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)  # noqa: S311 (the same rows each time)
        letters = "etaoinshrdlucmfw"
        words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(20_000)]
        weights = [rank**-0.5 for rank in range(1, len(words) + 1)]
        stream = iter(draw.choices(words, weights, k=min(count, 200_000) * 30))
        with (project / "sft.partial").open("w", encoding="utf-8") as file:
            for number in range(count):
                if number % 200_000 == 0 and number:
                    stream = iter(draw.choices(words, weights, k=200_000 * 30))
                text = [next(stream) for _ in range(30)]
                row = {"prompt": " ".join(text[:8]), "completion": " ".join(text[8:])}
                file.write(json.dumps({**row, "topic": f"t{number % options.topics}"}) + "\n")
        (project / "sft.partial").rename(project / "sft.jsonl")
    return project


def resident() -> float:
    """Return resident memory now, in MB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e6


def peak(whose: int = resource.RUSAGE_SELF) -> float:
    """Return the most resident memory so far of this process, or of the largest that it started, in MB."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def processor() -> float:
    """Return the seconds of processor of this process and of those that it started and that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    raise SystemExit(main())
