"""Generation: the likeliest token or a seeded draw, until a stop token, each prompt by itself."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from mindprint.contract import Generation as Answer
from mindprint.contract import Int32, LoadedModel, LoraFactors, Sampling, TokenBatch
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims
from mindprint_testing.injection import EXACT

GREEDY = Sampling(max_new_tokens=6, stop_token_ids=())


class Generation(Claims):
    """`mindprint_generate`."""

    @pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "base"])
    def test_greedy_takes_the_likeliest_token(self, bench: Bench, adapter: bool) -> None:
        """Every token generated has the highest log-prob of the vocabulary at its place, by `mindprint_log_probs`.

        If it fails at the first token: logits are read at the wrong position. Later: a cache with wrong positions. With
        the adapter only: generation ignores it, or `adapter`.
        """
        model = bench.ready()
        for prompt, answer in zip(
            _prompts(bench), bench.backend.generate(model, _prompts(bench), GREEDY, adapter=adapter), strict=True
        ):
            assert answer.tokens.dtype == np.int32
            assert (len(answer.tokens), answer.stop_reason) == (6, "length")
            for place in range(6):
                before = np.concatenate([prompt, answer.tokens[:place]])
                scores = _next_log_probs(bench, model, before, adapter=adapter)
                # Not the same token but one as likely: two tokens may tie within rounding.
                assert scores[answer.tokens[place]] >= scores.max() - EXACT, f"token {place}"

    def test_the_adapter_changes_answers_and_off_restores_them(self, bench: Bench) -> None:
        """With `adapter=False` answers are those of the bare base; with it, at least one differs.

        If it fails: `adapter` is ignored, or a cache outlives its call.
        """
        # A strong adapter: a weak one may leave every likeliest token as it was.
        model = bench.ready(alpha=24.0)
        base = bench.backend.generate(bench.load(), _prompts(bench), GREEDY)
        adapted = bench.backend.generate(model, _prompts(bench), GREEDY)
        off = bench.backend.generate(model, _prompts(bench), GREEDY, adapter=False)
        assert _words(off) == _words(base)
        assert _words(adapted) != _words(base)

    def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(self, bench: Bench) -> None:
        """Cut before the first stop token, of several, with the reason `stop`; else `length`.

        If it fails: the stop token is in the answer (and in every evaluation's text), stop tokens after the first are
        ignored, or an answer that was cut off says `stop`.
        """
        model = bench.ready()
        free = bench.backend.generate(model, _prompts(bench), GREEDY)
        # The first stop token never comes. The others are tokens that the model did generate, so that it must stop.
        stops = (bench.vocab_size - 1, int(free[0].tokens[3]), int(free[1].tokens[2]))
        stopped = bench.backend.generate(model, _prompts(bench), Sampling(6, stops))
        assert "stop" in {answer.stop_reason for answer in stopped}
        for before, after in zip(free, stopped, strict=True):
            ends = [place for place, token in enumerate(before.tokens) if token in stops]
            assert after.stop_reason == ("stop" if ends else "length")
            assert after.tokens.tolist() == before.tokens.tolist()[: ends[0] if ends else 6]

    def test_a_prompt_alone_and_among_others(self, bench: Bench) -> None:
        """Answers come in the order of the prompts, and each is what its prompt gets alone.

        If it fails: padding on the left is attended to, positions are off for shorter prompts, or answers are sorted.
        """
        model, prompts = bench.ready(), _prompts(bench)
        together = bench.backend.generate(model, prompts, GREEDY)
        alone = [bench.backend.generate(model, [prompt], GREEDY)[0] for prompt in prompts]
        assert _words(together) == _words(alone)
        assert _words(bench.backend.generate(model, prompts[::-1], GREEDY)) == _words(alone)[::-1]
        assert bench.backend.generate(model, [], GREEDY) == ()

    def test_sampling_follows_its_seed(self, bench: Bench) -> None:
        """One seed, one answer, alone or among others, whatever was drawn before; another seed, another answer.

        If it fails: draws come from a generator that the process shares. Key them by seed, prompt and place.
        """
        self.needs("sampling")
        model, prompts = bench.ready(), _prompts(bench)
        sampling = Sampling(6, (), temperature=1.0, seed=5)
        first = bench.backend.generate(model, prompts, sampling)
        other = bench.backend.generate(model, prompts, Sampling(6, (), temperature=1.0, seed=6))
        assert _words(bench.backend.generate(model, prompts, sampling)) == _words(first)
        assert [_words(bench.backend.generate(model, [prompt], sampling))[0] for prompt in prompts] == _words(first)
        assert _words(other) != _words(first)

    def test_sampling_when_there_is_no_choice_is_greedy(self, bench: Bench) -> None:
        """At a temperature near 0, and with a nucleus of one token, a draw is the likeliest token.

        If it fails: temperature multiplies instead of divides, or top-p keeps the wrong end.
        """
        self.needs("sampling")
        model, prompts = bench.ready(), _prompts(bench)
        greedy = _words(bench.backend.generate(model, prompts, GREEDY))
        for sampling in (Sampling(6, (), temperature=1e-4), Sampling(6, (), temperature=1.0, top_p=1e-6)):
            assert _words(bench.backend.generate(model, prompts, sampling)) == greedy

    def test_draws_follow_the_probabilities(self, bench: Bench) -> None:
        """Of 200 draws at temperature 1 the mean log-prob is the model's own, within four standard errors.

        If it fails: draws are flatter or sharper than the distribution.
        """
        self.needs("sampling")
        model, prompt = bench.ready(), _prompts(bench)[0]
        scores = _next_log_probs(bench, model, prompt).astype(np.float64)
        drawn = [
            bench.backend.generate(model, [prompt], Sampling(1, (), temperature=1.0, seed=seed))[0].tokens[0]
            for seed in range(200)
        ]
        # The mean log-prob of draws estimates minus the entropy, with the standard error below.
        expected = float((np.exp(scores) * scores).sum())
        deviation = float(np.sqrt((np.exp(scores) * (scores - expected) ** 2).sum() / len(drawn)))
        assert abs(float(scores[drawn].mean()) - expected) < 4 * deviation

    def test_filters_that_leave_no_choice_are_greedy(self, bench: Bench) -> None:
        """At a temperature of 2 the likeliest token is drawn where `top_k` is 1, and where `min_p` is as good as 1.

        If it fails: a filter is ignored, or it keeps the wrong end.
        """
        self.needs("filters")
        model, prompts = bench.ready(), _prompts(bench)
        greedy = _words(bench.backend.generate(model, prompts, GREEDY))
        of_one = Sampling(6, (), temperature=2.0, top_k=1), Sampling(6, (), temperature=2.0, min_p=1 - 1e-9)
        for sampling in of_one:
            assert _words(bench.backend.generate(model, prompts, sampling)) == greedy

    def test_filters_draw_from_what_they_leave(self, bench: Bench) -> None:
        """60 draws with `top_k` 3 at a high temperature are the three likeliest tokens.

        If it fails: `top_k` counts from the wrong end, or is off by one.
        """
        self.needs("filters")
        model, prompt = bench.ready(), _prompts(bench)[0]
        likeliest = np.argsort(-_next_log_probs(bench, model, prompt), kind="stable")[:3]
        settings = [Sampling(1, (), temperature=50.0, top_k=3, seed=seed) for seed in range(60)]
        drawn = {int(bench.backend.generate(model, [prompt], each)[0].tokens[0]) for each in settings}
        assert drawn == set(likeliest.tolist())

    def test_a_penalty_forbids_what_was_there(self, bench: Bench) -> None:
        """With a repetition penalty of 10^6 a greedy answer has no token of its prompt, and none of them twice.

        If it fails: the penalty is not applied to greedy answers, knows only the prompt or only the answer, or takes
        the filling of shorter prompts for text.
        """
        self.needs("filters")
        model, prompts = bench.ready(), _prompts(bench)
        sampling = Sampling(6, (), repetition_penalty=1e6)
        made = bench.backend.generate(model, prompts, sampling)
        for prompt, answer in zip(prompts, made, strict=True):
            before, new = set(prompt.tolist()), answer.tokens.tolist()
            assert len(before.union(new)) == len(before) + len(new)
        answers = _words(made)
        assert [_words(bench.backend.generate(model, [prompt], sampling))[0] for prompt in prompts] == answers

    def test_each_prompt_has_its_settings(self, bench: Bench) -> None:
        """Prompts with unlike limits, stop tokens, temperatures, filters and seeds have the answers of each one alone.

        If it fails: the settings of one row are used for all, or they are matched to rows in another order.
        """
        self.needs("mixed")
        model, prompts = bench.ready(), _prompts(bench) * 2
        greedy = bench.backend.generate(model, prompts[:1], GREEDY)[0]
        samplings = [
            Sampling(6, (int(greedy.tokens[2]),)),
            GREEDY,
            Sampling(0, ()),
            *(
                [Sampling(4, (), temperature=1.0, seed=3), Sampling(6, (), temperature=2.0, top_p=0.5, seed=4)]
                if "sampling" in self.capabilities
                else [Sampling(2, ()), Sampling(3, ())]
            ),
            Sampling(5, (), repetition_penalty=1e6) if "filters" in self.capabilities else Sampling(5, ()),
        ]
        together = bench.backend.generate(model, prompts, samplings)
        alone = [
            bench.backend.generate(model, [prompt], own)[0] for prompt, own in zip(prompts, samplings, strict=True)
        ]
        assert _words(together) == _words(alone)
        assert _words(bench.backend.generate(model, prompts[::-1], samplings[::-1])) == _words(alone)[::-1]
        assert len({tuple(words) for words, _ in _words(alone)}) > 3

    def test_told_tokens_are_the_answers(self, bench: Bench) -> None:
        """`on_token` gets each row's tokens, in order and without the stop token, and answers stay as they are.

        If it fails: tokens are told under another row's index, the stop token is told, or tokens behind the end of a
        row are (the padding of rows that are done).
        """
        self.needs("streaming")
        model, prompts = bench.ready(), _prompts(bench)
        free = bench.backend.generate(model, prompts, GREEDY)
        sampling = Sampling(6, (int(free[0].tokens[3]), int(free[1].tokens[2])))
        told: list[list[int]] = [[] for _ in prompts]
        silent = bench.backend.generate(model, prompts, sampling)
        streamed = bench.backend.generate(model, prompts, sampling, on_token=lambda row, token: told[row].append(token))
        assert _words(streamed) == _words(silent)
        assert told == [answer.tokens.tolist() for answer in silent]

    def test_a_token_that_is_answered_with_false_is_the_last_one(self, bench: Bench) -> None:
        """A row ends with the token for which `on_token` returned False, for the reason `stop`. Others continue.

        If it fails: the answer of `on_token` is ignored, all rows end with one, or the last token is left out.
        """
        self.needs("streaming")
        model, prompts = bench.ready(), _prompts(bench)
        free = bench.backend.generate(model, prompts, GREEDY)
        told = [0] * len(prompts)

        def until_the_second_of_row_1(row: int, _: int) -> bool:
            told[row] += 1
            return not (row == 1 and told[row] == 2)

        answers = bench.backend.generate(model, prompts, GREEDY, on_token=until_the_second_of_row_1)
        expected = _words(free)
        expected[1] = (expected[1][0][:2], "stop")
        assert _words(answers) == expected
        assert told == [6, 2, 6]

    def test_the_next_turn_of_a_conversation(self, bench: Bench) -> None:
        """A second turn, whose prompt begins with the first one and its answer, is answered as without the first one.

        With the adapter and without it, two conversations at once, and with other weights.

        If it fails: a cache of the first turn is used for other tokens than it was made of, with `adapter` ignored, or
        after the weights changed.
        """
        self.needs("streaming")
        model = bench.ready(alpha=24.0)
        first = [bench.tokens(length, seed=40 + length) for length in (30, 24)]

        def turn(prompts: list[Int32], *, adapter: bool) -> list[Int32]:
            """Return the next prompts: the present ones, their answers, and three tokens more."""
            silent = bench.backend.generate(model, prompts, GREEDY, adapter=adapter)
            heard = bench.backend.generate(model, prompts, GREEDY, adapter=adapter, on_token=lambda *_: None)
            assert _words(heard) == _words(silent)
            return [
                np.concatenate([prompt, answer.tokens, prompt[:3]])
                for prompt, answer in zip(prompts, silent, strict=True)
            ]

        second = {adapter: turn(first, adapter=adapter) for adapter in (True, False)}
        for adapter in (False, True):
            # What was kept of the other model's conversation must not be taken for this one's.
            turn(second[not adapter], adapter=adapter)
            turn(second[adapter], adapter=adapter)
            turn(second[adapter][:1], adapter=adapter)
        if self.training:
            state = bench.backend.save(model)
            doubled = {name: LoraFactors(a, 2 * b) for name, (a, b) in state.adapter.tensors.items()}
            bench.backend.restore(model, replace(state, adapter=replace(state.adapter, tensors=doubled)))
            turn(second[True], adapter=True)

    def test_tokens_are_told_while_an_answer_is_generated(self, bench: Bench) -> None:
        """The first of 48 tokens is told in the first half of the time that all of them take, in most of 3 tries.

        If it fails: the answer is generated first and told afterwards. Do not claim `streaming` then, core does that.
        """
        self.needs("streaming")
        model, prompts, shares = bench.ready(), _prompts(bench)[:1], []
        for _ in range(3):
            told: list[float] = []
            start = time.perf_counter()
            bench.backend.generate(
                model, prompts, Sampling(48, ()), on_token=lambda *_, told=told: told.append(time.perf_counter())
            )
            shares.append((told[0] - start) / (time.perf_counter() - start))
        assert sorted(shares)[1] < 0.5


def _prompts(bench: Bench) -> list[Int32]:
    return [bench.tokens(length, seed=20 + length) for length in (5, 2, 7)]


def _next_log_probs(bench: Bench, model: LoadedModel, tokens: Int32, *, adapter: bool = True) -> np.ndarray:
    """Return the log-prob of every token of the vocabulary as the next one after `tokens`."""
    size, length = bench.vocab_size, len(tokens) + 1
    # `mindprint_log_probs` gives the log-prob of given tokens only. So each token of the vocabulary ends a row.
    rows = np.concatenate([np.tile(tokens, (size, 1)), np.arange(size)[:, None]], axis=1).astype(np.int32)
    mask = np.zeros(rows.shape, np.bool_)
    mask[:, -1] = True
    batch = TokenBatch(rows, np.full(size, length, np.int32), mask)
    return bench.backend.log_probs(model, batch, adapter=adapter)[:, -1]


def _words(answers: tuple[Answer, ...] | list[Answer]) -> list[tuple[list[int], str]]:
    return [(answer.tokens.tolist(), answer.stop_reason) for answer in answers]
