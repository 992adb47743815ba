"""`mindprint prepare` measured: its reading, its throughput, its rows after a kill and on both backends, its voice.

    python benchmarks/prepare.py [reading]                      200,000 words made here, or of --writing FOLDER
    python benchmarks/prepare.py throughput --model MODEL       the command's questions, next to generation alone
    python benchmarks/prepare.py same --model MODEL             kill -9 at moments drawn, and the rows of both backends
    python benchmarks/prepare.py voice FOLDER --model MODEL     from one work of an author to a voice, on the other work

Seconds are those of the processor. FOLDER of `voice` has a folder for each author with two works (`austen/emma.txt`):
the first author's first work is prepared and trained, unless --author names another one.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mindprint
from mindprint.config import BackendConfig, DataConfig, GenerationConfig, ModelConfig
from mindprint.data.render import render_sft
from mindprint.models.likelihoods import sum_texts
from mindprint.runs.opened import OpenedModel, open_base
from mindprint.voice.copying import Copying, measure_copying
from mindprint.voice.scoring import NotScored, VoiceReference, fit_scorer
from mindprint.writing.asking import BaseModel, Kept
from mindprint.writing.gathering import Options, gather
from mindprint.writing.making import MIX, make_rows
from mindprint.writing.passages import Passage
from mindprint.writing.templates import Templates

ROWS = ("sft.jsonl", "preferences.jsonl", "heldout.jsonl", "curriculum.yaml")
NOTHING = "Write something."
KILLS = 3
SCORED = 40
"""Passages and answers of each side that a voice figure is made from."""


def main() -> int:
    options = arguments()
    return 0 if options.command(options) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.set_defaults(command=reading, writing=None, words=200_000)
    commands = parser.add_subparsers()
    for name, command, words in (
        ("reading", reading, 200_000),
        ("throughput", throughput, 1_500),
        ("same", same, 1_500),
        ("voice", voice, 40_000),
    ):
        sub = commands.add_parser(name)
        sub.set_defaults(command=command)
        sub.add_argument("--words", type=int, default=words, help="words of the writing that are used")
        if name == "voice":
            sub.add_argument("folder", type=Path)
            sub.add_argument("--author")
            sub.add_argument("--sft-steps", type=int, default=200)
            sub.add_argument("--dpo-steps", type=int, default=50)
        else:
            sub.add_argument("--writing", type=Path, help="a folder or a file; default: text that is made here")
        if name != "reading":
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
            for limit in sorted({sampling.max_new_tokens for _, sampling, _, _ in asked}):
                calls = [entry for entry in asked if entry[1].max_new_tokens == limit]
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


def voice(options: argparse.Namespace) -> bool:
    """Prepare and train on one work, and measure on the author's other work."""
    authors = sorted(path for path in options.folder.iterdir() if path.is_dir())
    author = next(path for path in authors if options.author in (None, path.name))
    trained_work, other_work = sorted(author.glob("*.txt"))[:2]
    with tempfile.TemporaryDirectory() as name:
        project = Path(name) / "voice"
        writing = Path(name) / "work.txt"
        writing.write_text(first_words(trained_work, options.words), encoding="utf-8")
        clock = Clock()
        result = mindprint.prepare(writing, project, model=options.model, backend=options.backend)
        print(f"prepare: {result.gathered.words:,} words, rows {dict(result.counts)}, {clock()}", flush=True)
        has_pairs = result.counts["preferences.jsonl"] > 0
        mindprint.train(
            project,
            sft={"steps_per_topic": options.sft_steps},
            dpo={"enabled": has_pairs, "steps_per_topic": options.dpo_steps},
            evaluation={"levels": []},
            backend={"type": options.backend},
        )
        print(f"train: {options.sft_steps} steps of SFT, {options.dpo_steps * has_pairs} of DPO, {clock()}", flush=True)
        texts = [passage.text for passage in result.gathered.train]
        plain = continued(Path(name) / "plain", texts, options)
        print(f"continued training on the same text: {clock()}", flush=True)
        unseen = spread([passage.text for passage in passages_of(other_work)], SCORED)
        with mindprint.open_adapter(project) as opened:
            untuned, tuned = (perplexity(opened, unseen, adapter=adapter) for adapter in (False, True))
            prompts = [json.loads(line)["prompt"] for line in (project / "data" / "heldout.jsonl").open()][:SCORED]
            settings = GenerationConfig(max_new_tokens=160)
            before, after = (
                [answer.text for answer in opened.answer(prompts, settings, adapter=adapter)]
                for adapter in (False, True)
            )
        with mindprint.open_adapter(plain) as opened:
            kept_on = perplexity(opened, unseen, adapter=True)
        print(
            f"perplexity of {other_work.stem} ({len(unseen)} passages): untuned {untuned:.2f}, tuned {tuned:.2f} "
            f"({tuned / untuned:.3f} of it), after continued training {kept_on:.2f}; {clock()}"
        )
        area, copied = judged(before, after, other_work, [path for path in authors if path != author], texts)
        print(f"{len(prompts)} held-out prompts: AUC of tuned against untuned answers {area}, copied words {copied}")
        return tuned <= 0.85 * untuned and tuned < kept_on


