"""Every check of the repository, one session each; plain `nox` runs all of them but `bench`, `soak` and `real`.

Sessions install built wheels, never the source tree in place. Those that need both frameworks share one environment.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

# A session's environment is installed without bytecode (UNCOMPILED). Where containers forbid Python to write any, every
# process would compile PyTorch, transformers and PEFT again: 12 of the 22 processor seconds that importing them takes.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = [
    "lint", "core", "testing", "hello", "torch", "mlx", "llamacpp", "types", "parity", "faults", "integration", "docs",
    "site", "demo", "wheels", "pretrained",
]  # fmt: skip

# CPU builds of PyTorch are published for some Pythons only; 3.11 where there is one, else whatever runs nox.
PYTHON = "3.11" if shutil.which("python3.11") else f"{sys.version_info.major}.{sys.version_info.minor}"
BOTH = Path(__file__).resolve().parent / ".nox" / "both"
CONSTRAINTS = "constraints.txt"
PACKAGES = ("core", "torch", "mlx", "testing")
INFERENCE = ("llamacpp",)
"""Distributions that do not train. The environments of the other tests are without them."""
HELLO = "examples/mindprint-hello"
TESTS = ("pytest", "pytest-timeout", "pytest-xdist")
IN_PARALLEL = ("-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile")
"""For many small tests. `-n 0` after a session's `--` undoes it, and then `-s` shows the tests' output."""
UNCOMPILED = ("--no-compile",)
"""Most installed modules are never imported. Python compiles the others when it imports them."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For the same tests: a second thread makes models this small slower."""
TRACKERS = ("tensorboard", "wandb")
SERVING = ("starlette", "uvicorn", "openai")
"""The libraries of `mindprint serve`, and a client for it."""
LLAMA_CPP = "3.22.1"
"""The release of the npm packages that hold llama.cpp v0.5.0: its converters as source, and its library."""
NOTEBOOK = ("nbclient", "nbformat", "ipykernel", "matplotlib")
"""To execute the notebook of examples/."""


def install(session: nox.Session, packages: tuple[str, ...], *tools: str) -> None:
    """Install distributions of this repository from wheels built now, and tools, at the tested versions."""
    paths = [f"packages/mindprint-{name}" for name in packages]
    # The backend does without PEFT. Its tests compare with it.
    peers = ("peft",) if "torch" in packages else ()
    session.install("-q", *UNCOMPILED, "-c", CONSTRAINTS, *tools, *peers, *paths)


def forbid(session: nox.Session, *modules: str) -> None:
    """Stop if a module that this session must do without is there."""
    code = "import importlib.util as u, sys; sys.exit(', '.join(m for m in sys.argv[1:] if u.find_spec(m)) or 0)"
    session.run("python", "-c", code, *modules, silent=True)


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Style and structure: ruff's checks, its formatter, and the layers of pyproject.toml."""
    session.install("-q", "-c", CONSTRAINTS, "ruff", "import-linter")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = os.pathsep.join(str(folder.resolve()) for folder in Path("packages").glob("*/src"))
    session.run("lint-imports", env={"PYTHONPATH": sources})


@nox.session(python=PYTHON)
def core(session: nox.Session) -> None:
    """Core's tests, where neither torch nor mlx is installed."""
    core_tests(session)


@nox.session(python=["3.11", "3.12", "3.13"], default=False)
def pythons(session: nox.Session) -> None:
    """Core's tests on every supported Python. A version that this machine lacks is skipped with a message."""
    core_tests(session)


def core_tests(session: nox.Session) -> None:
    install(session, ("core",), "packages/mindprint-core[documents]", *TESTS, *TRACKERS, *SERVING)
    forbid(session, "torch", "mlx")
    session.run("pytest", "packages/mindprint-core/tests", *IN_PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHON)
def testing(session: nox.Session) -> None:
    """The conformance suite, tested: how many of the seeded defects it catches."""
    install(session, ("core", "testing"), *TESTS)
    session.run("pytest", "packages/mindprint-testing/tests", *session.posargs)


@nox.session(python=PYTHON)
def hello(session: nox.Session) -> None:
    """The tutorial's plugin: built as a wheel, installed next to core alone, conforming, and trained."""
    install(session, ("core", "testing"), *TESTS, HELLO)
    forbid(session, "torch", "mlx")
    session.run("pytest", f"{HELLO}/tests", *session.posargs)


