"""Where the seconds of `mindprint train` go that are no step: the start, the last evaluation, fingerprint and report.

    python benchmarks/whole_command.py MODEL [--backend torch] [--steps 12] [--profile start]

MODEL is a folder of Hugging Face. 200 SFT rows of the embedded example are trained, and 16 held-out prompts are
answered at the end. Each measurement is a separate process. All seconds are those of the processor, imports included.
Modules are compiled beforehand, as they are where pip has installed them.

Must hold: the start takes at most 1.3 times what loading model and tokenizer alone take. All that follows the last
step takes at most 60 steps' time. `--profile start` or `--profile end` prints the functions that take most of either.
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
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

ROWS, HELDOUT, STEPS = 200, 16, 60
START, END = 1.3, 60


def main() -> int:
    """Print the table and return 1 if a line does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"))
    parser.add_argument("--steps", type=int, default=12, help="steps whose mean is a step's time")
    parser.add_argument("--profile", choices=("start", "end"))
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
    command += ["--profile", options.profile] if options.profile and child == "training" else []
    *shown, last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    print("\n".join(shown), end="\n" if shown else "")
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

    def watch(event: Event) -> None:
        if isinstance(event, StageStarted):
            marks["first step"] = time.process_time()
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


CHILDREN = {"loading": loading, "starting": starting, "training": training}

if __name__ == "__main__":
    raise SystemExit(main())
