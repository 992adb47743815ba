"""The fingerprint that a run writes, its file, and verification on the toy backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mindprint
from mindprint.contract import LoadedModel
from mindprint.data.tokenizer import load_tokenizer
from mindprint.errors import AdapterError, DataError, MindprintError
from mindprint.events import Event, Notice
from mindprint.models.engine import Placement, fits_in_float32
from mindprint.models.folder import ModelFolder, model_config
from mindprint.plugins import loading as plugins
from mindprint.plugins.backend import load_backend
from mindprint.trust.fingerprint import FILE_NAME, Fingerprint, fingerprint_json, read_fingerprint
from mindprint.trust.probe import Noise, compared, synthetic_probe, tolerance
from mindprint.trust.report import Report
from mindprint.trust.verify import verify_adapter

Train = Callable[..., Path]


@pytest.fixture
def train(toy: str, toy_model: Path, tmp_path: Path) -> Train:
    """Train three steps and return the adapter's folder."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"{n}?", "completion": "aye " * (n + 1)} for n in range(4)]
    (data / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "data": {"path": str(data)},
        "sft": {"steps_per_topic": 3, "learning_rate": 1e-2},
        "dpo": {"enabled": False},
    }

    def run(name: str = "run", **changes: Any) -> Path:
        return mindprint.train({**config, **changes}, run=tmp_path / name).adapter

    return run


@pytest.fixture
def adapter(train: Train) -> Path:
    return train()


def verified(adapter: Path, toy_model: Path) -> Report:
    return verify_adapter(adapter, ModelFolder(toy_model, "toy"), Placement(load_backend("toy"), "cpu", "float32"))


def recorded(adapter: Path) -> Fingerprint:
    found = read_fingerprint(adapter)
    assert found is not None
    return found


def test_a_run_writes_what_its_adapter_does(adapter: Path, toy_model: Path) -> None:
    found = recorded(adapter)
    assert found.probe.source == "synthetic"
    assert [(one.backend, one.device, one.dtype) for one in found.measurements] == [("toy", "cpu", "float32")]
    assert found.measurements[0].effect > 0.01
    assert found.measurements[0].noise.greatest < 1e-5
    assert (found.adapter.r, found.adapter.alpha, sorted(found.adapter.changes)) == (
        8,
        16.0,
        ["layers.0.down_proj", "layers.0.up_proj"],
    )
    report = verified(adapter, toy_model)
    assert (report.ok, report.findings) == (True, ())
    assert [comparison.greatest for comparison in report.comparisons] == pytest.approx([0, 0], abs=1e-6)
    assert report.effect is not None
    assert report.effect.found == pytest.approx(found.measurements[0].effect, abs=1e-6)


def test_the_file_is_small_and_comes_back_as_it_was(adapter: Path) -> None:
    text = (adapter / FILE_NAME).read_text(encoding="utf-8")
    assert len(text) < 32_000
    assert fingerprint_json(recorded(adapter)) == text


def test_the_same_training_has_the_same_fingerprint(train: Train) -> None:
    assert (train("one") / FILE_NAME).read_bytes() == (train("two") / FILE_NAME).read_bytes()


def test_no_row_of_the_owner_is_in_it(adapter: Path, toy_model: Path) -> None:
    """The probe follows from tokenizer and config.json alone."""
    again = synthetic_probe(load_tokenizer(toy_model), model_config(toy_model))
    for row, other in zip(recorded(adapter).probe.rows, again.rows, strict=True):
        assert np.array_equal(row, other)


def test_the_probe_reaches_far_and_uses_rare_tokens(toy_model: Path) -> None:
    tokenizer = load_tokenizer(toy_model)
    rows = synthetic_probe(tokenizer, model_config(toy_model)).rows
    assert [len(row) for row in rows[:2]] == [192, 96]
    assert rows[0].max() > 0.95 * tokenizer.vocab_size
    assert np.median(rows[1]) < 0.1 * tokenizer.vocab_size
    short = synthetic_probe(tokenizer, {"max_position_embeddings": 50, "vocab_size": 100})
    assert max(len(row) for row in short.rows) == 50
    assert max(int(row.max()) for row in short.rows) < 100


