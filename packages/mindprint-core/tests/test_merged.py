"""What became of a merged weight, decided from the numbers of two files."""

from pathlib import Path

import numpy as np
import pytest

from mindprint.adapter.merging import refuse_taken
from mindprint.contract import Float32, LoraFactors
from mindprint.errors import RunError
from mindprint.models.tensor_files import TensorInfo, from_float32, to_float32
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


def test_a_path_with_a_nul_is_refused_as_a_run_error() -> None:
    with pytest.raises(RunError, match="is not a path: embedded null byte"):
        refuse_taken(Path("out\0put"))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("noise", [0.9, 0.1])
def test_noise_in_a_narrow_merge_is_found_element_by_element(dtype: str, noise: float, tmp_path: Path) -> None:
    """The right change is in it, in the mean: only single elements show that it is not the rounded sum."""
    random = np.random.default_rng(1).normal(0, noise * CHANGE.std(), WEIGHT.shape).astype(np.float32)
    assert fate(tmp_path, WEIGHT + CHANGE + random, dtype)[0] == "other"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_ways_of_a_sound_merge_to_round(dtype: str, tmp_path: Path) -> None:
    def narrow(values: Float32) -> Float32:
        return to_float32(from_float32(values, dtype), dtype)

    assert fate(tmp_path, WEIGHT + CHANGE, dtype)[0] == "exact"
    assert fate(tmp_path, narrow(WEIGHT) + CHANGE, dtype)[0] in ("exact", "rounded")
    product = narrow(FACTORS.b @ FACTORS.a)
    assert fate(tmp_path, narrow(WEIGHT) + narrow(np.float32(SCALE) * product), dtype)[0] in ("exact", "rounded")
    # Half a unit more than rounding in one element of thousands is not a rounding.
    wrong = narrow(WEIGHT + CHANGE)
    wrong[5, 7] *= np.float32(1 + 2.0 ** (-6 if dtype == "BF16" else -9))
    assert fate(tmp_path, wrong, dtype)[0] == "other"


def test_another_order_of_summing_is_exact_in_float32(tmp_path: Path) -> None:
    a, b = FACTORS
    turned = np.float32(SCALE) * np.einsum("ok,ki->oi", b[:, ::-1], a[::-1])
    assert fate(tmp_path, WEIGHT + turned)[0] == "exact"
