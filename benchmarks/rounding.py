"""The error of log-probs on both backends, and the tolerance for it.

    python benchmarks/rounding.py [FOLDER]                      # float32 against the same model in float64
    python benchmarks/rounding.py FOLDER --dtype bfloat16       # 16 bits against the same backend's float32

For the fixed probe of a base, most of which is random token ids, and for plain text. The base is `builtin:tiny` by
default. Errors are in nats a token, as a share of the tolerance of `verify`, and as a share of the mean log-prob.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mindprint.config import ModelConfig
from mindprint.contract import Dtype
from mindprint.data.tokenizer import load_tokenizer
from mindprint.models.engine import Engine, Placement
from mindprint.models.folder import ModelFolder, model_config, resolve_model
from mindprint.plugins.backend import load_backend
from mindprint.trust.probe import Probe, compared, score, synthetic_probe, tolerance
from mindprint.trust.report import Tolerance

TEXT = (
    "The ferry leaves at noon and comes back with the tide, and nobody on the island sets a clock by it any more. "
    "My grandmother counted her eggs in the old language and her money in the new one, and made no mistake in it.\n"
    "When the lambs are sold and the rain forgets us for a day, we go down to the harbour and look at the boats, "
    "which are painted blue and white, and my brother tells the story of the storm that took the roof of the school."
)
"""Two paragraphs that no model was trained on."""


def main() -> None:
    """Print a line for each pair of computations, and for each kind of text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", default="builtin:tiny")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--backends", nargs="+", default=["torch", "mlx"], help="default: torch mlx")
    options = parser.parse_args()
    base = resolve_model(ModelConfig(name=options.base), Path.cwd())
    config = model_config(base.path)
    tokenizer = load_tokenizer(base.path)
    text = Probe(tuple(np.array(tokenizer.encode(plain), np.int32) for plain in TEXT.splitlines()))
    allowed = tolerance([options.dtype], config=config)
    for kind, probe in (("probe", synthetic_probe(tokenizer, config)), ("text", text)):
        print(f"{base.name}, {kind}: {probe.tokens} tokens, {allowed.reason}")
        values = {name: on_backend(name, base, probe, options.dtype) for name in options.backends}
        if options.dtype == "float32":
            print_errors({**values, "float64": in_float64(base, probe)}, allowed)
        for name in options.backends if options.dtype != "float32" else ():
            print_errors({name: values[name], "float32": on_backend(name, base, probe, "float32")}, allowed)


def print_errors(values: Mapping[str, np.ndarray], allowed: Tolerance) -> None:
    """Print how far each of some computations of the same log-probs is from each that follows."""
    for first, second in itertools.combinations(values, 2):
        comparison = compared("", values[first], values[second], allowed)
        apart = np.abs(values[first].astype(np.float64) - values[second])
        print(
            f"{first:6s} {second:8s} rms {np.sqrt((apart**2).mean()):.1e}, mean {comparison.mean:.1e} "
            f"({comparison.mean / comparison.tolerance.mean:.2f}), greatest {comparison.greatest:.1e} "
            f"({comparison.greatest / comparison.tolerance.greatest:.2f}), "
            f"{comparison.mean / np.abs(values[second]).mean():.2e} of the mean log-prob"
        )


def on_backend(name: str, base: ModelFolder, probe: Probe, dtype: Dtype) -> np.ndarray:
    """Score the probe with a backend on the CPU."""
    engine = Engine(base)
    engine.load(Placement(load_backend(name), "cpu", dtype))
    try:
        return score(engine.backend, engine.model, probe, adapter=False)
    finally:
        engine.release()


def in_float64(base: ModelFolder, probe: Probe) -> np.ndarray:
    """Score the probe with transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64)
    parts = []
    with torch.no_grad():
        for row in probe.rows:
            tokens = torch.tensor(row[None].astype(np.int64))
            log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
            parts.append(log_probs.gather(-1, tokens[0, 1:, None])[:, 0].numpy())
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
