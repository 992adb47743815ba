"""A terminal that goes away, in every way in which it can: training never loses a step by it."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mindprint
from mindprint.errors import Interrupted
from mindprint.events import Event, StepDone
from mindprint.printing import LossyStream, tell
from mindprint.runs.folder import RunFolder
from mindprint.training.loop import stop_on_signal

STEPS = 6


@pytest.fixture
def project(toy: str, toy_model: Path, tmp_path: Path) -> Path:
    """A project with six SFT steps, whose checkpoints are so far apart that a lost step would show."""
    rows = [{"topic": "tide → ebb", "prompt": f"{n}?", "completion": "aye " * (n + 1)} for n in range(6)]
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "adapter": {"r": 2},
        "sft": {"steps_per_topic": STEPS, "batch_size": 2},
        "dpo": {"enabled": False},
        "evaluation": {"levels": []},
        "checkpoints": {"every": 1000},
    }
    (folder / "mindprint.yaml").write_text(json.dumps(settings))
    return folder


def kill_at(step: int, *numbers: signal.Signals) -> Callable[[Event], None]:
    def send(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return send


@pytest.fixture
def hangup_heard() -> Iterator[None]:
    """A test runner may have been started by nohup, which has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGHUP,),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGHUP),
        (signal.SIGTERM,),
    ],
    ids=lambda signals: "+".join(number.name for number in signals),
)
@pytest.mark.usefixtures("hangup_heard")
def test_a_hangup_ends_a_run_like_sigterm_with_every_step_kept(
    project: Path, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    """The shell and the kernel both send SIGHUP when a terminal closes: the second one is no request to hurry."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match="the checkpoint of step 3 is in"):
        mindprint.train(project, run=run, on_event=kill_at(3, *signals))
    assert (run / "checkpoints" / "000003").is_dir()
    mindprint.train(project, run=run, resume=True)
    assert [line["step"] for line in RunFolder(run).read_steps()] == list(range(1, STEPS + 1))


def test_a_second_ctrl_c_still_ends_at_once(project: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        mindprint.train(project, run=tmp_path / "run", on_event=kill_at(3, signal.SIGINT, signal.SIGINT))


def test_a_signal_that_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop_requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


# Each is what a shell would start, with the output in a state that cannot be written.
OUTPUTS = {
    "standard error closed": "2>&-",
    "standard output closed": ">&-",
    "both closed": ">&- 2>&-",
    "a full disk": ">/dev/full 2>/dev/full",
    "standard error full": "2>/dev/full",
    "an encoding without the arrow": "2>errors.txt >output.txt",
    "a reader that has gone": "2>&1 | true",
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_cannot_be_written_ends_no_run(project: Path, toy_site: Path, output: str) -> None:
    ended = _train(project, toy_site, output)
    run = project / "runs" / "run-001"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert len(RunFolder(run).read_steps()) == STEPS
    assert "Traceback" not in ended
    if "errors.txt" in output:
        # Python itself writes standard error with escapes, whatever the environment asks for.
        assert r"tide \u2192 ebb sft: done, loss " in (project / "errors.txt").read_text("ascii")
        assert "tide ? ebb" in (project / "output.txt").read_text("ascii")


def _train(project: Path, toy_site: Path, output: str) -> str:
    path = os.pathsep.join([str(toy_site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii:strict"}
    command = f'"{sys.executable}" -c "import sys; from mindprint.cli import main; sys.exit(main())" train {output}'
    done = subprocess.run(command, shell=True, cwd=project, env=environment, capture_output=True, check=False)
    return (done.stdout + done.stderr).decode()


def test_a_closed_descriptor_does_not_become_a_file_of_the_run(project: Path, toy_site: Path) -> None:
    """With standard error closed, the next file that is opened would get its number, and what a library writes."""
    code = (
        "import os, sys; from mindprint.cli.output import lossy_streams\n"
        "with lossy_streams():\n"
        "    opened = os.open('precious', os.O_WRONLY | os.O_CREAT)\n"
        "    os.write(2, b'noise of a library')\n"
        "    assert opened > 2, opened\n"
    )
    subprocess.run(f'"{sys.executable}" -c "{code}" >&- 2>&-', shell=True, cwd=project, check=True)
    assert (project / "precious").read_bytes() == b""


@pytest.mark.usefixtures("hangup_heard")
def test_a_terminal_that_closes_ends_a_run_with_a_checkpoint(project: Path, toy_site: Path) -> None:
    """A real one: its last descriptor is closed while the bar is on it, and the kernel sends SIGHUP."""
    code = (
        "import os, sys, time\n"
        "import toy_backend\n"
        "from mindprint.cli import main\n"
        "from mindprint.hookspecs import hookimpl\n"
        "honest = toy_backend.mindprint_sft_step\n"
        "def slow(model, batches, update):\n"
        "    time.sleep(0.4)\n"
        "    return honest(model=model, batches=batches, update=update)\n"
        "toy_backend.mindprint_sft_step = hookimpl(slow)\n"
        "sys.exit(main(['train', 'sft.steps_per_topic=60']))\n"
    )
    path = os.pathsep.join([str(toy_site), os.environ.get("PYTHONPATH", "")])
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover (another process)
        os.chdir(project)
        environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    metrics = RunFolder(project / "runs" / "run-001")
    while len(metrics.read_steps()) < 2:
        os.read(terminal, 1024)
    os.close(terminal)
    os.waitpid(child, 0)
    steps = len(metrics.read_steps())
    assert 2 <= steps < 60
    assert (metrics.checkpoints / f"{steps:06d}").is_dir()


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_a_line_for_a_stream_that_is_gone_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Gone(), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        tell("anyone there?")


def test_what_an_encoding_lacks_is_replaced() -> None:
    buffer = io.BytesIO()
    stream: Any = LossyStream(io.TextIOWrapper(buffer, "ascii", "strict"))
    assert stream.write("loss 2 → 1\n") == 11
    stream.flush()
    assert buffer.getvalue() == b"loss 2 ? 1\n"
    assert stream.encoding == "ascii"
