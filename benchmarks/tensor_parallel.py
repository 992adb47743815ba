"""LoRA on a base that mlx-lm's own tensor parallelism divides between two ranks, next to one process.

    python benchmarks/tensor_parallel.py                 # both ways to put LoRA on it, on the built-in model

mlx-lm's `shard` divides a layer by columns (`q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`) or by rows (`o_proj`,
`down_proj`). Two ways to put LoRA around such layers are measured. One is mlx-lm's own LoRA layer. In the other, each
factor is whole or divided as its layer is, with the sums over ranks that this takes. Nothing is asserted: the figures
are the reason why Mindprint does not shard on MLX.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ranks import SHAPES, adapter_elements, bytes_of_a_step, bytes_sent, end, start_ranks

COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
RANK, SCALE, TOKENS = 4, 2.0, (2, 48)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
}


def main() -> None:
    """Measure both ways, or be one rank of a measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--into", type=Path, help="of a worker: the folder of its results")
    parser.add_argument("--layer", choices=("mlx-lm", "divided"), help="of a worker: how LoRA is put on a layer")
    options = parser.parse_args()
    if options.into is not None:
        work(options.into, options.layer)
        return
    print(f"model classes of mlx-lm that have `shard`: {count_classes()}")
    with tempfile.TemporaryDirectory() as kept:
        for layer in ("mlx-lm", "divided"):
            folder = Path(kept) / layer
            (folder / "1").mkdir(parents=True)
            (folder / "2").mkdir()
            for size in (1, 2):
                words = ["--into", str(folder / str(size)), "--layer", layer]
                end(start_ranks("mlx", size, words, program=[sys.executable, __file__]))
            print(f"LoRA {layer}: {compare(folder)}", flush=True)
    print(f"a step of 1,000 tokens on an 8B base, float32: {bytes_on_paper('8B', 1000)}")


def bytes_on_paper(base: str, tokens: int) -> str:
    """Return the bytes that a rank of two sends in a step, with a divided base and with divided micro-batches."""
    layers, width, _, _ = SHAPES[base]
    # A sum of float32 [tokens, width] behind o_proj and down_proj, and of the gradient by the input of five others.
    divided = layers * 7 * 4 * tokens * width
    whole = bytes_of_a_step(adapter_elements(base), 2)
    return f"{divided / 1e6:,.0f} MB with a divided base, {whole / 1e6:,.0f} MB with divided micro-batches"


def count_classes() -> str:
    """Return how many modules of mlx-lm's models define `shard`, of how many."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.origin is not None
    files = [file.read_text(encoding="utf-8") for file in (Path(spec.origin).parent / "models").glob("*.py")]
    models = [text for text in files if "\nclass Model(" in text]
    return f"{sum('def shard(' in text for text in models)} of {len(models)}"


def compare(folder: Path) -> str:
    """Return how far two ranks are from one process, and from each other."""
    alone = np.load(folder / "1" / "0.npz")
    ranks = [np.load(folder / "2" / f"{rank}.npz") for rank in (0, 1)]
    facts = [json.loads((folder / "2" / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    loss = max(abs(float(rank["loss"]) - float(alone["loss"])) for rank in ranks)
    apart = abs(float(ranks[0]["loss"]) - float(ranks[1]["loss"]))
    whole = np.concatenate([alone[name].ravel() for name in alone if name != "loss"])
    joined = [joined_gradient(alone[name], [rank[name] for rank in ranks]) for name in alone if name != "loss"]
    gradient = np.linalg.norm(np.concatenate([part.ravel() for part in joined]) - whole) / np.linalg.norm(whole)
    return (
        f"loss {loss:.1e} from one process and {apart:.1e} between the ranks, gradient {gradient:.1e} of its norm; a "
        f"rank sends {facts[0]['bytes']:,} bytes in a step of {math.prod(TOKENS)} tokens"
    )


def joined_gradient(whole: np.ndarray[Any, Any], parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the gradient of a whole factor from those of the ranks: the first one's, or both next to each other."""
    if parts[0].shape == whole.shape:
        return parts[0]
    axis = next(axis for axis in (0, 1) if parts[0].shape[axis] != whole.shape[axis])
    return np.concatenate(parts, axis=axis)


