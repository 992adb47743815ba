"""Rows on disk: the same rows, examples, split and digests as in memory, and a cache that is never taken for whole."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import write_tokenizer

from mindprint.config import ConfigFile, make_config
from mindprint.data import processes, render, row_files, rows, split, stored
from mindprint.data.processes import results_in_order
from mindprint.data.quizzes import Quizzes
from mindprint.data.render import PreferenceExample, SftExample, render_preferences, render_sft
from mindprint.data.rows import read_rows
from mindprint.data.split import split_rows
from mindprint.data.stored import Stored, StoreWriter, by_topic, cache_folder, count_topics, evenly_chosen
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import DataError, MindprintError
from mindprint.training.objectives import OBJECTIVES

COUNT = 90
WORDS = ("ferry", "harbour", "garden", "kettle", "winter", "letter", "chapel", "market", "orchard", "lantern")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path / "model"))


@pytest.fixture
def file(tmp_path: Path) -> ConfigFile:
    """A project with rows of three topics, some of them conversations, and as many pairs."""
    data = tmp_path / "data"
    data.mkdir()
    asked = [f"Tell me of the {WORDS[n % 10]} and the {WORDS[n // 10]}, {WORDS[n % 7]} {n}." for n in range(COUNT)]
    texts: list[dict[str, Any]] = [{"prompt": text, "completion": f"Aye, {text}"} for text in asked]
    for row in texts[::5]:
        turns = (
            ("user", row.pop("prompt")),
            ("assistant", row.pop("completion")),
            ("user", "And?"),
            ("assistant", "Nay ☕"),
        )
        row["messages"] = [{"role": role, "content": content} for role, content in turns]
    pairs = [{"prompt": text, "chosen": f"Aye, {text}", "rejected": "Yes."} for text in asked]
    for name, records in (("sft.jsonl", texts), ("preferences.jsonl", pairs)):
        lines = [json.dumps({**row, "topic": "cab"[n % 3], "mood": "fair"}) for n, row in enumerate(records)]
        (data / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return make_config({"data": {"path": "data", "max_length": 120, "heldout_fraction": 0.2}}, tmp_path)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are many, and one core prepares them."""
    monkeypatch.setattr(rows, "IN_MEMORY", 20)
    monkeypatch.setattr(rows, "CACHED_BYTES", 0)
    monkeypatch.setattr(processes, "available_cores", lambda: 1)


def arrays(example: SftExample | PreferenceExample) -> list[Any]:
    parts = (example.tokens, example.loss_mask) if isinstance(example, SftExample) else (
        example.prompt, example.chosen, example.rejected)  # fmt: skip
    return [[example.topic, str(example.origin)], *(part.tolist() for part in parts)]


def prepared(file: ConfigFile, tokenizer: Tokenizer) -> list[Any]:
    """Everything that a run takes from its rows."""
    read = read_rows(file)
    parted = split_rows(read, Quizzes(), file.config.data)
    rendered: list[Any] = [render_sft(parted.train.sft, tokenizer, file.config.data),
                render_preferences(parted.train.preferences, tokenizer, file.config.data)]  # fmt: skip
    digest = hashlib.blake2b()
    for stage, part in zip(OBJECTIVES, rendered, strict=True):
        OBJECTIVES[stage].update_digest(digest, part.examples)
    parts = [part.__dict__ | {"examples": list(map(arrays, part.examples))} for part in rendered]
    topics = [{name: list(map(arrays, found)) for name, found in by_topic(part.examples).items()} for part in rendered]
    kept = [list(read.sft), list(read.preferences), read.notes, count_topics(read.sft)]
    return [parts, topics, parted.facts, parted.held_out, kept, digest.hexdigest()]


