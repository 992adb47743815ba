"""Rows as people write them. Everything else is refused in one line, with file, line and how to fix it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mindprint.config import ConfigFile, make_config
from mindprint.data.rows import (
    DEFAULT_TOPIC,
    Format,
    Message,
    Origin,
    PreferenceRow,
    Rows,
    SftRow,
    check_topics,
    preference_row,
    read_rows,
    sft_row,
    text_of,
)
from mindprint.errors import DataError

LINE = Origin("sft.jsonl", 3)
HI, YO, SIR = Message("user", "Hi"), Message("assistant", "Yo"), Message("assistant", "Sir")
PAIR = {"prompt": "Hi", "chosen": "Yo", "rejected": "Sir"}


def said(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def sft(record: Mapping[str, Any], data_format: Format = "chat") -> SftRow:
    return sft_row(record, LINE, data_format)


def pair(record: Mapping[str, Any], data_format: Format = "chat") -> PreferenceRow:
    return preference_row(record, LINE, data_format)


def write(folder: Path, name: str, *records: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def only_sft(folder: Path, **data: Any) -> ConfigFile:
    return make_config({"data": data, "dpo": {"enabled": False}}, folder)


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "Hi", "completion": "Yo"}, "Hi", "Yo"),
        ({"prompt": said(HI), "completion": said(YO)}, (HI,), (YO,)),
        ({"prompt": said(HI), "completion": "Yo"}, (HI,), "Yo"),
        ({"messages": said(HI, YO, HI, SIR)}, None, (HI, YO, HI, SIR)),
        ({"instruction": "Greet.", "output": "Yo"}, "Greet.", "Yo"),
        ({"instruction": "Greet.", "input": "", "output": "Yo"}, "Greet.", "Yo"),
        ({"instruction": "Greet.", "input": "Ann", "output": "Yo"}, "Greet.\n\nAnn", "Yo"),
        ({"question": "Hi?", "answer": "Yo", "extra": 1}, "Hi?", "Yo"),
        ({"prompt": None, "completion": None, "question": "Hi?", "answer": "Yo"}, "Hi?", "Yo"),
    ],
)
def test_the_forms_of_an_sft_row(record: dict[str, Any], prompt: object, completion: object) -> None:
    assert sft(record) == SftRow(DEFAULT_TOPIC, prompt, completion, LINE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (PAIR, ("Hi", "Yo", "Sir")),
        ({"prompt": said(HI), "chosen": said(YO), "rejected": said(SIR)}, ((HI,), (YO,), (SIR,))),
        ({"chosen": said(HI, YO), "rejected": said(HI, SIR)}, ((HI,), (YO,), (SIR,))),
        ({"chosen": said(HI, YO, HI, YO), "rejected": said(HI, YO, HI, SIR)}, ((HI, YO, HI), (YO,), (SIR,))),
        # As TRL's extract_prompt: equal, or one the beginning of the other, the last message is still an answer.
        ({"chosen": said(HI, YO), "rejected": said(HI, YO)}, ((HI,), (YO,), (YO,))),
        ({"chosen": said(HI, YO), "rejected": said(HI, YO, HI, SIR)}, ((HI,), (YO,), (YO, HI, SIR))),
        # As in ultrafeedback: the prompt as text, and again as the first message of both.
        ({"prompt": "Hi", "chosen": said(HI, YO), "rejected": said(HI, SIR)}, ((HI,), (YO,), (SIR,))),
    ],
)
def test_the_forms_of_a_preference_row(record: dict[str, Any], expected: tuple[Any, Any, Any]) -> None:
    assert pair(record) == PreferenceRow(DEFAULT_TOPIC, *expected, LINE)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is grey.", ("The sky is", " blue.", " grey.")),
        ("The sky is blue", "The sky is black", ("The sky is bl", "ue", "ack")),
        ("ab", "ab", ("a", "b", "b")),
        ("ab", "abc", ("a", "b", "bc")),
    ],
)
def test_raw_pairs_may_share_their_beginning(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    """Expected values from TRL's `extract_prompt`; tests/interop compares with the function itself."""
    assert pair({"chosen": chosen, "rejected": rejected}, "raw") == PreferenceRow(DEFAULT_TOPIC, *expected, LINE)


def test_raw_rows() -> None:
    assert sft({"text": "Yo"}, "raw") == SftRow(DEFAULT_TOPIC, None, "Yo", LINE)
    assert sft({"question": "Hi?", "answer": "Yo"}, "raw") == SftRow(DEFAULT_TOPIC, "Hi?", "Yo", LINE)
    assert pair(PAIR, "raw") == PreferenceRow(DEFAULT_TOPIC, "Hi", "Yo", "Sir", LINE)


