"""`mindprint eval`: the voice on held-out pairs and in answers to their prompts, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from mindprint.cli.generate import backend_section, where
from mindprint.cli.output import emit, json_option, notice, say, table
from mindprint.cli.runs_table import show_compared
from mindprint.config import ConfigFile, DataConfig, make_config
from mindprint.data.render import PreferenceExample, render_preferences
from mindprint.data.rows import PreferenceRow, Rows, read_rows
from mindprint.data.tokenizer import Tokenizer
from mindprint.errors import DataError
from mindprint.inference import Located, OpenedAdapter, locate_adapter, open_adapter, read_heldout
from mindprint.plugins import load_scorers
from mindprint.voice.answers import answer_held_out, reference_of, unseen
from mindprint.voice.assessment import Assessed, Assessment, assess
from mindprint.voice.copying import Copying
from mindprint.voice.evaluation import Evaluation, Measured, evaluate_heldout
from mindprint.voice.scoring import NotScored, VoiceScore

HEADER = ("topic", "pairs", "prefers chosen", "a token", "margin", "perplexity", "reward accuracy")


@click.command("eval", short_help="Measure the voice.")
@click.argument("paths", metavar="[PATH]", nargs=-1, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Show the figures of two or more runs, given as PATHs, side by side.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Pairs to measure with; default: the project's.")
@click.option("--backend", help="auto, torch, mlx, ...; default: the run's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@click.option("--answers/--no-answers", default=True, show_default=True, help="Let it answer, and score the voice.")
@json_option
def command(
    *,
    paths: tuple[Path, ...],
    compare: bool,
    heldout: Path | None,
    backend: str | None,
    device: str | None,
    model: str | None,
    answers: bool,
    as_json: bool,
) -> None:
    """Measure the voice on held-out pairs, before and after training.

    PATH is a project (its newest complete run), the folder of a run, or that of an adapter.

    `prefers chosen` is the share of pairs whose chosen answer is the more probable as a whole, `a token` on the mean of
    its tokens; margins are log p(chosen) - log p(rejected) in nats, perplexity is that of the chosen answers. `reward
    accuracy` is the share of pairs in which training raised the chosen answer more than the rejected one.

    `voice` is that of the model's own answers to the held-out prompts, where 0 is the untuned model and 1 the person's
    held-out answers, with its 95 % interval; docs/voice.md says what it can tell. What cannot be scored says
    why.

    With --compare nothing is computed: the figures are those that each run's own final evaluation found.
    """
    if compare:
        show_compared(paths, as_json=as_json)
        return
    if len(paths) > 1:
        raise click.UsageError("one PATH is measured at a time; --compare shows runs side by side")
    path = paths[0] if paths else Path()
    file = _heldout_config(locate_adapter(path), heldout)
    rows = read_heldout(file).heldout
    if not rows:
        raise DataError(
            f"{path}: has no held-out pairs to measure with; add heldout.jsonl (rows with prompt, chosen, rejected "
            "that are in no training file) to the data folder, or name a file with --heldout"
        )
    with open_adapter(path, backend_section(backend, device), model=model, notice=notice) as opened:
        examples = _rendered(rows, opened.tokenizer, file.config.data)
        evaluation = evaluate_heldout(opened.backend, opened.model, examples, opened.tokenizer.pad_id)
        assessment = _assess(opened, file, rows) if answers else None
        facts = where(opened)
    if as_json:
        emit({**facts, **asdict(evaluation), "voice": asdict(assessment) if assessment else None})
        return
    _show(evaluation)
    if assessment:
        _show_voice(assessment)


def _assess(opened: OpenedAdapter, file: ConfigFile, held_out: tuple[PreferenceRow, ...]) -> Assessment:
    """Score the model's answers to prompts that it has not seen.

    An adapter that lies in no run has no training text to know the voice by: then nothing is scored, and it says so.
    """
    extra = load_scorers(file.config.voice.scorers)
    rows = Rows((), (), held_out) if opened.located.config is None else read_rows(file)
    scored = unseen(rows)
    if len(scored) < len(held_out):
        notice(f"{len(held_out) - len(scored)} held-out rows stand in the training data: not scored", warning=True)
    return assess(reference_of(rows), answer_held_out(opened, scored), extra=extra, seed=file.config.seed)


def _heldout_config(located: Located, heldout: Path | None) -> ConfigFile:
    file = located.config or make_config({"data": {"path": None}})
    if heldout is None:
        return file
    data = file.config.data.model_copy(update={"heldout": [str(heldout.resolve())]})
    return ConfigFile(file.config.model_copy(update={"data": data}), file.folder, str(heldout))


def _rendered(rows: Sequence[PreferenceRow], tokenizer: Tokenizer, data: DataConfig) -> Sequence[PreferenceExample]:
    rendered = render_preferences(rows, tokenizer, data)
    for note in rendered.notes:
        notice(note)
    return rendered.examples


def _show(evaluation: Evaluation) -> None:
    rows = [_row(topic, measured) for topic, measured in evaluation.topics.items()]
    say(table(HEADER, [*rows, _row("all", evaluation.overall)], numbers=range(1, len(HEADER))))
    if evaluation.overall.few:
        notice(f"{_few(evaluation.overall.pairs)}: read these figures as hints", warning=True)


def _few(pairs: int) -> str:
    return f"only {pairs} held-out pairs, so that one of them moves an accuracy by {1 / pairs:.0%}"


def _row(topic: str, measured: Measured) -> tuple[str, ...]:
    base, adapter = measured.base, measured.adapter
    return (
        topic,
        str(measured.pairs),
        f"{base.prefers_chosen:.0%} → {adapter.prefers_chosen:.0%}",
        f"{base.prefers_chosen_per_token:.0%} → {adapter.prefers_chosen_per_token:.0%}",
        f"{base.margin:+.1f} → {adapter.margin:+.1f}",
        f"{base.perplexity:.1f} → {adapter.perplexity:.1f}",
        f"{measured.reward_accuracy:.0%}",
    )


VOICE_HEADER = ("topic", "answers", "words", "voice untuned", "voice tuned", "copied", "longest copy", "length")


def _show_voice(assessment: Assessment) -> None:
    rows = [*assessment.topics.items(), ("all", assessment.overall)]
    say()
    say(table(VOICE_HEADER, [_voice_row(*row) for row in rows], numbers=range(1, len(VOICE_HEADER))))
    if isinstance(assessment.overall.tuned, NotScored):
        notice(f"the voice could not be scored: {assessment.overall.tuned.reason}", warning=True)
    for flag in getattr(assessment.overall.copying, "flagged", ()):
        notice(f"tuned model: {flag}", warning=True)


def _voice_row(topic: str, assessed: Assessed) -> tuple[str, ...]:
    tuned, copying = assessed.tuned, assessed.copying
    counts = (str(tuned.texts), str(tuned.words)) if isinstance(tuned, VoiceScore) else ("-", str(tuned.words))
    copied = ("-", "-", "-")
    if isinstance(copying, Copying):
        length = "-" if copying.length is None else f"{copying.length:.2f}"
        copied = (f"{copying.copy_rate:.0%}", f"{copying.longest.words} words", length)
    return (topic, *counts, _interval(assessed.untuned), _interval(tuned), *copied)


def _interval(score: VoiceScore | NotScored) -> str:
    if isinstance(score, NotScored):
        return "not scored"
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"
