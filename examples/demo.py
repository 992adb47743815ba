"""The whole of Mindprint in a few minutes: one voice, trained on each installed backend by the same commands.

    python examples/demo.py [--backends torch,mlx] [--folder DIR]

Makes the sample project, trains SFT then DPO, measures the voice on held-out text, shows answers before and after, and
lays the backends' loss curves over each other. The backends work at the same time, each with its share of the cores.
Exits 1 if a figure that the README promises does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ACCURACY = (
    0.90  # of held-out pairs, the share whose implicit DPO reward is higher for the voice (TRL's rewards/accuracies)
)
PERPLEXITY = 0.5  # of held-out answers in the voice, after over before
VOICES = 0.05  # of the greater voice score, how far apart the backends' may be
CURVES = {"sft": 1e-5, "dpo": 1e-3}  # times (1 + loss), over the first 100 steps of a stage
CURVES_TO_THE_END = 1e-3
SECONDS = 300


def main() -> int:
    options = arguments()
    started = time.perf_counter()
    project = Path(options.folder or tempfile.mkdtemp(prefix="mindprint-demo-")) / "my-voice"
    print(mindprint("init", str(project)), flush=True)
    prompts = questions(project / "data" / "heldout.jsonl")
    threads = max(1, (os.cpu_count() or 1) // len(options.backends))
    with ThreadPoolExecutor(len(options.backends)) as pool:
        results = pool.map(lambda name: one_backend(project, name, prompts, threads), options.backends)
        measured = dict(zip(options.backends, results, strict=True))
    for name, (figures, answers) in measured.items():
        show_voice(name, figures["overall"])
        show_score(figures["voice"])
        show_answers(answers)
    evaluated = {name: figures for name, (figures, _) in measured.items()}
    checks = [check for name, figures in evaluated.items() for check in voice_checks(name, figures)]
    checks += same_voice_checks(evaluated)
    runs = [project / "runs" / name for name in options.backends]
    for other in runs[1:]:
        checks += curve_checks(runs[0], other)
    seconds = time.perf_counter() - started
    checks.append((f"all of it in under {SECONDS} s", f"{seconds:.0f} s", seconds < SECONDS))
    print("\nWhat must hold")
    for what, figure, holds in checks:
        print(f"  {'ok    ' if holds else 'FAILED'}  {what}: {figure}")
    return 0 if all(holds for _, _, holds in checks) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    installed = sorted((point.name for point in entry_points(group="mindprint.backends")), reverse=True)
    parser.add_argument("--backends", type=lambda text: text.split(","), default=installed)
    parser.add_argument("--folder", help="where to work; a new temporary folder otherwise")
    return parser.parse_args()


def mindprint(*words: str, label: str = "", threads: int = 0) -> str:
    """Run a command as a user would and return its output. Its messages go to the screen as they come."""
    show(f"$ mindprint {' '.join(words)}", label)
    # NumPy, PyTorch and MLX all read this. Two processes that both use every core would only wait for each other.
    env = {"OMP_NUM_THREADS": str(threads), **os.environ} if threads else None
    command = [sys.executable, "-m", "mindprint", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with ThreadPoolExecutor(1) as pool:
            printed = pool.submit(process.stdout.read)
            for line in process.stderr:
                show(line.rstrip("\n"), label)
            output = printed.result()
    if process.returncode:
        sys.exit(f"mindprint {words[0]} failed with exit code {process.returncode}")
    return output


def show(line: str, label: str) -> None:
    """Print a line after the name of the backend that it comes from."""
    # One call, because two threads print.
    print(f"{label}: {line}\n" if label else f"{line}\n", end="", flush=True)


def questions(file: Path, count: int = 3) -> list[str]:
    """Held-out questions of different topics."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first_of_topic = {row["topic"]: row["prompt"] for row in reversed(rows)}
    return list(first_of_topic.values())[-count:]


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # an evaluation, and answers to prompts


def one_backend(project: Path, name: str, prompts: list[str], threads: int) -> Measured:
    """Train, measure and ask, on one backend. Return the evaluation and the answers."""
    run = str(project / "runs" / name)
    trained = mindprint(
        "train", str(project), f"backend.type={name}", "backend.dtype=float32", "--run", run,
        label=name, threads=threads,
    )  # fmt: skip
    for line in trained.splitlines():
        show(line, name)
    figures = json.loads(mindprint("eval", run, "--json", label=name, threads=threads))
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    answers = json.loads(mindprint("generate", run, *asked, "--json", label=name, threads=threads))
    return figures, answers["prompts"]


