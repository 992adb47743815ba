"""The voice of adapters: one trained on a person, and one on somebody else, both on the person's scale.

    python benchmarks/voice.py FOLDER --only smollm2 --model MODEL [--person doyle --other austen] [--steps 150]

MODEL is the folder of a base model, such as SmolLM2-135M-Instruct. Both adapters are trained alike, on passages of one
work of their author. The two authors who are left are the background. Prompts are beginnings of passages that were held
out, and answers are made as `mindprint eval` makes them. Must hold: the base model scores 0 ± 0.1, the person's
adapter between 0.3 and 1, and the other adapter at most half of that.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mindprint
from mindprint.data.rows import Rows
from mindprint.runs.opened import locate_adapter, open_adapter
from mindprint.voice.background import read_background
from mindprint.voice.evaluation import evaluate
from mindprint.voice.heldout import read_scored
from mindprint.voice.scoring import NotScored, VoiceScore

Works = Mapping[str, Sequence[Sequence[str]]]

PROMPT, ANSWER = 20, 100  # words of a passage that are the prompt, and that answer it
TRAINED, HELD_OUT = 200, 40  # passages
EDGES = 500  # words left out at both ends of a work
BACKGROUND = 20_000  # words of each author in the background


def compare_adapters(works: Works, model: str, person: str, other: str, steps: int) -> Iterator[tuple[str, str, bool]]:
    """Train both adapters, and yield each requirement with its figure and whether it holds."""
    with tempfile.TemporaryDirectory(prefix="mindprint-voice-") as name:
        folder = Path(name)
        background = folder / "people"
        background.mkdir()
        for author in works:
            if author not in (person, other):
                text = " ".join(works[author][0][EDGES : EDGES + BACKGROUND])
                (background / f"{author}.txt").write_text(text, encoding="utf-8")
        runs = {author: _train(works, author, model, background, folder / author, steps) for author in (person, other)}
        scores = {author: _scores(runs[person], run) for author, run in runs.items()}
    base, right = scores[person]
    wrong = scores[other][1]
    for whose, score in (("base model", base), (f"adapter of {person}", right), (f"adapter of {other}", wrong)):
        print(f"  {whose:24s}{_shown(score)}", flush=True)
    values = [score.value if isinstance(score, VoiceScore) else float("nan") for score in (base, right, wrong)]
    yield "the base model scores 0 ± 0.1", f"{values[0]:.2f}", abs(values[0]) <= 0.1
    yield f"the adapter of {person} scores 0.3 to 1", f"{values[1]:.2f}", 0.3 <= values[1] <= 1
    yield f"the adapter of {other} scores at most half of it", f"{values[2]:.2f}", values[2] <= values[1] / 2


def _train(works: Works, author: str, model: str, background: Path, project: Path, steps: int) -> Path:
    data = project / "data"
    data.mkdir(parents=True)
    # Whole passages, one after the other: the held-out ones are from the end of the work.
    words = works[author][0][EDGES:-EDGES]
    length = PROMPT + ANSWER
    starts = range(0, len(words) - length, length)
    passages = [words[start : start + length] for start in starts]
    for name, part in (("sft", passages[:TRAINED]), ("heldout", passages[-HELD_OUT:])):
        with (data / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for passage in part:
                file.write(json.dumps(_row(passage, pair=name == "heldout")) + "\n")
    config = {
        "model": {"name": model},
        "backend": {"dtype": "float32"},
        "data": {"path": str(data), "heldout_fraction": 0},
        "sft": {"steps_per_topic": steps},
        "dpo": {"enabled": False},
        "voice": {"background": [str(background)]},
        "evaluation": {"levels": []},
    }
    return Path(mindprint.train(config, run=project / "run").run)


def _row(passage: Sequence[str], *, pair: bool) -> dict[str, str]:
    prompt, answer = " ".join(passage[:PROMPT]), " ".join(passage[PROMPT:])
    row = {"topic": "prose", "prompt": f"Continue this text: {prompt}"}
    # A held-out row is a pair. Its rejected answer is read for an accuracy that is not looked at here.
    return row | ({"chosen": answer, "rejected": "I cannot continue this text."} if pair else {"completion": answer})


def _scores(person: Path, adapter: Path) -> tuple[VoiceScore | NotScored, VoiceScore | NotScored]:
    """Return the scores of the base model and of an adapter, on the scale and the prompts of the person's run."""
    scored = read_scored(locate_adapter(person))
    train: Rows = scored.train
    people = read_background(scored.file, [str(row.completion) for row in train.sft])
    with open_adapter(adapter) as opened:
        found = evaluate(opened, opened.tokenizer, scored.held_out, train, scored.file.config, people=people)
    if found.voice is None:
        raise SystemExit("no voice was scored: there are no held-out prompts")
    return found.voice.overall.base, found.voice.overall.tuned


def _shown(score: VoiceScore | NotScored) -> str:
    if isinstance(score, NotScored):
        return f"not scored: {score.reason}"
    failed = "".join(f", {count} answers: {reason}" for reason, count in score.failed.items())
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f}), {score.texts} answers{failed}"
