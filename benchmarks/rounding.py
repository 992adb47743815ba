"""The error of log-probs in float32 on both backends, against the same model in float64, and the tolerance for it.

    python benchmarks/rounding.py [FOLDER]

For the fixed probe of a base, most of which is random token ids, and for plain text. The base is `builtin:tiny` by
default. Errors are in nats a token, and as a share of the tolerance of `verify`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mindprint.config import ModelConfig
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
    base = resolve_model(ModelConfig(name=parser.parse_args().base), Path.cwd())
    config = model_config(base.path)
    tokenizer = load_tokenizer(base.path)
    text = Probe(tuple(np.array(tokenizer.encode(plain), np.int32) for plain in TEXT.splitlines()))
    for kind, probe in (("probe", synthetic_probe(tokenizer, config)), ("text", text)):
        print_errors(base, kind, probe, tolerance(["float32"], config=config))


def print_errors(base: ModelFolder, kind: str, probe: Probe, allowed: Tolerance) -> None:
    """Score a probe on both backends and in float64, and print how far each is from each."""
    values = {name: on_backend(name, base, probe) for name in ("torch", "mlx")}
    values["float64"] = in_float64(base, probe)
    print(f"{base.name}, {kind}: {probe.tokens} tokens, {allowed.reason}")
    for first, second in (("torch", "mlx"), ("torch", "float64"), ("mlx", "float64")):
        comparison = compared("", values[first], values[second], allowed)
        apart = np.abs(values[first].astype(np.float64) - values[second])
        print(
            f"{first:6s} {second:8s} rms {np.sqrt((apart**2).mean()):.1e}, mean {comparison.mean:.1e} "
            f"({comparison.mean / comparison.tolerance.mean:.2f}), greatest {comparison.greatest:.1e} "
            f"({comparison.greatest / comparison.tolerance.greatest:.2f})"
        )


def on_backend(name: str, base: ModelFolder, probe: Probe) -> np.ndarray:
    """Score the probe with a backend in float32."""
    engine = Engine(base)
    engine.load(Placement(load_backend(name), "cpu", "float32"))
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
