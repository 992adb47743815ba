"""How prompts are rendered is kept with an adapter that leaves its run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_voice import opened_voice

import mindprint
from mindprint.adapter.prompting import FILE_NAME, read_prompting, write_prompting
from mindprint.api.chatting import Chat
from mindprint.config import DataConfig
from mindprint.errors import AdapterError, ConfigError, DataError
from mindprint.runs.opened import PLAIN_TURNS, OpenedAdapter

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if loud %}aye {% endif %}"


@pytest.fixture(scope="module")
def opened(toy_site: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedAdapter]:
    """An adapter that was trained with a variable of its base's template."""
    base = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(toy_model, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    data = {"chat_template_kwargs": {"loud": True}}
    with opened_voice(toy_site, base, tmp_path_factory.mktemp("prompting"), data) as adapter:
        yield adapter


def test_a_copied_adapter_is_asked_as_in_its_run(opened: OpenedAdapter, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(opened.located.adapter, copy)
    assert json.loads((copy / FILE_NAME).read_text()) == {"chat_template_kwargs": {"loud": True}}
    in_run = opened.render("sea 1?").tolist()
    with mindprint.open_adapter(copy, backend="toy", model=str(opened.base.path)) as alone:
        assert alone.render("sea 1?").tolist() == in_run
    (copy / FILE_NAME).unlink()
    with mindprint.open_adapter(copy, backend="toy", model=str(opened.base.path)) as alone:
        assert len(alone.render("sea 1?")) < len(in_run)


@pytest.mark.parametrize("state", ["copied", "in its run", "plain text", "template"])
def test_a_copied_adapter_says_how_messages_are_written(
    state: str, toy_site: Path, toy_model: Path, opened: OpenedAdapter, tmp_path: Path
) -> None:
    """Its base has no chat template. In its run nothing is said again, and plain text has no messages."""
    base, copy = tmp_path / "base", tmp_path / "copy"
    shutil.copytree(opened.base.path, base)
    shutil.copytree(opened.located.adapter, copy)
    if state != "template":
        (base / "chat_template.jinja").unlink()
        settings = json.loads((base / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        (copy / FILE_NAME).unlink()
    if state == "plain text":
        write_prompting(copy, DataConfig(format="raw"))
    heard: list[str] = []
    path = opened.located.adapter if state == "in its run" else copy
    with mindprint.open_adapter(
        path, backend="toy", model=str(base), on_notice=lambda notice: heard.append(notice.message)
    ):
        pass
    assert (PLAIN_TURNS in heard) == (state == "copied")


def test_so_are_a_merged_model_and_a_converted_adapter(opened: OpenedAdapter, tmp_path: Path) -> None:
    merged, converted = tmp_path / "merged", tmp_path / "converted"
    mindprint.merge(opened.located.adapter, merged, model=str(opened.base.path), verify=False)
    assert read_prompting(merged).chat_template_kwargs == {"loud": True}
    mindprint.convert(opened.located.adapter, converted, to="mlx-lm", model=str(opened.base.path))
    assert read_prompting(converted).chat_template_kwargs == {"loud": True}


def test_an_adapter_of_plain_text_is_no_chat(opened: OpenedAdapter, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(opened.located.adapter, copy)
    (copy / FILE_NAME).unlink()
    write_prompting(copy, DataConfig(format="raw"))
    with (
        mindprint.open_adapter(copy, backend="toy", model=str(opened.base.path)) as alone,
        pytest.raises(DataError, match="trained on plain text"),
    ):
        Chat(alone)


def test_defaults_need_no_file(tmp_path: Path) -> None:
    write_prompting(tmp_path, DataConfig())
    assert list(tmp_path.iterdir()) == []
    assert read_prompting(tmp_path) == DataConfig()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "prompting.json"),
        ('{"path": "x"}', "'path' is not known; known: format, chat_template_kwargs"),
        ('{"format": "loud"}', "prompting.json: format: "),
        ('{"chat_template_kwargs": 3}', "prompting.json: chat_template_kwargs: "),
    ],
)
def test_a_broken_file_is_refused_in_a_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(AdapterError) as caught:
        read_prompting(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variable_that_is_set_by_mindprint_is_refused(opened: OpenedAdapter, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(opened.located.adapter, copy)
    (copy / FILE_NAME).write_text('{"chat_template_kwargs": {"messages": []}}')
    with (
        pytest.raises(ConfigError, match="'messages' is set by Mindprint itself"),
        mindprint.open_adapter(copy, backend="toy", model=str(opened.base.path)),
    ):
        pass