@nox.session(python=PYTHON)
def torch(session: nox.Session) -> None:
    """The PyTorch backend's tests, where mlx is not installed."""
    install(session, ("core", "torch", "testing"), *TESTS, "bitsandbytes")
    forbid(session, "mlx")
    session.run("pytest", "packages/mindprint-torch/tests", *IN_PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHON)
def mlx(session: nox.Session) -> None:
    """The MLX backend's tests, where torch is not installed."""
    install(session, ("core", "mlx", "testing"), *TESTS)
    forbid(session, "torch")
    session.run("pytest", "packages/mindprint-mlx/tests", *IN_PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHON)
def llamacpp(session: nox.Session) -> None:
    """The llama.cpp backend's tests, from its wheel, where neither torch nor mlx is installed."""
    install(session, ("core", "llamacpp", "testing"), *TESTS, *SERVING)
    forbid(session, "torch", "mlx")
    session.run("pytest", "packages/mindprint-llamacpp/tests", *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHON, default=False)
def both(session: nox.Session) -> None:
    """The environment that the sessions below share: both backends, all of core's scorers, and the tools for tests."""
    tools = (*TESTS, *NOTEBOOK, "bitsandbytes", "hypothesis", "mypy", "types-PyYAML")
    install(session, PACKAGES, "packages/mindprint-core[all,documents,embeddings,gguf,serve,chat]", *tools)


def run_in_both(session: nox.Session, command: str, *words: str, env: dict[str, str] | None = None) -> None:
    """Run a command of the shared environment."""
    folder = programs(BOTH)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    session.run(str(folder / command), *words, external=True, env={"PATH": path, **(env or {})})


@nox.session(python=False, requires=["both"])
def types(session: nox.Session) -> None:
    """mypy, strict, on every distribution."""
    # One call for all of them: each would check core and load the stubs of the frameworks again.
    folders = (*(f"packages/mindprint-{name}" for name in (*PACKAGES, *INFERENCE)), HELLO)
    run_in_both(session, "mypy", *(f"{folder}/src" for folder in folders))


@nox.session(python=False, requires=["both"])
def parity(session: nox.Session) -> None:
    """The same numbers on both backends, TRL, PEFT and mlx-lm as witnesses, and the faults that verify finds."""
    folders = ("tests/parity", "tests/interop", "tests/trust")
    run_in_both(session, "pytest", *folders, *IN_PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session(python=False, requires=["both"])
def integration(session: nox.Session) -> None:
    """Whole runs on both backends from the command line, killed and resumed, with as many threads as users have."""
    # Two tests at a time: each waits most of its time for processes that import or read files. Threads that wait for
    # work then leave the core to the other test.
    parallel = (*IN_PARALLEL[:2], "--dist", "loadgroup")
    run_in_both(session, "pytest", "tests/integration", *parallel, *session.posargs, env={"OMP_WAIT_POLICY": "passive"})


@nox.session(python=False, requires=["both"])
def docs(session: nox.Session) -> None:
    """Documentation that cannot drift: links and settings are tested, code and command blocks run."""
    run_in_both(session, "pytest", "tests/docs", *IN_PARALLEL[:2], *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHON)
def site(session: nox.Session) -> None:
    """The documentation as a site, in build/site: a link or an anchor that leads nowhere fails.

    `nox -s site -- serve` shows the site on this machine while you write.
    """
    session.install("-q", *UNCOMPILED, "-c", CONSTRAINTS, "mkdocs", "mkdocs-material")
    words = session.posargs or ("build",)
    session.run("mkdocs", *words, "--strict", "-f", "docs/site/mkdocs.yml", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=False, requires=["both"])
def demo(session: nox.Session) -> None:
    """Train the embedded example on both backends and show the change. Installed, away from the source tree."""
    script = Path("examples/demo.py").resolve()
    with session.chdir(session.create_tmp()):
        run_in_both(session, "python", str(script), *session.posargs)


@nox.session(python=PYTHON)
def wheels(session: nox.Session) -> None:
    """Build every wheel from its source distribution, check its metadata, and use each in its own environment.

    `nox -s wheels -- hello` looks at one of them.
    """
    session.install("-q", "-c", CONSTRAINTS, "build", "hatchling", "twine")
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for folder in (*(f"packages/mindprint-{name}" for name in (*PACKAGES, *INFERENCE)), HELLO):
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist), folder, silent=True)
    session.run("twine", "check", "--strict", *sorted(str(path) for path in dist.iterdir()))
    if not session.posargs:
        add_and_remove(Environment(session, dist, "added"))
    for name in session.posargs or ("torch",):
        environment = Environment(session, dist, name)
        environment.add(name)
        shutil.rmtree(environment.folder)


