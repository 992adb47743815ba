"""Text and conversations → ids, worked out by hand over the tokenizers of small_tokenizers.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_tokenizers import BOS, CAT, CHATML, EOS, IM_END, IM_START, WITH_BOS, byte_level_bpe, write_tokenizer
from tokenizers import normalizers

from mindprint.data.rows import Message
from mindprint.data.tokenizer import PLAIN_TEMPLATE, Tokenizer, load_tokenizer
from mindprint.errors import DataError, ModelError

CHAT = (Message("user", "Hi"), Message("assistant", "Yo"))
USER_TURN = [IM_START, *b"user\nHi", IM_END, *b"\n"]
ANSWER_OPEN = [IM_START, *b"assistant\n"]


def tokenizer(folder: Path, template: str | None = CHATML, **config: object) -> Tokenizer:
    return load_tokenizer(write_tokenizer(folder, template, **config))  # type: ignore[arg-type]


def test_a_conversation_is_rendered_by_the_template(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path)
    assert (loaded.has_template, loaded.notes) == (True, ())
    assert loaded.render(CHAT[:1], generation_prompt=True) == USER_TURN + ANSWER_OPEN
    assert loaded.render(CHAT, generation_prompt=False) == [*USER_TURN, *ANSWER_OPEN, *b"Yo", IM_END, *b"\n"]


def test_bytes_merges_and_special_tokens(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path)
    assert loaded.encode("a cat é<eos>") == [*b"a ", CAT, 0x20, 0xC3, 0xA9, EOS]
    assert loaded.decode([*b"a ", CAT, EOS]) == "a cat"
    assert loaded.decode([*b"a ", CAT, EOS], keep_special=True) == "a cat<eos>"


def test_the_end_of_turn_token_stops_beside_end_of_sequence(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.pad_id) == (EOS, EOS)
    assert loaded.stop_token_ids == (EOS, IM_END)


def test_generation_config_adds_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 299]}))
    assert tokenizer(tmp_path).stop_token_ids == (EOS, 299, IM_END)


def test_without_eos_token_the_models_config_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        tokenizer(tmp_path, eos_token=None, pad_token=None)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": IM_END}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.eos_token) == (IM_END, IM_END, "<|im_end|>")


def test_one_bos_never_two(tmp_path: Path) -> None:
    """The template writes a BOS and so does the post-processor; neither text nor conversation gets both."""
    loaded = tokenizer(tmp_path, WITH_BOS, bos=True)
    assert loaded.render(CHAT, generation_prompt=False) == [BOS, *b"[Hi]Yo", EOS]
    assert loaded.encode("Hi") == [BOS, *b"Hi"]
    assert loaded.encode("<bos>Hi") == [BOS, *b"Hi"]
    assert loaded.stop_token_ids == (EOS,)


def test_a_tokenizer_without_template_uses_the_plain_one_and_says_so(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path, None)
    assert not loaded.has_template
    assert loaded.notes == ("the tokenizer has no chat template: rows are written as `User: …` and `Assistant: …`",)
    chat = (Message("system", "Be brief."), *CHAT, Message("user", "Bye"))
    begin = b"Be brief.\n\nUser: Hi\n\nAssistant: Yo"
    assert loaded.render(chat[:3], generation_prompt=False) == [*begin, EOS]
    assert loaded.render(chat, generation_prompt=True) == [*begin, EOS, *b"\n\nUser: Bye\n\nAssistant:"]
    assert loaded.template == PLAIN_TEMPLATE


def test_the_plain_template_begins_with_the_bos_that_the_tokenizer_adds(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path, None, bos=True)
    assert loaded.render(CHAT[:1], generation_prompt=True) == [BOS, *b"User: Hi\n\nAssistant:"]


def test_a_template_that_refuses_says_why(tmp_path: Path) -> None:
    loaded = tokenizer(tmp_path, WITH_BOS, bos=True)
    with pytest.raises(DataError, match="refuses this conversation: System role not supported"):
        loaded.render([Message("system", "Be brief."), *CHAT], generation_prompt=False)


def test_a_template_in_a_file_of_its_own_wins(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, CHATML)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}|{% endfor %}")
    assert load_tokenizer(tmp_path).render(CHAT, generation_prompt=False) == [*b"Hi|Yo|"]


def test_of_several_templates_the_default_one_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    loaded = tokenizer(tmp_path, None, chat_template=templates)
    assert loaded.has_template
    assert loaded.render(CHAT[:1], generation_prompt=False) == USER_TURN


def test_a_dated_template_is_the_same_every_day(tmp_path: Path) -> None:
    """`strftime_now` would make tomorrow's tokens differ from today's. What the template begins with stays, too."""
    dated = "\n{{ strftime_now('%d %b %Y') }} {{ strftime_now('%d %B %Y') }} " + CHATML
    loaded = tokenizer(tmp_path, dated)
    assert loaded.render(CHAT[:1], generation_prompt=False) == [*b"\n26 Jul 2024 26 July 2024 ", *USER_TURN]
    assert loaded.notes == ("the chat template writes today's date: held at 26 Jul 2024, so that tokens stay the same",)


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    backend = byte_level_bpe()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abcd") == [*b"abcd"]


def test_digests_tell_tokenizers_and_templates_apart(tmp_path: Path) -> None:
    one, other, third = (
        tokenizer(tmp_path / name, template) for name, template in {"a": CHATML, "b": "x", "c": None}.items()
    )
    assert one.digest == other.digest == third.digest
    assert len({one.template_digest, other.template_digest, third.template_digest}) == 3
    assert tokenizer(tmp_path / "d", bos=True).digest != one.digest
    write_tokenizer(tmp_path / "e")
    backend = byte_level_bpe()
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "e" / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "e").digest != one.digest


def test_the_digest_outlives_a_rewritten_file(tmp_path: Path) -> None:
    """Older files write a merge as `c a`, newer ones as `["c", "a"]`, and leave out fields that are false."""
    before = tokenizer(tmp_path).digest
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["model"]["ignore_merges"], content["model"]["byte_fallback"]
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    assert load_tokenizer(tmp_path).digest == before


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer.json\): copy its files"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_loading_and_rendering_import_no_framework_and_say_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mindprint.data.tokenizer import load_tokenizer\n"
        "from mindprint.data.rows import Message\n"
        f"t = load_tokenizer(Path({str(write_tokenizer(tmp_path))!r}))\n"
        "t.render([Message('user', 'Hi')], generation_prompt=True), t.digest, t.stop_token_ids\n"
        "found = [m for m in ('torch', 'mlx', 'datasets', 'pandas') if m in sys.modules]; assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
