"""Generation: greedy by definition, sampling by its own, and no prompt's answer depends on another prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_samples import VOCABULARY, linear_sites, lora

from mindprint.contract import Generation, LoadedModel, OnToken, Sampling
from mindprint_mlx import adapter, generation
from mindprint_mlx.generation import Row
from mindprint_mlx.model import MlxModel
from mindprint_mlx.rows import ROWS
from mindprint_mlx.state import restore, save

GREEDY = Sampling(max_new_tokens=9, stop_token_ids=())


def generate(
    handle: MlxModel, rows: Sequence[np.ndarray], sampling: Sampling, *, adapter: bool, on_token: OnToken | None = None
) -> tuple[Generation, ...]:
    """Continue all prompts with the same settings."""
    return generation.generate(handle, rows, sampling.of_each(len(rows)), adapter=adapter, on_token=on_token)


def prompts(count: int = 5) -> list[np.ndarray]:
    random = np.random.default_rng(4)
    return [random.integers(0, VOCABULARY, 2 + 3 * (index % 4)).astype(np.int32) for index in range(count)]


def greedily(handle: MlxModel, prompt: np.ndarray, count: int) -> list[int]:
    """The definition: the likeliest next token of the whole sequence, again and again, without a cache."""
    tokens = list(map(int, prompt))
    for _ in range(count):
        tokens.append(int(mx.argmax(handle.module(mx.array([tokens]))[0, -1]).item()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("adapted", [True, False])
def test_greedy_decoding_is_its_definition(make: Callable[..., LoadedModel], family: str, adapted: bool) -> None:
    loaded = make(family)
    expected = [greedily(loaded.handle, prompt, 9) for prompt in prompts()]
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    if adapted:
        expected = [greedily(loaded.handle, prompt, 9) for prompt in prompts()]
    found = generate(loaded.handle, prompts(), GREEDY, adapter=adapted)
    assert [answer.tokens.tolist() for answer in found] == expected
    assert {answer.stop_reason for answer in found} == {"length"}
    assert found[0].tokens.dtype == np.int32


def test_nothing_may_be_asked_for(make: Callable[..., LoadedModel]) -> None:
    (found,) = generate(make().handle, prompts(1), Sampling(0, ()), adapter=True)
    assert (found.tokens.tolist(), found.stop_reason) == ([], "length")
    assert generate(make().handle, [], GREEDY, adapter=True) == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_alone_and_among_others(make: Callable[..., LoadedModel], family: str, temperature: float) -> None:
    handle = make(family).handle
    sampling = Sampling(9, (), temperature=temperature, seed=3)
    many = prompts(ROWS + 7)
    together = generate(handle, many, sampling, adapter=True)
    for prompt, answer in zip(many, together, strict=True):
        assert generate(handle, [prompt], sampling, adapter=True)[0].tokens.tolist() == answer.tokens.tolist()
    backwards = generate(handle, many[::-1], sampling, adapter=True)[::-1]
    assert [a.tokens.tolist() for a in backwards] == [a.tokens.tolist() for a in together]


def test_a_rows_logits_are_the_same_in_any_company_but_for_rounding(
    make: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each number of rows, and at each place among them. Matrix products of other shapes round otherwise."""
    handle = make().handle
    seen: list[np.ndarray] = []
    monkeypatch.setattr("mindprint_mlx.generation._take", _recording(seen))
    own = prompts(5)[1]
    generate(handle, [own], GREEDY, adapter=True)
    alone = np.stack([values[0] for values in seen])
    assert len(alone) == 9
    for others in (1, 3, ROWS - 1):
        # A prompt keeps its place among others of its length.
        for place in (0, others):
            seen.clear()
            company = [own + 1] * others
            generate(handle, [*company[:place], own, *company[place:]], GREEDY, adapter=True)
            found = np.stack([values[place] for values in seen])
            np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5 * float(np.abs(alone).max()))


def test_rows_that_are_done_cost_nothing(make: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    handle = make().handle
    many = prompts(7)
    answers = generate(handle, many, GREEDY, adapter=True)
    seen: list[np.ndarray] = []
    monkeypatch.setattr("mindprint_mlx.generation._take", _recording(seen))
    ends = {row: 2 + row for row in range(7)}

    def on_token(row: int, _: int) -> bool:
        ends[row] -= 1
        return ends[row] > 0

    found = generate(handle, many, GREEDY, adapter=True, on_token=on_token)
    for row, (whole, part) in enumerate(zip(answers, found, strict=True)):
        assert part.tokens.tolist() == whole.tokens.tolist()[: 2 + row]
    widths = [len(values) for values in seen if len(values) > 1]
    assert widths[0] == 7 and sorted(widths, reverse=True) == widths and 3 in widths


def test_the_next_turn_reads_its_new_tokens_only(
    make: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a chat of 30 tokens with an answer of 9, the last token was chosen and not read. Other weights forget it."""
    loaded = make()
    adapter.inject(loaded.handle, lora(linear_sites(loaded)))
    handle, read = loaded.handle, []
    network = type(handle.module)
    forward = network.__call__

    def counted(module: object, tokens: mx.array, *arguments: object, **options: object) -> mx.array:
        read.append(tokens.shape[1])
        return forward(module, tokens, *arguments, **options)

    monkeypatch.setattr(network, "__call__", counted)
    first = np.random.default_rng(9).integers(3, VOCABULARY, 30).astype(np.int32)

    def turn(prompt: np.ndarray, *, tuned: bool = True, listens: bool = True) -> list[int]:
        read.clear()
        on_token = (lambda *_: None) if listens else None
        return generate(handle, [prompt], GREEDY, adapter=tuned, on_token=on_token)[0].tokens.tolist()

    second = np.array([*first, *turn(first), 7, 9], np.int32)
    assert read[0] == 29
    silent = turn(second, listens=False)
    assert read[0] == 40
    assert turn(second) == silent
    assert read[0] == 2  # 38 are known, and the last token is read with the first step
    base = turn(second, tuned=False)
    assert read[0] == 40
    assert turn(second, tuned=False, listens=False) == base
    restore(handle, save(handle))
    assert handle.kept.size == 0


def _recording(seen: list[np.ndarray]) -> Callable[..., None]:
    from mindprint_mlx.generation import _take

    def take(logits: mx.array, rows: Sequence[Row]) -> None:
        seen.append(np.array(logits))
        _take(logits, rows)

    return take


def test_a_class_that_cannot_continue_rows_continues_them_one_by_one(make: Callable[..., LoadedModel]) -> None:
    handle = make().handle
    assert handle.continues_rows
    together = generate(handle, prompts(), GREEDY, adapter=True)
    handle.continues_rows = False
    alone = generate(handle, prompts(), GREEDY, adapter=True)
    assert [a.tokens.tolist() for a in alone] == [a.tokens.tolist() for a in together]


class TestSampling:
    def test_it_is_reproducible_by_seed(self, make: Callable[..., LoadedModel]) -> None:
        handle = make().handle

        def sample(seed: int) -> list[list[int]]:
            sampling = Sampling(9, (), temperature=1.0, seed=seed)
            return [answer.tokens.tolist() for answer in generate(handle, prompts(), sampling, adapter=True)]

        assert sample(1) == sample(1)
        assert sample(1) != sample(2)