SHORT = ("curriculum.max_topics=2", "sft.steps_per_topic=2", "dpo.steps_per_topic=2",
         "evaluation.prompts_per_topic=1", "evaluation.levels=[final]", "generation.max_new_tokens=16")  # fmt: skip

USED_ALONE = {
    "core": (("mindprint", "init", "first"), ("mindprint", "plugins", "--check")),
    "testing": (("pytest", "--version"), ("python", "-c", "import mindprint_testing")),
    "hello": (("mindprint", "hello", "base"), ("mindprint", "init", "voice", "--model", "base"),
              ("mindprint", "train", "voice", "--backend", "hello", *SHORT)),
    "torch": (("mindprint", "doctor", "--backend", "torch"),),
    "mlx": (("mindprint", "doctor", "--backend", "mlx"),),
}  # fmt: skip
"""The commands that show that a distribution is there and works: `doctor` trains a few steps on each device."""


class Environment:
    """An empty environment, into which distributions are installed from wheels, with what they declare."""

    def __init__(self, session: nox.Session, dist: Path, name: str) -> None:
        self._session = session
        self._dist = dist
        self.folder = dist.parent / name
        self._constraints = Path(CONSTRAINTS).resolve()
        session.run("python", "-m", "venv", "--clear", "--without-pip", str(self.folder), silent=True)

    def pip(self, *words: str) -> None:
        """Run the session's pip on this environment."""
        python = programs(self.folder) / "python"
        self._session.run("python", "-m", "pip", "--python", str(python), *words, silent=True)

    def add(self, name: str) -> None:
        """Install a wheel, check what it declares, and run the commands that show that it works."""
        wheel = next(self._dist.glob(f"mindprint_{name}-*.whl"))
        if name != "core" and "Requires-Dist: mindprint-core" not in metadata_of(wheel):
            self._session.error(f"{wheel.name} does not declare mindprint-core")
        options = ("-q", *UNCOMPILED, "-c", str(self._constraints), "--find-links", str(self._dist))
        self.pip("install", *options, str(wheel))
        self.pip("check")
        self.use(*USED_ALONE[name])

    def use(self, *commands: tuple[str, ...], success_codes: Sequence[int] = (0,)) -> None:
        """Run commands of this environment, away from the source tree."""
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        with self._session.chdir(work):
            for command, *words in commands:
                path = str(programs(self.folder) / command)
                self._session.run(path, *words, external=True, success_codes=list(success_codes))