def test_rows_as_messages() -> None:
    assert sft({"prompt": "Hi", "completion": "Yo"}).messages == (HI, YO)
    assert sft({"messages": said(HI, YO)}).prompt_messages == ()
    row = pair(PAIR)
    assert (row.prompt_messages, row.chosen_messages, row.rejected_messages) == ((HI,), (YO,), (SIR,))
    assert (text_of("Hi"), text_of((HI, YO))) == ("Hi", "Yo")


def test_topic_then_the_default() -> None:
    row = {"prompt": "Hi", "completion": "Yo"}
    assert sft({**row, "topic": " tea ", "source": "mail"}).topic == "tea"
    assert sft({**row, "source": "mail"}).topic == DEFAULT_TOPIC
    assert sft({**row, "topic": None}).topic == DEFAULT_TOPIC


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi", "completions": "Yo"}, "no field `completion`; is it 'completions'?"),
        ({"message": said(HI, YO)}, "no field `messages`; is it 'message'?"),
        ({"prompt": "Hi"}, "`completion` is missing, next to `prompt`"),
        ({"prompt": "Hi", "completion": None}, "`completion` is null, next to `prompt`"),
        ({"a": 1, "b": 2}, "needs `prompt` and `completion`; or `messages`; or "),
        ({"prompt": "Hi", "completion": " \n"}, "`completion` is empty"),
        ({"prompt": "", "completion": "Yo"}, "`prompt` is empty"),
        ({"prompt": "Hi", "completion": 7}, "`completion` must be text, found a number"),
        ({"question": ["Hi"], "answer": "Yo"}, "`question` must be text, found a list"),
        ({"prompt": "Hi", "completion": "\ud83d"}, "`completion` has a broken \\u escape at character 1"),
        ({"messages": "Hi"}, "`messages` must be a list of messages, found text"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": ["Hi"]}, "`messages[0]` must be an object with `role` and `content`, found text"),
        ({"messages": said(HI)}, "`messages` must end with an assistant message, found user"),
        ({"messages": said(YO)}, "`messages` has nothing before the assistant's answer"),
        ({"messages": [*said(HI), {"role": "assistant", "content": ""}]}, "`messages[1].content` is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "`messages[0].content` must be text, found null"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "`messages[0].content[0].text` must be text"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "must be system, user or assistant, found 'tool'"),
        ({"messages": [{"content": "Hi"}]}, "must be system, user or assistant, found None"),
        (
            {"messages": [*said(HI), {"role": "assistant", "content": "Yo", "tool_calls": [{}]}]},
            "`messages[1].tool_calls` is not supported",
        ),
        ({"prompt": said(HI), "completion": said(HI, YO)}, "`completion` begins with a user message: leave out"),
        ({"prompt": "Hi", "completion": "Yo", "topic": 7}, "`topic` must be text, found 7"),
        ({"text": "Yo"}, "`text` is plain text: write `prompt` and `completion`, or set data.format=raw"),
    ],
)
def test_a_wrong_sft_row_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^sft.jsonl: line 3: .*{re.escape(message)}"):
        sft(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi", "chose": "Yo", "rejected": "Sir"}, "no field `chosen`; is it 'chose'?"),
        ({"prompt": "Hi", "chosen": "Yo"}, "`rejected` is missing, next to `prompt` and `chosen`"),
        ({"chosen": "Yo", "rejected": "Sir"}, "`prompt` is missing: strings in `chosen` and `rejected` hold one only"),
        ({**PAIR, "rejected": ""}, "`rejected` is empty"),
        ({"chosen": said(HI, YO), "rejected": "Sir"}, "`prompt` is missing"),
        ({"chosen": said(HI, YO), "rejected": said(YO)}, "`chosen` and `rejected` do not begin alike"),
        ({"chosen": said(HI), "rejected": said(HI, YO)}, "`chosen` must end with an assistant message, found user"),
        ({"prompt": "Hey", "chosen": said(HI, YO), "rejected": said(HI, SIR)}, "`prompt` is not the last message that"),
        ({"prompt": said(HI), "chosen": said(HI, YO), "rejected": said(SIR)}, "`chosen` begins with a user message"),
    ],
)
def test_a_wrong_preference_row_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^sft.jsonl: line 3: .*{re.escape(message)}"):
        pair(record)


def test_raw_takes_strings_alone() -> None:
    with pytest.raises(DataError, match=r"line 3: messages need data.format=chat"):
        sft({"messages": said(HI, YO)}, "raw")
    with pytest.raises(DataError, match=r"line 3: messages need data.format=chat"):
        pair({"chosen": said(HI, YO), "rejected": said(HI, SIR)}, "raw")


