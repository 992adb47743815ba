"""Train from Python: a configuration and rows go in, a run with its adapter and its loss curve comes out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindprint import config as settings
from mindprint.api.progress import STOPPING, is_interactive, show_progress
from mindprint.api.results import TrainResult
from mindprint.config import FILE_NAME, ConfigFile
from mindprint.data.memory import check_records, records_digest
from mindprint.errors import RunError
from mindprint.events import Event, Notice, Observer
from mindprint.plugins.launched import launched
from mindprint.printing import short_path
from mindprint.runs.folder import Resume, RunFolder, newest_run, portable
from mindprint.training import run as training_run

OnEvent = Callable[[Event], None]
Configuration = str | os.PathLike[str] | ConfigFile | Mapping[str, Any]
Records = Iterable[Mapping[str, Any]]


def load_config(config: Configuration, overrides: Sequence[str] = (), **changes: Any) -> ConfigFile:
    """Read and check a configuration.

    Args:
        config: A folder with `mindprint.yaml`, a YAML file, or the values themselves.
        overrides: Settings as the command line takes them: `"sft.learning_rate=1e-4"`.
        **changes: Sections or settings to merge in: `backend="mlx"`, `sft={"learning_rate": 1e-4}`.

    Returns:
        A `ConfigFile`: the checked settings (`.config`), and the folder that relative paths start from (`.folder`).
        It prints as YAML.

    Raises:
        ConfigError: A setting is unknown, has a wrong type, or contradicts another one.

    Example:
        >>> file = mindprint.load_config("my-voice", sft={"learning_rate": 1e-4})
        >>> file.config.sft.learning_rate
        0.0001
    """
    # A checked configuration is taken as it is: its file may have changed since.
    if isinstance(config, ConfigFile):
        file = config
    elif isinstance(config, Mapping):
        file = settings.make_config(config, overrides=overrides)
    else:
        file = settings.load_config(config, overrides)
    return settings.merged(file, changes) if changes else file


def train(
    config: Configuration,
    *,
    rows: Records | None = None,
    run: str | os.PathLike[str] | None = None,
    resume: bool | Resume = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
    observers: Sequence[object] = (),
    **overrides: Any,
) -> TrainResult:
    """Train SFT, then DPO, topic by topic, and write one adapter.

    Args:
        config: A folder with `mindprint.yaml`, a YAML file, the values themselves, or what `load_config` returned.
        rows: Training rows from memory instead of the data folder's files: a list of dicts, or a `datasets.Dataset`.
            A row with `chosen` and `rejected` is a preference pair, every other row is imitated. The fields are those
            of the files. Held-out pairs, quizzes and the curriculum still come from the data folder, if there is one.
        run: The run's folder. Default: a new one under `runs/` next to the configuration.
        resume: Continue the newest run, or `run`, from its last checkpoint. `"latest"` takes the newest checkpoint
            that is not damaged. A run of `rows` needs the same `rows` again.
        progress: Show how the run proceeds, in a notebook and in a terminal. Default: only there.
        on_event: Receives every event of the run. An exception that it raises ends the run.
        observers: Objects with an `on_event` method (see `Observer`), or plugins whose hooks watch the backend.
        **overrides: Sections or settings to merge in: `backend="mlx"`, `sft={"learning_rate": 1e-4}`.

    Returns:
        A `TrainResult`: the adapter's folder, a summary of each stage, and the loss curve in `result.steps`.

    Raises:
        MindprintError: The input is wrong. Nothing was trained.
        GuardError: Continuing would have corrupted the result.
        Interrupted: The user stopped the run. A checkpoint was written, and the message says how to continue.

    Example:
        >>> result = mindprint.train("my-voice", sft={"steps_per_topic": 2}, dpo={"steps_per_topic": 2})
        >>> [(stage.stage, stage.steps) for stage in result.stages if stage.topic == result.stages[0].topic]
        [('sft', 2), ('dpo', 2)]
        >>> [step.loss for step in result.steps][0] > 0
        True
    """
    notes: list[str] = []
    if resume and isinstance(config, str | os.PathLike):
        file, run = config_to_resume(Path(config), run, notes.append)
        file = settings.merged(file, overrides) if overrides else file
    else:
        file = load_config(config, **overrides)
    if rows is not None:
        file = with_rows(file, rows)
    # A mismatch has to be found before the run's lock is taken and the base is loaded.
    if resume:
        _refuse_other_rows(file, run)
    watching = [observer for observer in observers if isinstance(observer, Observer)]
    # An object can be both an observer of events and a plugin with hooks, and then gets both.
    hooked = [observer for observer in observers if observer not in watching or _has_hooks(observer)]
    with _shown(progress) as show:
        listeners: list[OnEvent] = [
            show,
            *([on_event] if on_event else []),
            *(observer.on_event for observer in watching),
        ]

        def tell_all(event: Event) -> None:
            for listener in listeners:
                listener(event)

        if not resume and (unfinished := _unfinished(file)):
            notes.append(unfinished)
        for note in notes:
            tell_all(Notice(note))
        result = training_run.train(
            file, run=run, resume=resume, on_event=tell_all, on_stop=lambda: show(Notice(STOPPING)), observers=hooked
        )
    return TrainResult(result.run, result.adapter, result.stages, result.verdicts)


def config_to_resume(
    path: Path,
    run: str | os.PathLike[str] | None,
    note: Callable[[str], None],
    overrides: Sequence[str] = (),
) -> tuple[ConfigFile, str | os.PathLike[str] | None]:
    """Return the configuration of the run that is resumed, with overrides, and the run's folder.

    That is the run's own and not the project's file, which may have changed since: a run continues as it began. `note`
    receives what has changed. Without such a run, the project's file is returned.
    """
    # A project that also holds a manifest is still a project: its configuration file decides.
    if not (path / FILE_NAME).exists() and RunFolder(path).holds_run:
        return settings.load_config(RunFolder(path).config, overrides), path if run is None else run
    file = settings.load_config(path, overrides)
    resumed = Path(run) if run else newest_run(file.folder / "runs")
    if resumed is None or not RunFolder(resumed).config.is_file():
        return file, run
    own = settings.load_config(RunFolder(resumed).config, overrides)
    changed = settings.differing_settings(own.config, portable(file, resumed.resolve()))
    # The digest of rows from memory is the run's own, and never a setting of the file.
    changed.pop("data.rows_digest", None)
    # With overrides, a refusal names them together with the settings that the run has.
    if changed and not overrides:
        name = short_path(resumed)
        note(f"{name} continues with its own settings; {file.source} differs in {', '.join(changed)}")
    return own, resumed


def _unfinished(file: ConfigFile) -> str | None:
    """Return a sentence about the newest run if it was ended, by a crash perhaps, before it was complete."""
    newest = newest_run(file.folder / "runs")
    if newest is None or not RunFolder(newest).unfinished():
        return None
    try:
        done, planned = RunFolder(newest).steps_done()
    except RunError:
        return None
    name = short_path(newest)
    return (
        f"{name} is not finished ({done} of {planned} steps), and this starts another run; "
        f"to continue that one: mindprint train {shlex.quote(name)} --resume"
    )


def with_rows(file: ConfigFile, rows: Records) -> ConfigFile:
    """Return the configuration with rows from memory, and with their digest in it."""
    records = check_records(rows)
    # The digest goes into the run's configuration, so that a resumed run can recognise its rows.
    data = file.config.data.model_copy(update={"rows_digest": records_digest(records)})
    return replace(file, config=file.config.model_copy(update={"data": data}), records=records)


def _refuse_other_rows(file: ConfigFile, run: str | os.PathLike[str] | None) -> None:
    """Raise `RunError` if the run that would continue was trained on rows from memory, and they are not these.

    Checkpoints know the training rows, but not those that are held out.
    """
    path = Path(run) if run else newest_run(file.folder / "runs")
    if path is None or not RunFolder(path).config.is_file():
        return
    digest = settings.load_config(RunFolder(path).config).config.data.rows_digest
    if digest is None or (file.records is not None and file.config.data.rows_digest == digest):
        return
    given = "" if file.records is None else f", and rows= are others (digest {file.config.data.rows_digest})"
    raise RunError(
        f"{path}: was trained on rows from memory (digest {digest}), which are not kept{given}: "
        "resume it from Python with the same rows, mindprint.train(..., resume=True, rows=rows)"
    )


def _has_hooks(observer: object) -> bool:
    return any(name.startswith("mindprint_") for name in dir(observer))


@contextmanager
def _shown(progress: bool | None) -> Iterator[OnEvent]:
    """Give what shows a run: a display where it is asked for or someone is looking, else nothing."""
    (rank, _), _ = launched()
    # Of several processes that train one adapter, the first one shows it.
    if rank or not (is_interactive() if progress is None else progress):
        yield lambda _: None
        return
    with show_progress() as show:
        yield show
