"""`mindprint generate`: the same prompts without and with the adapter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindprint.cli.output import emit, json_option, notice, say
from mindprint.config import BackendConfig, GenerationConfig
from mindprint.errors import DataError
from mindprint.runs.opened import Answer, OpenedAdapter, open_adapter

WIDE = 80
"""Columns of a terminal from which answers stand side by side."""

Only = Literal["base", "adapter"]


@dataclass(frozen=True)
class Answered:
    """A prompt with both answers; None where it was not asked for."""

    prompt: str
    base: Answer | None
    adapter: Answer | None

    def as_json(self) -> dict[str, Any]:
        sides = {"base": self.base, "adapter": self.adapter}
        return {
            "prompt": self.prompt,
            **{name: answer.text if answer else None for name, answer in sides.items()},
            "stop_reasons": {name: answer.stop_reason if answer else None for name, answer in sides.items()},
        }


@click.command("generate", short_help="Answer prompts.")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to answer; repeatable; - reads it.")
@click.option("--only", type=click.Choice(["base", "adapter"]), help="Answer with one of the two alone.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer; default: the run's setting.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy; default: the run's setting.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Nucleus sampling; likewise.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option("--backend", help="auto, torch, mlx, ...; default: the run's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal; default: the run's.")
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@json_option
def command(
    *,
    path: Path,
    prompts: tuple[str, ...],
    only: Only | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    backend: str | None,
    device: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Answer prompts without and with the adapter, side by side.

    PATH is a project (its newest complete run), the folder of a run, or that of an adapter.
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    texts = _read(prompts)
    with open_adapter(path, backend_section(backend, device), model=model, notice=notice) as opened:
        settings = _settings(opened.config.generation, given)
        answers = _answers(opened, texts, settings, seed, only)
        facts = where(opened)
    if as_json:
        emit({**facts, "prompts": [answer.as_json() for answer in answers]})
        return
    for answer in answers:
        _show(answer, only)


def backend_section(backend: str | None, device: str | None) -> BackendConfig | None:
    """The backend section that options ask for, None to leave it to the run."""
    if backend is None and device is None:
        return None
    return BackendConfig(type=backend or "auto", device=device or "auto")


def where(opened: OpenedAdapter) -> dict[str, Any]:
    """What a result was obtained with."""
    name, device, dtype = opened.placement.key
    adapter = str(opened.located.adapter.resolve())
    return {"adapter_folder": adapter, "model": opened.base.name, "backend": name, "device": device, "dtype": dtype}


def _read(prompts: Sequence[str]) -> list[str]:
    if prompts.count("-") > 1:
        raise click.UsageError("--prompt - reads standard input, which can be read once")
    texts = [sys.stdin.read().strip() if prompt == "-" else prompt for prompt in prompts]
    if not all(text.strip() for text in texts):
        raise DataError("--prompt: is empty")
    return texts


def _settings(configured: GenerationConfig, given: dict[str, Any]) -> GenerationConfig:
    return configured.model_copy(update={name: value for name, value in given.items() if value is not None})


def _answers(
    opened: OpenedAdapter, prompts: Sequence[str], settings: GenerationConfig, seed: int, only: Only | None
) -> list[Answered]:
    nothing = (None,) * len(prompts)
    base = nothing if only == "adapter" else opened.answer(prompts, settings, seed=seed, adapter=False)
    adapter = nothing if only == "base" else opened.answer(prompts, settings, seed=seed)
    return [Answered(*one) for one in zip(prompts, base, adapter, strict=True)]


# --- showing ---------------------------------------------------------------------------------------------------------


def _show(answered: Answered, only: Only | None) -> None:
    console = Console()
    if only is None and console.is_terminal and console.width >= WIDE:
        console.print(_side_by_side(answered))
        return
    say(f"prompt: {answered.prompt}\n")
    for title, answer in (("without the adapter", answered.base), ("with the adapter", answered.adapter)):
        if answer is not None:
            say(f"{title}:\n{_text(answer)}\n")


def _side_by_side(answered: Answered) -> Table:
    shown = Table(title=Text(answered.prompt), title_justify="left", expand=True, show_lines=False)
    shown.add_column("without the adapter", ratio=1)
    shown.add_column("with the adapter", ratio=1)
    assert answered.base is not None
    assert answered.adapter is not None
    shown.add_row(Text(_text(answered.base)), Text(_text(answered.adapter)))
    return shown


def _text(answer: Answer) -> str:
    """An answer as a terminal may have it: what a model says must not move the cursor."""
    shown = "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in answer.text)
    return shown + (" […]" if answer.stop_reason == "length" else "")
