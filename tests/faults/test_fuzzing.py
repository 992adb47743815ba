"""Whatever is in a file, a command ends with exit 0, 1 or 2, in bounded time and memory, and touches nothing else.

A minute of processor time in CI, with the same tries each time. `nox -s fuzz` runs longer, with a seed that it prints.
MINDPRINT_FUZZ is the number of tries of each test.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from attacked import (
    CPU_SECONDS,
    TRAIN,
    TRAINING_SECONDS,
    ForkServer,
    Work,
    command,
    difference,
    make_samples,
    prepared,
    untouched,
)
from edits import HOSTILE, TEMPLATES, Edit, file_edits, json_edits, rewrite
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TRIES = int(os.environ.get("MINDPRINT_FUZZ", "0"))
"""Tries of each test. In CI each has the number that is written at it, about a minute of processor time together."""

pytestmark = pytest.mark.slow


def fuzzing(tries: int) -> settings:
    """Return Hypothesis' settings for a test that makes `tries` tries in CI."""
    return settings(
        max_examples=TRIES or tries,
        deadline=None,
        database=None,
        derandomize=not TRIES,
        # Shrinking tries hundreds of times more, and a try of what hangs takes its whole limit.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a project with a run, an adapter and a model, which the tries copy."""
    folder = tmp_path_factory.mktemp("samples")
    make_samples(folder)
    return folder


@pytest.fixture(scope="module")
def server(samples: Path) -> Iterator[ForkServer]:
    """Start the process whose forks are the tries."""
    server = ForkServer(samples / "voice")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cost(server: ForkServer) -> Iterator[None]:
    """Print the processor time of a test's tries."""
    tries, seconds = server.tries, server.seconds
    server.longest = 0.0
    yield
    spent = f"{server.seconds - seconds:.1f} s of processor time, the longest {server.longest:.1f} s"
    print(f"{server.tries - tries} tries, {spent}")


@contextmanager
def attacked(samples: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Yield a new folder with a copy of one sample in it, next to a folder that must stay as it is."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        outside = folder / "outside"
        outside.mkdir()
        (outside / "precious").write_text("precious")
        copy = folder / "inside" / name
        shutil.copytree(samples / name, copy, symlinks=True)
        with untouched(outside):
            yield folder, copy


def attack(
    server: ForkServer,
    samples: Path,
    name: str,
    file: str,
    edit: Edit,
    work: Callable[[Path, Path], Work],
    limit: int = CPU_SECONDS,
) -> None:
    """Edit one file of a copied sample, run a command on it, and check how it ends."""
    with attacked(samples, name) as (folder, copy):
        plant(copy, folder / "outside")
        before = (copy / file).read_bytes() if (copy / file).is_file() else b""
        edit(copy / file)
        change = f"{name}/{file}: {difference(before, copy / file)}"
        check(server, work(folder, copy), folder, (str(folder), Path(file).name, *SETTINGS), change, limit)


def check(
    server: ForkServer, work: Work, folder: Path, names: tuple[str, ...], change: str, limit: int = CPU_SECONDS
) -> None:
    """Run a try, and fail with its input and its outcome where it breaks the promise."""
    ended = server.run(work, folder, limit)
    if faults := "; ".join(ended.faults(names)):
        spent = f"{ended.seconds:.1f} s of computing, {ended.memory / 2**20:.0f} MB"
        lines = (faults, f"try: {work.kind} {list(work.words)}", f"input: {change}", f"exit {ended.code}, {spent}")
        pytest.fail("\n".join((*lines, ended.out[-1500:], ended.err[-4000:])), pytrace=False)


SETTINGS = ("model.name", "topic", "data/", "dataset ", "builtin:tiny")
"""Words by which a message names a place that is not a file: a setting, a topic, a name on the hub."""


def plant(copy: Path, outside: Path) -> None:
    """Put links where a careless program would write through them."""
    for name in (".report.html.partial", ".report.md.partial", "report.html", ".config.yaml.partial"):
        path = copy / name
        if not path.exists():
            path.symlink_to(outside / "precious")


def files(folder: Path, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern))


@given(data=st.data())
@fuzzing(30)
def test_adapters(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]))
    edit = data.draw(file_edits((samples / "adapter" / file).read_bytes()))
    if file.endswith(".safetensors") and data.draw(st.booleans()):
        edit = data.draw(header_edits((samples / "adapter" / file).read_bytes()))
    words = data.draw(st.sampled_from(["convert", "merge", "verify"]))
    attack(server, samples, "adapter", file, edit, lambda folder, copy: command(*adapter_command(words, folder, copy)))


