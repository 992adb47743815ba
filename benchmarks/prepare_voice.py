"""From one work of an author to a voice, with two commands, measured on the author's other work.

    python benchmarks/prepare.py voice FOLDER --model MODEL       perplexity, held-out prompts, copying
    python benchmarks/prepare.py rewriting FOLDER --model MODEL   plain texts in the person's voice
    python benchmarks/prepare.py pairs FOLDER --model MODEL       pairs on policy next to those of the base model
    python benchmarks/prepare.py settings FOLDER --model MODEL    figures by words, learning rate and passes

FOLDER has a folder for each author with two works (`doyle/hound.txt`). One work of --author is prepared and trained as
`mindprint prepare` and `mindprint train` do it. The other work is only measured with, and the other authors teach the
scorer the prose of other people. --into DIR keeps everything and uses what it holds, so that a measurement
can be stopped and continued, and all commands measure one adapter.

--words, --limit, --steps and --no-evaluation make a small trial of it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import mindprint
from mindprint.config import DataConfig, GenerationConfig, load_config
from mindprint.data.render import render_sft
from mindprint.models.likelihoods import sum_texts
from mindprint.runs.folder import RunFolder, newest_run
from mindprint.runs.opened import OpenedModel
from mindprint.sampling import ENOUGH_PENALTY
from mindprint.voice.copying import Copying, measure_copying
from mindprint.voice.scoring import NotScored, VoiceReference, VoiceScore, VoiceScorer, fit_scorer
from mindprint.writing.asking import BaseModel, Kept
from mindprint.writing.checks import unfit_rewriting, up_to_sentence
from mindprint.writing.gathering import Options, gather
from mindprint.writing.keywords import keywords
from mindprint.writing.making import last_words, rewritten_texts
from mindprint.writing.templates import Templates

NOTHING = "Write something."
REFERENCE = 150
"""Passages of each author on which a scorer is fitted."""

SCORED_WORDS = 100
"""Words of the passages that a scorer compares."""

LONGEST_ANSWER = 220
"""Tokens: about the words of a passage."""

RATIO, AREA, COPIED, CONTENT, MOVED = 0.85, 0.9, 0.1, 0.8, 0.3
"""What must hold: see the functions below."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every measurement of a voice has."""
    parser.add_argument("folder", type=Path, help="a folder with a folder of two works for each author")
    parser.add_argument("--author", help="whose voice is trained; default: the first author")
    parser.add_argument("--swap", action="store_true", help="train on the second work and measure on the first")
    parser.add_argument("--into", type=Path, help="keep everything here, and use what an earlier call left")
    parser.add_argument("--limit", type=int, default=60, help="passages and answers behind each figure")
    parser.add_argument("--steps", type=int, help="steps of SFT, and a third as many of DPO; default: as prepared")
    parser.add_argument("--no-evaluation", action="store_true", help="train without the run's own evaluations")


@dataclass(frozen=True)
class Works:
    """The work that is trained, the author's other work, and the works of other authors."""

    trained: Path
    other: Path
    others: tuple[Path, ...]


def voice(options: argparse.Namespace) -> bool:
    """Print perplexity, area under the curve and copying of an adapter that two commands made of one work."""
    works = works_of(options)
    with kept_folder(options) as folder:
        project = trained(folder, works, options)
        texts = [row["completion"] for row in rows_of(project, "sft") if "completion" in row]
        unseen = spread(passages_of(works.other), options.limit)
        prompts = unseen_prompts(project, works, options.limit)
        clock = Clock()
        with mindprint.open_adapter(project) as opened:
            untuned, tuned = (perplexities(opened, unseen, adapter=adapter) for adapter in (False, True))
            before, after = (answers_of(opened, prompts, adapter=adapter) for adapter in (False, True))
        print(f"measured the adapter: {clock()}", flush=True)
        scorer = scorer_of(works, project, unseen)
        area = area_under(scorer, after, before)
        only_people = area_under(scorer_of(works, None, unseen), after, before)
        copying = measure_copying(after, texts)
        copied = copying.copy_rate if isinstance(copying, Copying) else float("nan")
        print(f"{len(prompts)} held-out prompts: AUC of tuned against untuned answers {area:.3f}")
        print(f"  with a scorer that has never seen an answer of the base model: {only_people:.3f}")
        print(f"  words in a verbatim overlap of 8 or more with the training text: {copied:.3f}")
        print(f"perplexity of {len(unseen)} passages of {works.other.stem}:")
        print_perplexity("untuned", untuned, untuned)
        print_perplexity("prepared and trained", tuned, untuned)
        with mindprint.open_adapter(continued(folder, project, options)) as opened:
            plain = perplexities(opened, unseen, adapter=True)
        print_perplexity("continued training", plain, untuned)
    return holds(
        (f"the perplexity is at most {RATIO} of the untuned model's", tuned["answer"] <= RATIO * untuned["answer"]),
        ("it is below that after continued training", tuned["answer"] < plain["answer"]),
        (f"AUC is at least {AREA}", area >= AREA),
        (f"copied words are below {COPIED}", copied < COPIED),
    )