def test_default_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "data", "sft.jsonl", {"prompt": "Hi", "completion": "Yo"})
    write(tmp_path / "data", "preferences.jsonl", PAIR, {**PAIR, "topic": "tea"})
    write(tmp_path / "data", "heldout.jsonl", PAIR)
    rows = read_rows(make_config({}, tmp_path))
    assert [len(part) for part in (rows.sft, rows.preferences, rows.heldout)] == [1, 2, 1]
    assert rows.preferences[1].topic == "tea"
    assert str(rows.preferences[1].origin).endswith("preferences.jsonl: line 2")


def test_the_other_default_names_are_understood_but_not_both(tmp_path: Path) -> None:
    write(tmp_path, "sft_data.jsonl", {"prompt": "Hi", "completion": "Yo"})
    write(tmp_path, "preference_data.jsonl", PAIR)
    config = make_config({"data": {"path": "."}}, tmp_path)
    assert len(read_rows(config).sft) == len(read_rows(config).preferences) == 1
    write(tmp_path, "sft.jsonl", {"prompt": "Hi", "completion": "Yo"})
    with pytest.raises(DataError, match=r"sft.jsonl and sft_data.jsonl both exist: remove one, or name files"):
        read_rows(config)


def test_a_stage_that_is_off_needs_no_file(tmp_path: Path) -> None:
    write(tmp_path / "data", "sft.jsonl", {"prompt": "Hi", "completion": "Yo"})
    assert read_rows(only_sft(tmp_path)).preferences == ()
    with pytest.raises(DataError, match=r"sft.jsonl|preferences.jsonl: no such file.*set dpo.enabled=false"):
        read_rows(make_config({}, tmp_path))


def test_files_named_in_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", {"prompt": "1", "completion": "Yo"})
    write(tmp_path, "b.jsonl", {"prompt": "2", "completion": "Yo"}, {"prompt": "3", "completion": "Yo"})
    rows = read_rows(only_sft(tmp_path, sft=["b.jsonl", str(tmp_path / "a.jsonl")]))
    assert [row.prompt for row in rows.sft] == ["2", "3", "1"]
    assert rows.heldout == ()


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    """A byte order mark, blank lines and Windows line ends change no number."""
    row = json.dumps({"prompt": "Hi", "completion": "Yo"}).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row)
    assert [row.origin.line for row in read_rows(only_sft(tmp_path, sft="x.jsonl")).sft] == [1, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b'{"prompt": "Hi",}', "line 1: not valid JSON: "),
        (b'\n["Hi"]', "line 2: must be an object {...}, found a list: one object a line, without an array"),
        (b'[\n{"prompt": "Hi"}]', "line 1: not valid JSON: .* one object a line"),
        (b'{"prompt": "Gr\xfc\xdf"}', r"line 1: is not UTF-8 \(byte 15\)"),
        (b"[" * 100_000, "line 1: cannot be read as JSON"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}/x.jsonl: {message}") as caught:
        read_rows(only_sft(tmp_path, sft="x.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data: no such data folder: make it"),
        ({"path": "."}, r"sft.jsonl: no such file \(found sft.json\): make it, name files in data.sft, or set"),
        ({"path": None}, "data.path and data.sft are both empty: name a folder or files"),
        ({"sft": "gone.jsonl"}, r"gone.jsonl: no such file \(data.sft\)"),
        ({"sft": "gone/gone.jsonl"}, r"gone.jsonl: no such file \(data.sft\)"),
        ({"sft": []}, "data.sft names nothing"),
        ({"sft": "."}, "data.sft names a folder: name its files, or set data.path"),
        ({"sft": "notes.txt"}, r"notes.txt: unknown kind of file: known are .jsonl"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    (tmp_path / "sft.json").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=message):
        read_rows(only_sft(tmp_path, **data))


@pytest.mark.parametrize("named", [False, True], ids=["default", "named"])
@pytest.mark.parametrize("part", ["sft", "heldout"])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/dev/zero", "a pipe or a device|is not a regular file"),
        ("nowhere", "a link that leads to no file|no such file"),
        (".", "a folder"),
    ],
)
def test_a_link_that_leads_to_no_file_is_named(tmp_path: Path, part: str, target: str, words: str, named: bool) -> None:
    """Also for held-out rows, which would be missing without a word."""
    (tmp_path / "sft.jsonl").write_text('{"prompt": "Hi", "completion": "Yo"}\n')
    link = tmp_path / f"{part}.jsonl"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    data = {"path": "."} | ({part: link.name} if named else {})
    with pytest.raises(DataError, match=f"({link.name}|{target}|{tmp_path.name}).*({words})"):
        read_rows(only_sft(tmp_path, **data))


