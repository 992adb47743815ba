"""What an adapter changes, in a few numbers: each way of changing it moves them as it must."""

from dataclasses import replace

import numpy as np
import pytest

from mindprint.adapter.peft_format import adapter_digest
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.models.tensor_files import from_float32, to_float32
from mindprint.trust.adapters import rounded_digests, value_findings
from mindprint.trust.changes import Change, change, changes, reshaped, rounding_error
from mindprint.trust.fingerprint import AdapterRecord

SITES = ("layers.0.up_proj", "layers.1.up_proj", "layers.0.down_proj")


@pytest.fixture
def adapter() -> AdapterState:
    random = np.random.default_rng(0)
    shapes = dict(zip(SITES, ((6, 4), (6, 4), (4, 6)), strict=True))
    tensors = {
        site: LoraFactors(*(random.normal(size=shape).astype(np.float32) for shape in ((2, columns), (rows, 2))))
        for site, (rows, columns) in shapes.items()
    }
    return AdapterState(LoraConfig(2, 4.0, SITES), tensors)


@pytest.fixture
def record(adapter: AdapterState) -> AdapterRecord:
    return AdapterRecord(adapter_digest(adapter), 2, 4.0, use_rslora=False, changes=changes(adapter))


def edited(adapter: AdapterState, **tensors: LoraFactors) -> AdapterState:
    named = {site.replace(".", "_"): site for site in SITES}
    return AdapterState(adapter.config, {**adapter.tensors, **{named[name]: pair for name, pair in tensors.items()}})


def codes(adapter: AdapterState, record: AdapterRecord) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.code, finding.sites) for finding in value_findings(adapter, record)]


def test_the_norm_is_that_of_the_product(adapter: AdapterState) -> None:
    for site, one in changes(adapter).items():
        a, b = adapter.tensors[site]
        assert one.norm == pytest.approx(float(np.linalg.norm(2.0 * b.astype(np.float64) @ a)), rel=1e-8)


def test_traces_scale_with_the_change_and_depend_on_it(adapter: AdapterState) -> None:
    a, b = adapter.tensors[SITES[0]]
    once, thrice = change(LoraFactors(a, b), 2.0), change(LoraFactors(a, 3 * b), 2.0)
    assert thrice.factor(once) == pytest.approx(3.0, rel=1e-6)
    assert thrice.distance(once, 3.0) < 1e-6
    assert thrice.distance(once) > 0.5
    assert change(LoraFactors(2 * a, b / 2), 2.0).distance(once) < 1e-6  # another factorisation, the same change


def test_a_stack_of_experts_adds_up_and_keeps_them_apart() -> None:
    random = np.random.default_rng(1)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((3, 2, 4), (3, 5, 2)))
    stack = change(LoraFactors(a, b), 1.0)
    squares = [change(LoraFactors(a[n], b[n]), 1.0).norm ** 2 for n in range(3)]
    assert stack.norm**2 == pytest.approx(sum(squares), rel=1e-6)
    assert change(LoraFactors(a[::-1].copy(), b[::-1].copy()), 1.0).distance(stack) > 0.1


def test_reshaping_undoes_bytes_read_in_the_wrong_shape(adapter: AdapterState) -> None:
    a, b = adapter.tensors[SITES[0]]
    misread = LoraFactors(a.T.copy().reshape(a.shape), b.T.copy().reshape(b.shape))
    assert all(map(np.array_equal, (a, b), reshaped(misread)[0]))
    back = LoraFactors(a.reshape(a.shape[::-1]).T, b.reshape(b.shape[::-1]).T)
    assert all(map(np.array_equal, (a, b), reshaped(back)[1]))


def test_the_same_values_are_no_finding(adapter: AdapterState, record: AdapterRecord) -> None:
    assert codes(adapter, record) == []


def test_each_module_is_named_once_by_what_became_of_it(adapter: AdapterState, record: AdapterRecord) -> None:
    first, second, third = (adapter.tensors[site] for site in SITES)
    broken = edited(
        adapter,
        layers_0_up_proj=LoraFactors(first.a, 5 * first.b),
        layers_1_up_proj=LoraFactors(second.a, 0 * second.b),
        layers_0_down_proj=LoraFactors(third.a, third.b + 0.1),
    )
    assert codes(broken, record) == [
        ("partly_applied", (SITES[1],)),
        ("scale", (SITES[0],)),
        ("adapter_changed", (SITES[2],)),
    ]
    assert value_findings(broken, record)[1].factor == pytest.approx(5.0)