def rewriting(options: argparse.Namespace) -> bool:
    """Let the adapter rewrite plain texts of the other work: the content that is kept, and the voice that is moved."""
    works = works_of(options)
    with kept_folder(options) as folder:
        project = trained(folder, works, options)
        clock, templates = Clock(), Templates()
        # Twice as many, because a small base model's plain texts are often unfit.
        passages = spread(passages_of(works.other), 2 * options.limit)
        with mindprint.open_adapter(project) as opened, Kept(folder / "rewriting.jsonl") as kept:
            base = BaseModel(opened, kept, progress)
            plain = rewritten_texts(passages, base, templates)
            asked = templates.texts["rewrite"]
            fit = [place for place, text in enumerate(plain) if not unfit_rewriting(text, passages[place], asked)]
            pairs = [(passages[place], plain[place]) for place in fit[: options.limit]]
            prompts = [templates.fill("ask-rewrite", text) for _, text in pairs]
            untuned, tuned = (answers_of(opened, prompts, adapter=adapter) for adapter in (False, True))
        print(f"{len(fit)} of {len(passages)} plain texts serve, {len(pairs)} were rewritten: {clock()}", flush=True)
        own, plain_texts = [passage for passage, _ in pairs], [text for _, text in pairs]
        scorer = scorer_of(works, project, passages)
        scale = scorer.calibrated(floor=plain_texts, ceiling=own)
        if isinstance(scale, NotScored):
            print(f"no voice score: {scale.reason}")
            return False
        print("                        content   of the plain text's   voice (0: plain texts, 1: the person)")
        content, values = {}, {}
        for name, texts in (("plain text", plain_texts), ("untuned rewriting", untuned), ("tuned rewriting", tuned)):
            score = scale.score(texts)
            content[name] = shared_names(own, texts)
            values[name] = score.value if isinstance(score, VoiceScore) else float("nan")
            share = content[name] / content["plain text"] if content["plain text"] else float("nan")
            print(f"  {name:22s}{content[name]:.3f}     {share:.3f}                 {values[name]:.3f}", flush=True)
    kept_content = content["tuned rewriting"] >= CONTENT * content["plain text"]
    return holds(
        (f"content is at least {CONTENT} of the plain text's", kept_content),
        (f"the voice moves by at least {MOVED}", values["tuned rewriting"] - values["plain text"] >= MOVED),
    )


