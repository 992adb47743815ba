"""Where the seconds of `mindprint train` go that are no step: the start, the last evaluation, fingerprint and report.
In addition, what `verify` and `merge` of the adapter take.

    python benchmarks/whole_command.py MODEL [--backend torch] [--steps 12] [--profile start]

MODEL is a folder of Hugging Face. 200 SFT rows of the embedded example are trained, and 16 held-out prompts are
answered at the end. Each measurement is a separate process. All seconds are those of the processor, imports included.
Modules are compiled beforehand, as they are where pip has installed them.

Must hold: the start takes at most 1.3 times what loading model and tokenizer alone take. All that follows the last
step takes at most 60 steps' time. `--parts` prints where the seconds of the start, of `verify` and of `merge` go.
`--profile` prints the functions that take most of the start, the end, `verify` or `merge`.
"""

# ruff: noqa: PLC0415 (the imports of each process are measured too)

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce, wraps
from importlib.resources import files
from pathlib import Path
from typing import Any

ROWS, HELDOUT, STEPS = 200, 16, 60
PARTS = {
    "tokenizer": ("mindprint.data.tokenizer", "load_tokenizer"),
    "other preparation": ("mindprint.training.prepare", "prepare"),
    "import of the framework": ("mindprint.plugins.backend", "make_backend"),
    "estimate of memory": ("mindprint.plugins.backend", "Backend.memory"),
    "load of the model": ("mindprint.plugins.backend", "Backend.load_model"),
    "digest of the base": ("mindprint.plugins.backend", "Backend.base_digest"),
    "largest weight": ("mindprint.plugins.backend", "Backend.largest_weight"),
    "log-probs": ("mindprint.plugins.backend", "Backend.log_probs"),
    "injection": ("mindprint.plugins.backend", "Backend.inject_adapter"),
    "merge": ("mindprint.adapter.merging", "_write_shard"),
    "comparison of the merged weights": ("mindprint.trust.merged", "judge"),
}
"""Functions whose processor time `--parts` prints, without that of others among them which they call."""
START, END = 1.3, 60


def main() -> int:
    """Print the table and return 1 if a line does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"))
    parser.add_argument("--steps", type=int, default=12, help="steps whose mean is a step's time")
    parser.add_argument("--profile", choices=("start", "end", "verifying", "merging"))
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--project", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        options.project = project(Path(name), options)
        # An environment in which Python may write no bytecode would compile a library at every import.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(name) / "bytecode")
        for child in ("loading", "starting"):
            in_process(child, options)
        alone = in_process("loading", options)["loading"]
        marks = in_process("training", options)
        later = {child: in_process(child, options)[child] for child in ("verifying", "merging")}
    step = (marks["last step"] - marks["first step"]) / options.steps
    start, end = marks["first step"] / alone, (marks["end"] - marks["last step"]) / step
    print(f"{options.backend}, {options.model.name}, float32, seconds of the processor")
    print(f"  model and tokenizer alone     {alone:7.2f}")
    print(f"  command to first step         {marks['first step']:7.2f}   {start:.2f} times that (at most {START})")
    print(f"  a step                        {step:7.3f}")
    previous = marks["last step"]
    for mark in ("evaluation", "end"):
        name = {"evaluation": "evaluation of 16 prompts", "end": "fingerprint and reports"}[mark]
        print(f"  {name:26s}    {marks[mark] - previous:7.2f}   {(marks[mark] - previous) / step:.1f} steps")
        previous = marks[mark]
    print(f"  all after the last step       {marks['end'] - marks['last step']:7.2f}   {end:.1f} steps (at most {END})")
    for child, seconds in later.items():
        print(f"  {child:26s}    {seconds:7.2f}   {seconds / alone:.2f} times model and tokenizer alone")
    return 0 if start <= START and end <= END else 1


def project(folder: Path, options: argparse.Namespace) -> Path:
    """Write a project of one topic with the rows of the embedded example."""
    (folder / "data").mkdir()
    data = files("mindprint").joinpath("resources/curriculum")
    for name, count in (("sft.jsonl", ROWS), ("heldout.jsonl", HELDOUT)):
        lines = data.joinpath(name).read_text(encoding="utf-8").splitlines()[:count]
        rows = [{**json.loads(line), "topic": "main"} for line in lines]
        (folder / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model": {"name": str(options.model.resolve())},
        "backend": {"type": options.backend, "device": "cpu", "dtype": "float32"},
        "data": {"path": "data"},
        "sft": {"steps_per_topic": options.steps, "epochs_per_topic": None},
        "dpo": {"enabled": False},
        "evaluation": {"levels": ["final"], "prompts_per_topic": HELDOUT},
    }
    # JSON is YAML.
    (folder / "mindprint.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


def in_process(child: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the last line that a new process printed. Its other lines are shown."""
    command = [sys.executable, __file__, str(options.model), "--child", child, "--backend", options.backend]
    command += ["--steps", str(options.steps), "--project", str(options.project)]
    measured = "training" if options.profile in ("start", "end") else options.profile
    command += ["--profile", options.profile] if child == measured else []
    command += ["--parts"] if options.parts and child in PARTED else []
    *shown, last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    print("\n".join([f"  {child}:", *shown]) if shown else "", end="\n" if shown else "")
    values: dict[str, float] = json.loads(last)
    return values


