"""`mindprint prepare` on both backends with the embedded model: rows, the same rows after a kill, and a training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mindprint.cli import main
from mindprint.config import ModelConfig
from mindprint.models.folder import resolve_model
from mindprint.reports.prepared import MEASURED

ROWS = ("sft.jsonl", "preferences.jsonl", "heldout.jsonl", "curriculum.yaml", "report.html")
OPTIONS = ("--passage-words", "16", "40", "--model", "builtin:tiny", "--mix", "answer=0.5", "--mix", "continue=0.5")

WRITING = """\
The boat was old when my father bought her, and he never let anybody forget what he had paid for her.

On the morning of the fair the whole village crossed the river, and I carried the baker's geese for nothing.

My aunt kept her money in a teapot. Everybody knew it, and so it was the safest place in the house.

Nobody mends a net as well as a man who has lost a fish through it, and he mends it with his mouth shut.

When the bridge was built they gave us a medal and a dinner. I sold the medal, and I still think of the dinner.

The priest came over twice a year, once for the dead and once for the plums, and he stayed longer for the plums.

I have seen three floods. The first took the barn, the second took the road, and the third took my patience.

There is a stone in the landing on which my mother cut a line for every year that she had been angry with the miller.

Ask me for the time and I will look at the water, for the church clock has been wrong since the sexton married.

My brother went to the city for a winter and came back with a hat, and of the two only the hat was any use.
"""


Prepare = Callable[..., Path]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """The command on a file of the text above, and the folder that it made."""
    writing = tmp_path / "ferry.txt"
    writing.write_text(WRITING, encoding="utf-8")

    def run(name: str, backend: str) -> Path:
        folder = tmp_path / name
        code = main(["prepare", str(writing), "--into", str(folder), "--backend", backend, *OPTIONS])
        assert code == 0, capsys.readouterr().err
        return folder

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "data" / name).read_bytes() for name in ROWS}


def test_both_backends_make_the_same_rows(prepare: Prepare) -> None:
    torch, mlx = (files_of(prepare(backend, backend)) for backend in ("torch", "mlx"))
    # The report shows gains with two digits, so it is the same too.
    assert torch == mlx
    assert len(torch["sft.jsonl"].splitlines()) >= 5


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_killed_command_continues_to_the_same_bytes(backend: str, prepare: Prepare) -> None:
    """A process that is killed leaves the file of answers cut off anywhere, and none or some of the row files."""
    folder = prepare("voice", backend)
    whole, answers = files_of(folder), folder / "data" / "prepare.jsonl"
    made = answers.read_bytes()
    for end in (0, len(made) // 3, 2 * len(made) // 3, len(made) - 1):
        answers.write_bytes(made[:end])
        (folder / "data" / "sft.jsonl").unlink()
        prepare("voice", backend)
        assert files_of(folder) == whole
        assert answers.read_bytes() == made


def test_what_was_prepared_is_trained(prepare: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare("voice", "torch")
    report = (folder / "data" / "report.html").read_text(encoding="utf-8")
    assert "What to expect" in report and all(figure in report for row in MEASURED for figure in row)
    settings = ("sft.steps_per_topic=2", "dpo.steps_per_topic=2", "evaluation.levels=[]")
    assert main(["train", str(folder), *settings]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "data" / "sft.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in rows} <= set(WRITING.strip().split("\n\n"))
    assert (folder / "runs" / "run-001" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_model_without_a_chat_template_makes_rows_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_model(ModelConfig(name="builtin:tiny"), tmp_path).path, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "ferry.txt").write_text(WRITING, encoding="utf-8")
    words = [str(tmp_path / "ferry.txt"), "--into", str(tmp_path / "voice"), "--backend", "torch", *OPTIONS[:3]]
    assert main(["prepare", *words, "--model", str(base), "--mix", "continue=1"]) == 0
    assert "has no chat template" in capsys.readouterr().err
    assert (tmp_path / "voice" / "data" / "sft.jsonl").is_file()


def test_a_textbook_is_prepared_and_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Path(__file__).parents[2] / "packages" / "mindprint-core" / "tests" / "textbook"
    folder = tmp_path / "voice"
    assert main(["prepare", str(book), "--into", str(folder), "--backend", "torch", *OPTIONS]) == 0, capsys.readouterr()
    rows = [json.loads(line) for line in (folder / "data" / "sft.jsonl").read_text().splitlines()]
    assert {row["topic"].rpartition("/")[0] for row in rows} == {"unit-01/chapter-01", "unit-01/chapter-02"}
    settings = ("sft.steps_per_topic=1", "dpo.steps_per_topic=1", "evaluation.levels=[]")
    assert main(["train", str(folder), *settings]) == 0, capsys.readouterr().err
    manifest = json.loads((folder / "runs" / "run-001" / "manifest.json").read_text())
    assert manifest["curriculum"]["titles"]["unit-01/chapter-02"] == "People"