def work(into: Path, kind: str) -> None:
    """Take one gradient as one rank, and write it."""
    import mlx.core as mx  # noqa: PLC0415 (the comparing process needs none of it)
    from mlx import nn  # noqa: PLC0415
    from mlx.utils import tree_flatten  # noqa: PLC0415
    from mlx_lm.models.llama import Model, ModelArgs  # noqa: PLC0415

    mx.set_default_device(mx.cpu)
    group = mx.distributed.init()
    mx.random.seed(0)
    model = Model(ModelArgs(**LLAMA))
    mx.eval(model.parameters())
    model.freeze()
    if group.size() > 1:
        model.shard(group)
    rng = np.random.default_rng(0)
    for block in model.model.layers:
        for name in COLUMNS + ROWS:
            host = block.self_attn if hasattr(block.self_attn, name) else block.mlp
            setattr(host, name, lora_layer(kind, name, getattr(host, name), rng, group))
    tokens = mx.array(rng.integers(0, LLAMA["vocab_size"], TOKENS))

    def loss(each: Any) -> mx.array:
        return nn.losses.cross_entropy(each(tokens[:, :-1]), tokens[:, 1:]).mean()

    # Connected before the bytes are counted.
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))
    before = bytes_sent()
    value, gradients = nn.value_and_grad(model, loss)(model)
    flat = dict(tree_flatten(gradients))
    mx.eval(value, flat)
    sent = bytes_sent() - before
    arrays = {name: np.array(part) for name, part in flat.items()}
    np.savez(into / f"{group.rank()}.npz", loss=np.array(value), **arrays)
    (into / f"{group.rank()}.json").write_text(json.dumps({"bytes": sent}), encoding="utf-8")
    # A rank that ends takes the others with it, while they may still be at work.
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))


def lora_layer(kind: str, name: str, linear: Any, rng: np.random.Generator, group: Any) -> Any:
    """Return LoRA around a layer, with this rank's part of factors that are drawn for the whole layer."""
    import mlx.core as mx  # noqa: PLC0415
    from mlx_lm.tuner.lora import LoRALinear  # noqa: PLC0415

    by_rows, by_columns = (group.size() if name in names else 1 for names in (ROWS, COLUMNS))
    outputs, inputs = linear.weight.shape
    a = rng.standard_normal((inputs * by_rows, RANK)).astype(np.float32) / 8
    b = rng.standard_normal((RANK, outputs * by_columns)).astype(np.float32) / 8
    lora = LoRALinear(inputs, outputs, r=RANK, scale=SCALE) if kind == "mlx-lm" else divided_lora(name, group)
    lora.linear = linear
    lora.lora_a = mx.array(np.split(a, by_rows)[group.rank() if by_rows > 1 else 0])
    lora.lora_b = mx.array(np.split(b, by_columns, axis=1)[group.rank() if by_columns > 1 else 0])
    lora.linear.freeze()
    return lora


def divided_lora(name: str, group: Any) -> Any:
    """Return LoRA, still without its layer and factors, that sums over ranks what only together is whole."""
    import mlx.core as mx  # noqa: PLC0415
    from mlx import nn  # noqa: PLC0415
    from mlx.nn.layers.distributed import sum_gradients  # noqa: PLC0415

    class DividedLora(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            low = x @ self.lora_a
            # By rows, each rank has a share of the input. By columns, each has a share of the gradient by x A.
            low = mx.distributed.all_sum(low, group=group) if name in ROWS else sum_gradients(group)(low)
            return self.linear(x) + SCALE * (low @ self.lora_b)

    return DividedLora()


if __name__ == "__main__":
    main()
