"""Every check of the repository, one session each; plain `nox` runs all of them but `bench` and `soak`.

Sessions install built wheels, never the source tree in place. Those that need both frameworks share one environment.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "core", "testing", "hello", "torch", "mlx", "types", "parity", "docs", "demo", "wheels"]

# CPU builds of PyTorch are published for some Pythons only; 3.11 where there is one, else whatever runs nox.
PYTHON = "3.11" if shutil.which("python3.11") else f"{sys.version_info.major}.{sys.version_info.minor}"
BOTH = Path(__file__).parent / ".nox" / "both"
CONSTRAINTS = "constraints.txt"
PACKAGES = ("core", "torch", "mlx", "testing")
HELLO = "examples/mindprint-hello"
TESTS = ("pytest", "pytest-timeout")
TRACKERS = ("tensorboard", "wandb")


def install(session: nox.Session, packages: tuple[str, ...], *tools: str) -> None:
    """Install distributions of this repository from wheels built now, and tools, at the tested versions."""
    paths = [f"packages/mindprint-{name}" for name in packages]
    session.install("-q", "-c", CONSTRAINTS, *tools, *paths)


def forbid(session: nox.Session, *modules: str) -> None:
    """Stop if a module that this session must do without is there."""
    code = "import importlib.util as u, sys; sys.exit(', '.join(m for m in sys.argv[1:] if u.find_spec(m)) or 0)"
    session.run("python", "-c", code, *modules, silent=True)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Style: ruff's checks and its formatter."""
    session.install("-q", "-c", CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=PYTHON)
def core(session: nox.Session) -> None:
    """Core's tests, where neither torch nor mlx is installed."""
    core_tests(session)


@nox.session(python=["3.11", "3.12", "3.13"], default=False)
def pythons(session: nox.Session) -> None:
    """Core's tests on every Python that is supported; a version that this machine lacks is skipped aloud."""
    core_tests(session)


def core_tests(session: nox.Session) -> None:
    install(session, ("core",), *TESTS, *TRACKERS)
    forbid(session, "torch", "mlx")
    session.run("pytest", "packages/mindprint-core/tests", *session.posargs)


@nox.session(python=PYTHON)
def testing(session: nox.Session) -> None:
    """The conformance suite, tested: how many of the seeded defects it catches."""
    install(session, ("core", "testing"), *TESTS)
    session.run("pytest", "packages/mindprint-testing/tests", *session.posargs)
    session.run("python", "packages/mindprint-testing/tests/defects.py")


@nox.session(python=PYTHON)
def hello(session: nox.Session) -> None:
    """The tutorial's plugin: built as a wheel, installed beside core alone, conforming, and trained."""
    install(session, ("core", "testing"), *TESTS, HELLO)
    forbid(session, "torch", "mlx")
    session.run("pytest", f"{HELLO}/tests", *session.posargs)


@nox.session(python=PYTHON)
def torch(session: nox.Session) -> None:
    """The PyTorch backend's tests, where mlx is not installed."""
    install(session, ("core", "torch", "testing"), *TESTS)
    forbid(session, "mlx")
    session.run("pytest", "packages/mindprint-torch/tests", *session.posargs)


@nox.session(python=PYTHON)
def mlx(session: nox.Session) -> None:
    """The MLX backend's tests, where torch is not installed."""
    install(session, ("core", "mlx", "testing"), *TESTS)
    forbid(session, "torch")
    session.run("pytest", "packages/mindprint-mlx/tests", *session.posargs)


@nox.session(python=PYTHON, default=False)
def both(session: nox.Session) -> None:
    """The environment that the sessions below share: both backends, and what tests them."""
    install(session, PACKAGES, *TESTS, "mypy", "types-PyYAML")


def run_in_both(session: nox.Session, command: str, *words: str, env: dict[str, str] | None = None) -> None:
    """Run a command of the shared environment."""
    folder = BOTH / ("Scripts" if os.name == "nt" else "bin")
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    session.run(str(folder / command), *words, external=True, env={"PATH": path, **(env or {})})


@nox.session(python=False, requires=["both"])
def types(session: nox.Session) -> None:
    """mypy, strict, on every distribution."""
    for folder in (*(f"packages/mindprint-{name}" for name in PACKAGES), HELLO):
        run_in_both(session, "mypy", f"{folder}/src")


@nox.session(python=False, requires=["both"])
def parity(session: nox.Session) -> None:
    """What needs both backends: the same numbers, TRL and PEFT as witnesses, whole runs from the command line."""
    run_in_both(session, "pytest", "tests", "--ignore=tests/docs", *session.posargs)


@nox.session(python=False, requires=["both"])
def docs(session: nox.Session) -> None:
    """Documentation that cannot drift: links, settings, commands and code blocks are tested."""
    run_in_both(session, "pytest", "tests/docs", *session.posargs)


@nox.session(python=False, requires=["both"])
def demo(session: nox.Session) -> None:
    """Train the embedded example on both backends and show what changed."""
    run_in_both(session, "python", "examples/demo.py", *session.posargs)


@nox.session(python=PYTHON)
def wheels(session: nox.Session) -> None:
    """Build every wheel, check its metadata, and run the demo from the wheels, away from the source tree."""
    session.install("-q", "-c", CONSTRAINTS, "build", "twine")
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for folder in (*(f"packages/mindprint-{name}" for name in PACKAGES), HELLO):
        session.run("python", "-m", "build", "--outdir", str(dist), folder, silent=True)
    built = sorted(str(path) for path in dist.iterdir())
    session.run("twine", "check", "--strict", *built)
    wheel = next(path for path in built if Path(path).name.startswith("mindprint_core") and path.endswith(".whl"))
    constraints, script = Path(CONSTRAINTS).resolve(), Path("examples/demo.py").resolve()
    session.install("-q", "-c", str(constraints), "--find-links", str(dist), f"{wheel}[all]")
    with session.chdir(dist):
        session.run("python", str(script), *session.posargs)
    for built_wheel in (path for path in built if path.endswith(".whl")):
        alone(session, built_wheel, dist, constraints)


def alone(session: nox.Session, wheel: str, dist: Path, constraints: Path) -> None:
    """A wheel in an environment of its own, with the dependencies that it declares, must import."""
    folder = dist.parent / "alone" / Path(wheel).name.partition("-")[0]
    session.run("python", "-m", "venv", "--clear", str(folder), silent=True)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    options = ("-q", "-c", str(constraints), "--find-links", str(dist))
    session.run(python, "-m", "pip", "install", *options, wheel, external=True, silent=True)
    with session.chdir(dist):
        session.run(python, "-c", f"import {folder.name.removesuffix('_core')}", external=True)
    shutil.rmtree(folder)


@nox.session(python=False, requires=["both"])
def soak(session: nox.Session) -> None:
    """kill -9 at twenty random moments of each stage on each backend, and resume."""
    env = {"MINDPRINT_KILLS": "20"}
    run_in_both(session, "pytest", "-s", "tests/integration/test_kill.py", *session.posargs, env=env)


@nox.session(python=PYTHON, default=False)
def bench(session: nox.Session) -> None:
    """Measure what the documentation states, beside the peers; prints, and asserts nothing that noise could turn.

    `nox -s bench -- dpo_torch --steps 3` runs one of them, with its options.
    """
    install(session, PACKAGES, "mlx-lm-lora==5.10.2")
    chosen, options = session.posargs[:1], session.posargs[1:]
    for script in sorted(Path("benchmarks").glob(f"{chosen[0] if chosen else '*'}.py")):
        session.run("python", str(script), *options)
