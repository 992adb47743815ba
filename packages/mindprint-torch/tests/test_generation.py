"""Generation: what a prompt gets is its own affair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mindprint.contract import Generation, Int32, LoadedModel, ModelSpec, Sampling
from mindprint.plugins.backend import Backend
from mindprint_torch.decoding import GRAIN, Decoder, left_padded
from mindprint_torch.generation import draw

Load = Callable[..., LoadedModel]


@pytest.fixture
def prompts() -> list[Int32]:
    rng = np.random.default_rng(4)
    return [rng.integers(3, 61, length).astype(np.int32) for length in (7, 2, 5, 2, 9, 1)]


def same(one: Generation, other: Generation) -> bool:
    return one.stop_reason == other.stop_reason and np.array_equal(one.tokens, other.tokens)


def greedy_by_hand(network: torch.nn.Module, prompt: Int32, count: int) -> list[int]:
    """The most likely next token from the full forward pass, again and again, with neither cache nor padding."""
    tokens = list(map(int, prompt))
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2", "deepseek_v3"])
def test_greedy_equals_full_passes_and_ignores_neighbours(
    backend: Backend, train: Load, prompts: list[Int32], architecture: str
) -> None:
    model = train(architecture)
    together = backend.generate(model, prompts, Sampling(8, ()))
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.tokens.dtype == np.int32
        assert answer.stop_reason == "length"
        assert answer.tokens.tolist() == greedy_by_hand(model.handle.network, prompt, 8)
        assert same(backend.generate(model, [prompt], Sampling(8, ()))[0], answer)


def test_keys_and_values_grow_as_often_as_needed(backend: Backend, train: Load, prompts: list[Int32]) -> None:
    """Their arrays have room for 64 more places at a time: 150 new tokens need three of them."""
    model = train("qwen2")
    made = backend.generate(model, prompts[:2], Sampling(2 * GRAIN + 22, ()))
    for prompt, answer in zip(prompts, made, strict=False):
        assert answer.tokens.tolist() == greedy_by_hand(model.handle.network, prompt, 2 * GRAIN + 22)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_rows_that_are_done_are_taken_out(
    backend: Backend, train: Load, prompts: list[Int32], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows that end after 2 to 7 tokens. The rest of them is as before, of fewer and fewer rows."""
    model, widths = train(architecture), []
    free = backend.generate(model, prompts, Sampling(8, ()))
    step = Decoder.step

    def counted(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
        widths.append(len(tokens))
        return step(decoder, tokens)

    monkeypatch.setattr(Decoder, "step", counted)
    told = [0] * len(prompts)

    def until_its_end(row: int, _: int) -> bool:
        told[row] += 1
        return told[row] < 2 + row

    answers = backend.generate(model, prompts, Sampling(8, ()), on_token=until_its_end)
    for row, (answer, whole) in enumerate(zip(answers, free, strict=True)):
        assert answer.tokens.tolist() == whole.tokens.tolist()[: 2 + row]
    assert widths == [6, 6, 4, 3, 2, 1]


def test_the_next_turn_reads_its_new_tokens_only(
    backend: Backend, train: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chat of 30 tokens with an answer of 8, the last token was chosen and not read. Training forgets it all."""
    model, read = train("qwen2"), []
    forward = Decoder.read

    def counted(decoder: Decoder) -> torch.Tensor:
        read.append(tuple(decoder._tokens.shape))
        return forward(decoder)

    rng = np.random.default_rng(9)
    first = [rng.integers(3, 61, length).astype(np.int32) for length in (30, 21)]
    backend.generate(model, first, Sampling(1, ()))  # measures whether prompts can be continued together
    monkeypatch.setattr(Decoder, "read", counted)

    def turn(*prompts: Int32, adapter: bool = True) -> list[Int32]:
        told = backend.generate(model, prompts, Sampling(8, ()), adapter=adapter, on_token=lambda *_: None)
        return [np.concatenate([prompt, made.tokens, [7, 9]]) for prompt, made in zip(prompts, told, strict=True)]

    second = turn(*first)
    turn(*second)
    turn(second[1])
    turn(second[1], adapter=False)
    backend.generate(model, second[:1], Sampling(8, ()))
    backend.restore(model, backend.save(model))
    turn(second[1])
    assert read == [(2, 30), (2, 3), (1, 1), (1, 31), (1, 40), (1, 31)]


def test_sampling_is_seeded_and_ignores_neighbours(backend: Backend, train: Load, prompts: list[Int32]) -> None:
    model = train("qwen2")
    sampling = Sampling(8, (), temperature=1.0, top_p=0.9, seed=5)
    together = backend.generate(model, prompts, sampling)
    torch.manual_seed(1)
    assert all(map(same, together, backend.generate(model, prompts, sampling)))
    for prompt, answer in zip(prompts, together, strict=True):
        assert same(backend.generate(model, [prompt], sampling)[0], answer)
    other = backend.generate(model, prompts, Sampling(8, (), temperature=1.0, top_p=0.9, seed=6))
    assert not any(map(same, together, other))


def test_draw_by_hand() -> None:
    """Probabilities 0.5, 0.25, 0.15, 0.1: the nucleus of 0.8 is the first three, together 0.9."""
    logits = torch.log(torch.tensor([[0.25, 0.1, 0.5, 0.15]]))
    sampling = Sampling(1, (), temperature=1.0, top_p=0.8)
    uniform = {0.0: 2, 0.55: 2, 0.56: 0, 0.83: 0, 0.84: 3, 0.9999999: 3}
    for number, token in uniform.items():
        assert draw(logits, sampling, torch.tensor([[number]])).item() == token
    assert draw(logits, Sampling(1, (), temperature=1.0, top_p=0.5), torch.tensor([[0.99]])).item() == 2


def test_draw_follows_the_probabilities() -> None:
    """Temperature 2 flattens p to p^0.5: (0.5, 0.3, 0.2) becomes (0.4154, 0.3218, 0.2628)."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(1000, 3)
    uniform = (torch.arange(1000)[:, None] + 0.5) / 1000
    drawn = draw(logits, Sampling(1, (), temperature=2.0), uniform)
    assert torch.bincount(drawn.flatten()).tolist() == [415, 322, 263]


def test_the_folders_sampling_defaults_are_ignored(
    backend: Backend, folders: Callable[[str], Path], tmp_path: Path, prompts: list[Int32]
) -> None:
    folder = Path(shutil.copytree(folders("qwen2"), tmp_path / "model"))
    defaults = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": 7, "max_length": 9}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    plain, other = (backend.load_model(ModelSpec(str(path), "cpu", "float32")) for path in (folders("qwen2"), folder))
    assert all(
        map(same, backend.generate(plain, prompts, Sampling(8, ())), backend.generate(other, prompts, Sampling(8, ())))
    )
    backend.release(plain)
    backend.release(other)


def test_more_prompts_than_run_at_once_come_back_in_order(backend: Backend, load: Load) -> None:
    model = load("qwen2")
    prompts = [np.array([3 + index % 50] * (1 + index % 3), np.int32) for index in range(70)]
    answers = backend.generate(model, prompts, Sampling(2, ()))
    for index in (0, 33, 69):
        assert same(backend.generate(model, [prompts[index]], Sampling(2, ()))[0], answers[index])
    assert backend.generate(model, [], Sampling(2, ())) == ()


def test_generating_says_nothing(
    backend: Backend, load: Load, prompts: list[Int32], capfd: pytest.CaptureFixture[str]
) -> None:
    model = load("qwen2")
    backend.generate(model, prompts, Sampling(3, (2,), temperature=0.7, top_p=0.9))
    backend.generate(model, prompts, Sampling(3, ()))
    assert capfd.readouterr() == ("", "")


def test_left_padded() -> None:
    tokens, mask = left_padded([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], fill=2)
    np.testing.assert_array_equal(tokens, [[5, 6, 7], [2, 2, 8]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])
