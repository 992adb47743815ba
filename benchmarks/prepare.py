"""`mindprint prepare` measured: its reading, its throughput, its rows after a kill and on both backends, its voice.

    python benchmarks/prepare.py [reading]                      200,000 words made here, or of --writing FOLDER
    python benchmarks/prepare.py mails                          a mailbox of 100,000 messages that is made here
    python benchmarks/prepare.py throughput --model MODEL       the command's questions, next to generation alone
    python benchmarks/prepare.py same --model MODEL             kill -9 at moments drawn, and the rows of both backends
    python benchmarks/prepare.py voice FOLDER --model MODEL     from one work of an author to a voice, on the other work
    python benchmarks/prepare.py rewriting FOLDER --model MODEL the same voice rewrites plain texts
    python benchmarks/prepare.py pairs FOLDER --model MODEL     pairs on policy next to those of the base model
    python benchmarks/prepare.py settings FOLDER --model MODEL  figures by words, learning rate and passes

Seconds are those of the processor. prepare_voice.py describes the last four.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindprint.config import BackendConfig, ModelConfig
from mindprint.runs.opened import open_base
from mindprint.writing.asking import BaseModel, Kept
from mindprint.writing.gathering import Options, gather
from mindprint.writing.making import MIX, make_rows
from mindprint.writing.templates import Templates
from prepare_voice import add_arguments, first_words, model_path, pairs, rewriting, settings, voice

ROWS = ("sft.jsonl", "preferences.jsonl", "heldout.jsonl", "curriculum.yaml")
KILLS = 3


def main() -> int:
    options = arguments()
    return 0 if options.command(options) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.set_defaults(command=reading, writing=None, words=200_000)
    commands = parser.add_subparsers()
    for name, command, words in (
        ("reading", reading, 200_000),
        ("mails", mails, 0),
        ("throughput", throughput, 1_500),
        ("same", same, 1_500),
        ("voice", voice, 40_000),
        ("rewriting", rewriting, 40_000),
        ("pairs", pairs, 40_000),
        ("settings", settings, 40_000),
    ):
        sub = commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0])
        sub.set_defaults(command=command)
        sub.add_argument("--words", type=int, default=words, help="words of the writing that are used")
        if command in (voice, rewriting, pairs, settings):
            add_arguments(sub)
        else:
            sub.add_argument("--writing", type=Path, help="a folder or a file; default: text that is made here")
        if command is settings:
            sub.add_argument("--sizes", type=int, nargs="+", default=[2_000, 10_000, 40_000], help="words tried")
            sub.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3], help="of SFT")
            sub.add_argument("--dpo-rates", type=float, nargs="+", default=[5e-6, 2e-5, 1e-4])
            sub.add_argument("--passes", type=int, default=6, help="over the rows, in SFT")
        if command is mails:
            sub.add_argument("--count", type=int, default=100_000, help="messages")
        if command not in (reading, mails):
            sub.add_argument("--model", required=True)
            sub.add_argument("--backend", default="torch")
    return parser.parse_args()


def reading(options: argparse.Namespace) -> bool:
    """Read, cut and deduplicate, without a model. Bounds: 20 s and 500 MB."""
    with writing_of(options) as path:
        started = time.process_time()
        gathered = gather([path], Options())
        seconds = time.process_time() - started
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    count = len(gathered.train) + len(gathered.heldout)
    print(
        f"reading: {gathered.words:,} words in {count:,} passages, {gathered.duplicates} duplicates left out: "
        f"{seconds:.1f} s of processor, {peak:.0f} MB at most"
    )
    return seconds < 20 and peak < 500


def mails(options: argparse.Namespace) -> bool:
    """Read a mailbox of many messages, each with headers, a quotation and a signature."""
    with tempfile.TemporaryDirectory() as name:
        box = Path(name) / "sent.mbox"
        sentences = [line for line in made_text(50_000).splitlines() if line]
        draw = random.Random(0)  # noqa: S311 (the same mails each time)
        with box.open("w", encoding="utf-8") as file:
            for number in range(options.count):
                body = "\n\n".join(draw.choice(sentences) for _ in range(3))
                file.write(
                    f"From ada@example.org Mon Jan  5 10:00:00 2026\nFrom: Ada <ada@example.org>\nTo: tom@example.org\n"
                    f"Subject: {number}\nContent-Type: text/plain; charset=utf-8\n\n{body}\n\n"
                    f"On Monday, Tom wrote:\n> {draw.choice(sentences)}\n\n-- \nAda\n\n"
                )
        started = time.process_time()
        gathered = gather([box], Options())
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    print(
        f"mails: {options.count:,} messages, {gathered.words:,} words in {len(gathered.train):,} passages to train on: "
        f"{seconds:.1f} s of processor, {peak:.0f} MB at most"
    )
    return len(gathered.train) > 0


def throughput(options: argparse.Namespace) -> bool:
    """The tokens that the command generates for each second, next to the backend's generation of the same answers."""
    asked: list[tuple[list[Any], Any, float, int]] = []
    with writing_of(options) as path:
        gathered = gather([path], Options(heldout=0))
        model = ModelConfig(name=options.model)
        backend = BackendConfig(type=options.backend)
        with open_base(model, Path.cwd(), backend) as opened, Kept(path.parent / "kept.jsonl") as kept:
            base = BaseModel(opened, kept, lambda *_: None)
            inner = opened.backend.generate

            def watched(handle: Any, prompts: Any, sampling: Any, **more: Any) -> Any:
                started = time.process_time()
                answers = inner(handle, prompts, sampling, **more)
                tokens = sum(len(answer.tokens) for answer in answers)
                asked.append((list(prompts), sampling, time.process_time() - started, tokens))
                return answers

            opened.backend.generate = watched  # type: ignore[method-assign]
            started = time.process_time()
            make_rows(gathered.train, base, Templates(), MIX, 0)
            seconds = time.process_time() - started
            alone, tokens = 0.0, 0
            # The same questions in one call for each limit, which the backend divides as it likes.
            for sampling in dict.fromkeys(sampling for _, sampling, _, _ in asked):
                calls = [entry for entry in asked if entry[1] == sampling]
                began = time.process_time()
                inner(opened.model, [prompt for call in calls for prompt in call[0]], calls[0][1], adapter=False)
                alone += time.process_time() - began
            tokens = sum(entry[3] for entry in asked)
            generating = sum(entry[2] for entry in asked)
    share = alone / generating
    print(
        f"throughput on {options.backend}: {tokens:,} tokens, {tokens / generating:.1f} a second in the command, "
        f"{tokens / alone:.1f} alone: {share:.2f}. The command took {seconds:.0f} s, {generating:.0f} s to generate"
    )
    return share >= 0.7


