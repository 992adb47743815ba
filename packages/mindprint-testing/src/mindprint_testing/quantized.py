"""Quantized bases: the formats that a backend may claim, each with the numbers of core's dequantizer."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mindprint.errors import ModelError
from mindprint.models.quantized import Method, quantized_weights
from mindprint_testing import reference
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims
from mindprint_testing.quantizing import write_dequantized, write_quantized

NEAR = 1e-4
"""Nats a token between packed weights and the same weights dequantized, in float32."""


class Quantized(Claims):
    """Capabilities `affine`, `mxfp4`, `mxfp8`, `nvfp4`, `nf4`, `fp4` and `int8`."""

    @pytest.mark.parametrize("method", get_args(Method))
    def test_packed_weights_are_cores_numbers(self, bench: Bench, tmp_path: Path, method: Method) -> None:
        """Sites, log-probs and a step on a quantized base are those on the same base dequantized by core.

        If it fails: packed elements are read in another order, a scale is rounded before it is used, or activations
        are quantized as well. Compare your weights with `mindprint.models.quantized.load_dense`.
        """
        self.needs(method)
        linear = {site.name for site in bench.linear_sites(bench.load())}
        packed = write_quantized(bench.folder, tmp_path / "packed", method, linear)
        assert quantized_weights(packed), "no weight of `model_folder` has columns that are a multiple of 32"
        dense = write_dequantized(packed, tmp_path / "dense")
        models = [bench.load(folder=folder) for folder in (packed, dense)]
        sites = [bench.backend.adapter_sites(model) for model in models]
        assert sites[0] == sites[1]
        assert models[0].parameters == models[1].parameters
        assert models[0].vocab_size == models[1].vocab_size
        for model in models:
            bench.backend.inject_adapter(model, bench.adapter(bench.linear_sites(model)))
        batch = bench.token_batch()
        for adapter in (False, True):
            found, expected = (bench.backend.log_probs(model, batch, adapter=adapter) for model in models)
            np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR)
        steps = [bench.sft_step(model, batch) for model in models]
        assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-5)
        assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-4)
        moments = [reference.flat(bench.backend.save(model).first_moments) for model in models]
        # The gradient passes through the packed weights as well.
        assert reference.distance(*moments) < 1e-4

    @pytest.mark.parametrize("method", get_args(Method))
    def test_a_format_that_is_not_claimed_is_refused(self, bench: Bench, tmp_path: Path, method: Method) -> None:
        """A quantized base in another format is a `ModelError`.

        If it fails: packed elements are taken for weights. Look at `ModelSpec.quantization` first in
        `mindprint_load_model`.
        """
        if method in self.capabilities:
            pytest.skip(f"{method} is claimed")
        linear = {site.name for site in bench.linear_sites(bench.load())}
        packed = write_quantized(bench.folder, tmp_path / "packed", method, linear)
        with pytest.raises(ModelError):
            bench.load(folder=packed)
