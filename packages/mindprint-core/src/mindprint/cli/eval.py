"""`mindprint eval`: the voice on held-out pairs and in answers to their prompts, by both models."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.api import evaluate
from mindprint.cli.options import backend_option, device_option, model_option
from mindprint.cli.output import json_option, notice, show, tell_notice
from mindprint.cli.runs_table import show_compared
from mindprint.errors import DataError


@click.command("eval", short_help="Measure the voice.")
@click.argument("paths", metavar="[PATH]", nargs=-1, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Show the figures of two or more runs, given as PATHs, side by side.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Pairs to measure with; default: the project's.")
@backend_option
@device_option
@model_option
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
) -> int:
    """Measure the voice on held-out text, with the base model and with the tuned model.

    PATH is a project (its newest complete run), the folder of a run, or that of an adapter. Held out are the pairs of
    data.heldout, the rows that the split kept from training, and the questions of quizzes. Nothing is measured on rows
    that were trained.

    `preference accuracy` is the share of pairs whose chosen answer is more probable than the rejected one, `per token`
    the same by the mean over its tokens. The margin is log p(chosen) - log p(rejected) in nats, the perplexity that of
    the chosen answers. `reward accuracy` is the share of pairs in which training raised the chosen answer more than
    the rejected one. An arrow leads from the base model to the tuned model.

    `voice` is that of the model's own answers to the held-out prompts, where 0 is the base model and 1 the person's
    held-out answers, with its 95 % interval. docs/voice.md says how far it can be trusted. A figure that cannot be
    measured says why. `concepts` is the share of a quiz's key concepts that the answers mention.

    With --compare nothing is computed: the figures are those of each run's own final evaluation.
    """
    if compare:
        show_compared(paths, as_json=as_json)
        return 0
    # A run is measured with its own settings. `eval.x=1` of other commands must not be taken for a second folder.
    if given := [str(path) for path in paths if "=" in str(path) and not path.exists()]:
        raise click.UsageError(
            f"{given[0]} is a setting, and eval takes none: a run is measured with the settings of its config.yaml; "
            "train with others, or use --heldout, --no-answers, --backend, --device and --model"
        )
    if len(paths) > 1:
        raise click.UsageError("one PATH is measured at a time; --compare shows runs side by side")
    path = paths[0] if paths else Path()
    result = evaluate(
        path, heldout=heldout, answers=answers, backend=backend, device=device, model=model, on_notice=tell_notice
    )
    show(result, as_json=as_json)
    unevaluated = [f"not evaluated: {problem}" for problem in result.not_evaluated]
    # In JSON the figures themselves tell the other cautions.
    for caution in unevaluated if as_json else result.cautions():
        notice(caution, warning=True)
    return DataError.exit_code if unevaluated else 0