def adapter_command(name: str, folder: Path, adapter: Path) -> list[str | Path]:
    match name:
        case "convert":
            return ["convert", adapter, folder / "inside" / "out", "--to", "mlx-lm"]
        case "merge":
            return ["merge", adapter, folder / "inside" / "out", "--no-verify"]
        case _:
            return ["verify", adapter, "--backend", "mlx"]


@st.composite
def header_edits(draw: st.DrawFn, content: bytes) -> Callable[[Path], None]:
    """Draw an edit of a safetensors file's header, the rest left as it is."""
    length = int.from_bytes(content[:8], "little")
    header = draw(json_edits(json.loads(content[8 : 8 + length])))
    said = draw(st.sampled_from([len(header), len(header), len(header), 0, 2**31, 2**63]))
    new = said.to_bytes(8, "little") + header + content[8 + length :]
    return lambda path: rewrite(path, new)


@given(data=st.data())
@fuzzing(30)
def test_fingerprints(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    edit = data.draw(file_edits((samples / "adapter" / "fingerprint.json").read_bytes()))
    attack(
        server,
        samples,
        "adapter",
        "fingerprint.json",
        edit,
        lambda _, copy: command("verify", copy, "--backend", "mlx"),
    )


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@given(data=st.data())
@fuzzing(30)
def test_model_folders(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(MODEL_FILES))
    content = (samples / "model" / file).read_bytes()
    edit = data.draw(header_edits(content) if file.endswith("safetensors") else file_edits(content))
    trained = data.draw(st.integers(0, 9)) == 0

    def work(folder: Path, copy: Path) -> Work:
        shutil.copytree(samples / "voice", folder / "inside" / "voice", ignore=shutil.ignore_patterns("run"))
        if trained:
            words = ["train", folder / "inside" / "voice", "--backend", "mlx", f"model.name={copy}", *TRAIN]
            return command(*words)
        return prepared(folder / "inside" / "voice", f"model.name={copy}")

    attack(server, samples, "model", file, edit, work, TRAINING_SECONDS if trained else CPU_SECONDS)


@given(template=st.sampled_from(TEMPLATES))
@fuzzing(len(TEMPLATES))
def test_chat_templates(server: ForkServer, samples: Path, template: str) -> None:
    def work(folder: Path, copy: Path) -> Work:
        shutil.copytree(samples / "voice", folder / "inside" / "voice", ignore=shutil.ignore_patterns("run"))
        return prepared(folder / "inside" / "voice", f"model.name={copy}")

    attack(server, samples, "model", "chat_template.jinja", lambda path: rewrite(path, template.encode()), work)


YAML = (
    "k: &k0 [x, x]\n" + "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]\n" for n in range(1, 40)),
    "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12)),
    "a: &a {b: *a}\n",
    "a: &a [*a]\n",
    "x: " + "[" * 20_000,
    "x: " + "{a: " * 20_000,
    "".join(" " * n + f"k{n}:\n" for n in range(900)),
    "? [a]\n: b\n",
    "? {a: b}\n: c\n",
    "1: 2\n",
    "null: 1\n",
    "data: !!binary 'x'\n",
    "data: !!timestamp 2001-99-99\n",
    "data: 2001-99-99\n",
    "data: !!int 'x'\n",
    "seed: !!int '" + "9" * 5000 + "'\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 1e999\n",
    "seed: !!float 'x'\n",
    "seed: !!python/object/apply:os.system ['touch ../outside/made']\n",
    'data: {path: "a\\0b"}\n',
    'data: {path: "\\ud800"}\n',
    "data: {path: ~nosuchuser}\n",
    "data: {sft: ~nosuchuser/x.jsonl}\n",
    "model: {name: ~nosuchuser/x}\n",
    'model: {name: "a\\0b"}\n',
    'model: {name: "' + "a/" * 5000 + '"}\n',
    "adapter: {start_from: ~nosuchuser}\n",
    "a: &a {x: 1}\nb: {<<: *a}\n",
    "<<: 1\n",
    "%YAML 9.9\n---\na: 1\n",
    "--- a\n--- b\n",
    "\t\n",
    "a: b: c\n",
    "'\x00'",
    "sft: {steps_per_topic: 1" + "0" * 400 + "}\n",
    "data: {max_length: -5}\n",
    "data: {max_length: 1" + "0" * 30 + "}\n",
    "sft: {batch_size: 1" + "0" * 30 + "}\n",
    "adapter: {r: 1" + "0" * 30 + "}\n",
    "seed: -1\n",
    "seed: 1" + "0" * 40 + "\n",
    'units: [{id: a, topics: [{id: "\\ud800"}]}]\n',
)  # fmt: skip
"""Settings that no reader should trust."""


