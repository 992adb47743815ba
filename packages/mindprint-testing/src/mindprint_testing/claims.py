"""The attributes by which a test class states its backend and its claims, and how a test asks for a claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

NEEDS: Mapping[str, str] = {
    "dropout": "LoRA dropout in SFT steps only, its masks a function of `update.seed` and the micro-batch's index",
    "bfloat16": "a base in bfloat16 on the tested device, with adapter, moments and log-softmax in float32",
    "float16": "the same in float16, with `contract.TrainingState`'s loss scale, and overflowing steps skipped",
    "sampling": "draws at `temperature` within `top_p` that follow from seed and prompt alone",
    "filters": "`top_k`, `min_p` and `repetition_penalty`, as `mindprint.sampling` defines them",
    "mixed": "`Sampling.rows`: settings for each prompt, in one batch",
    "streaming": "`on_token` called for each token as soon as it is known, and a row ended where it returns False",
    "embedding": "sites of the kind `embedding`, with LoRA on them as PEFT defines it",
    "affine": "a base in MLX's affine format, its quantized embedding included, with the numbers of core's dequantizer",
    **{
        method: f"the same for linear layers in {whose} {method}"
        for whose, methods in (("MLX's", ("mxfp4", "mxfp8", "nvfp4")), ("bitsandbytes'", ("nf4", "fp4", "int8")))
        for method in methods
    },
    "quantize": "the linear layers of a full-precision base packed while they are loaded, by `ModelSpec.quantize`",
    "gguf": "a GGUF file in place of a folder, with the log-probs of the weights in it",
    "ranks": "`mindprint_gather`, steps that sum loss and gradient over ranks, and `Update.micro_batches` for dropout",
    "shard": "a base of which each rank holds a part, as `ModelSpec.shard` says, with the numbers of a whole one",
    "devices": "a base whose layers are on several devices of one process, with the numbers of one device",
    "experts": "sites of the kind `experts` on a Mixtral, with LoRA on them as PEFT defines it for `target_parameters`",
}
"""For each capability of `mindprint.contract.CAPABILITIES`, the work that a backend must do before it may claim it."""


class Claims:
    """The attributes that a backend's test class sets."""

    backend_name: ClassVar[str]
    """The name of the backend's entry point."""

    capabilities: ClassVar[frozenset[str]] = frozenset()
    """The optional parts of the contract that the backend claims, of `mindprint.contract.CAPABILITIES`."""

    training: ClassVar[bool] = True
    """Whether the backend trains, as `BackendInfo.training` states it."""

    device: ClassVar[str] = "cpu"
    """The device on which it is tested."""

    def needs(self, capability: str) -> None:
        """Skip the test, naming the capability and the work behind it, unless the test class claims it."""
        # Skipped and not passed, so that a report of the suite lists everything that was not tested.
        if capability not in self.capabilities:
            pytest.skip(f"not claimed: {capability} (needs {NEEDS[capability]})")

    def needs_training(self) -> None:
        """Skip the test for a backend that does not train."""
        if not self.training:
            pytest.skip("not claimed: training (the backend states that it only evaluates and answers)")