def loading(options: argparse.Namespace) -> dict[str, float]:
    """Load the model and the tokenizer as their libraries do."""
    if options.backend == "torch":
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoTokenizer.from_pretrained(options.model)
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm import load

        model = load(str(options.model))[0]
        model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))
        mx.eval(model.parameters())
    return {"loading": time.process_time()}


def parts() -> Callable[[], None]:
    """Measure the functions of `PARTS` from now on. Return what prints their seconds, and the rest of the process's."""
    seconds: dict[str, float] = {"imports of core": 0.0}
    # The names of the parts that are under way, and the time from which the last one counts.
    under_way, since = ["imports of core"], 0.0

    def switch() -> None:
        nonlocal since
        now = time.process_time()
        seconds[under_way[-1]] = seconds.get(under_way[-1], 0.0) + now - since
        since = now

    def measured(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            switch()
            under_way.append(part)
            try:
                return function(*values, **named)
            finally:
                switch()
                under_way.pop()

        return call

    import mindprint.api.adapters
    import mindprint.api.training  # noqa: F401 (imported here, to be counted as imports)

    for part, (module, name) in PARTS.items():
        *outer, last = name.split(".")
        function = getattr(reduce(getattr, outer, sys.modules[module]), last)
        # A function is also known by its name in the modules that import it.
        for holder in [reduce(getattr, outer, sys.modules[module])] if outer else list(sys.modules.values()):
            if getattr(holder, "__dict__", {}).get(last) is function:
                setattr(holder, last, measured(part, function))
    switch()
    under_way[0] = "everything else"

    def show() -> None:
        switch()
        for part, taken in sorted(seconds.items(), key=lambda entry: -entry[1]):
            print(f"    {taken:6.2f}  {part}")

    return show


def starting(options: argparse.Namespace) -> dict[str, float]:
    """Start training, and stop before the first step."""
    import mindprint
    from mindprint.events import Event, StageStarted

    class Started(Exception):  # noqa: N818  (it ends the run, and nothing has failed)
        pass

    def stop(event: Event) -> None:
        if isinstance(event, StageStarted):
            raise Started

    with suppress(Started):
        mindprint.train(options.project, on_event=stop)
    return {}


def training(options: argparse.Namespace) -> dict[str, float]:
    """Train, and return the processor's seconds at each mark since the process began."""
    profile = cProfile.Profile(time.process_time)
    if options.profile == "start":
        profile.enable()
    import mindprint
    from mindprint.events import Evaluated, Event, StageStarted, StepDone

    marks: dict[str, float] = {}
    show = parts() if options.parts else lambda: None

    def watch(event: Event) -> None:
        if isinstance(event, StageStarted):
            marks["first step"] = time.process_time()
            show()
            profile.disable()
        elif isinstance(event, StepDone):
            marks["last step"] = time.process_time()
            if options.profile == "end" and event.step == options.steps:
                profile.enable()
        elif isinstance(event, Evaluated):
            marks["evaluation"] = time.process_time()

    mindprint.train(options.project, on_event=watch)
    marks["end"] = time.process_time()
    profile.disable()
    if options.profile:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(60)
    return marks


def verifying(options: argparse.Namespace) -> dict[str, float]:
    """Verify the adapter of the run that was trained, in the same process as the imports."""
    with profiled(options):
        import mindprint

        show = parts() if options.parts else lambda: None
        if not mindprint.verify(options.project).ok:
            raise SystemExit("the adapter does not verify")
        show()
    return {"verifying": time.process_time()}


def merging(options: argparse.Namespace) -> dict[str, float]:
    """Merge the adapter of the run that was trained, and verify the result."""
    with profiled(options):
        import mindprint

        show = parts() if options.parts else lambda: None
        mindprint.merge(options.project, options.project / "merged")
        show()
    return {"merging": time.process_time()}


@contextmanager
def profiled(options: argparse.Namespace) -> Iterator[None]:
    """Print the functions that took most of the block, if that was asked for."""
    profile = cProfile.Profile(time.process_time)
    if options.profile:
        profile.enable()
    yield
    profile.disable()
    if options.profile:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(60)


PARTED = ("training", "verifying", "merging")
CHILDREN = {
    "loading": loading,
    "starting": starting,
    "training": training,
    "verifying": verifying,
    "merging": merging,
}

if __name__ == "__main__":
    raise SystemExit(main())