def test_rounded_factors_are_a_note(adapter: AdapterState, record: AdapterRecord) -> None:
    rounded = {
        site.replace(".", "_"): LoraFactors(*(part.astype(np.float16).astype(np.float32) for part in pair))
        for site, pair in adapter.tensors.items()
    }
    (finding,) = value_findings(edited(adapter, **rounded), record)
    assert (finding.code, finding.fails) == ("precision", False)


def stored(adapter: AdapterState, dtype: str) -> AdapterState:
    tensors = {
        site: LoraFactors(*(to_float32(from_float32(part, dtype), dtype) for part in pair))
        for site, pair in adapter.tensors.items()
    }
    return AdapterState(adapter.config, tensors)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("format_1", [False, True])
def test_only_the_recorded_adapter_is_called_rounded(
    dtype: str, format_1: bool, adapter: AdapterState, record: AdapterRecord
) -> None:
    """By its digest, or by likeness in a fingerprint of format 1. Noise a few times the rounding is another adapter."""
    record = record if format_1 else replace(record, rounded=rounded_digests(adapter))
    assert codes(stored(adapter, dtype), record) == [("precision", tuple(sorted(SITES)))]
    random = np.random.default_rng(1)

    def noisy(size: float) -> AdapterState:
        tensors = {
            site: LoraFactors(*(part * (1 + size * random.normal(size=part.shape)).astype(np.float32) for part in pair))
            for site, pair in adapter.tensors.items()
        }
        return AdapterState(adapter.config, tensors)

    # An earlier checkpoint is such an adapter, whether it is rounded or not.
    for other in (noisy(0.05), stored(noisy(0.05), dtype), noisy(1e-3), noisy(1e-5)):
        assert {code for code, _ in codes(other, record)} == {"adapter_changed"}
    if not format_1:
        assert codes(stored(noisy(2e-3), dtype), record) == [("adapter_changed", tuple(sorted(SITES)))]


def test_the_error_of_a_rounding_is_estimated() -> None:
    """Of 200 roundings none is beyond six deviations, and the estimate is not ten times too wide."""
    random = np.random.default_rng(2)
    worst = []
    for _ in range(200):
        exact = LoraFactors(*(random.normal(size=shape).astype(np.float32) for shape in ((4, 40), (30, 4))))
        rounded = LoraFactors(*(to_float32(from_float32(part, "BF16"), "BF16") for part in exact))
        error, was, now = rounding_error(rounded, 2.0, "BF16"), change(exact, 2.0), change(rounded, 2.0)
        ratios = [abs(t - r) / e for t, r, e in zip(now.traces, was.traces, error.traces, strict=True)]
        worst.append(max(*ratios, abs(now.norm - was.norm) / error.norm))
    assert 0.3 < max(worst) <= 1


def test_the_same_change_in_other_digits_is_a_note(adapter: AdapterState, record: AdapterRecord) -> None:
    """Another factorisation, or a last bit: the digest differs and no module's change does."""
    a, b = adapter.tensors[SITES[0]]
    (finding,) = value_findings(edited(adapter, layers_0_up_proj=LoraFactors(4 * a, b / 4)), record)
    assert (finding.code, finding.fails) == ("written_otherwise", False)


def test_swapped_modules(adapter: AdapterState, record: AdapterRecord) -> None:
    first, second = adapter.tensors[SITES[0]], adapter.tensors[SITES[1]]
    swapped = edited(adapter, layers_0_up_proj=second, layers_1_up_proj=first)
    assert codes(swapped, record) == [("sites_swapped", (SITES[0], SITES[1]))]


def test_what_is_not_finite_ends_the_comparison(adapter: AdapterState, record: AdapterRecord) -> None:
    pair = adapter.tensors[SITES[0]]
    broken = edited(adapter, layers_0_up_proj=LoraFactors(pair.a, pair.b * np.float32("nan")))
    assert codes(broken, record) == [("not_finite", (SITES[0],))]


def test_a_change_of_nothing_has_no_factor() -> None:
    nothing = Change(2.0, 0.0, (0.0,) * 4)
    assert nothing.distance(nothing) == 0
    assert nothing.factor(nothing) == 0