def pairs(options: argparse.Namespace) -> bool:
    """Train DPO on the model's own answers instead of the base model's, for as many steps, and compare the voices."""
    works = works_of(options)
    with kept_folder(options) as folder:
        project, clock = trained(folder, works, options), Clock()
        run = finished_run(project, {})
        prompts = unseen_prompts(project, works, options.limit)
        own = spread(passages_of(works.other), options.limit)
        steps = [line for line in run.read_steps() if not line.get("rolled_back")]
        taken = {stage: sum(line["stage"] == stage for line in steps) for stage in ("sft", "dpo")}
        if not taken["dpo"]:
            print("the project took no DPO steps, so there is nothing to compare")
            return False
        # The checkpoint at the start of the last stage is kept: the adapter after SFT alone.
        first = next(line for line in steps if line["stage"] == "dpo")
        after_sft = run.checkpoints / f"{first['step'] - first['stage_step']:06d}"
        config = load_config(run.config)
        adapter = config.config.adapter.model_copy(update={"start_from": str(after_sft)})
        other = RunFolder(folder / "on_policy" / "runs" / "run-001")
        if not other.complete:
            other.path.parent.mkdir(parents=True, exist_ok=True)
            mindprint.train(
                config,
                run=other.path,
                resume=other.holds_run,
                progress=True,
                adapter=adapter.model_dump(),
                sft={"enabled": False},
                dpo={"pairs": "on_policy", "steps_per_topic": taken["dpo"], "epochs_per_topic": None},
                evaluation={"levels": []},
            )
        answered = {}
        adapters = {
            "after SFT": after_sft,
            "base model's pairs": run.path,
            "pairs on policy": other.path,
        }
        for name, path in adapters.items():
            with mindprint.open_adapter(path) as opened:
                if not answered:
                    answered["untuned"] = answers_of(opened, prompts, adapter=False)
                answered[name] = answers_of(opened, prompts, adapter=True)
        print(f"{taken['dpo']} steps of DPO each, {len(prompts)} held-out prompts: {clock()}", flush=True)
        scale = scorer_of(works, project, own).calibrated(floor=answered["untuned"], ceiling=own)
        if isinstance(scale, NotScored):
            print(f"no voice score: {scale.reason}")
            return False
        values = {}
        for name, texts in answered.items():
            score = scale.score(texts)
            if isinstance(score, NotScored):
                print(f"  {name:22s}not scored: {score.reason}")
                return False
            values[name] = score.value
            print(f"  {name:22s}{score.value:.3f} ({score.low:.3f} to {score.high:.3f})", flush=True)
    better = values["pairs on policy"] > values["base model's pairs"]
    return holds(("pairs on policy give a higher voice than the base model's", better))


def settings(options: argparse.Namespace) -> bool:
    """Print perplexity and voice by words, learning rate and passes over the rows, to find settings that suit.

    An adapter is trained once for each rate, and measured after each pass, at a checkpoint. DPO starts from the
    checkpoint whose perplexity is the lowest.
    """
    works = works_of(options)
    with kept_folder(options) as folder:
        earlier: Path | None = None
        for words in sorted(options.sizes):
            project = folder / f"words-{words}" / "voice"
            answers = project / "data" / "prepare.jsonl"
            # The base model's answers about the words that the smaller size has too.
            if earlier and not answers.exists():
                answers.parent.mkdir(parents=True)
                shutil.copy(earlier, answers)
            earlier = answers
            writing = folder / "writing" / works.trained.name
            writing.parent.mkdir(parents=True, exist_ok=True)
            writing.write_text(first_words(works.trained, words), encoding="utf-8")
            result = mindprint.prepare(
                writing, project, model=str(model_path(options.model)), backend=options.backend, on_batch=progress
            )
            proposed = load_config(project).config
            print(
                f"{words:,} words: rows {dict(result.counts)}; proposed: {proposed.sft.epochs_per_topic} passes at "
                f"{proposed.sft.learning_rate:g}, {proposed.dpo.steps_per_topic} steps of DPO at "
                f"{proposed.dpo.learning_rate:g}",
                flush=True,
            )
            per_pass = math.ceil(result.counts["sft.jsonl"] / proposed.sft.batch_size)
            scores: dict[Path, float] = {}
            for rate in options.rates:
                run = explored(project, f"sft-{rate:g}", per_pass, per_pass * options.passes, sft_rate=rate)
                scores |= measured_run(run, f"SFT at {rate:g}", "pass", per_pass, project, works, options)
            best = min(scores, key=lambda path: scores[path])
            steps = max(1, proposed.dpo.steps_per_topic or 1)
            for rate in options.dpo_rates if result.counts["preferences.jsonl"] else ():
                run = explored(project, f"dpo-{rate:g}", steps, 2 * steps, dpo_rate=rate, start=best)
                measured_run(run, f"DPO at {rate:g}", f"{steps} steps", steps, project, works, options)
    return True