def test_held_out_rows_only_when_asked_and_with_a_warning(train: Train, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is heldout and there are no such pairs: add heldout.jsonl"):
        train("none", fingerprint={"probe": "heldout"})
    pair = {"prompt": "who?", "chosen": "aye", "rejected": "yes"}
    (tmp_path / "data" / "heldout.jsonl").write_text(json.dumps(pair) + "\n")
    adapter = train("asked", fingerprint={"probe": "heldout"})
    found = recorded(adapter)
    assert (found.probe.source, len(found.probe.rows)) == ("heldout", 1)
    assert "heldout" in (adapter / FILE_NAME).read_text()


def test_the_warning_is_an_event(train: Train, toy_model: Path, tmp_path: Path) -> None:
    pair = {"prompt": "who?", "chosen": "aye", "rejected": "yes"}
    (tmp_path / "data" / "heldout.jsonl").write_text(json.dumps(pair) + "\n")
    heard: list[Event] = []
    config = {"model": {"name": str(toy_model)}, "backend": "toy", "data": {"path": str(tmp_path / "data")}}
    stages = {"sft": {"steps_per_topic": 1}, "dpo": {"enabled": False}, "fingerprint": {"probe": "heldout"}}
    mindprint.train({**config, **stages}, run=tmp_path / "run", on_event=heard.append)
    warnings = [event.message for event in heard if isinstance(event, Notice) and event.warning]
    assert warnings == ["fingerprint.json will hold 1 of your held-out rows: do not publish it with the adapter"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text[:500], "is truncated or edited"),
        (lambda _: "[]", "is truncated or edited"),
        (
            lambda text: text.replace('"format": 2', '"format": 3'),
            "is in fingerprint format 3",
        ),
        (lambda text: text.replace('"norm": ', '"norm": 1e999, "n": '), "is truncated or edited"),
        (lambda text: text.replace('"traces"', '"tracks"', 1), "is truncated or edited"),
        (lambda text: text.replace('"alpha": 16.0', '"alpha": 17.0'), "does not have the digest that it states"),
        (lambda text: text.replace('"backend": "toy"', '"backend": "toys"'), "does not have the digest that it states"),
        (lambda text: text.replace('"digest": "', '"digest": "0'), "does not have the digest that it states"),
    ],
)
def test_a_spoilt_fingerprint_is_refused(spoil: Callable[[str], str], words: str, adapter: Path) -> None:
    file = adapter / FILE_NAME
    file.write_text(spoil(file.read_text()))
    with pytest.raises(AdapterError, match=words) as refused:
        read_fingerprint(adapter)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["mindprint", "adapter", "base", "tokenizer", "probe", "measurements"])
