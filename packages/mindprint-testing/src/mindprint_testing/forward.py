"""Log-probs: normalised, causal, masked, and blind to padding and neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mindprint.contract import TokenBatch
from mindprint_testing.bench import Bench, rows_of
from mindprint_testing.claims import Claims
from mindprint_testing.injection import EXACT


class Forward(Claims):
    """`mindprint_log_probs`."""

    def test_probabilities_of_all_tokens_sum_to_one(self, bench: Bench) -> None:
        """One prefix, continued by each token of the vocabulary: the probabilities add up to 1, and are not all alike.

        If it fails: no log-softmax was taken, or over the wrong axis, or not in float32; or the log-prob at `t` is not
        that of `tokens[t]` given `tokens[:t]` (off by one).
        """
        model, size = bench.ready(), bench.vocab_size
        # All continuations are rows of one batch: the sum over them is the softmax's own denominator.
        tokens = np.tile(bench.tokens(5), (size, 1))
        tokens[:, -1] = np.arange(size)
        mask = np.zeros(tokens.shape, np.bool_)
        mask[:, -1] = True
        last = bench.backend.log_probs(model, TokenBatch(tokens, np.full(size, 5, np.int32), mask))[:, -1]
        assert abs(np.exp(last.astype(np.float64)).sum() - 1) < 1e-4
        assert last.std() > 1e-2, "every token is equally likely: the logits do not reach the result"

    def test_log_probs_outside_the_mask_are_zero(self, bench: Bench) -> None:
        """Outside the mask every value is 0, under it none is; an empty mask gives zeros.

        If it fails: prompt tokens or padding would count in every sum. Look at where the mask is applied.
        """
        model, batch = bench.ready(), bench.token_batch()
        log_probs = bench.backend.log_probs(model, batch)
        assert not log_probs[~batch.loss_mask].any()
        assert (log_probs[batch.loss_mask] < 0).all()
        nothing = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
        assert not bench.backend.log_probs(model, nothing).any()

    def test_the_mask_selects_and_changes_nothing_else(self, bench: Bench) -> None:
        """A token's log-prob is the same whether or not other tokens are asked for.

        If it fails: masked tokens are hidden from the model. The mask decides which tokens count, not which are seen.
        """
        model, batch = bench.ready(), bench.token_batch()
        everything = (np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]) & (
            np.arange(batch.tokens.shape[1]) > 0
        )
        whole = bench.backend.log_probs(model, replace(batch, loss_mask=everything))
        part = bench.backend.log_probs(model, batch)
        np.testing.assert_allclose(part[batch.loss_mask], whole[batch.loss_mask], rtol=0, atol=EXACT)

    def test_later_tokens_do_not_matter_and_earlier_ones_do(self, bench: Bench) -> None:
        """Changing the last token changes no other position; changing the first changes those behind it.

        If it fails: attention is not causal, or the model sees nothing but the token before.
        """
        model = bench.ready()
        tokens = bench.tokens(1, 8)
        mask = np.arange(8)[None] > 0
        lengths = np.full(1, 8, np.int32)
        before = bench.backend.log_probs(model, TokenBatch(tokens, lengths, mask))[0]
        last, first = tokens.copy(), tokens.copy()
        # Another id than before, and none of the first three, which are often special.
        last[0, -1] = 3 + (last[0, -1] - 2) % (bench.vocab_size - 3)
        first[0, 0] = 3 + (first[0, 0] - 2) % (bench.vocab_size - 3)
        changed_last = bench.backend.log_probs(model, TokenBatch(last, lengths, mask))[0]
        changed_first = bench.backend.log_probs(model, TokenBatch(first, lengths, mask))[0]
        np.testing.assert_allclose(changed_last[:-1], before[:-1], rtol=0, atol=EXACT)
        assert (np.abs(changed_first - before)[2:] > 1e-6).any()

    def test_padding_and_neighbours_change_nothing(self, bench: Bench) -> None:
        """Each row alone, in a batch, in a wider batch, with other padding and in another order: the same log-probs.

        If it fails: padding is attended to, positions count from the wrong end, or statistics are taken over a batch.
        """
        model, batch = bench.ready(), bench.token_batch()
        together = bench.backend.log_probs(model, batch)
        for row, row_alone in enumerate(rows_of(batch)):
            alone = bench.backend.log_probs(model, row_alone)[0]
            np.testing.assert_allclose(together[row, : len(alone)], alone, rtol=0, atol=EXACT)
        tokens = np.pad(batch.tokens, ((0, 0), (0, 5)))
        tokens[np.arange(tokens.shape[1]) >= batch.lengths[:, None]] = 5
        # No row keeps its place, so that an error that depends on the row's index shows.
        order = np.array([2, 0, 3, 1])
        wide = TokenBatch(tokens[order], batch.lengths[order], np.pad(batch.loss_mask, ((0, 0), (0, 5)))[order])
        moved = bench.backend.log_probs(model, wide)[:, : together.shape[1]]
        np.testing.assert_allclose(moved, together[order], rtol=0, atol=EXACT)

    def test_the_same_question_twice_bit_for_bit(self, bench: Bench) -> None:
        """In one model and in one loaded again. And a question changes nothing that training then does.

        If it fails: something is drawn at random, or evaluation leaves a trace. Look for dropout that is on, and for
        caches that are kept.
        """
        first, second, batch = bench.ready(), bench.ready(), bench.token_batch()
        log_probs = bench.backend.log_probs(first, batch)
        np.testing.assert_array_equal(bench.backend.log_probs(first, batch), log_probs)
        np.testing.assert_array_equal(bench.backend.log_probs(second, batch), log_probs)
        bench.backend.log_probs(second, batch, adapter=False)
        if self.training:
            assert bench.sft_step(first, batch) == bench.sft_step(second, batch)
