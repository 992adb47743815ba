"""Discovery: from metadata alone, one plugin at a time, and one clear message for each way to be broken."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mindprint.contract import ModelSpec
from mindprint.errors import BackendError, MindprintError
from mindprint.plugins import loading as plugins
from mindprint.plugins.backend import load_backend

Install = Callable[..., None]
COUNT = iter(range(1000))
STATED = "from mindprint.hookspecs import hookimpl\nMINDPRINT_HOOK_APIS = (1,)\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution with one backend module into a folder on sys.path."""

    def add(name: str, code: str, distribution: str = "acme-backend", version: str = "3.1") -> None:
        module = f"acme_{next(COUNT)}"
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[mindprint.backends]\n{name} = {module}\n")
        (tmp_path / f"{module}.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load_backend_plugin.cache_clear()
    yield add
    plugins.load_backend_plugin.cache_clear()


def test_listing_imports_nothing(install: Install) -> None:
    install("acme", "raise SystemExit('imported')")
    found = {plugin.name: plugin for plugin in plugins.installed(plugins.BACKENDS)}["acme"]
    assert (found.distribution, found.version) == ("acme-backend", "3.1")
    assert found.module not in sys.modules


def test_a_missing_backend_comes_with_its_command() -> None:
    with pytest.raises(BackendError, match=r"backend 'tensorfire' is not installed \(installed: .*choose one"):
        plugins.find_backend("tensorfire")


def test_ours_missing_comes_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: [])
    with pytest.raises(BackendError, match=r'installed: none\); install it: pip install "mindprint-core\[torch\]"'):
        plugins.find_backend("pytorch")


def test_pytorch_is_torch() -> None:
    assert plugins.canonical_name("PyTorch") == "torch"


def test_a_name_claimed_twice_names_both(install: Install) -> None:
    install("acme", "")
    install("acme", "", "other-backend", "0.2")
    with pytest.raises(BackendError, match="claimed by acme-backend 3.1 and other-backend 0.2; uninstall one"):
        plugins.find_backend("acme")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import no_such_framework",
            "failed to import: ModuleNotFoundError: No module named 'no_such_framework'; reinst",
        ),
        ("1 / 0", "failed to import: ZeroDivisionError"),
        ("raise SystemExit", "failed to import: SystemExit"),
        ("", "does not state its hook API: its module needs MINDPRINT_HOOK_APIS"),
        ("MINDPRINT_HOOK_APIS = 1", "does not state its hook API"),
        (
            "MINDPRINT_HOOK_APIS = (0,)",
            "supports hook API 0, this mindprint-core drives 1; pip install --upgrade acme-b",
        ),
        ("MINDPRINT_HOOK_APIS = (8, 9)", "supports hook API 8, 9, .* drives 1; pip install --upgrade mindprint-core"),
        ("MINDPRINT_HOOK_APIS = (1,)", "does not implement mindprint_adapter_sites, mindprint_backend_info"),
        (
            STATED + "@hookimpl\ndef mindprint_sft_stepp(model): ...",
            "does not fit the hook contract: unknown hook 'mindprint_sft_stepp'",
        ),
        (
            STATED + "@hookimpl\ndef mindprint_sft_step(model, batch): ...",
            "does not fit the hook contract: .*batch",
        ),
    ],
)
def test_a_broken_backend_is_named_with_version_cause_and_remedy(install: Install, code: str, words: str) -> None:
    install("acme", code)
    with pytest.raises(BackendError, match=f"(?s)backend 'acme' \\(acme-backend 3.1\\) .*{words}"):
        load_backend("acme")


def test_a_broken_backend_breaks_no_other(install: Install, toy: str) -> None:
    install("acme", "1 / 0")
    assert load_backend(toy).info.name == "hello"


@pytest.mark.parametrize("named", ["acme", "ACME, other", "acme-backend", "*"])
def test_a_plugin_can_be_turned_off(install: Install, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    install("acme", "1 / 0")
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", named)
    assert "acme" not in {plugin.name for plugin in plugins.installed(plugins.BACKENDS)}
    with pytest.raises(BackendError, match="backend 'acme' is turned off by MINDPRINT_DISABLE_PLUGINS"):
        plugins.find_backend("acme")


def test_a_backend_that_cannot_say_what_it_can_do(install: Install) -> None:
    """The framework is imported inside a hook, and is what is missing: named like any other failure."""
    hooks = "".join(f"@hookimpl\ndef {hook}(): import no_such_framework\n" for hook in plugins.backend_hooks())
    install("acme", STATED + hooks)
    with pytest.raises(BackendError, match=r"acme-backend 3.1\): mindprint_backend_info raised ModuleNotFoundError"):
        load_backend("acme")


def test_hook_calls_are_traced_on_request(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a call took, by kind and size, who answered and with what; and nothing of what was in it."""
    load_backend(toy)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MINDPRINT_TRACE", "1")
    backend = load_backend(toy)
    line = r"mindprint: trace: mindprint_backend_info\(\) \[toy\] \d+\.\d{4} s -> BackendInfo\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    with pytest.raises(MindprintError):
        backend.load_model(ModelSpec("nowhere", "cpu", "float32"))
    assert "mindprint_load_model(spec=ModelSpec) [toy]" in (error := capsys.readouterr().err)
    assert "raised FileNotFoundError" in error
