"""Talk to a trained adapter: open it, or answer a few prompts without and with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Literal

from mindprint.api.options import Notices, OnNotice, backend_section
from mindprint.api.results import AnsweredPrompt, GenerateResult, Source
from mindprint.contract import Dtype
from mindprint.errors import DataError
from mindprint.runs import opened as runs_opened
from mindprint.runs.opened import Answer, OpenedAdapter, OpenedModel


@contextmanager
def open_adapter(
    path: str | PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    model: str | None = None,
    on_notice: OnNotice | None = None,
) -> Iterator[OpenedAdapter]:
    """Load a base model and its adapter, for as long as the `with` block lasts.

    Args:
        path: A project (its newest complete run), the folder of a run, or the folder of an adapter.
        backend: `torch`, `mlx`, or any installed backend. Default: the run's.
        device: `cpu`, `cuda`, `mps`, `metal`. Default: the run's.
        dtype: `float32`, `bfloat16` or `float16`. Default: the run's. Taken only with `backend` or `device`.
        model: Where the base model is, if not where the run or the adapter says.
        on_notice: Receives messages about loading as they come.

    Returns:
        A context manager. It gives an `OpenedAdapter`, whose `answer(prompts)` answers with the adapter and
        `answer(prompts, adapter=False)` without it.

    Raises:
        MindprintError: The adapter or its base model cannot be found, read or loaded.

    Example:
        >>> with mindprint.open_adapter("my-voice") as voice:
        ...     answers = voice.answer(["Is the tide in?", "Where is the rope?"])
        >>> [type(answer.text) for answer in answers]
        [<class 'str'>, <class 'str'>]
    """
    section = backend_section(backend, device, dtype)
    with runs_opened.open_adapter(path, section, model=model, notice=Notices(on_notice)) as opened:
        yield opened


def generate(
    path: str | PathLike[str],
    prompts: str | Sequence[str],
    *,
    only: Literal["base", "tuned", "adapter"] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    device: str | None = None,
    model: str | None = None,
    on_notice: OnNotice | None = None,
) -> GenerateResult:
    """Answer prompts without and with the adapter.

    Args:
        path: A project (its newest complete run), the folder of a run, or the folder of an adapter. The folder of a
            whole model, such as a merged one, answers alone.
        prompts: One prompt, or several.
        only: Ask one of the two models alone: `"base"`, also before any training, or `"tuned"`. `"adapter"` is the old
            name of `"tuned"`.
        max_new_tokens: The longest answer. Default: the run's setting.
        temperature: 0 is greedy. Default: the run's setting.
        top_p: Nucleus sampling. Default: the run's setting.
        top_k: The number of likeliest tokens to draw from. Default: the run's setting.
        min_p: The least probability relative to the likeliest token. Default: the run's setting.
        repetition_penalty: 1 changes nothing. Default: the run's setting.
        seed: Seed of the draws.
        backend: `torch`, `mlx`, or any installed backend. Default: the run's.
        device: `cpu`, `cuda`, `mps`, `metal`. Default: the run's.
        model: Where the base model is, if not where the run or the adapter says.
        on_notice: Receives messages about loading as they come.

    Returns:
        A `GenerateResult`. Print it, or read `result.answers[0].tuned.text`.

    Raises:
        DataError: A prompt is empty, or there is none.
        MindprintError: The adapter or its base model cannot be found, read or loaded.

    Example:
        >>> result = mindprint.generate("my-voice", "Is the tide in?")
        >>> result.answers[0].prompt
        'Is the tide in?'
        >>> print(result)  # doctest: +ELLIPSIS
        prompt: Is the tide in?
        <BLANKLINE>
        without the adapter:
        ...
    """
    # A text is a sequence of texts too: without the check each letter would become a prompt.
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    if not asked or not all(prompt.strip() for prompt in asked):
        raise DataError("prompts: a prompt is empty" if asked else "prompts: there is none")
    notices = Notices(on_notice)
    section = backend_section(backend, device)
    alone = runs_opened.is_model_folder(path)
    if alone and only is None:
        notices(f"{path}: is a whole model, without an adapter next to it: it answers alone")
    asked_for = {"base": (False,), "tuned": (True,), "adapter": (True,), None: (False, True)}[only]
    # Without the adapter there may be no run yet to take one from.
    if only == "base" or (alone and only is None):
        asked_for, opening = (False,), runs_opened.open_model(path, section, model=model, notice=notices)
    else:
        opening = runs_opened.open_adapter(path, section, model=model, notice=notices)
    with opening as opened:
        settings = opened.config.generation.changed(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        sides: list[Sequence[Answer | None]] = [
            # Both models get the same seed, so that the answers differ by the adapter and not by the draw.
            opened.answer(asked, settings, seed=seed, adapter=adapter) if adapter in asked_for else [None] * len(asked)
            for adapter in (False, True)
        ]
        source = source_of(opened)
    answers = tuple(AnsweredPrompt(*row) for row in zip(asked, *sides, strict=True))
    return GenerateResult(answers, source, notices.heard)


def source_of(opened: OpenedModel) -> Source:
    """Return the place of an opened adapter, if there is one, its base model, and where it computes."""
    folder = str(opened.located.adapter.resolve()) if isinstance(opened, OpenedAdapter) else None
    return Source(folder, opened.base.name, *opened.placement.key)