@given(text=st.sampled_from(YAML), name=st.sampled_from(["mindprint.yaml", "data/curriculum.yaml"]))
@fuzzing(2 * len(YAML))
def test_yaml_of_an_enemy(server: ForkServer, samples: Path, text: str, name: str) -> None:
    attack(
        server,
        samples,
        "voice",
        "mindprint.yaml",
        lambda path: write(path.parent / name, text),
        lambda _, copy: prepared(copy),
    )


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@given(data=st.data())
@fuzzing(60)
def test_settings(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    """Each setting with each hostile value."""
    whole = yaml.safe_load((samples / "voice" / "run" / "config.yaml").read_text())
    whole["data"]["path"], whole["model"]["name"] = "data", "builtin:tiny"
    text = data.draw(json_edits(json.loads(json.dumps(whole))))
    attack(server, samples, "voice", "mindprint.yaml", lambda path: rewrite(path, text),
           lambda _, copy: prepared(copy))  # fmt: skip


@given(data=st.data())
@fuzzing(60)
def test_rows(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["sft.jsonl", "preferences.jsonl", "heldout.jsonl"]))
    edit = data.draw(file_edits((samples / "voice" / "data" / name).read_bytes()))
    attack(server, samples, "voice", f"data/{name}", edit, lambda _, copy: prepared(copy))


OTHER_ROWS = {
    "rows.csv": b'prompt,completion\n"a ""b""",c\nd,e\n',
    "rows.json": b'[{"prompt": "a", "completion": "b"}]',
    "rows.ndjson": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "quiz.json": b'[{"question": "Why?", "reference_answers": ["So."], "key_concepts": ["so"]}]',
}


@given(data=st.data())
@fuzzing(60)
def test_other_rows(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OTHER_ROWS)))
    edit = data.draw(file_edits(OTHER_ROWS[name]))

    def edited(path: Path) -> None:
        path.write_bytes(OTHER_ROWS[name])
        edit(path)

    chosen = [] if name == "quiz.json" else ["dpo.enabled=false", f"data.sft=data/{name}"]
    attack(server, samples, "voice", f"data/{name}", edited, lambda _, copy: prepared(copy, *chosen))


RUN_FILES = (
    "manifest.json", "split.json", "config.yaml", "costs.json", "metrics.jsonl", "evaluations.jsonl", "decisions.jsonl",
    "answers.jsonl", "checkpoints/*/cursor.json", "checkpoints/*/adapter_config.json", "references/*.safetensors",
)  # fmt: skip


@given(data=st.data())
@fuzzing(20)
def test_run_folders(server: ForkServer, samples: Path, data: st.DataObject) -> None:
    run = samples / "voice" / "run"
    file = data.draw(st.sampled_from(files(run, *RUN_FILES)))
    edit = data.draw(file_edits((run / file).read_bytes()))
    name = data.draw(st.sampled_from(["report", "report", "report", "eval", "resume"]))

    def work(_: Path, copy: Path) -> Work:
        copy = copy / "run"
        if name == "resume":
            shutil.rmtree(copy / "adapter")
            return command("train", copy, "--resume")
        return (
            command("report", copy) if name == "report" else command("eval", "--compare", copy, samples / "voice/run")
        )

    attack(server, samples, "voice", f"run/{file}", edit, work, TRAINING_SECONDS if name == "resume" else CPU_SECONDS)


@given(value=st.sampled_from([value for value in HOSTILE if isinstance(value, str) and "\0" not in value]))
@fuzzing(12)
def test_words_of_the_command_line(server: ForkServer, samples: Path, value: str) -> None:
    word = value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    with attacked(samples, "adapter") as (folder, copy):
        for words in (["verify", copy, "--model", word], ["train", word], ["convert", copy, word], ["report", word]):
            check(server, command(*words), folder, (word[:20], str(folder), "mindprint", "\\"), repr(word))
