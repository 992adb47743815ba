"""Code that came with somebody else's files is stopped in bounded time and memory."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from edits import TEMPLATES

from mindprint.adapter.peft_format import read_adapter, write_adapter
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.data.rows import Message
from mindprint.data.tokenizer import Tokenizer, load_tokenizer
from mindprint.errors import AdapterError, DataError, ModelError
from mindprint.limits import LimitError, limited

CHAT = (Message("user", "Tea?"), Message("assistant", "At four."))


def with_template(folder: Path, template: str) -> Tokenizer:
    tiny = Path(str(files("mindprint").joinpath("resources", "tiny")))
    for file in tiny.glob("*.json"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder)


def test_a_template_that_computes_powers_is_refused(tmp_path: Path) -> None:
    """One power takes longer than any limit, and nothing interrupts it. Unpacking and bold text look alike."""
    for template in ("{{ 10 ** 100000000 }}", "{% set x = 9\n** 9 %}{{ x }}"):
        with pytest.raises(DataError, match=r"the chat template computes powers \(\*\*\)"):
            with_template(tmp_path, template).render_all([CHAT], generation_prompt=True)
    sound = "**bold**{{ dict(**{'a': 1}).a }}{{ dict(b=2, **{'a': 1}).b }}"
    tokenizer = with_template(tmp_path, sound)
    (ids,) = tokenizer.render_all([CHAT], generation_prompt=True)
    assert tokenizer.decode(ids.tolist()) == "**bold**12"


def test_a_loop_without_end_is_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(LimitError, match="more than 1 s"), limited(1.0):
        while True:
            pass
    assert time.monotonic() - started < 3


def test_memory_is_bounded_and_the_bound_is_taken_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(LimitError, match="MB of memory"), limited(5.0):
        bytearray(2**33)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template[:40])
def test_a_template_renders_or_is_refused_in_time(tmp_path: Path, template: str) -> None:
    started = time.monotonic()
    with suppress(DataError, ModelError):
        tokenizer = with_template(tmp_path, template)
        for _ in range(3):
            tokenizer.render_all([CHAT] * 20, generation_prompt=True)
    assert time.monotonic() - started < 10


PATTERNS = ("(a+)+b", "((a|a)*)*b", "(.*)*(.*)*(.*)*x", "(([a-z_.0-9]+)+)+!", ".*.*.*.*.*.*.*.*.*.*.*.*x")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_of_an_adapter_match_in_time(tmp_path: Path, pattern: str, field: str) -> None:
    site = "model.layers.0.self_attn.q_proj" + "a" * 40
    lora = LoraConfig(2, 4.0, (site,))
    write_adapter(tmp_path, AdapterState(lora, {site: LoraFactors(np.ones((2, 4)), np.ones((4, 2)))}), "base")
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {field: pattern if field == "target_modules" else {pattern: 1}}))
    started = time.monotonic()
    with suppress(AdapterError):
        read_adapter(tmp_path)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("field", ["target_modules", "target_parameters", "rank_pattern", "alpha_pattern"])
def test_many_names_in_an_adapter_are_read_in_time(tmp_path: Path, field: str) -> None:
    sites = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(200))
    factors = {site: LoraFactors(np.ones((2, 4)), np.ones((4, 2))) for site in sites}
    write_adapter(tmp_path, AdapterState(LoraConfig(2, 4.0, sites), factors), "base")
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    names = [f"model.layers.{number}.mlp" for number in range(50_000)]
    file.write_text(json.dumps(content | {field: names if field.startswith("target") else dict.fromkeys(names, 1)}))
    started = time.monotonic()
    with suppress(AdapterError):
        read_adapter(tmp_path)
    assert time.monotonic() - started < 10


def test_a_template_that_hangs_is_named_with_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the chat template takes more than") as caught:
        with_template(tmp_path, TEMPLATES[0]).render(CHAT, generation_prompt=False)
    assert str(tmp_path) in str(caught.value)
