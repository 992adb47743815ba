"""llama.cpp's library: found, of a known release, and its errors in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mindprint.contract import ModelSpec, Sampling
from mindprint.errors import BackendError, ModelError
from mindprint.plugins.backend import Backend, load_backend
from mindprint_llamacpp import library
from mindprint_testing import write_tiny_model


@pytest.fixture
def loaded_again() -> Iterator[None]:
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.fixture
def backend() -> Backend:
    return load_backend("llamacpp")


@pytest.mark.usefixtures("loaded_again")
def test_without_the_wheel_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install 'xllamacpp"):
        library.load_library()
    (device,) = load_backend("llamacpp").info.devices
    assert not device.usable


@pytest.mark.usefixtures("loaded_again")
def test_other_structures_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that has another default where a known field is expected."""
    monkeypatch.setitem(library._CONTEXT_DEFAULTS, "n_ctx", 511)
    with pytest.raises(BackendError, match="has other structures than are known here"):
        library.load_library()


def test_a_broken_file_is_refused_in_a_line(backend: Backend, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="llama.cpp does not load it") as caught:
        backend.load_model(ModelSpec(str(file), "cpu", "float32"))
    assert "\n" not in str(caught.value)


def test_a_gguf_file_in_the_folder_is_used_and_named(backend: Backend, tmp_path: Path) -> None:
    from mindprint.adapter.gguf_merging import write_base

    folder, other = write_tiny_model(tmp_path / "one"), write_tiny_model(tmp_path / "two", seed=1)
    plain = backend.load_model(ModelSpec(str(folder), "cpu", "float32"))
    write_base(folder / "own.gguf", other)
    model = backend.load_model(ModelSpec(str(folder), "cpu", "float32"))
    assert model.notes == ("computed with own.gguf, as that file rounds it",)
    prompt, sampling = [np.array([5, 6, 7], np.int32)], Sampling(6, ())
    expected = backend.generate(backend.load_model(ModelSpec(str(other), "cpu", "float32")), prompt, sampling)
    assert backend.generate(model, prompt, sampling)[0].tokens.tolist() == expected[0].tokens.tolist()
    assert backend.generate(plain, prompt, sampling)[0].tokens.tolist() != expected[0].tokens.tolist()


def test_more_prompts_than_take_turns_in_one_context(backend: Backend, tmp_path: Path) -> None:
    model = backend.load_model(ModelSpec(str(write_tiny_model(tmp_path / "base")), "cpu", "float32"))
    prompts = [np.arange(3, 5 + number % 7, dtype=np.int32) for number in range(18)]
    answers = backend.generate(model, prompts, Sampling(4, ()))
    alone = [backend.generate(model, [prompt], Sampling(4, ()))[0] for prompt in prompts]
    assert [answer.tokens.tolist() for answer in answers] == [answer.tokens.tolist() for answer in alone]
