"""What became of a merged weight, decided from the numbers of two files."""

from pathlib import Path

import numpy as np
import pytest

from mindprint.adapter.base_facts import BaseFacts
from mindprint.adapter.weight_changes import Weight, stored_factors
from mindprint.contract import AdapterState, Float32, LoraConfig, LoraFactors
from mindprint.models.tensor_files import TensorInfo, from_float32
from mindprint.trust.merged import judge

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(0, 0.05, (48, 48)).astype(np.float32)
FACTORS = LoraFactors(
    RANDOM.normal(0, 0.1, (4, 48)).astype(np.float32), RANDOM.normal(0, 0.01, (48, 4)).astype(np.float32)
)
SCALE = 2.0
CHANGE = np.float32(SCALE) * (FACTORS.b @ FACTORS.a)


def stored(folder: Path, values: Float32, dtype: str) -> TensorInfo:
    file = folder / f"{len(list(folder.iterdir()))}.bits"
    file.write_bytes(from_float32(values, dtype).tobytes())
    return TensorInfo(dtype, values.shape, file, 0, file.stat().st_size)


def fate(folder: Path, merged: Float32, dtype: str = "F32", factors: LoraFactors = FACTORS) -> tuple[str, float]:
    found = judge(stored(folder, merged, dtype), stored(folder, WEIGHT, "F32"), factors, SCALE)
    return found.fate, found.factor


def test_experts_lie_in_one_tensor_or_each_in_tensors_of_its_own() -> None:
    """Two experts of rank 1 on three inputs, whose inner size is 2: B's first two rows are the gate, the others up."""
    a = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    b = np.arange(8, dtype=np.float32).reshape(2, 4, 1)
    site = "model.layers.0.mlp.experts.gate_up_proj"
    adapter = AdapterState(LoraConfig(1, 1.0, (site,)), {site: LoraFactors(a, b)})
    base = BaseFacts("mixtral", 1, tied=False)

    stacked = list(stored_factors(adapter, base, {site}))
    assert [str(weight) for _, weight, _ in stacked] == [f"{site}[0]", f"{site}[1]"]
    assert np.array_equal(stacked[1][2].b, b[1])

    apart = "model.layers.0.block_sparse_moe.experts.1.w3.weight"  # of expert 1, up
    ((_, weight, factors),) = stored_factors(adapter, base, {apart})
    assert str(weight) == apart
    assert np.array_equal(factors.b @ factors.a, b[1, 2:] @ a[1])


def test_a_part_of_a_stack_is_where_it_lies(tmp_path: Path) -> None:
    stack = stored(tmp_path, RANDOM.normal(size=(3, 4, 5)).astype(np.float32), "F16")
    part = Weight("stack", 1).of(stack)
    assert (part.shape, part.start, part.end) == ((4, 5), 40, 80)


def test_an_embedding_lies_transposed() -> None:
    site = "model.embed_tokens"
    a, b = np.ones((2, 7), np.float32), np.ones((3, 2), np.float32)
    adapter = AdapterState(LoraConfig(2, 2.0, (site,)), {site: LoraFactors(a, b)})
    ((_, _, factors),) = stored_factors(adapter, BaseFacts("llama", 1, tied=False), {f"{site}.weight"})
    assert (factors.b @ factors.a).shape == (7, 3)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_right_sum_is_exact_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    what, factor = fate(tmp_path, WEIGHT + CHANGE, dtype)
    assert what == "exact"
    assert factor == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_base_itself_is_lost(dtype: str, tmp_path: Path) -> None:
    assert fate(tmp_path, WEIGHT, dtype) == ("lost", 0.0)


@pytest.mark.parametrize("factor", [2.0, 8.0, 0.5, -1.0])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_another_strength_is_estimated(dtype: str, factor: float, tmp_path: Path) -> None:
    what, found = fate(tmp_path, WEIGHT + np.float32(factor) * CHANGE, dtype)
    assert what == "scaled"
    assert found == pytest.approx(factor, rel=0.02)


def test_rounding_the_change_before_adding_it_is_told_from_being_wrong(tmp_path: Path) -> None:
    rounded = (WEIGHT.astype(np.float16) + CHANGE.astype(np.float16)).astype(np.float32)
    assert fate(tmp_path, rounded, "F16")[0] in ("exact", "rounded")
    assert fate(tmp_path, WEIGHT + CHANGE.T) == ("transposed", pytest.approx(0, abs=0.1))
    noise = RANDOM.normal(0, 0.005, WEIGHT.shape).astype(np.float32)
    assert fate(tmp_path, WEIGHT + CHANGE + noise)[0] == "other"


def test_one_wrong_number_among_thousands(tmp_path: Path) -> None:
    merged = WEIGHT + CHANGE
    merged[3, 5] += 0.01
    assert fate(tmp_path, merged)[0] == "other"
    merged[3, 5] = np.nan
    assert fate(tmp_path, merged)[0] == "not finite"


def test_a_change_below_the_rounding_is_swallowed(tmp_path: Path) -> None:
    tiny = LoraFactors(FACTORS.a, FACTORS.b * np.float32(1e-6))
    base = stored(tmp_path, WEIGHT.astype(np.float16).astype(np.float32), "F16")
    assert judge(base, base, tiny, SCALE).fate == "swallowed"