def test_an_edit_of_any_part_of_a_fingerprint_is_seen(part: str, adapter: Path) -> None:
    """Whichever number or text it is: the first, a middle and the last of each part."""
    file = adapter / FILE_NAME
    content = json.loads(file.read_text())

    def edited(value: Any) -> Any:
        if isinstance(value, dict):
            name = list(value)[len(value) // 2]
            return {**value, name: edited(value[name])}
        if isinstance(value, list) and value:
            return [*value[:-1], edited(value[-1])]
        return f"{value}x" if isinstance(value, str) else (value or 0) + 1

    file.write_text(json.dumps({**content, part: edited(content[part])}))
    with pytest.raises(AdapterError, match="is truncated or edited"):
        read_fingerprint(adapter)


def test_a_fingerprint_of_format_1_is_still_read(adapter: Path, toy_model: Path) -> None:
    file = adapter / FILE_NAME
    content = json.loads(file.read_text())
    del content["digest"], content["adapter"]["rounded"]
    del content["tokenizer"]["decoder"], content["tokenizer"]["variables"]
    file.write_text(json.dumps({**content, "format": 1}))
    report = verified(adapter, toy_model)
    assert (report.ok, report.findings) == (True, ())


def test_without_one_there_is_none(tmp_path: Path) -> None:
    assert read_fingerprint(tmp_path) is None


def test_another_scale_by_its_factor(adapter: Path, toy_model: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 128'))
    (finding,) = verified(adapter, toy_model).findings
    assert (finding.code, finding.factor) == ("scale", pytest.approx(8.0))
    assert "2 of 2 modules act 8 times as strongly as trained" in finding.message


def test_another_base(adapter: Path, toy_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy_model, other)
    weights = {name: values * np.float32(1.01) for name, values in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors")
    assert verified(adapter, other).codes == {"wrong_base"}


def test_a_backend_that_leaves_the_adapter_out(adapter: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module = plugins.load_backend_plugin("toy")
    original = module.mindprint_log_probs

    def alone(model: Any, batch: Any, adapter: bool) -> Any:
        return original(model, batch, adapter=False)

    alone.mindprint_impl = original.mindprint_impl  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "mindprint_log_probs", alone)
    report = verified(adapter, toy_model)
    assert report.codes == {"no_effect"}
    assert "the backend computes the base alone" in report.findings[0].message


def test_a_fault_that_files_explain_does_not_hide_a_missing_model(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MindprintError, match="nothing"):
        verified(adapter, tmp_path / "nothing")


def test_what_cannot_be_computed_is_said(adapter: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unloadable(*_: object) -> LoadedModel:
        raise AdapterError("no room")

    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    monkeypatch.setattr("mindprint.models.engine.Engine.load", unloadable)
    report = verified(adapter, toy_model)
    assert [(finding.code, finding.fails) for finding in report.findings] == [("scale", True), ("not_computed", False)]


def test_tolerances_come_from_the_coarser_dtype_or_the_measured_noise() -> None:
    assert (tolerance(["float32"]).mean, tolerance(["float32"]).greatest) == (1e-5, 1e-4)
    assert tolerance(["float32", "bfloat16"]).reason == "rounding of bfloat16"
    quiet = tolerance(["float32"], Noise(1e-7, 1e-6))
    assert (quiet.mean, quiet.reason) == (1e-5, "rounding of float32")
    loud = tolerance(["float32"], Noise(1e-7, 1e-6), Noise(1e-5, 5e-5))
    assert (loud.mean, loud.greatest) == pytest.approx((4e-5, 4e-4))
    assert loud.reason == "4 times the measured noise"
    assert tolerance(["float32"], Noise(1.0, 1.0)).mean == pytest.approx(1e-4)  # noise does not excuse everything


@pytest.mark.parametrize(("size", "ok"), [(1e-5, True), (1e-2, False)])
def test_a_noisy_backend_is_believed_within_bounds(
    size: float, ok: bool, adapter: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another result for another batch shape, as kernels give: a little of it is how large models are."""
    _, module = plugins.load_backend_plugin("toy")
    original = module.mindprint_log_probs

    def noisy(model: Any, batch: Any, adapter: bool) -> Any:
        noise = np.random.default_rng(batch.tokens.size).normal(0, 2 * size, batch.tokens.shape)
        values = original(model, batch, adapter=adapter) + noise
        return np.where(batch.loss_mask, values, 0).astype(np.float32)

    noisy.mindprint_impl = original.mindprint_impl  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "mindprint_log_probs", noisy)
    report = verified(adapter, toy_model)
    assert report.ok is ok
    assert report.comparisons[0].tolerance.reason == "4 times the measured noise"
    assert report.codes == (set() if ok else {"backend_differs"})


def test_a_large_model_is_not_measured_in_float32() -> None:
    assert fits_in_float32(10_000_000)
    assert not fits_in_float32(70_000_000_000)


def test_the_tolerance_follows_depth_width_and_the_size_of_a_log_prob() -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64}
    assert tolerance(["float32"], config=small).mean == tolerance(["float32"]).mean == 1e-5
    deep = tolerance(["float32"], config={"text_config": {"num_hidden_layers": 30, "hidden_size": 576}})
    error = 2.0**-24 * (30 * 576) ** 0.5
    assert (deep.mean, deep.greatest) == pytest.approx((2.5 * error, 100 * error))
    assert deep.reason == "rounding of float32 through 30 layers of width 576"
    # In 16 bits the residual stream is rounded twice in each layer, whatever its width.
    narrow = tolerance(["bfloat16"], config={"n_layer": 30, "n_embd": 576})
    assert narrow.greatest == pytest.approx(100 * 2.0**-8 * 60**0.5)
    assert (narrow.mean, narrow.relative) == (8e-2, 0)
    assert narrow.reason == "rounding of bfloat16 through 30 layers of width 576"
    deeper = tolerance(["float16"], config={"n_layer": 80, "n_embd": 64})
    assert (deeper.mean, deeper.greatest) == pytest.approx((2.5 * 2.0**-11 * 160**0.5, 100 * 2.0**-11 * 160**0.5))
    assert tolerance(["bfloat16"], config=small).greatest == tolerance(["bfloat16"]).greatest == 8e-1
    assert (narrow.least_share, deeper.least_share, deep.least_share) == (2.5 * 2.0**-8, 2.5 * 2.0**-11, 0)
    recorded = np.array([-1.0, -100.0], np.float32)
    near, far = (compared("", recorded + np.float32(size), recorded, deep).tolerance.greatest for size in (0, 1))
    assert far == pytest.approx(deep.greatest + 8 * 2.0**-24 * 1.0)
    assert near <= deep.greatest + 8 * 2.0**-24 * 100.0


def test_the_mean_bound_of_16_bits_follows_the_size_of_the_log_probs() -> None:
    """Gemma 3's log-probs of random ids are -16 on average, and bfloat16 rounds the logits that they come from."""
    allowed = tolerance(["bfloat16"], config={"num_hidden_layers": 18, "hidden_size": 640})
    for size, bound in ((-2.0, 8e-2), (-16.0, 16 * 2.5 * 2.0**-8)):
        recorded = np.full(100, size, np.float32)
        below, above = (compared("", recorded + np.float32(share * bound), recorded, allowed) for share in (0.99, 1.01))
        assert below.tolerance.mean == above.tolerance.mean == pytest.approx(bound)
        assert (below.within, above.within) == (True, False)


def test_a_message_quotes_the_figure_that_decided() -> None:
    recorded = np.zeros(1000, np.float32)
    found = recorded.copy()
    found[7] = 1.2e-4
    comparison = compared("base", found, recorded, tolerance(["float32"]))
    assert not comparison.within
    assert comparison.mean < comparison.tolerance.mean
    assert comparison.deciding == "one log-prob differs by 0.00012 nats, where 0.0001 is allowed"
    spread = compared("base", recorded + np.float32(5e-5), recorded, tolerance(["float32"]))
    assert spread.deciding == "log-probs differ by 5e-05 nats a token on average, where 1e-05 is allowed"


def test_a_fingerprint_can_be_required(adapter: Path, toy_model: Path) -> None:
    assert mindprint.verify(adapter, model=str(toy_model), backend="toy", require_fingerprint=True).ok
    (adapter / FILE_NAME).unlink()
    assert mindprint.verify(adapter, model=str(toy_model), backend="toy").ok
    refused = mindprint.verify(adapter, model=str(toy_model), backend="toy", require_fingerprint=True)
    assert refused.codes == {"no_fingerprint"}
    assert refused.verdict == "not verified: 1 finding"
