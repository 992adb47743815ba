"""Discovery: from metadata alone, one plugin at a time, and one clear message for each way to be broken."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import mindprint
from mindprint.cli import group
from mindprint.config import BackendConfig
from mindprint.contract import ModelSpec
from mindprint.errors import BackendError, MindprintError, PluginError, ScorerError
from mindprint.events import Event, Notice
from mindprint.hookspecs import REQUIRED_HOOKS
from mindprint.models.engine import Placements
from mindprint.plugins import entries, loading
from mindprint.plugins.backend import load_backend
from mindprint.plugins.choosing import choose_backend
from mindprint.plugins.entries import BACKENDS, COMMANDS, SCORERS, TRACKERS, installed
from mindprint.plugins.loading import find_plugin
from mindprint.plugins.scoring import load_scorers
from mindprint.plugins.watching import load_trackers

Install = Callable[..., None]
COUNT = iter(range(1000))
STATED = "from mindprint.hookspecs import hookimpl\nMINDPRINT_HOOK_APIS = (1,)\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution with one plugin, a backend unless stated, into a folder on sys.path."""

    def add(
        name: str, code: str, distribution: str = "acme-backend", version: str = "3.1", group: str = BACKENDS
    ) -> None:
        module = f"acme_{next(COUNT)}"
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        (tmp_path / f"{module}.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path))
    loading.load_backend_plugin.cache_clear()
    yield add
    loading.load_backend_plugin.cache_clear()


def test_listing_imports_nothing(install: Install) -> None:
    install("acme", "raise SystemExit('imported')")
    plugin = {plugin.name: plugin for plugin in installed(BACKENDS)}["acme"]
    assert (plugin.distribution, plugin.version) == ("acme-backend", "3.1")
    assert plugin.module not in sys.modules


def test_a_missing_backend_comes_with_its_command() -> None:
    with pytest.raises(
        BackendError, match=r"backend 'tensorfire' is not installed \(installed: .*or choose another backend"
    ):
        find_plugin(BACKENDS, "tensorfire")


def test_ours_missing_comes_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries.metadata, "entry_points", lambda group: [])
    with pytest.raises(BackendError, match=r'installed: none\); install it: pip install "mindprint-core\[torch\]"'):
        find_plugin(BACKENDS, "pytorch")


def test_pytorch_is_torch() -> None:
    assert entries.canonical_name("PyTorch") == "torch"


def test_a_name_claimed_twice_names_both(install: Install) -> None:
    install("acme", "")
    install("acme", "", "other-backend", "0.2")
    with pytest.raises(BackendError, match="claimed by acme-backend 3.1 and other-backend 0.2; uninstall one"):
        find_plugin(BACKENDS, "acme")


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
        ("MINDPRINT_HOOK_APIS = ()", "does not state its hook API"),
        ("class Odd(BaseException): ...\nraise Odd('odd')", "failed to import: Odd: odd"),
        (
            "MINDPRINT_HOOK_APIS = (0,)",
            "supports hook API 0, this mindprint-core drives 1, 2; pip install --upgrade acme-b",
        ),
        (
            "MINDPRINT_HOOK_APIS = (8, 9)",
            "supports hook API 8, 9, .* drives 1, 2; pip install --upgrade mindprint-core",
        ),
        ("MINDPRINT_HOOK_APIS = (1,)", "does not implement mindprint_backend_info, mindprint_load_model"),
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
    assert "acme" not in {plugin.name for plugin in installed(BACKENDS)}
    with pytest.raises(BackendError, match="backend 'acme' is turned off by MINDPRINT_DISABLE_PLUGINS"):
        find_plugin(BACKENDS, "acme")


def test_a_backend_that_cannot_say_what_it_can_do(install: Install) -> None:
    """The framework is missing and is imported inside a hook: the message is that of any other failure."""
    hooks = "".join(f"@hookimpl\ndef {hook}(): import no_such_framework\n" for hook in REQUIRED_HOOKS)
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


ANSWER = "devices=(DeviceInfo('cpu', None),)"
BACKEND = """
import sys
from mindprint.contract import BackendInfo, DeviceInfo
from mindprint.hookspecs import REQUIRED_HOOKS, hookimpl

MINDPRINT_HOOK_APIS = {apis}

def hook(name):
    def implementation(): {body}
    implementation.__name__ = name
    return hookimpl(implementation)

globals().update({{name: hook(name) for name in REQUIRED_HOOKS}})
{more}
"""


def backend_code(answer: str = ANSWER, apis: str = "(1,)", body: str | None = None, more: str = "") -> str:
    """Return a module with every hook, in which each answers alike: with a `BackendInfo`, or by `body`."""
    return BACKEND.format(apis=apis, body=body or f"return BackendInfo('acme', {answer})", more=more)


