"""A trained adapter, found and opened: for answers with and without it, and for measuring its effect.

with open_adapter("my-voice") as opened:
    before = opened.answer(["Who are you?"], adapter=False)
    after = opened.answer(["Who are you?"])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

from mindprint.adapter.formats import named_base, read_any_adapter
from mindprint.adapter.peft_format import CONFIG_FILE as ADAPTER_CONFIG_FILE
from mindprint.adapter.prompting import read_prompting
from mindprint.config import FILE_NAME, BackendConfig, Config, ConfigFile, GenerationConfig, ModelConfig, load_config
from mindprint.contract import AdapterState, Dtype, Int32, LoadedModel, Sampling
from mindprint.data.render import render_prompt
from mindprint.data.rows import Rows, Text, read_rows, text_of
from mindprint.data.split import read_split
from mindprint.data.text_stream import answer_stream, finished_answer
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import AdapterError, MindprintError, RunError
from mindprint.models import folder as models
from mindprint.models.engine import Engine, Placement, Placements, fits_in_float32
from mindprint.models.folder import GGUF, is_gguf
from mindprint.models.quantized import QuantizedWeight, dense_weights
from mindprint.models.token_ids import check_token_ids
from mindprint.plugins.backend import Backend
from mindprint.runs.folder import RunFolder, newest_run

PLAIN_TURNS = "the tokenizer has no chat template: messages are written as `User: …` and `Assistant: …`, as in training"

OnText = Callable[[int, str], bool | None]
"""Takes the index of a prompt and the next piece of its answer. False ends the answer."""


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
class OpenedModel:
    """A base model in memory, and the tokenizer to talk to it.

    `file` is the configuration that named it, if any. `config` are its settings. For a model or an adapter that is not
    in a run they are the defaults, with the way of rendering prompts that its folder states.
    """

    file: ConfigFile | None
    config: Config
    base: models.ModelFolder
    tokenizer: Tokenizer
    placement: Placement
    model: LoadedModel

    @property
    def backend(self) -> Backend:
        return self.placement.backend

    def answer(
        self,
        prompts: Sequence[Text],
        settings: GenerationConfig | None = None,
        *,
        seed: int = 0,
        adapter: bool = True,
        on_text: OnText | None = None,
    ) -> tuple[Answer, ...]:
        """Answer each prompt, with the adapter or as the base alone. `settings` default to the run's.

        `on_text` gets the index of a prompt and the next piece of its answer, as soon as the text is certain. If it
        returns False, that answer ends.
        """
        rendered = [self.render(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
        streams = [answer_stream(self.tokenizer, prompt) for prompt in rendered]

        def tell(row: int, token: int) -> bool:
            piece = streams[row].add(token)
            return not piece or on_text is None or on_text(row, piece) is not False

        sampling = self.sampling(settings or self.config.generation, seed)
        on_token = tell if on_text is not None else None
        made = self.backend.generate(self.model, rendered, sampling, adapter=adapter, on_token=on_token)
        answers = []
        for row, (generation, prompt) in enumerate(zip(made, rendered, strict=True)):
            text = finished_answer(self.tokenizer, prompt, generation.tokens.tolist())
            answers.append(Answer(text, generation.stop_reason))
            rest = streams[row].finish(text) if on_text is not None else ""
            if on_text is not None and rest:
                on_text(row, rest)
        return tuple(answers)

    def render(self, prompt: Text, name: str = "prompt", data_format: Literal["chat", "raw"] | None = None) -> Int32:
        """Return the token ids of a prompt, as the model was trained to read it, or in another format.

        Raises `DataError`, with the prompt's name, for a token that the model has no embedding for.
        """
        ids = render_prompt(prompt, self.tokenizer, data_format or self.config.data.format)
        # Ids beyond the embedding may fail late and unclearly in a framework, so they are refused here.
        check_token_ids([(name, ids)], self.base, self.tokenizer)
        return ids

    def sampling(self, settings: GenerationConfig, seed: int = 0) -> Sampling:
        """Return how answers are generated: the settings, and the stop tokens of this model."""
        return settings.sampling(self.tokenizer.stop_token_ids, seed)


@dataclass(frozen=True, repr=False)
class OpenedAdapter(OpenedModel):
    """A base model with its adapter in memory, and the tokenizer to talk to it."""

    located: Located
    adapter: AdapterState

    def __repr__(self) -> str:
        name, device, dtype = self.placement.key
        return f"<adapter {self.located.adapter} on {self.base.name}: {name}, {device}, {dtype}>"


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
    with _loaded(located.config, base, backend, notice, located.adapter) as (engine, opened):
        engine.inject(adapter)
        yield OpenedAdapter(**vars(opened), located=located, adapter=adapter)


@contextmanager
def open_model(
    path: str | PathLike[str],
    backend: BackendConfig | None = None,
    *,
    model: str | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Iterator[OpenedModel]:
    """Load a model without an adapter while the block lasts.

    `path` is a model's folder, such as a merged one, or whatever has a base model: a project, also one that has not
    been trained, a run or an adapter. The other arguments are those of `open_adapter`.
    """
    base, file = _locate_model(Path(path), model)
    with _loaded(file, base, backend, notice, Path(path)) as (_, opened):
        yield opened


@contextmanager
def open_base(
    model: ModelConfig, folder: Path, backend: BackendConfig, notice: Callable[[str], None] = lambda _: None
) -> Iterator[OpenedModel]:
    """Load a base that a configuration names, relative to `folder`, while the block lasts."""
    with _loaded(None, models.resolve_model(model, folder), backend, notice) as (_, opened):
        yield opened


@contextmanager
def _loaded(
    file: ConfigFile | None,
    base: models.ModelFolder,
    backend: BackendConfig | None,
    notice: Callable[[str], None],
    folder: Path | None = None,
) -> Iterator[tuple[Engine, OpenedModel]]:
    """Load a base on the backend that is asked for, or on that of its configuration, while the block lasts.

    Without a configuration, `folder` may state how prompts are rendered.
    """
    config = file.config if file else Config() if folder is None else Config(data=read_prompting(folder))
    tokenizer = load_tokenizer(base.path, config.data.chat_template_kwargs)
    # A run was told so when it was trained. `prepare`, which has no folder, tells it by itself.
    if file is None and folder is not None and not tokenizer.has_template and config.data.format == "chat":
        notice(PLAIN_TURNS)
    placement = Placements().resolve(backend or config.backend)
    engine = Engine(base, notice)
    try:
        engine.load(placement)
        yield engine, OpenedModel(file, config, base, tokenizer, placement, engine.model)
    finally:
        # Also after a failed load: the backend may hold half a model by then.
        engine.release()


def is_model_folder(path: str | PathLike[str]) -> bool:
    """Return whether a folder holds a whole model, such as a merged one, and neither an adapter nor a project."""
    folder = Path(path)
    others = (ADAPTER_CONFIG_FILE, FILE_NAME)
    return (folder / "config.json").is_file() and not any((folder / name).is_file() for name in others)


def _locate_model(path: Path, model: str | None) -> tuple[models.ModelFolder, ConfigFile | None]:
    """Find the model that `path` is or names, and the configuration that names it."""
    if (path / FILE_NAME).is_file():
        # The settings are those with the adapter. A project that has not been trained names its base all the same.
        with suppress(RunError):
            path = newest_complete(path).path
        file = load_config(RunFolder(path).config if RunFolder(path).holds_run else path)
    elif RunFolder(path).holds_run:
        file = load_config(RunFolder(path).config)
    elif model is None and is_model_folder(path):
        return models.resolve_model(ModelConfig(name=str(path.resolve())), Path.cwd()), None
    else:
        located = locate_adapter(path)
        return find_base(located, model), located.config
    named = ModelConfig(name=model) if model is not None else file.config.model
    return models.resolve_model(named, Path.cwd() if model is not None else file.folder), file


def locate_adapter(path: str | PathLike[str]) -> Located:
    """Find the adapter that `path` means. Raises a `MindprintError` that says what would be one."""
    folder = Path(path)
    # An adapter's own folder comes first. It may lie within a run, whose configuration it then uses.
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return Located(folder, _surrounding_config(folder))
    if (folder / FILE_NAME).is_file():
        return _of_run(newest_complete(folder))
    if RunFolder(folder).holds_run:
        return _of_run(RunFolder(folder))
    if not folder.exists():
        raise RunError(f"{folder}: no such folder")
    if is_gguf(folder):
        raise AdapterError(f"{folder}: {GGUF}; name the adapter's own folder")
    if is_model_folder(folder):
        raise AdapterError(
            f"{folder}: is a whole model, without an adapter next to it: `mindprint generate` lets it answer, and "
            "`mindprint verify` checks a merged one"
        )
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


def newest_complete(project: Path) -> RunFolder:
    """Return a project's newest complete run, else its newest one. Raises `RunError` for a project without a run."""
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
    # From the headers: the size has to be known before the model is loaded. Packed weights stay packed, whatever the
    # dtype that is computed in.
    elements = sum(
        weight.stored_bytes // 4 if isinstance(weight, QuantizedWeight) else math.prod(weight.shape)
        for weight in dense_weights(base.path).values()
    )
    if dtype is not None:
        section = section.model_copy(update={"dtype": dtype})
    elif fits_in_float32(elements):
        # float32 shows differences that reduced precision would hide.
        section = section.model_copy(update={"dtype": "float32"})
    return Placements().resolve(section)