def add_and_remove(environment: Environment) -> None:
    """Add one distribution after the other to core, and remove a backend that another one shares a project with.

    One environment serves for all of them: each needs core, and nothing else that an earlier one brings.
    """
    for name in ("core", "hello", "mlx"):
        environment.add(name)
    environment.pip("uninstall", "-q", "-y", "mindprint-hello")
    environment.pip("check")
    environment.use(("mindprint", "plugins", "--check"), ("mindprint", "doctor"), ("mindprint", "init", "other"),
                    ("mindprint", "train", "other", *SHORT))  # fmt: skip
    environment.use(("mindprint", "generate", "voice", "--prompt", "Tea?"), success_codes=(2,))
    environment.add("testing")
    shutil.rmtree(environment.folder)


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as content:
        name = next(name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        return content.read(name).decode()


def programs(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin")


@nox.session(python=False, requires=["both"])
def faults(session: nox.Session) -> None:
    """Broken and hostile input: planted links, limits on what comes from others, and a minute of fuzzing."""
    run_in_both(session, "pytest", "tests/faults", *IN_PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHON, default=False)
def voice(session: nox.Session) -> None:
    """The voice score on real authors: `nox -s voice -- FOLDER`, which has a folder of two works for each of four.

    Twenty runs of the tiny model also show whether their intervals say how far a seed moves a voice.

    `nox -s voice -- FOLDER MODEL` measures `mindprint prepare` instead: from one work of an author to a voice, on a
    base model such as SmolLM2-135M-Instruct, and the throughput and sameness of its rows. Options of the first may
    follow: `--limit 10 --words 3000`.
    """
    if not session.posargs:
        session.error("name the folder of the authors: nox -s voice -- FOLDER [MODEL]")
    folder, *more = session.posargs
    install(session, ("core", "torch", *(("mlx",) if more else ())), *TESTS)
    folder = str(Path(folder).resolve())
    if more:
        model, *options = more
        kept = Path(session.create_tmp()).resolve() / "voice"
        failed = []
        of_an_author = (folder, "--into", str(kept), *options)
        for command in ("voice", "rewriting", "pairs", "throughput", "same"):
            chosen = of_an_author if command in ("voice", "rewriting", "pairs") else ()
            words = (command, "--model", model, *chosen)
            # Every figure is printed, also after one that does not hold.
            try:
                session.run("python", "benchmarks/prepare.py", *words, env=ONE_THREAD)
            except CommandFailed:
                failed.append(command)
        if failed:
            session.error(f"not everything holds: {', '.join(failed)}")
        return
    session.run("pytest", "-s", "tests/voice", "--timeout=0", env={**ONE_THREAD, "MINDPRINT_AUTHORS": folder})
    session.run("python", "benchmarks/voice.py", folder, env=ONE_THREAD)


@nox.session(python=False, requires=["both"], default=False)
def trust(session: nox.Session) -> None:
    """All that verify must find and must not: every fault, every sound form, and real models where they are named.

    Set `MINDPRINT_SMOLLM2` and `MINDPRINT_GEMMA3` to the folders of SmolLM2-135M and Gemma 3 270M.
    """
    env = {**ONE_THREAD, "MINDPRINT_TRUST": "all"}
    run_in_both(session, "pytest", "tests/trust", *IN_PARALLEL, "--timeout=0", *session.posargs, env=env)


@nox.session(python=False, requires=["both"], default=False)
def quantized(session: nox.Session) -> None:
    """A hundred steps of each stage on packed bases in every format, torch and MLX, next to the dequantized ones.

    Set `MINDPRINT_SMOLLM2` to the folder of SmolLM2-135M to have it in 4 bits among them, which takes an hour.
    """
    env = {**ONE_THREAD, "MINDPRINT_QUANTIZED_STEPS": "100"}
    run_in_both(
        session, "pytest", "tests/parity/test_quantized_training.py", "-s", "--timeout=0", *session.posargs, env=env
    )


@nox.session(python=False, requires=["both"], default=False)
def fuzz(session: nox.Session) -> None:
    """The same fuzzers for as long as you like: `nox -s fuzz -- 2000` makes 2000 tries of each, with a seed it prints.

    `nox -s fuzz -- 2000 SEED` makes the same tries again.
    """
    tries = session.posargs[0] if session.posargs else "1000"
    seed = session.posargs[1] if len(session.posargs) > 1 else str(secrets.randbits(32))
    session.log(f"{tries} tries of each fuzzer; the seed is {seed}")
    env = {**ONE_THREAD, "MINDPRINT_FUZZ": tries}
    # One test and not one file for each worker: every fuzzer is in the same file.
    options = (*IN_PARALLEL[:2], "--dist", "load", "--timeout=0", f"--hypothesis-seed={seed}")
    run_in_both(session, "pytest", "tests/faults/test_fuzzing.py", *options, env=env)


@nox.session(python=False, requires=["both"])
def soak(session: nox.Session) -> None:
    """kill -9 at twenty random moments of each stage, and among 200 commands in parallel on one project."""
    env = {"MINDPRINT_KILLS": "20", "MINDPRINT_SOAK": "200"}
    files = ("tests/integration/test_kill.py", "tests/faults/test_soak.py")
    run_in_both(session, "pytest", "-s", *files, *session.posargs, env=env)


@nox.session(python=False, requires=["both"], default=False)
def ranks(session: nox.Session) -> None:
    """Two and three ranks against one on both backends, runs killed and resumed, and the bytes that ranks exchange.

    `nox -s ranks -- steps --backends torch` runs one part, with its options.
    """
    parts = [session.posargs] if session.posargs else [["steps"], ["resume"], ["kill"], ["bytes"]]
    for words in parts:
        run_in_both(session, "python", "benchmarks/ranks.py", *words, env=ONE_THREAD)


@nox.session(python=PYTHON, default=False)
def gguf(session: nox.Session) -> None:
    """Adapters and merged models in GGUF against llama.cpp's own converter and its log-probs, SmolLM2 among them.

    All three backends then answer with SmolLM2, in `generate` and through `serve`. Needs npm, and Linux on x64. Set
    `LLAMA_CPP_SOURCE`, `LLAMA_CPP_LIBRARY` or `MINDPRINT_REAL` to folders that you have, and they are not fetched.
    """
    install(session, (*PACKAGES, *INFERENCE), "packages/mindprint-core[gguf]", *TESTS, *SERVING)
    env = {**ONE_THREAD, **fetch_llama_cpp(session)}
    # The backend loads llama.cpp from a wheel, and the other tests load another release: one process cannot hold both.
    session.run("pytest", "tests/gguf", "--ignore=tests/gguf/test_serving.py", "-s", *session.posargs, env=env)
    session.run("pytest", "tests/gguf/test_serving.py", "-s", *session.posargs, env=env)


def fetch_llama_cpp(session: nox.Session) -> dict[str, str]:
    """Fetch llama.cpp's converters, its library, and SmolLM2, each unless the environment names a folder with it."""
    folder = Path(session.create_tmp()).resolve()
    fetched = {name: os.environ.get(name, "") for name in ("LLAMA_CPP_SOURCE", "LLAMA_CPP_LIBRARY", "MINDPRINT_REAL")}
    if not fetched["LLAMA_CPP_SOURCE"]:
        bundle = unpack_from_npm(session, folder, "node-llama-cpp") / "llama" / "gitRelease.bundle"
        source = folder / "llama.cpp"
        if not source.exists():
            session.run("git", "clone", "-q", str(bundle), str(source), external=True)
        fetched["LLAMA_CPP_SOURCE"] = str(source)
    if not fetched["LLAMA_CPP_LIBRARY"]:
        package = unpack_from_npm(session, folder, "@node-llama-cpp/linux-x64")
        fetched["LLAMA_CPP_LIBRARY"] = str(package / "bins" / "linux-x64")
    if not fetched["MINDPRINT_REAL"]:
        session.run("python", "tests/real/pretrained.py", str(folder / "models"), "smollm2")
        fetched["MINDPRINT_REAL"] = str(folder / "models")
    return fetched


def unpack_from_npm(session: nox.Session, folder: Path, name: str) -> Path:
    """Fetch the pinned release of a package from npm. Return the folder of its files."""
    target = folder / name.replace("/", "-")
    target.mkdir(exist_ok=True)
    with session.chdir(target):
        session.run("npm", "pack", "--silent", f"{name}@{LLAMA_CPP}", external=True)
        session.run("tar", "xzf", str(next(target.glob("*.tgz"))), external=True)
    return target / "package"


@nox.session(python=False, requires=["both"])
def pretrained(session: nox.Session) -> None:
    """Two steps of each stage of a pretrained model, cut to a few layers, on torch, on MLX and in TRL's trainers."""
    train_pretrained(session, ("smollm2-6-layers",), steps=2)


@nox.session(python=False, requires=["both"], default=False)
def real(session: nox.Session) -> None:
    """The same with 30 steps of each stage, of whole models: `nox -s real -- smollm2` trains one of the two.

    Their adapters are then loaded with PEFT, merged and verified. Takes long, and 2 GB of disk.
    """
    train_pretrained(session, session.posargs or ("smollm2", "gemma3"), steps=30)


def train_pretrained(session: nox.Session, models: Sequence[str], steps: int) -> None:
    """Make folders of models that the package index serves, and compare the training of each with TRL's."""
    folder = Path(session.create_tmp()).resolve() / "models"
    run_in_both(session, "python", "tests/real/pretrained.py", str(folder), *models)
    env = {"MINDPRINT_REAL": str(folder), "MINDPRINT_REAL_MODELS": " ".join(models)}
    run_in_both(session, "pytest", "-s", "tests/real", env={**env, "MINDPRINT_REAL_STEPS": str(steps)})


BENCHMARKS = ("sft_torch", "sft_mlx", "dpo_torch", "dpo_mlx", "bfloat16_torch", "linear_cost", "step_savings",
              "loop_overhead", "memory_flat", "merge", "near_duplicates", "row_rounding", "rounding", "startup",
              "verify", "plan", "quantized")  # fmt: skip
"""Those that need no more than this repository."""


@nox.session(python=PYTHON, default=False)
def bench(session: nox.Session) -> None:
    """Measure the figures of the documentation, next to the peers. Asserts nothing, because they are noisy.

    `nox -s bench -- dpo_torch --turns 3` runs one of them, with its options. Those of `benchmarks/` that need a model,
    texts or a GPU run by name only.
    """
    install(session, PACKAGES, "mlx-lm-lora==5.10.2")
    chosen, options = session.posargs[:1], session.posargs[1:]
    for name in chosen or BENCHMARKS:
        session.run("python", f"benchmarks/{name}.py", *options)