def test_rows_on_disk_are_those_in_memory(
    file: ConfigFile, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = prepared(file, tokenizer)
    assert not cache_folder(file).exists()
    monkeypatch.setattr(rows, "IN_MEMORY", 20)
    monkeypatch.setattr(rows, "CACHED_BYTES", 0)
    # More than one portion is written, and rendered.
    monkeypatch.setattr(stored.in_portions, "__defaults__", (7,))
    monkeypatch.setattr(render, "CHUNK", 16)
    # Two processes for prompts and texts, whatever this machine has, and this one for pairs: a process takes seconds.
    cores = iter([2, 2, 1])
    monkeypatch.setattr(processes, "available_cores", lambda: next(cores))
    assert prepared(file, tokenizer) == in_memory
    assert isinstance(read_rows(file).sft, Stored)

    # The second time, nothing is parsed or tokenized again.
    monkeypatch.setattr(rows, "sft_row", None)
    monkeypatch.setattr(rows, "preference_row", None)
    monkeypatch.setattr(render, "results_in_order", None)
    monkeypatch.setattr(split, "_compared_in_processes", None)
    assert prepared(file, tokenizer) == in_memory


@pytest.mark.usefixtures("on_disk")
def test_other_rows_settings_or_tokenizers_have_another_entry(file: ConfigFile, tmp_path: Path) -> None:
    tokens = load_tokenizer(write_tokenizer(tmp_path / "model"))
    other = load_tokenizer(write_tokenizer(tmp_path / "other", template="{{ messages[-1].content }}<eos>"))
    shorter = file.config.data.model_copy(update={"max_length": 110})
    read = read_rows(file).sft
    assert isinstance(read, Stored)
    half = read.select(np.arange(0, COUNT, 2))
    rendered = [
        render_sft(part, tokenizer, data).examples
        for part, tokenizer, data in (
            (read, tokens, file.config.data), (half, tokens, file.config.data), (read, tokens, shorter),
            (read, other, file.config.data),
        )
    ]  # fmt: skip
    keys = {part.key for part in rendered if isinstance(part, Stored)}
    assert len(keys) == 4 and [len(part) for part in rendered[:3]] == [COUNT, COUNT // 2, COUNT]
    path = tmp_path / "data" / "sft.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Aye", "Oh"), encoding="utf-8")
    changed = read_rows(file).sft
    assert isinstance(changed, Stored) and changed.key != read.key and "Oh, " in str(changed[1])
    # The older entry is still read by whoever has it open.
    assert "Aye, " in str(read[1])


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("damage", ["cut", "changed", "no meta", "meta cut", "missing"])
def test_a_damaged_entry_is_built_again(file: ConfigFile, damage: str) -> None:
    before = list(read_rows(file).sft)
    entry = min(path for path in cache_folder(file).iterdir() if path.is_dir())
    items, meta = entry / "items.bin", entry / "meta.json"
    if damage == "cut":
        items.write_bytes(items.read_bytes()[:-9])
    if damage == "changed":
        content = bytearray(items.read_bytes())
        content[40] ^= 1
        items.write_bytes(content)
    if damage == "no meta":
        meta.unlink()
    if damage == "meta cut":
        meta.write_text(meta.read_text(encoding="utf-8")[:30], encoding="utf-8")
    if damage == "missing":
        (entry / "ends.i8").unlink()
    assert list(read_rows(file).sft) == before
    assert len(items.read_bytes()) > 1000 and json.loads(meta.read_text(encoding="utf-8"))


