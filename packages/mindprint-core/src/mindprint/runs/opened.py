"""A trained adapter, found and opened: for answers with and without it, and for measuring its effect.

with open_adapter("my-voice") as opened:
    before = opened.answer(["Who are you?"], adapter=False)
    after = opened.answer(["Who are you?"])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

from mindprint.adapter.formats import named_base, read_any_adapter
from mindprint.adapter.peft_format import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mindprint.config import FILE_NAME, BackendConfig, Config, ConfigFile, GenerationConfig, ModelConfig, load_config
from mindprint.contract import AdapterState, Dtype, LoadedModel, Sampling
from mindprint.data.render import render_prompt
from mindprint.data.rows import Rows, Text, read_rows, text_of
from mindprint.data.split import read_split
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import AdapterError, MindprintError, RunError
from mindprint.models import folder as models
from mindprint.models.engine import Engine, Placement, Placements, fits_in_float32
from mindprint.models.token_ids import check_token_ids
from mindprint.plugins.backend import Backend
from mindprint.runs.folder import RunFolder, newest_run


@dataclass(frozen=True)
class Located:
    """An adapter's folder, and the configuration of the run that it belongs to, if it lies in one."""

    adapter: Path
    config: ConfigFile | None = None


@dataclass(frozen=True)
class Answer:
    """An answer of the model, without its thoughts.

    `stop_reason` is `stop`, or `length` if it was cut off at `max_new_tokens`.
    """

    text: str
    stop_reason: Literal["stop", "length"]


@dataclass(frozen=True, repr=False)
class OpenedAdapter:
    """A base model with its adapter in memory, and the tokenizer to talk to it."""

    located: Located
    base: models.ModelFolder
    tokenizer: Tokenizer
    placement: Placement
    model: LoadedModel
    adapter: AdapterState

    def __repr__(self) -> str:
        name, device, dtype = self.placement.key
        return f"<adapter {self.located.adapter} on {self.base.name}: {name}, {device}, {dtype}>"

    @property
    def backend(self) -> Backend:
        return self.placement.backend

    @property
    def config(self) -> Config:
        """Return the run's configuration, or the defaults for an adapter that is not in a run."""
        return self.located.config.config if self.located.config else Config()

    def answer(
        self,
        prompts: Sequence[Text],
        settings: GenerationConfig | None = None,
        *,
        seed: int = 0,
        adapter: bool = True,
    ) -> tuple[Answer, ...]:
        """Answer each prompt, with the adapter or as the base alone. `settings` default to the run's."""
        settings = settings or self.config.generation
        sampling = Sampling(
            settings.max_new_tokens, self.tokenizer.stop_token_ids, settings.temperature, settings.top_p, seed
        )
        rendered = [render_prompt(prompt, self.tokenizer, self.config.data.format) for prompt in prompts]
        # Ids beyond the embedding may fail late and unclearly in a framework, so they are refused here.
        check_token_ids(((f"prompt {n}", ids) for n, ids in enumerate(rendered, 1)), self.base, self.tokenizer)
        made = self.backend.generate(self.model, rendered, sampling, adapter=adapter)
        answers = []
        for generation, prompt in zip(made, rendered, strict=True):
            ids = generation.tokens.tolist()
            # An answer that ends within its thought is shown with it: nothing would be left.
            text = self.tokenizer.answer_text(ids, prompt.tolist()) or self.tokenizer.decode(ids).strip()
            answers.append(Answer(text, generation.stop_reason))
        return tuple(answers)