def judged(
    before: Sequence[str], after: Sequence[str], own: Path, others: Sequence[Path], training: Sequence[str]
) -> tuple[str, str]:
    """Return the area under the curve of a scorer that knows other passages of the author, and the copied share."""
    copying = measure_copying(after, training)
    copied = f"{copying.copy_rate:.3f}" if isinstance(copying, Copying) else "not measured"
    people = [passage.text for author in others for work in sorted(author.glob("*.txt"))[:1] for passage in
              spread(list(passages_of(work)), SCORED)]  # fmt: skip
    reference = VoiceReference(
        tuple(passage.text for passage in spread(list(passages_of(own)), SCORED)), (), tuple(people)
    )
    scorer = fit_scorer(reference, passage_words=100)
    if isinstance(scorer, NotScored) or not after:
        return "not measured", copied
    higher, lower = scorer.decisions(after), scorer.decisions(before)
    wins = (higher[:, None] > lower[None, :]).mean() + 0.5 * (higher[:, None] == lower[None, :]).mean()
    return f"{wins:.3f}", copied


def continued(folder: Path, texts: Sequence[str], options: argparse.Namespace) -> Path:
    """Train on the same text without prompts, for as many steps as both stages together."""
    folder.mkdir()
    (folder / "mindprint.yaml").write_text(f"model: {json.dumps(str(model_path(options.model)))}\n", encoding="utf-8")
    mindprint.train(
        folder,
        rows=[{"text": text} for text in texts],
        data={"format": "raw"},
        sft={"steps_per_topic": options.sft_steps + options.dpo_steps, "learning_rate": 3e-4, "batch_size": 4},
        dpo={"enabled": False},
        evaluation={"levels": []},
        backend={"type": options.backend},
    )
    return folder


def perplexity(opened: OpenedModel, texts: Sequence[str], *, adapter: bool) -> float:
    """Return the perplexity of texts as answers to a prompt that says nothing."""
    rows = [mindprint.SftRow("main", NOTHING, text, mindprint.Origin("", 0)) for text in texts]
    examples = render_sft(rows, opened.tokenizer, DataConfig(max_length=10**6)).examples
    sums = sum_texts(opened.backend, opened.model, examples, opened.tokenizer.pad_id, adapter=adapter)
    return float(np.exp(-sums.sum() / sum(int(example.loss_mask.sum()) for example in examples)))


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


def first_words(path: Path, count: int) -> str:
    """Return the paragraphs at the beginning of a file that have `count` words together."""
    kept, size = [], 0
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        kept.append(paragraph)
        size += len(paragraph.split())
        if size >= count:
            break
    return "\n\n".join(kept)


def passages_of(work: Path) -> list[Passage]:
    return gather([work], Options(heldout=0)).train


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return `count` evenly spaced items."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


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
    return {name: (project / "data" / name).read_bytes() for name in ROWS}


def model_path(model: str) -> str | Path:
    return Path(model).resolve() if Path(model).is_dir() else model


class Clock:
    """Says the processor seconds since it was asked last."""

    def __init__(self) -> None:
        self._at = time.process_time()

    def __call__(self) -> str:
        now = time.process_time()
        seconds, self._at = now - self._at, now
        return f"{seconds:.0f} s of processor"


if __name__ == "__main__":
    raise SystemExit(main())