def explored(
    project: Path,
    name: str,
    every: int,
    steps: int,
    *,
    sft_rate: float | None = None,
    dpo_rate: float | None = None,
    start: Path | None = None,
) -> RunFolder:
    """Return a run of one stage with a checkpoint every few steps, trained unless it is complete."""
    run = project / "runs" / name
    if RunFolder(run).complete:
        return RunFolder(run)
    file = load_config(project)
    adapter = file.config.adapter.model_copy(update={"start_from": str(start) if start else None})
    length = {"steps_per_topic": steps, "epochs_per_topic": None}
    mindprint.train(
        file,
        run=run,
        resume=RunFolder(run).holds_run,
        progress=True,
        adapter=adapter.model_dump(),
        sft={"enabled": sft_rate is not None, **length, **({"learning_rate": sft_rate} if sft_rate else {})},
        dpo={"enabled": dpo_rate is not None, **length, **({"learning_rate": dpo_rate} if dpo_rate else {})},
        checkpoints={"every": every, "keep": steps // every + 1},
        evaluation={"levels": []},
    )
    return RunFolder(run)


def measured_run(
    run: RunFolder,
    title: str,
    unit: str,
    every: int,
    project: Path,
    works: Works,
    options: argparse.Namespace,
) -> dict[Path, float]:
    """Print the figures of each checkpoint of a run, and return the perplexities by their folders."""
    unseen = spread(passages_of(works.other), options.limit)
    prompts = unseen_prompts(project, works, options.limit)
    training = [row["completion"] for row in rows_of(project, "sft") if "completion" in row]
    scorer = scorer_of(works, project, unseen)
    scores: dict[Path, float] = {}
    untuned: dict[str, float] = {}
    before: list[str] = []
    checkpoints = sorted(path for path in run.checkpoints.iterdir() if path.name.isdigit() and int(path.name))
    for path in checkpoints:
        with mindprint.open_adapter(path) as opened:
            if not untuned:
                untuned = perplexities(opened, unseen, adapter=False)
                before = answers_of(opened, prompts, adapter=False)
            tuned = perplexities(opened, unseen, adapter=True)
            after = answers_of(opened, prompts, adapter=True)
        copying = measure_copying(after, training)
        copied = copying.copy_rate if isinstance(copying, Copying) else float("nan")
        scores[path] = tuned["answer"]
        print(
            f"  {title}, {int(path.name) / every:g} × {unit}: perplexity {tuned['answer'] / untuned['answer']:.3f} of "
            f"the untuned model's, AUC {area_under(scorer, after, before):.3f}, copied {copied:.3f}",
            flush=True,
        )
    return scores


def works_of(options: argparse.Namespace) -> Works:
    """Return the works in the folder by their parts. The first author is trained unless another one is named."""
    authors = sorted(path for path in options.folder.iterdir() if path.is_dir())
    chosen = [path for path in authors if options.author in (None, path.name)]
    if not chosen or len(sorted(chosen[0].glob("*.txt"))) < 2:
        raise SystemExit(f"{options.folder}: has no author with two works {options.author or ''}")
    first, second = sorted(chosen[0].glob("*.txt"))[:2]
    trained_work, other = (second, first) if options.swap else (first, second)
    others = tuple(min(path.glob("*.txt")) for path in authors if path != chosen[0])
    return Works(trained_work, other, others)


def trained(folder: Path, works: Works, options: argparse.Namespace) -> Path:
    """Return the project with a complete run, made by what `mindprint prepare` and `mindprint train` call."""
    project, clock = folder / "voice", Clock()
    earlier = newest_run(project / "runs")
    if earlier is not None and RunFolder(earlier).complete:
        return project
    writing = folder / "writing" / works.trained.name
    writing.parent.mkdir(parents=True, exist_ok=True)
    writing.write_text(first_words(works.trained, options.words), encoding="utf-8")
    result = mindprint.prepare(
        writing, project, model=str(model_path(options.model)), backend=options.backend, on_batch=progress
    )
    print(f"prepare: {result.gathered.words:,} words, rows {dict(result.counts)}, {clock()}", flush=True)
    changes: dict[str, Any] = {"evaluation": {"levels": []}} if options.no_evaluation else {}
    if options.steps:
        pairs = result.counts["preferences.jsonl"] > 0
        changes["sft"] = {"steps_per_topic": options.steps, "epochs_per_topic": None}
        changes["dpo"] = {"steps_per_topic": max(1, options.steps // 3), "epochs_per_topic": None, "enabled": pairs}
    run = finished_run(project, changes)
    taken = [line for line in run.read_steps() if not line.get("rolled_back")]
    stages = {stage: sum(line["stage"] == stage for line in taken) for stage in ("sft", "dpo")}
    print(f"train: {stages['sft']} steps of SFT, {stages['dpo']} of DPO, {clock()}", flush=True)
    return project


def continued(folder: Path, project: Path, options: argparse.Namespace) -> Path:
    """Return a project that was trained on the same text without prompts, for as many steps of as many rows."""
    plain, clock = folder / "plain", Clock()
    run = newest_run(project / "runs")
    assert run is not None
    steps = sum(not line.get("rolled_back") for line in RunFolder(run).read_steps())
    prepared = load_config(project).config
    settings = prepared.sft
    if not (plain / "mindprint.yaml").is_file():
        (plain / "data").mkdir(parents=True)
        lines = [json.dumps({"text": row["completion"]}) + "\n" for row in rows_of(project, "sft")]
        (plain / "data" / "sft.jsonl").write_text("".join(lines), encoding="utf-8")
        config = {
            "model": {"name": str(model_path(options.model))},
            "backend": {"type": options.backend, "dtype": prepared.backend.dtype},
            "data": {"format": "raw", "heldout_fraction": 0},
            "sft": {
                "steps_per_topic": steps,
                "learning_rate": settings.learning_rate,
                "batch_size": settings.batch_size,
                "schedule": settings.schedule,
                "warmup_steps": settings.warmup_steps,
            },
            "dpo": {"enabled": False},
            "evaluation": {"levels": []},
        }
        # JSON is YAML.
        (plain / "mindprint.yaml").write_text(json.dumps(config), encoding="utf-8")
    finished_run(plain, {})
    print(f"continued training on the same text: {steps} steps, {clock()}", flush=True)
    return plain


def finished_run(project: Path, changes: Mapping[str, Any]) -> RunFolder:
    """Return the project's newest run, begun or continued if it is not complete."""
    newest = newest_run(project / "runs")
    if newest is None or not RunFolder(newest).complete:
        mindprint.train(project, resume=newest is not None, **({} if newest else changes), progress=True)
    newest = newest_run(project / "runs")
    assert newest is not None
    return RunFolder(newest)


def perplexities(opened: OpenedModel, texts: Sequence[str], *, adapter: bool) -> dict[str, float]:
    """Return the perplexity of texts as the answer to a prompt that says nothing, and as plain text.

    The rows that were trained are answers, and continued training read plain text: each is best in its own form.
    """
    forms: dict[str, tuple[str | None, Literal["chat", "raw"]]] = {"answer": (NOTHING, "chat"), "plain": (None, "raw")}
    values = {}
    for name, (prompt, form) in forms.items():
        rows = [mindprint.SftRow("main", prompt, text, mindprint.Origin("", 0)) for text in texts]
        settings = DataConfig(max_length=10**6, format=form)
        examples = render_sft(rows, opened.tokenizer, settings).examples
        sums = sum_texts(opened.backend, opened.model, examples, opened.tokenizer.pad_id, adapter=adapter)
        values[name] = float(np.exp(-sums.sum() / sum(int(example.loss_mask.sum()) for example in examples)))
    return values


def print_perplexity(name: str, values: Mapping[str, float], untuned: Mapping[str, float]) -> None:
    """Print perplexities by the form of the text, and their shares of the untuned model's."""
    shares = ", ".join(f"{values[form] / untuned[form]:.3f}" for form in values)
    shown = ", ".join(f"{form} {value:.2f}" for form, value in values.items())
    print(f"  {name:22s}{shown} (of untuned: {shares})", flush=True)


def answers_of(opened: OpenedModel, prompts: Sequence[Any], *, adapter: bool) -> list[str]:
    """Return greedy answers with the penalty of a new project, up to their last whole sentence."""
    settings = GenerationConfig(max_new_tokens=LONGEST_ANSWER, repetition_penalty=ENOUGH_PENALTY)
    # Sorted by length and a few at once, so that progress can be shown.
    order = sorted(range(len(prompts)), key=lambda place: len(str(prompts[place])))
    answers = [""] * len(prompts)
    for start in range(0, len(order), 16):
        places = order[start : start + 16]
        made = opened.answer([prompts[place] for place in places], settings, adapter=adapter)
        for place, answer in zip(places, made, strict=True):
            answers[place] = up_to_sentence(answer.text)
        progress("answers with the adapter" if adapter else "answers without it", start + len(places), len(order))
    return answers


def unseen_prompts(project: Path, works: Works, count: int) -> list[str]:
    """Return the prompts of the held-out rows, and prompts of the author's other work, `count` in all.

    One work holds out too few. Of passages of the other work every second one gives its names and long words as a
    topic, the others the words before them as a text to continue: the two kinds of row that need no model.
    """
    prompts = [row["prompt"] for row in rows_of(project, "heldout")][:count]
    templates = Templates()
    passages = gather([works.other], Options(heldout=0)).train
    # More than are asked for, because a passage at the beginning of a chapter has nothing before it.
    for place, passage in enumerate(spread(passages, 2 * count)):
        if place % 2:
            prompts.append(templates.fill("ask-topic", ", ".join(keywords(passage.text))))
        elif passage.before:
            prompts.append(templates.fill("ask-continue", last_words(passage.before)))
    return spread(prompts, count)


def scorer_of(works: Works, project: Path | None, measured: Sequence[str]) -> VoiceScorer:
    """Return a scorer fitted on passages of the other work that are not measured, none of which was trained.

    The background is prose of the other authors, and, of a project, the base model's answers to its training prompts.
    """
    seen = set(measured)
    own = spread([text for text in passages_of(works.other) if text not in seen], REFERENCE)
    people = [text for work in works.others for text in spread(passages_of(work), REFERENCE // len(works.others))]
    answers = [row["rejected"] for row in rows_of(project, "preferences")] if project else []
    reference = VoiceReference(tuple(own), tuple(spread(answers, REFERENCE)), tuple(people))
    scorer = fit_scorer(reference, passage_words=SCORED_WORDS)
    if isinstance(scorer, NotScored):
        raise SystemExit(scorer.reason)
    return scorer


def area_under(scorer: VoiceScorer, higher: Sequence[str], lower: Sequence[str]) -> float:
    """Return the share of pairs of an answer of each side in which the first is more like the person; a tie is half."""
    above, below = (decided[~np.isnan(decided)] for decided in map(scorer.decisions, (higher, lower)))
    if not len(above) or not len(below):
        return float("nan")
    return float((above[:, None] > below).mean() + 0.5 * (above[:, None] == below).mean())


_NAME = re.compile(r"(?<=[^\s.!?:\"“”'‘’]\s)[A-Z][\w’'-]{2,}|\d[\d.,:]*\d|\d")
_ANY_NAME = re.compile(r"[A-Z][\w’'-]{2,}|\d[\d.,:]*\d|\d")


def shared_names(originals: Sequence[str], texts: Sequence[str]) -> float:
    """Return the share of character 3-grams of the originals' names and numbers that are in those of the texts.

    A name is a word with a capital letter within a sentence. In the texts any such word counts, wherever it is.
    """
    shared = total = 0
    for original, text in zip(originals, texts, strict=True):
        wanted, present = _grams(_NAME.findall(original)), _grams(_ANY_NAME.findall(text))
        shared += len(wanted & present)
        total += len(wanted)
    return shared / total if total else float("nan")


def _grams(names: Sequence[str]) -> set[str]:
    return {f" {name} "[at : at + 3] for name in names for at in range(len(name))}


@contextmanager
def kept_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of --into, or a temporary one."""
    if options.into is not None:
        options.into.mkdir(parents=True, exist_ok=True)
        yield options.into.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def passages_of(work: Path) -> list[str]:
    return [passage.text for passage in gather([work], Options(heldout=0)).train]


def rows_of(project: Path, name: str) -> list[dict[str, Any]]:
    file = project / "data" / f"{name}.jsonl"
    # A file without rows is not written.
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    return [json.loads(line) for line in lines if line]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return `count` evenly spaced items."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def first_words(path: Path, count: int) -> str:
    """Return the paragraphs at the beginning of a file that have `count` words together."""
    kept, size = [], 0
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        kept.append(paragraph)
        size += len(paragraph.split())
        if size >= count:
            break
    return "\n\n".join(kept)


def model_path(model: str) -> str | Path:
    return Path(model).resolve() if Path(model).is_dir() else model


def holds(*bounds: tuple[str, bool]) -> bool:
    """Print each bound and whether it holds."""
    for name, held in bounds:
        print(f"{'holds' if held else 'DOES NOT HOLD'}: {name}", flush=True)
    return all(held for _, held in bounds)


def progress(kind: str, done: int, total: int) -> None:
    print(f"  {kind}: {done} of {total}, {time.process_time():.0f} s", flush=True)


class Clock:
    """Says the processor seconds since it was asked last."""

    def __init__(self) -> None:
        self._at = time.process_time()

    def __call__(self) -> str:
        now = time.process_time()
        seconds, self._at = now - self._at, now
        return f"{seconds:.0f} s of processor"