BROKEN = {
    "SystemExit at import": ("raise SystemExit(0)", "failed to import: SystemExit: 0"),
    "BaseException at import": ("class Odd(BaseException): ...\nraise Odd", "failed to import: Odd;"),
    "no hook API": (backend_code(apis="()"), "does not state its hook API"),
    "a hook API of text": (backend_code(apis="('1',)"), "does not state its hook API"),
    "another hook API": (backend_code(apis="(7,)"), "supports hook API 7"),
    "a rank of text": (backend_code(more="MINDPRINT_AUTO_RANK = 'high'"), "MINDPRINT_AUTO_RANK = 'high'"),
    "a rank that is not a number": (
        backend_code(more="MINDPRINT_AUTO_RANK = float('nan')"),
        "MINDPRINT_AUTO_RANK = nan",
    ),
    "hooks missing": ("MINDPRINT_HOOK_APIS = (1,)", "does not implement mindprint_backend_info"),
    "SystemExit in a hook": (backend_code(body="sys.exit(0)"), "mindprint_backend_info raised SystemExit: 0"),
    "BaseException in a hook": (backend_code(body="raise BaseException('odd')"), "raised BaseException: odd"),
    "an exception in a hook": (backend_code(body="1 / 0"), "mindprint_backend_info raised ZeroDivisionError"),
    "no answer": (backend_code(body="return None"), "mindprint_backend_info returned None"),
    "devices that are none": (backend_code("devices=('cpu',)"), "states devices[0] = 'cpu', .* asks for a DeviceInfo"),
    "devices in no tuple": (backend_code("devices=3"), "states devices = 3"),
    "a reason that is none": (backend_code("(DeviceInfo('cpu', True),)"), "devices[0].reason = True"),
    "an accelerator of text": (
        backend_code("(DeviceInfo('cpu', None, accelerator='yes'),)"),
        "devices[0].accelerator = 'yes', .* True or False",
    ),
    "a dtype that is none": (
        backend_code("(DeviceInfo('cpu', None, dtypes=('int4',), default_dtype='int4'),)"),
        "devices[0].dtypes = ('int4',)",
    ),
    "capabilities in a text": (backend_code(f"{ANSWER}, capabilities='sampling'"), "capabilities = 'sampling'"),
    "libraries in a list": (backend_code(f"{ANSWER}, libraries=['numpy']"), "libraries = ['numpy']"),
    "a note in place of notes": (backend_code(f"{ANSWER}, notes=(1,)"), "notes = (1,)"),
    "an info that raises when it is read": (
        backend_code(
            body="return Sly('acme', ())",
            more="class Sly(BackendInfo):\n    notes = property(lambda self: sys.exit(0))\n"
            "    def __init__(self, name, devices):\n        vars(self).update(name=name, devices=devices)\n"
            "        vars(self).update(capabilities=frozenset(), libraries={})",
        ),
        "mindprint_backend_info raised SystemExit: 0",
    ),
    "no device that auto may choose": (
        backend_code("(DeviceInfo('npu', None, auto=False),)"),
        "no usable device here (npu: must be named)",
    ),
}
"""Ways to be broken, each with words of the message. All are found before anything is trained."""


