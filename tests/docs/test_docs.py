"""Documentation that cannot drift: what it links to exists, what it lists is complete, and its code runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mindprint.cli import main
from mindprint.config import Config, load_config
from mindprint.events import StepDone

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")])
COMMANDS = ("init", "train", "generate", "eval", "plugins", "doctor")


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


def test_the_configuration_reference_is_what_the_code_says() -> None:
    generated = script(ROOT / "docs" / "generate.py").configuration()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == generated, "run python docs/generate.py"


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


def test_every_command_is_described(capsys: pytest.CaptureFixture[str]) -> None:
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
    """As written, on a sample project made short."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[-1]
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my-voice"]) == 0
    config = tmp_path / "my-voice" / "mindprint.yaml"
    short = re.sub(r"epochs_per_topic: \d+", "steps_per_topic: 1", config.read_text(encoding="utf-8"))
    config.write_text(re.sub(r"steps_per_topic: \d+", "steps_per_topic: 1", short), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert "my-voice/runs/run-001/adapter" in done.stdout


def test_the_voice_pages_python_scores_the_person_as_the_person() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "voice.md").read_text(encoding="utf-8"), re.DOTALL)[-1]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == pytest.approx(1)
