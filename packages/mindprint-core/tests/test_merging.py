"""Merging from file to file: what changes is W + s·B·A in the tensor's dtype, what does not is the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindprint.adapter import merging
from mindprint.adapter.merging import RECORD_FILE, merged_folder, read_record
from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError, MindprintError, ModelError, RunError
from mindprint.models import folder as models
from mindprint.models.folder import ModelFolder
from mindprint.models.tensor_files import from_float32, read_float32, to_float32

CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    f"{Q}.weight": (6, 6),
    f"{Q}.bias": (6,),
    f"{DOWN}.weight": (6, 9),
    "lm_head.weight": (11, 6),
}


def write_file(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file; the bits of each tensor under the dtype that they are."""
    header, content = {}, b""
    for name, (dtype, bits) in tensors.items():
        header[name] = {"dtype": dtype, "shape": bits.shape, "data_offsets": [len(content), len(content) + bits.nbytes]}
        content += bits.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def write_base(folder: Path, dtype: str = "BF16", shards: int = 1, **config: Any) -> ModelFolder:
    random = np.random.default_rng(1)
    left_out = ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
    shapes = {name: shape for name, shape in SHAPES.items() if name not in left_out}
    values = {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {name: (dtype, from_float32(part, dtype)) for name, part in values.items()}
    folder.mkdir()
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
    else:
        files = {name: f"model-{index % shards + 1:05d}.safetensors" for index, name in enumerate(tensors)}
        for file in set(files.values()):
            write_file(folder / file, {name: tensors[name] for name in tensors if files[name] == file})
        (folder / models.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=3))
    (folder / "tokenizer.json").write_text('{"version" : "1.0"}\n')
    (folder / "generation_config.json").write_text("{ }")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle stays behind")
    return ModelFolder(folder, "base")


def make_adapter(sites: Mapping[str, tuple[int, int]], rank: int = 2, alpha: float = 3.0) -> AdapterState:
    random = np.random.default_rng(2)

    def factors(rows: int, columns: int) -> LoraFactors:
        shapes = (rank, columns), (rows, rank)
        return LoraFactors(*(random.normal(0, 0.5, shape).astype(np.float32) for shape in shapes))

    return AdapterState(LoraConfig(rank, alpha, tuple(sites)), {site: factors(*shape) for site, shape in sites.items()})


TWO = {Q: (6, 6), DOWN: (6, 9)}
NOT_FINITE = AdapterState(
    LoraConfig(2, 1.0, (Q,)), {Q: LoraFactors(np.full((2, 6), np.nan, np.float32), np.ones((6, 2), np.float32))}
)


@pytest.fixture
def adapter() -> AdapterState:
    return make_adapter(TWO)


