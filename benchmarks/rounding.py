"""The error of log-probs in float32 on both backends, against the same model in float64, and the tolerance for it.

    python benchmarks/rounding.py [FOLDER]

Of the fixed probe of a base, by default `builtin:tiny`: in nats a token, and as a share of the tolerance of `verify`.
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


def main() -> None:
    """Print a line a pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", default="builtin:tiny")
    base = resolve_model(ModelConfig(name=parser.parse_args().base), Path.cwd())
    config = model_config(base.path)
    probe = synthetic_probe(load_tokenizer(base.path), config)
    values = {name: on_backend(name, base, probe) for name in ("torch", "mlx")}
    values["float64"] = in_float64(base, probe)
    allowed = tolerance(["float32"], config=config)
    print(f"{base.name}: {probe.tokens} tokens, {allowed.reason}")
    for first, second in (("torch", "mlx"), ("torch", "float64"), ("mlx", "float64")):
        found = compared("", values[first], values[second], allowed)
        apart = np.abs(values[first].astype(np.float64) - values[second])
        print(
            f"{first:6s} {second:8s} rms {np.sqrt((apart**2).mean()):.1e}, mean {found.mean:.1e} "
            f"({found.mean / found.tolerance.mean:.2f}), greatest {found.greatest:.1e} "
            f"({found.greatest / found.tolerance.greatest:.2f})"
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