def test_csv_cells_are_text_and_lines_are_lines(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('topic,prompt,completion\n007,NA,"Yo,\nyo"\n\n,null,true\n', encoding="utf-8-sig")
    assert read_rows(only_sft(tmp_path, sft="x.csv")).sft == (
        SftRow("007", "NA", "Yo,\nyo", Origin(str(tmp_path / "x.csv"), 2)),
        SftRow(DEFAULT_TOPIC, "null", "true", Origin(str(tmp_path / "x.csv"), 5)),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,completion\nHi,Yo\nHi,\n", "line 3: `completion` is missing, next to `prompt`"),
        (b"prompt,completion\nHi,Yo,Sir\n", "line 2: has more cells than the header has columns"),
        (b'prompt,completion\nHi,"Yo\n', "line 2: is not valid CSV"),
        (b"prompt,completion\nHi,\xfc\n", "line 2: is not UTF-8"),
        (b"prompt,completion\n", "the file is empty"),
    ],
)
def test_broken_csv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(only_sft(tmp_path, sft="x.csv"))


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    records = [{"messages": said(HI, YO), "topic": "tea"}, {"messages": said(HI, SIR), "topic": None}]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "x.parquet")
    rows = read_rows(only_sft(tmp_path, sft="x.parquet")).sft
    assert [(row.topic, row.completion) for row in rows] == [("tea", (HI, YO)), (DEFAULT_TOPIC, (HI, SIR))]
    assert str(rows[1].origin).endswith("x.parquet: row 2")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"x.parquet: cannot be read as Parquet: "):
        read_rows(only_sft(tmp_path, sft="x.parquet"))


def test_hub_names_go_to_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        calls.append((name, split))
        return [{"prompt": "Hi", "completion": "Yo"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(only_sft(tmp_path, sft=["trl-lib/chat", "trl-lib/chat:test"])).sft
    assert calls == [("trl-lib/chat", "train"), ("trl-lib/chat", "test")]
    assert [str(row.origin) for row in rows] == ["trl-lib/chat:train: row 1", "trl-lib/chat:test: row 1"]


def test_a_hub_without_connection_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        raise ConnectionError("Couldn't reach 'trl-lib/chat' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^dataset trl-lib/chat \(split train\) of data.sft .*Couldn't reach .* Hub$"):
        read_rows(only_sft(tmp_path, sft="trl-lib/chat"))


def test_json_lines_import_neither_datasets_nor_a_framework(tmp_path: Path) -> None:
    write(tmp_path / "data", "sft.jsonl", {"prompt": "Hi", "completion": "Yo"})
    code = (
        "import sys; from pathlib import Path; from mindprint.config import make_config\n"
        "from mindprint.data.rows import read_rows\n"
        f"read_rows(make_config({{'dpo': {{'enabled': False}}}}, Path({str(tmp_path)!r})))\n"
        "found = [m for m in ('torch', 'mlx', 'transformers', 'datasets', 'pandas') if m in sys.modules]\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_topics_need_rows_for_both_stages() -> None:
    row, other = sft({"prompt": "Hi", "completion": "Yo", "topic": "tea"}), pair({**PAIR, "topic": "rain"})
    same = pair({**PAIR, "topic": "tea"})
    both = make_config({}).config
    check_topics(Rows((row,), (same,), ()), both)
    with pytest.raises(DataError, match=r"topic 'tea' has 2 SFT rows and no preference pairs: add pairs .*dpo.enabled"):
        check_topics(Rows((row, row), (other,), ()), both)
    with pytest.raises(DataError, match=r"topic 'rain' has 1 preference pair and no SFT rows: add rows .*sft.enabled"):
        check_topics(Rows((row,), (same, other), ()), both)
    check_topics(Rows((row,), (), ()), make_config({"dpo": {"enabled": False}}).config)


PAGE = Path(__file__).parents[3] / "docs" / "data-formats.md"
BLOCKS = re.compile(r"<!-- rows: (sft|preferences) (chat|raw) -->\n```json\n(.*?)```", re.DOTALL)


def test_the_documented_rows_are_rows() -> None:
    blocks = BLOCKS.findall(PAGE.read_text(encoding="utf-8"))
    assert [(part, data_format, len(rows.splitlines())) for part, data_format, rows in blocks] == [
        ("sft", "chat", 8),
        ("preferences", "chat", 4),
        ("sft", "chat", 2),
        ("sft", "raw", 2),
        ("preferences", "raw", 2),
    ]
    for part, data_format, rows in blocks:
        for line in rows.splitlines():
            (sft if part == "sft" else pair)(json.loads(line), data_format)
