"""The time of `verify`, compared with loading the model and scoring the probe once.

    python benchmarks/verify.py [--backend torch] [--rounds 5]

A random model of 50M parameters in float32 and an adapter with its fingerprint. Both are measured in turn, and the
ratio is that of their medians. In addition: the speed of digesting weights, whole and by samples.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.peft_format import write_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.config import ModelConfig
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.data.tokenizer import load_tokenizer
from mindprint.models.engine import Engine, Placement
from mindprint.models.folder import ModelFolder, model_config, resolve_model, tensors
from mindprint.plugins.backend import load_backend
from mindprint.trust.digests import digest_weights
from mindprint.trust.fingerprint import FILE_NAME, fingerprint_json
from mindprint.trust.measurement import take_fingerprint
from mindprint.trust.probe import score, synthetic_probe
from mindprint.trust.verify import verify_adapter


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    placement = Placement(load_backend(options.backend), "cpu", "float32")
    with tempfile.TemporaryDirectory() as name:
        base, adapter = make_base(Path(name) / "base"), Path(name) / "adapter"
        make_adapter(adapter, base, placement)
        once, whole = measured(base, adapter, placement, options.rounds)
        size = sum(info.end - info.start for info in tensors(base.path).values())
        small = (adapter / FILE_NAME).stat().st_size
        print(f"{options.backend}: {size / 4e6:.0f}M parameters in float32, a fingerprint of {small} bytes")
        print(f"  loading, and scoring the probe once   {once:6.2f} s")
        print(f"  verify                                {whole:6.2f} s   {whole / once:.2f} times that (at most 2)")
        for method in ("whole", "sampled"):
            seconds = timed(lambda method=method: digest_weights(base.path, method))
            print(f"  digest of the weights, {method:8s}       {seconds:6.3f} s   {size / seconds / 1e9:.1f} GB/s")


def make_base(folder: Path) -> ModelFolder:
    """Save a random Qwen2 of 50M parameters with the tokenizer of the embedded model."""
    tiny = resolve_model(ModelConfig(name="builtin:tiny"), Path.cwd())
    config = Qwen2Config(
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=11,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    # The tokenizer of the embedded model, since making one would be most of this script.
    for file in tiny.path.iterdir():
        if "token" in file.name or "template" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return ModelFolder(folder, "random")


def make_adapter(folder: Path, base: ModelFolder, placement: Placement) -> None:
    """Save an adapter on every linear layer, with the fingerprint that a run writes."""
    engine, tokenizer = Engine(base), load_tokenizer(base.path)
    engine.load(placement)
    sites = placement.backend.adapter_sites(engine.model)
    start = initial_adapter(sites, LoraConfig(8, 16.0, resolve_targets(sites, "all-linear")), seed=0)
    random = np.random.default_rng(0)
    drawn = {
        site: LoraFactors(pair.a, random.normal(0, 0.02, pair.b.shape).astype(np.float32))
        for site, pair in start.tensors.items()
    }
    adapter = AdapterState(start.config, drawn)
    probe = synthetic_probe(tokenizer, model_config(base.path))
    fingerprint = take_fingerprint(engine, placement, adapter, tokenizer, probe)
    engine.release()
    folder.mkdir()
    write_adapter(folder, adapter, base.name)
    (folder / FILE_NAME).write_text(fingerprint_json(fingerprint), encoding="utf-8")


def measured(base: ModelFolder, adapter: Path, placement: Placement, rounds: int) -> tuple[float, float]:
    """Return the median seconds of loading and scoring once, and of a whole verification, taken in turn."""
    probe = synthetic_probe(load_tokenizer(base.path), model_config(base.path))

    def once() -> None:
        engine = Engine(base)
        engine.load(placement)
        score(engine.backend, engine.model, probe, adapter=False)
        engine.release()

    def verify() -> None:
        assert verify_adapter(adapter, base, placement).ok

    # Once untimed: the first run reads files from the disk.
    once()
    times = [(timed(once), timed(verify)) for _ in range(rounds)]
    first, second = zip(*times, strict=True)
    return statistics.median(first), statistics.median(second)


def timed(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


if __name__ == "__main__":
    main()
