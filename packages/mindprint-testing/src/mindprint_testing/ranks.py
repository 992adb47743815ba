"""Several processes that train one adapter: the part of it that one process can show."""

from __future__ import annotations

import numpy as np
import pytest

from mindprint.contract import ModelSpec
from mindprint.errors import ModelError
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims


class Several(Claims):
    """Capability `ranks`."""

    def test_a_single_rank_gathers_its_own_bytes(self, bench: Bench) -> None:
        """Alone, the hook returns one row with the bytes that it was given, and the backend states rank 0 of 1.

        If it fails: bytes are lost or become other numbers on their way. Look at `mindprint_gather`.
        """
        self.needs("ranks")
        assert bench.backend.info.world == (0, 1)
        for values in (np.arange(256, dtype=np.uint8), np.zeros(0, np.uint8)):
            given = values.copy()
            rows = bench.backend._hook.mindprint_gather(values=values)
            assert isinstance(rows, np.ndarray)
            assert (rows.dtype, rows.shape) == (np.uint8, (1, len(values)))
            np.testing.assert_array_equal(rows[0], given)
            np.testing.assert_array_equal(values, given)

    def test_a_single_rank_does_not_hold_a_part(self, bench: Bench) -> None:
        """Asked for a part of a base without other ranks, the backend raises `ModelError`.

        If it fails: the backend takes `ModelSpec.shard` for something that it may ignore. Look at `load_model`.
        """
        self.needs("shard")
        with pytest.raises(ModelError):
            bench.backend.load_model(ModelSpec(str(bench.folder), bench.device, "float32", shard=True))

    def test_a_step_is_the_sum_of_its_shares(self, bench: Bench) -> None:
        """Two micro-batches have the loss of the first one and of the second one, each with its index in the step.

        If it fails: dropout counts the micro-batches of a process from 0, and two ranks train another loss than one.
        Look at `Update.micro_batch`, which gives the index that keys dropout.
        """
        self.needs("ranks")
        dropout = 0.4 if "dropout" in self.capabilities else 0.0
        batches = bench.token_batch(seed=1), bench.token_batch(seed=2)
        total = sum(batch.loss_tokens for batch in batches)
        whole = bench.sft_step(bench.ready(dropout=dropout), *batches, seed=5).loss
        shares = [
            bench.sft_step(bench.ready(dropout=dropout), batch, seed=5, tokens=total, micro_batches=(place,)).loss
            for place, batch in enumerate(batches)
        ]
        assert sum(shares) == pytest.approx(whole, rel=1e-5)