def same(options: argparse.Namespace) -> bool:
    """The same bytes after kill -9, and the same rows from torch and MLX."""
    with writing_of(options) as path:
        folder = path.parent
        made = {name: rows_of(prepared(path, folder / name, options.model, name)) for name in ("torch", "mlx")}
        started = time.perf_counter()
        prepared(path, folder / "again", options.model, options.backend)
        whole = time.perf_counter() - started
        draw = random.Random(0)  # noqa: S311 (the same moments each time)
        for turn in range(KILLS):
            process = started_command(path, folder / "killed", options.model, options.backend)
            time.sleep(draw.uniform(0.2, 0.8) * whole)
            process.send_signal(signal.SIGKILL)
            print(f"kill {turn + 1}: exit code {process.wait()}", flush=True)
        killed = rows_of(prepared(path, folder / "killed", options.model, options.backend))
    equal = killed == made[options.backend]
    lines = {name: [json.loads(line) for line in rows["sft.jsonl"].splitlines()] for name, rows in made.items()}
    pairs = list(zip(lines["torch"], lines["mlx"], strict=False))
    alike = sum(first == second for first, second in pairs)
    print(f"killed {KILLS} times: {'the same bytes' if equal else 'OTHER BYTES'}")
    print(f"torch and MLX: {alike} of {max(map(len, lines.values()))} rows are the same")
    return equal and made["torch"] == made["mlx"]


@contextlib.contextmanager
def writing_of(options: argparse.Namespace) -> Iterator[Path]:
    """Yield a file with as many words as are asked for."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "writing.txt"
        if options.writing is None:
            text = made_text(options.words)
        else:
            files = sorted(options.writing.rglob("*.txt")) if options.writing.is_dir() else [options.writing]
            text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
            path.write_text(text, encoding="utf-8")
            text = first_words(path, options.words)
        path.write_text(text, encoding="utf-8")
        yield path


def made_text(count: int) -> str:
    """Return paragraphs from a vocabulary whose words are as unlike in frequency as those of a language."""
    draw = np.random.default_rng(0)
    letters = "etaoinshrdlucmfw"
    lengths = draw.integers(2, 9, 4000)
    vocabulary = np.array(["".join(draw.choice(list(letters), size)) for size in lengths])
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    words = draw.choice(vocabulary, count, p=weights / weights.sum())
    sentences = [" ".join(words[at : at + 12]).capitalize() + "." for at in range(0, count, 12)]
    return "\n\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))


def command(path: Path, project: Path, model: str, backend: str) -> list[str]:
    arguments = ["prepare", str(path), "--into", str(project), "--model", str(model_path(model)), "--backend", backend]
    return [sys.executable, "-m", "mindprint", *arguments]


def prepared(path: Path, project: Path, model: str, backend: str) -> Path:
    subprocess.run(command(path, project, model, backend), check=True, capture_output=True)
    return project


def started_command(path: Path, project: Path, model: str, backend: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(path, project, model, backend), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def rows_of(project: Path) -> dict[str, bytes]:
    # A file without rows is not written.
    return {name: file.read_bytes() if (file := project / "data" / name).exists() else b"" for name in ROWS}


if __name__ == "__main__":
    raise SystemExit(main())
