"""What starting costs: help and the list of plugins import no framework, and answer at once."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from toy_base import install_dummies

HEAVY = ("torch", "mlx", "mlx_lm", "transformers", "datasets", "pandas", "pydantic", "rich", "huggingface_hub")
SECONDS = 0.5

PROBE = """
import sys
from mindprint.cli import main
code = main(sys.argv[1:])
print("\\n" + ",".join(sorted({name.partition(".")[0] for name in sys.modules})))
sys.exit(code)
"""


HELLO = """
import click
SIZE = 3
@click.command()
@click.option("--name")
def command(name):
    print("hello", name)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins"], ["plugins", "--json"]])
def test_imports_nothing_heavy(arguments: list[str], toy_site: Path) -> None:
    done = _python("-c", PROBE, *arguments, path=toy_site)
    loaded = done.stdout.splitlines()[-1].split(",")
    assert "mindprint" in loaded
    assert not set(HEAVY) & set(loaded)
    assert "toy_backend" not in loaded


@pytest.mark.parametrize("command", ["--help", "plugins"])
def test_answers_at_once(command: str, toy_site: Path) -> None:
    """The best of five."""
    assert min(_seconds(command, toy_site) for _ in range(5)) <= SECONDS


def test_thirty_plugins_cost_next_to_nothing(tmp_path: Path) -> None:
    """Thirty distributions, each with a plugin of every group: under 100 ms more than with none; best of five each."""
    many, none = tmp_path / "many", tmp_path / "none"
    none.mkdir()
    install_dummies(many, 30)
    times = {site: min(_seconds("--help", site) for _ in range(5)) for site in (none, many)}
    assert "dummy-29" in _mindprint("--help", path=many).stdout
    print(f"help takes {times[none]:.3f} s without plugins, {times[many] - times[none]:+.3f} s with thirty")
    assert times[many] - times[none] < 0.1


def test_importing_mindprint_imports_nothing_but_itself() -> None:
    code = "import sys; before = set(sys.modules); import mindprint; print(set(sys.modules) - before)"
    added = _python("-c", code).stdout
    assert "numpy" not in added
    assert "pydantic" not in added


def test_a_broken_plugin_breaks_neither_help_nor_the_list(tmp_path: Path) -> None:
    _distribution(
        tmp_path, "[mindprint.backends]\nbroken = broken_backend\n[mindprint.commands]\nbroken = nowhere:gone\n"
    )
    (tmp_path / "broken_backend.py").write_text("raise RuntimeError('the plugin is broken')")
    assert "broken    from broken-things 2.0" in _mindprint("--help", path=tmp_path).stdout
    listed = json.loads(_mindprint("plugins", "--json", path=tmp_path).stdout)["plugins"]
    assert [plugin["kind"] for plugin in listed if plugin["name"] == "broken"] == ["backend", "command"]

    checked = _mindprint("plugins", "--check", path=tmp_path)
    assert checked.returncode == 1
    assert "backend broken: backend 'broken' (broken-things 2.0) failed to import: RuntimeError" in checked.stdout
    assert (
        "command broken: command 'broken' (broken-things 2.0) failed to import: ModuleNotFoundError" in checked.stdout
    )

    invoked = _mindprint("broken", path=tmp_path)
    assert invoked.returncode == 2
    assert invoked.stderr == (
        "mindprint: error: command 'broken' (broken-things 2.0) failed to import: ModuleNotFoundError: "
        "No module named 'nowhere'; reinstall it (pip install --force-reinstall broken-things) or uninstall its "
        "distribution\n"
    )


def test_another_distribution_adds_a_command(tmp_path: Path) -> None:
    _distribution(tmp_path, "[mindprint.commands]\ngreet = hello_command:command\nsize = hello_command:SIZE\n")
    (tmp_path / "hello_command.py").write_text(HELLO)
    assert _mindprint("greet", "--name", "Nan", path=tmp_path).stdout == "hello Nan\n"
    wrong = _mindprint("size", path=tmp_path)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "hello_command:SIZE is of type int, not a click.Command" in wrong.stderr


def test_output_into_a_closed_pipe() -> None:
    """`mindprint --help | head -0`: quiet, and the exit code that a shell gives for a broken pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mindprint", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read() == b""


def test_output_onto_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mindprint", "--help"]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "mindprint: error: No space left on device\n")


def _distribution(site: Path, entry_points: str) -> None:
    metadata = site / "broken_things-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-things\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def _mindprint(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    return _python("-m", "mindprint", *arguments, path=path, check=False)


def _python(*arguments: str, path: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(path or ""), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True, env=environment)


def _seconds(command: str, path: Path) -> float:
    """Return the processor time of a command: other work on the machine is not what is measured."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _mindprint(command, path=path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
