"""Documentation that cannot drift: what it links to exists, what it lists is complete, and its code runs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import click
import pytest
import yaml
from sample_rows import cut_sample_rows

import mindprint
from mindprint import hookspecs
from mindprint.cli import group, main
from mindprint.config import Config, ModelConfig, load_config
from mindprint.events import StepDone
from mindprint.models.folder import resolve_model
from mindprint.trust.report import MEANINGS, Code

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for place in ("", "docs/", "packages/*/", "examples/*/") for page in ROOT.glob(f"{place}*.md"))
COMMANDS = (
    "init",
    "prepare",
    "plan",
    "train",
    "launch",
    "generate",
    "chat",
    "serve",
    "eval",
    "compare",
    "report",
    "verify",
    "merge",
    "convert",
    "migrate",
    "plugins",
    "doctor",
)


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_on_the_site() -> None:
    """`nox -s site` refuses a page that the navigation leaves out. This says so without building the site."""
    settings = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")}
    assert {page for page in pages if f": {page}\n" not in settings} == set(), (
        "add it under nav in docs/site/mkdocs.yml"
    )


def test_the_configuration_reference_is_what_the_code_says() -> None:
    generated = script(ROOT / "docs" / "generate.py").configuration()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == generated, "run python docs/generate.py"


def test_the_hook_reference_is_what_the_code_says() -> None:
    generated = script(ROOT / "docs" / "generate.py").hooks()
    assert (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8") == generated, "run python docs/generate.py"


def test_the_api_reference_is_what_the_docstrings_say() -> None:
    generated = script(ROOT / "docs" / "generate.py").api()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == generated, "run python docs/generate.py"


def test_every_argument_of_the_api_is_described() -> None:
    for name in script(ROOT / "docs" / "generate.py").FUNCTIONS:
        function = getattr(mindprint, name)
        doc = inspect.getdoc(function) or ""
        described = [match[1] for match in re.finditer(r"^    \**(\w+): ", doc.partition("Returns:")[0], re.MULTILINE)]
        assert described == list(inspect.signature(function).parameters), name
        assert all(f"\n{part}:\n" in doc for part in ("Returns", "Raises", "Example")), name


def test_every_hook_is_documented_with_its_signature_and_has_a_test() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    pages = [*ROOT.glob("packages/*/tests/*.py"), *ROOT.glob("packages/mindprint-testing/src/**/*.py")]
    tests = "".join(path.read_text(encoding="utf-8") for path in pages)
    signature = script(ROOT / "docs" / "generate.py").signature
    specified = {
        name: function for name, function in vars(hookspecs).items() if hasattr(function, f"{hookspecs.PROJECT}_spec")
    }
    assert len(specified) >= 13
    for name, function in specified.items():
        assert f"### {name}\n\n```text\n{signature(name, function)}\n" in page
        assert re.search(rf"\b{name}\b", tests), f"{name} has no test"


def test_the_tutorials_code_is_the_tested_example() -> None:
    """Every block of Python and TOML in docs/write-a-backend.md is part of a file of examples/mindprint-hello."""
    page = (ROOT / "docs" / "write-a-backend.md").read_text(encoding="utf-8")
    example = ROOT / "examples" / "mindprint-hello"
    files = [*example.rglob("src/**/*.py"), *example.glob("tests/*.py"), example / "pyproject.toml"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        assert block.strip("\n") in text, block


def test_every_setting_has_a_meaning() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for section, field in Config.model_fields.items():
        for name, inner in getattr(field.annotation, "model_fields", {}).items():
            assert inner.description, f"{section}.{name}"
            assert f"| `{name}` |" in page


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_yaml_blocks_are_valid_configurations(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        if set(yaml.safe_load(block)) <= set(Config.model_fields):
            (tmp_path / "mindprint.yaml").write_text(block, encoding="utf-8")
            load_config(tmp_path)


def test_every_metrics_field_is_described() -> None:
    page = (ROOT / "docs" / "how-it-fits.md").read_text(encoding="utf-8")
    fields = set(StepDone.__dataclass_fields__) - {"loss_scale"}
    assert {name for name in fields if f"`{name}`" not in page} == set()


def test_every_code_of_verify_is_explained() -> None:
    page = (ROOT / "docs" / "fingerprint.md").read_text(encoding="utf-8")
    assert sorted(MEANINGS) == sorted(get_args(Code))
    assert [code for code, meaning in MEANINGS.items() if f"| `{code}` | {meaning} |" not in page] == []


def test_the_fingerprint_pages_python_runs() -> None:
    """On the adapter of a run made short."""
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "fingerprint.md").read_text(encoding="utf-8"), re.DOTALL
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    tiny = resolve_model(ModelConfig(name="builtin:tiny"), ROOT)
    with tempfile.TemporaryDirectory() as folder:
        data = str(files("mindprint").joinpath("resources", "curriculum"))
        stages = {"sft": {"steps_per_topic": 1}, "dpo": {"enabled": False}}
        result = mindprint.train({"backend": "torch", "data": {"path": data}, **stages}, run=Path(folder) / "run")
        assert scope["proven"](str(result.adapter), str(tiny.path)) is True


def test_every_command_is_described(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "*")
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"mindprint {name}" not in page] == []


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_step_by_step_example_runs(backend: str, tmp_path: Path) -> None:
    """Run as it stands but for the backend's name: it learns its one row by heart."""
    code = (ROOT / "docs" / "step_by_step.py").read_text(encoding="utf-8").replace('"torch"', f'"{backend}"')
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("#", '"""'))]) <= 40
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    )
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 20
    assert losses[-1] < 0.2 * losses[0]
    assert "gulls" in done.stdout
    folder = Path(re.findall(r"adapter: (.+)", done.stdout)[0])
    assert (folder / "adapter_model.safetensors").is_file()


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as written, on a sample project whose rows are cut."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my-voice"]) == 0
    cut_sample_rows(tmp_path / "my-voice" / "data")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert "my-voice/runs/run-001/adapter" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_line_is_one(page: Path) -> None:
    """Each line of a block that starts with `mindprint` parses: command, options and arguments are those there are.

    Those in blocks run as well, in test_commands.py; here are the others, and those that are marked as not run.
    """
    lines = re.findall(r"^(?: {4,})?(mindprint \w+[^\n]*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        if name == "hello":  # the example's own, tested there
            continue
        command = group.get_command(click.Context(group), name)
        assert command is not None, line
        command.make_context(name, words)


def test_the_voice_pages_python_scores_the_person_as_the_person() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "voice.md").read_text(encoding="utf-8"), re.DOTALL)[-1]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == pytest.approx(1)