@pytest.mark.usefixtures("on_disk")
def test_a_full_disk_is_one_line_and_leaves_nothing(file: ConfigFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_writer: StoreWriter, _items: Sequence[Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", full)
        with pytest.raises(
            DataError, match=r"^\S+: cannot be written: No space left on device; free space.*DATA_CACHE"
        ):
            read_rows(file)
    assert [path.name for path in cache_folder(file).iterdir()] == [".gitignore"]
    assert len(read_rows(file).sft) == COUNT


@pytest.mark.usefixtures("on_disk")
def test_a_file_that_is_cut_off_is_one_line_and_leaves_nothing(file: ConfigFile, tmp_path: Path) -> None:
    path = tmp_path / "data" / "sft.jsonl"
    noise = [hashlib.blake2b(str(n).encode()).hexdigest() for n in range(COUNT * 40)]
    lines = [json.dumps({"prompt": text, "completion": text}) for text in noise]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-100])
    path.unlink()
    cut = make_config({"data": {"sft": "rows.jsonl.gz"}, "dpo": {"enabled": False}}, tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be unpacked: .*is it damaged, or cut off\?$"):
        read_rows(cut)
    assert not [path for path in cache_folder(cut).iterdir() if path.is_dir()]


@pytest.mark.usefixtures("on_disk")
def test_of_two_runs_at_once_one_builds_and_the_other_reads(file: ConfigFile, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, counted = rows._parsed_rows, [0]
    building, may_end = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Iterator[Any]:
        for row in parsed(*arguments):
            counted[0] += 1
            yield row
        building.set()
        assert may_end.wait(10)

    monkeypatch.setattr(rows, "_parsed_rows", slow)
    only_texts = make_config({"data": {"path": "data"}, "dpo": {"enabled": False}}, file.folder)
    with ThreadPoolExecutor(2) as runs:
        first = runs.submit(read_rows, only_texts)
        assert building.wait(10)
        second = runs.submit(read_rows, only_texts)
        # It waits, and the first one is still at work.
        assert not wait([second], timeout=0.2).done
        may_end.set()
        texts = [run.result(10).sft for run in (first, second)]
    assert isinstance(texts[1], Stored) and list(texts[0]) == list(texts[1])
    # The second one read no more than it takes to see that there are many.
    assert counted == [COUNT + 21]
    # A process that was killed leaves no more than a temporary folder, which the next write removes.
    assert all(not path.name.endswith(("partial", "lock")) for path in cache_folder(file).iterdir())


def test_a_run_builds_what_another_one_failed_to_build(tmp_path: Path) -> None:
    building, may_fail = threading.Event(), threading.Event()

    def fail(_: StoreWriter) -> dict[str, Any]:
        building.set()
        assert may_fail.wait(10)
        raise DataError("line 7 is broken")

    with ThreadPoolExecutor(2) as runs:
        first = runs.submit(stored.build_entry, tmp_path, "key", bytes, fail)
        assert building.wait(10)
        second = runs.submit(stored.build_entry, tmp_path, "key", bytes, lambda _: {"rows": 3})
        may_fail.set()
        with pytest.raises(DataError, match="^line 7 is broken$"):
            first.result(10)
        assert second.result(10).facts == {"rows": 3}


def test_nobody_waits_for_a_process_that_was_killed(tmp_path: Path) -> None:
    lock = (
        "import sys, time; from pathlib import Path; from mindprint.data.stored import _sole_builder\n"
        "with _sole_builder(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", lock, str(tmp_path / "key.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as builder, ThreadPoolExecutor(1) as runs:
        assert builder.stdout is not None and builder.stdout.readline() == b"locked\n"
        run = runs.submit(stored.kept_arrays, tmp_path, "key", lambda: [np.arange(3)])
        assert not wait([run], timeout=0.2).done
        builder.kill()
        assert run.result(10)[0].tolist() == [0, 1, 2]


@pytest.mark.usefixtures("on_disk")
def test_a_row_that_the_template_refuses_is_named_as_in_memory(file: ConfigFile, tmp_path: Path) -> None:
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "silent", silent))
    stored = read_rows(file).sft
    messages = []
    for part in (tuple(stored), stored):
        with pytest.raises(DataError) as raised:
            render_sft(part, tokenizer, file.config.data)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and "sft.jsonl: line 1: the completion renders to nothing" in messages[0]


def test_processes_answer_in_order_and_raise_what_an_item_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    factory, items = "operator:attrgetter", [complex(n, n + 1) for n in range(7)]
    assert list(results_in_order(factory, ("imag",), items)) == [n + 1 for n in range(7)]
    assert list(results_in_order(factory, ("imag",), items[:1])) == [1]
    with pytest.raises(AttributeError, match="imag"):
        list(results_in_order(factory, ("imag",), [*items, "text"]))


def test_a_process_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    with pytest.raises(MindprintError, match=r"^a process that prepares rows ended early \(exit code -9\): was it"):
        list(results_in_order("functools:partial", (os.kill,), [KillYourself()]))


class KillYourself:
    """An item that ends the process which reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


@pytest.mark.usefixtures("on_disk")
def test_the_rows_of_a_single_topic_take_no_memory_for_each(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{n}", "completion": "c"}) for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    read = read_rows(make_config({"data": {"sft": "rows.jsonl"}, "dpo": {"enabled": False}}, tmp_path)).sft
    (rows_of_topic,) = by_topic(read).values()
    assert isinstance(read, Stored)
    assert isinstance(rows_of_topic, Stored)
    assert list(rows_of_topic) == list(read)
    assert np.shares_memory(rows_of_topic.sizes, read.sizes)
    assert not np.shares_memory(read.select(np.arange(99)).sizes, read.sizes)


@pytest.mark.usefixtures("on_disk")
def test_topics_are_divided_whatever_their_number(tmp_path: Path) -> None:
    count = 4000
    lines = [json.dumps({"prompt": f"p{n}", "completion": "c", "topic": f"t{n * 7 % 1300}"}) for n in range(count)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    read = read_rows(make_config({"data": {"sft": "rows.jsonl"}, "dpo": {"enabled": False}}, tmp_path)).sft
    expected: dict[str, list[Any]] = {}
    for row in read:
        expected.setdefault(row.topic, []).append(row)
    assert list(count_topics(read).items()) == [(topic, len(found)) for topic, found in expected.items()]
    divided = by_topic(read)
    assert list(divided) == list(expected)
    assert all(list(divided[topic]) == expected[topic] for topic in ("t0", "t7", "t1299"))
    assert [row.origin.line for row in evenly_chosen(read, 4)] == [1, 1001, 2001, 3001]


def test_a_hub_that_breaks_off_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(row_files, "RETRY_PAUSES", (0, 0))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    calls: list[str] = []
    failures = 2

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        calls.append(name + split)
        if len(calls) <= failures:
            raise RuntimeError("could not be read") from ConnectionResetError("Connection reset by peer")
        return [{"prompt": "Hi", "completion": "Yo"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = make_config({"data": {"sft": "a/b"}, "dpo": {"enabled": False}}, tmp_path)
    assert len(read_rows(config).sft) == 1 and len(calls) == 3
    calls.clear()
    failures = 9
    with pytest.raises(DataError, match=r"^dataset a/b \(split train\).*could not be loaded from the hub: could not"):
        read_rows(config)
    assert len(calls) == 3