def show_answers(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        print(f"\n  {answer['prompt']}\n    before: {answer['base']}\n    after:  {answer['tuned']}")


def show_voice(name: str, overall: dict[str, Any]) -> None:
    print(f"\n  {name}, {overall['pairs']} held-out pairs, never trained on             before     after")
    rows = {
        "preference_accuracy": "finds the voice more likely than the plain answer",
        "perplexity": "perplexity of the voice",
    }
    for key, what in rows.items():
        print(f"    {what:50s} {overall['base'][key]:9.3f} {overall['tuned'][key]:9.3f}")
    what = "training raised the voice more than the plain answer"
    print(f"    {what:50s} {'':9s} {overall['reward_accuracy']:9.3f}")


def show_score(voice: dict[str, Any]) -> None:
    """The voice of the model's own answers, or why it could not be scored."""
    sides = [voice["overall"][side] for side in ("base", "tuned")]
    shown = [f"{side['value']:9.2f}" if "value" in side else f" ({side['reason']})" for side in sides]
    print(f"    {'voice of its answers (1: the person)':50s} {' '.join(shown)}")


def voice_checks(name: str, facts: dict[str, Any]) -> list[tuple[str, str, bool]]:
    base, tuned = facts["overall"]["base"], facts["overall"]["tuned"]
    accuracy, ratio = facts["overall"]["reward_accuracy"], tuned["perplexity"] / base["perplexity"]
    return [
        (f"{name}: held-out reward accuracy at least {ACCURACY}", f"{accuracy:.3f}", accuracy >= ACCURACY),
        (f"{name}: held-out perplexity at most {PERPLEXITY} of the base model's", f"{ratio:.3f}", ratio <= PERPLEXITY),
        score_check(name, facts["voice"]["overall"]),
    ]


def score_check(name: str, voice: dict[str, Any]) -> tuple[str, str, bool]:
    """Return whether the tuned model's voice lies above the base model's whole interval, and recites nothing."""
    base, tuned, flags = voice["base"], voice["tuned"], voice["copying"].get("flagged", ["no answers"])
    what = f"{name}: the voice of its answers is above the base model's interval, and is not recited"
    if "value" not in base or "value" not in tuned:
        return what, "could not be scored", False
    figure = f"{tuned['value']:.2f} ({tuned['low']:.2f} to {tuned['high']:.2f}), base up to {base['high']:.2f}"
    return what, "; ".join([figure, *flags]), tuned["low"] > base["high"] and not flags


def same_voice_checks(measured: dict[str, dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """Return whether the backends' tuned models have the same voice."""
    values = [facts["voice"]["overall"]["tuned"].get("value", float("nan")) for facts in measured.values()]
    apart = (max(values) - min(values)) / max(values)
    what = f"the voice scores of {' and '.join(measured)} are within {VOICES:.0%}"
    return [(what, f"{apart:.1%}", apart <= VOICES)] if len(values) > 1 else []


def curve_checks(first: Path, second: Path) -> list[tuple[str, str, bool]]:
    """The greatest deviation of two runs' losses as a multiple of 1 + loss, by stage, over all topics in order."""
    names = f"{first.name} and {second.name}"
    checks = []
    for stage, tolerance in CURVES.items():
        first_losses, second_losses = (losses(run, stage) for run in (first, second))
        deviations = [abs(a - b) / (1 + abs(a)) for a, b in zip(first_losses, second_losses, strict=True)]
        for steps, limit, when in ((100, tolerance, "in its first 100 steps"), (None, CURVES_TO_THE_END, "to the end")):
            worst = max(deviations[:steps])
            what = f"{names}: {stage} losses differ by at most {limit:g} · (1 + loss) {when}"
            checks.append((what, f"{worst:.1e}", worst <= limit))
    return checks


def losses(run: Path, stage: str) -> list[float]:
    """The losses of a stage's steps, topic after topic."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage]


if __name__ == "__main__":
    sys.exit(main())