@contextmanager
def open_adapter(
    path: str | PathLike[str],
    backend: BackendConfig | None = None,
    *,
    model: str | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Iterator[OpenedAdapter]:
    """Load a base and its adapter while the block lasts.

    `path` is a project (its newest complete run), a run, or an adapter's folder. `backend` defaults to the run's;
    `model` names another place for the base than the run's configuration or adapter_config.json does.
    """
    located = locate_adapter(path)
    base, adapter = read_located(located, model)
    data = (located.config.config if located.config else Config()).data
    tokenizer = load_tokenizer(base.path, data.chat_template_kwargs)
    section = backend or (located.config.config.backend if located.config else BackendConfig())
    placement = Placements().resolve(section)
    engine = Engine(base, notice)
    try:
        engine.load(placement)
        engine.inject(adapter)
        yield OpenedAdapter(located, base, tokenizer, placement, engine.model, adapter)
    finally:
        # Also after a failed load: the backend may hold half a model by then.
        engine.release()


def locate_adapter(path: str | PathLike[str]) -> Located:
    """Find the adapter that `path` means. Raises a `MindprintError` that says what would be one."""
    folder = Path(path)
    # An adapter's own folder comes first. It may lie within a run, whose configuration it then uses.
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return Located(folder, _surrounding_config(folder))
    if (folder / FILE_NAME).is_file():
        return _of_run(_newest_complete(folder))
    if RunFolder(folder).holds_run:
        return _of_run(RunFolder(folder))
    if not folder.exists():
        raise RunError(f"{folder}: no such folder")
    raise AdapterError(
        f"{folder}: is not a project ({FILE_NAME}), a run (manifest.json) or an adapter ({ADAPTER_CONFIG_FILE})"
    )


def read_located(located: Located, model: str | None = None) -> tuple[models.ModelFolder, AdapterState]:
    """Read a located adapter, in whichever format it is, and find its base (see `find_base`)."""
    base = find_base(located, model)
    return base, read_any_adapter(located.adapter, base.path)[0]


def find_base(located: Located, model: str | None = None) -> models.ModelFolder:
    """Find the adapter's base: where the caller says, where the run's configuration says, or what its file names."""
    if model is not None:
        return models.resolve_model(ModelConfig(name=model), Path.cwd())
    if located.config is not None:
        return models.resolve_model(located.config.config.model, located.config.folder)
    named = named_base(located.adapter)
    if not named:
        raise AdapterError(f"{located.adapter}: does not say what its base model is; name it with --model")
    try:
        return models.resolve_model(ModelConfig(name=named), located.adapter.resolve())
    except MindprintError as error:
        raise AdapterError(
            f"{located.adapter}: its base model is not available: {error}; name it with --model"
        ) from error


def read_heldout(file: ConfigFile) -> Rows:
    """Read the pairs of `data.heldout`, without the rows that the stages train on."""
    # With the stages off, rows are not demanded of their files.
    off = {name: getattr(file.config, name).model_copy(update={"enabled": False}) for name in ("sft", "dpo")}
    return read_rows(replace(file, config=file.config.model_copy(update=off)))


def sample_prompt(file: ConfigFile) -> str | None:
    """Return a prompt from the configuration's data to try an adapter with, a held-out one if there is one."""
    rows = read_heldout(file).heldout
    if not rows:
        split = read_split(file)
        rows = split.held_out.pairs or split.train.preferences
    return text_of(rows[0].prompt) if rows else None


def _of_run(run: RunFolder) -> Located:
    if not run.complete:
        raise RunError(
            f"{run.path}: is not complete; continue with: mindprint train {run.path} --resume "
            "(or name one of its checkpoints/ instead)"
        )
    return Located(run.adapter, load_config(run.config))


def _newest_complete(project: Path) -> RunFolder:
    runs = project / "runs"
    # The adapter folder alone is not enough: a run that was copied in part has no manifest to read.
    complete = [run for path in _entries(runs) if (run := RunFolder(path)).complete and run.holds_run]
    if complete:
        return max(complete, key=RunFolder.start_order)
    started = newest_run(runs)
    if started is not None:
        return RunFolder(started)
    raise RunError(f"{project}: has no run yet; make one: mindprint train {project}")


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _surrounding_config(adapter: Path) -> ConfigFile | None:
    """Return the configuration of the run that an adapter is in: as its result, or as one of its checkpoints."""
    absolute = adapter.resolve()
    # A result lies in RUN/adapter and a checkpoint in RUN/checkpoints/N, so two levels are enough.
    for folder in absolute.parents[:2]:
        run = RunFolder(folder)
        if run.holds_run and run.config.is_file():
            return load_config(run.config)
    return None


def placement_for(
    located: Located, section: BackendConfig | None, dtype: Dtype | None, base: models.ModelFolder
) -> Placement:
    """Choose where to compute: as asked, or as the run did, in float32 unless that is too large for this machine."""
    if section is None:
        section = located.config.config.backend if located.config else BackendConfig()
    # From the headers: the size has to be known before the model is loaded.
    elements = sum(math.prod(info.shape) for info in models.tensors(base.path).values())
    if dtype is not None:
        section = section.model_copy(update={"dtype": dtype})
    elif fits_in_float32(elements):
        # float32 shows differences that reduced precision would hide.
        section = section.model_copy(update={"dtype": "float32"})
    return Placements().resolve(section)