@pytest.mark.parametrize("kind", BROKEN)
def test_auto_leaves_out_a_broken_backend_whatever_it_raises_or_states(
    kind: str, install: Install, toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other backend is chosen, and the reason names the broken one; alone, it is an error and no exit."""
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello")
    code, words = BROKEN[kind]
    pattern = re.escape(words).replace(r"\.\*", ".*")
    install("acme", code)
    choice = choose_backend()
    assert choice.name == toy
    assert re.search(f"backend 'acme'.*{pattern}", choice.reason)
    assert choice.left_out
    if "RANK" in words:  # it orders candidates of `auto`, and means nothing for a backend that was named
        return
    with pytest.raises(BackendError, match=f"backend 'acme'.*{pattern}"):
        load_backend("acme").device("auto")


def test_auto_trains_in_spite_of_a_broken_backend_and_prints_its_reason(
    install: Install, toy: str, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that nobody chose once ended training so: exit code 0, no output and no adapter."""
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello")
    install("acme", backend_code(body="sys.exit(0)"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sft.jsonl").write_text('{"prompt": "a?", "completion": "aye"}\n' * 4)
    config = {"model": {"name": str(toy_model)}, "data": {"path": str(tmp_path / "data")}, "adapter": {"r": 2}}
    stages = {"sft": {"steps_per_topic": 1}, "dpo": {"enabled": False}}
    events: list[Event] = []
    mindprint.train({**config, **stages}, run=tmp_path / "run", on_event=events.append)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any("acme" in message and "raised SystemExit: 0" in message for message in notices), notices


@pytest.mark.parametrize("place", ["import", "hook"])
def test_an_interrupt_passes(install: Install, toy: str, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello")
    body = "raise KeyboardInterrupt"
    install("acme", body if place == "import" else backend_code(body=body))
    with pytest.raises(KeyboardInterrupt):
        choose_backend()


GPU = backend_code("(DeviceInfo('npu', None, 'an NPU', accelerator=True),)")


@pytest.mark.parametrize(
    ("code", "chosen"),
    [
        (GPU, "acme"),
        (GPU.replace("accelerator=True", "accelerator=True, auto=False"), "toy"),
        (GPU.replace("None, 'an NPU'", "'no driver'"), "toy"),
        (backend_code(), "acme"),  # no accelerator in either: the name decides
        (backend_code(more="MINDPRINT_AUTO_RANK = -1"), "toy"),
        (backend_code().replace("'cpu'", "'cuda'"), "acme"),  # a device's name means nothing to core
        (backend_code(more="MINDPRINT_AUTO_RANK = -1").replace("'cpu'", "'cuda'"), "toy"),
    ],
)
def test_a_backend_of_others_can_win_auto(
    install: Install, toy: str, monkeypatch: pytest.MonkeyPatch, code: str, chosen: str
) -> None:
    """By stating an accelerator, whatever it is called; without one, by its rank, then by its name."""
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello")
    install("acme", code)
    choice = choose_backend()
    assert choice.name == chosen
    assert choice.left_out == () or "no driver" in code or "auto=False" in code


def test_the_first_by_rank_spares_the_others(install: Install, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backend with a lower rank the module is imported, and no hook is called: its framework is not wanted."""
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello")
    install("acme", f"{GPU}\nMINDPRINT_AUTO_RANK = 5")
    install("slow", backend_code(body="raise AssertionError('asked')"), "slow-backend")
    choice = choose_backend()
    assert (choice.name, choice.reason, choice.left_out) == ("acme", "it can use an NPU here", ())


def test_a_backend_is_asked_once_what_it_can_do(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though auto-selection asks every backend, and two stages use the chosen one."""
    counting = f"count = [0]\ndef counted():\n    count[0] += 1\n    return BackendInfo('acme', {ANSWER})\n"
    for name in ("acme", "other"):
        install(name, backend_code(body="return counted()", more=counting), f"{name}-backend")
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "torch, mlx, hello, toy")
    placements = Placements()
    for _ in range(2):
        assert placements.resolve(BackendConfig()).backend.name == "acme"
    modules = [sys.modules[plugin.module] for plugin in installed(BACKENDS) if plugin.name in ("acme", "other")]
    assert [module.count for module in modules] == [[1], [1]]


LOADERS: dict[str, Callable[[str], object]] = {
    BACKENDS: load_backend,
    SCORERS: lambda name: load_scorers({name: {}}),
    TRACKERS: lambda name: load_trackers([name]),
    COMMANDS: lambda name: group.get_command(click.Context(group), name),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_one_set_of_messages_for_every_kind_of_plugin(
    install: Install, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Not installed, failed to import, turned off, claimed by two: the same words, the error of the kind."""
    word, load = entries.kind_of(kind), LOADERS[kind]
    if kind != COMMANDS:  # there, click names the nearest command
        with pytest.raises(
            loading.ERRORS[kind], match=rf"{word} 'nonesuch' is not installed \(installed: .*\); install"
        ):
            load("nonesuch")
    install("acme", "raise SystemExit(0)", "acme-plugin", group=kind)
    words = r"failed to import: SystemExit: 0; reinstall it \(pip install --force-reinstall acme-plugin\) or \w+"
    with pytest.raises(loading.ERRORS[kind], match=rf"^{word} 'acme' \(acme-plugin 3.1\) {words}"):
        load("acme")
    install("acme", "", "other-plugin", "0.2", group=kind)
    words = r"is claimed by acme-plugin 3.1 and other-plugin 0.2; uninstall one of them"
    with pytest.raises(loading.ERRORS[kind], match=f"^{word} 'acme' {words}"):
        load("acme")
    if kind != COMMANDS:
        monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "acme")
        with pytest.raises(loading.ERRORS[kind], match=f"^{word} 'acme' is turned off by MINDPRINT_DISABLE_PLUGINS"):
            load("acme")


def test_a_command_that_is_none(install: Install) -> None:
    install("acme", "", "acme-plugin", group=COMMANDS)
    with pytest.raises(
        PluginError, match=r"command 'acme' \(acme-plugin 3.1\): .* is of type module, not a click.Command; up"
    ):
        LOADERS[COMMANDS]("acme")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "raise SystemExit(0)",
            "mindprint_scorers raised SystemExit: 0; upgrade it .* or take it out of voice.scorers",
        ),
        ("yield 1 / 0", "mindprint_scorers raised ZeroDivisionError: "),
        ("return ['words']", "mindprint_scorers returned a str, the contract asks for a Measure"),
        ("return 3", "mindprint_scorers raised TypeError: 'int' object is not iterable"),
    ],
)
def test_a_scorer_that_exits_or_answers_nonsense(install: Install, body: str, words: str) -> None:
    code = f"from mindprint.hookspecs import hookimpl\n@hookimpl\ndef mindprint_scorers(settings): {body}\n"
    install("acme", code, "acme-plugin", group=SCORERS)
    with pytest.raises(ScorerError, match=rf"scorer 'acme' \(acme-plugin 3.1\): {words}"):
        load_scorers({"acme": {}})