def merge(base: ModelFolder, adapter: AdapterState, out: Path) -> Path:
    with merged_folder(out, base, adapter, out.parent / "adapter"):
        pass
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_changed_weights_are_rounded_once_and_all_else_is_the_same_bytes(
    dtype: str, shards: int, adapter: AdapterState, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", dtype, shards)
    out = merge(base, adapter, tmp_path / "out")
    before, after = models.tensors(base.path), models.tensors(out)
    assert list(before) == list(after)
    for name, info in after.items():
        site = name.removesuffix(".weight")
        old = before[name].file.read_bytes()[before[name].start : before[name].end]
        new = info.file.read_bytes()[info.start : info.end]
        if site not in TWO:
            assert new == old
            continue
        a, b = adapter.tensors[site]
        exact = read_float32(before[name]).astype(np.float64) + 1.5 * (b.astype(np.float64) @ a)
        nearest = to_float32(from_float32(exact.astype(np.float32), dtype), dtype)
        # One rounding to the dtype of a sum in float32, which may fall on the other side of a tie.
        step = {"F32": 2.0**-22, "F16": 2.0**-10, "BF16": 2.0**-7}[dtype]
        assert np.abs(read_float32(info) - nearest).max() <= step * np.abs(nearest).max()
        assert np.mean(read_float32(info) == nearest) > (0.5 if dtype == "F32" else 0.95)
        assert (read_float32(info) != read_float32(before[name])).mean() > 0.9


def test_the_bases_files_are_kept_byte_for_byte_and_the_rest_stays_behind(
    adapter: AdapterState, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", shards=2)
    out = merge(base, adapter, tmp_path / "out")
    kept = {"config.json", "tokenizer.json", "generation_config.json", models.INDEX_FILE}
    shards = {file.name for file in models.weight_files(base.path)}
    assert {file.name for file in out.iterdir()} == kept | shards | {RECORD_FILE}
    for name in kept:
        assert (out / name).read_bytes() == (base.path / name).read_bytes()


def test_the_record_says_what_was_merged(adapter: AdapterState, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    record = read_record(merge(base, adapter, tmp_path / "out"))
    assert record is not None
    assert (record.base, record.base_digest) == ("base", models.base_digest(base.path))
    assert (record.adapter, record.adapter_digest) == ("../adapter", adapter_digest(adapter))


def test_blocks_do_not_show(adapter: AdapterState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    whole = merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 18)
    monkeypatch.setattr(merging, "CACHED_ELEMENTS", 7)
    parts = merge(base, adapter, tmp_path / "parts")
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_experts_that_the_files_have_one_by_one(tmp_path: Path) -> None:
    """Gate is the first half of the stack's rows and up the second, in every expert."""
    host = "model.layers.0.mlp.experts"
    random = np.random.default_rng(3)
    shapes = {"gate_proj": (4, 5), "up_proj": (4, 5), "down_proj": (5, 4)}
    tensors = {
        f"{host}.{number}.{part}.weight": ("F32", random.normal(size=shape).astype(np.float32))
        for number in range(3)
        for part, shape in shapes.items()
    }
    folder = tmp_path / "base"
    folder.mkdir()
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen3_moe"}))
    (folder / "tokenizer.json").write_text("{}")
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((3, 2, 5), (3, 8, 2)))
    state = AdapterState(LoraConfig(2, 2.0, (f"{host}.gate_up_proj",)), {f"{host}.gate_up_proj": LoraFactors(a, b)})
    after = models.tensors(merge(ModelFolder(folder, "base"), state, tmp_path / "out"))
    for name, (_, old) in tensors.items():
        number, part = int(name.split(".")[5]), name.split(".")[6]
        rows = {"gate_proj": slice(0, 4), "up_proj": slice(4, 8)}.get(part)
        change = np.zeros_like(old) if rows is None else b[number, rows] @ a[number]
        assert np.allclose(read_float32(after[name]), old + change, atol=1e-6)


def test_both_names_of_a_tied_embedding_changed_alike_are_one_change(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "F32", tie_word_embeddings=True)
    table = make_adapter({"model.embed_tokens": (6, 11)})
    a, b = table.tensors["model.embed_tokens"]
    both = AdapterState(
        LoraConfig(2, 3.0, ("lm_head", "model.embed_tokens")),
        {"lm_head": LoraFactors(b.T, a.T), "model.embed_tokens": LoraFactors(a, b)},
    )
    name = "model.embed_tokens.weight"
    after = models.tensors(merge(base, both, tmp_path / "out"))[name]
    assert np.allclose(read_float32(after), read_float32(models.tensors(base.path)[name]) + 1.5 * (b @ a).T, atol=1e-5)


def test_an_embedding_changed_alone_cannot_be_merged_where_it_is_the_head(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    for site, shape in (("model.embed_tokens", (6, 11)), ("lm_head", (11, 6))):
        with pytest.raises(AdapterError, match=f"{site}: embedding and LM head are one tensor"):
            merge(base, make_adapter({site: shape}), tmp_path / "out")


@pytest.mark.parametrize(
    ("adapter", "config", "words"),
    [
        (make_adapter({Q: (6, 7)}), {}, r"q_proj: the adapter is for a weight \[6, 7\], .* of the base is \[6, 6\]"),
        (make_adapter({"model.layers.9.x": (6, 6)}), {}, "layers.9.x: the base has no weight model.layers.9.x.weight"),
        (make_adapter(TWO), {"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not known here"),
        (NOT_FINITE, {}, "NaN or infinite"),
    ],
    ids=["shape", "name", "quantized", "nan"],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    adapter: AdapterState, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", **config)
    with pytest.raises(MindprintError, match=words):
        merge(base, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_without_floats_are_refused(adapter: AdapterState, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    tensors = {name: ("I8", np.zeros(shape, np.int8)) for name, shape in SHAPES.items()}
    write_file(base.path / "model.safetensors", tensors)
    with pytest.raises(ModelError, match="q_proj.weight is I8; an adapter is merged into float32, bfloat16 or float16"):
        merge(base, adapter, tmp_path / "out")


def test_what_exists_is_never_replaced(adapter: AdapterState, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("folder", "link"):
        with pytest.raises(RunError, match=f"{taken}: exists already"):
            merge(base, adapter, tmp_path / taken)
    with pytest.raises(RunError, match="is not a folder; make it first"):
        merge(base, adapter, tmp_path / "missing" / "out")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(
    failure: BaseException, adapter: AdapterState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", shards=2)
    write, written = merging._write_shard, []

    def interrupted(*arguments: Any) -> None:
        if written:
            # As a killed process would leave it: weights without config.json are no model's folder.
            assert not list(tmp_path.rglob(".out.*.partial/config.json"))
            raise failure
        written.append(write(*arguments))

    monkeypatch.setattr(merging, "_write_shard", interrupted)
    with pytest.raises((KeyboardInterrupt, RunError)) as caught:
        merge(base, adapter, tmp_path / "out")
    assert isinstance(failure, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_too_little_space_is_said_before_anything_is_written(
    adapter: AdapterState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(RunError, match="bytes and 10 are free"):
        merge(base, adapter, tmp_path / "out")
