"""What is loaded, and what is refused, by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_samples import CONFIGS, HIDDEN, LAYERS, VOCABULARY, load, shapes, write_model
from safetensors.numpy import load_file, save_file

from mindprint.contract import LoadedModel, ModelSpec
from mindprint.errors import BackendError, ModelError
from mindprint_mlx import architectures, imports, model
from mindprint_mlx.imports import mlx_lm_module


def test_facts_of_a_loaded_model(make: Callable[..., LoadedModel], family: str) -> None:
    loaded = make(family)
    assert loaded.vocab_size == VOCABULARY
    assert loaded.parameters == sum(int(np.prod(shape)) for shape in shapes(CONFIGS[family]).values())
    assert (loaded.device, loaded.dtype, loaded.notes) == ("cpu", "float32", ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_in_the_dtype_that_was_asked_for(make: Callable[..., LoadedModel], dtype: str) -> None:
    weight = make(dtype=dtype).handle.module.model.layers[1].mlp.up_proj.weight
    assert str(weight.dtype) == f"mlx.core.{dtype}"


def test_weights_are_those_of_the_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    found = load(folder).handle.module.model.layers[0].self_attn.k_proj.weight
    np.testing.assert_array_equal(
        found, load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    )


def test_shards_are_read_as_the_index_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    whole = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(load(folder).handle.module(tokens), whole.handle.module(tokens)).item()


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        load(tmp_path)


def test_a_config_without_model_type(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name a model_type"):
        load(tmp_path)


def test_a_family_that_mlx_lm_does_not_have(tmp_path: Path) -> None:
    write_model(tmp_path)
    _change(tmp_path, model_type="bert")
    with pytest.raises(ModelError, match="no class for model_type 'bert'.*; train it with backend.type=torch"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        load(tmp_path)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors"):
        load(tmp_path)


def test_missing_weights(tmp_path: Path) -> None:
    _tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_weights_that_have_no_place(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.o_proj.bias": np.zeros(HIDDEN, np.float32)}
    _tensors(tmp_path, lambda tensors: tensors.update(extra))
    with pytest.raises(ModelError, match=r"no place for model\.layers\.0\.self_attn\.o_proj\.bias"):
        load(tmp_path)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    odd = {"model.norm.weight": np.ones(HIDDEN + 1, np.float32)}
    _tensors(tmp_path, lambda tensors: tensors.update(odd))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \[33\], its config\.json implies \[32\]"):
        load(tmp_path)


def test_integer_weights(tmp_path: Path) -> None:
    odd = {"model.norm.weight": np.ones(HIDDEN, np.uint8)}
    _tensors(tmp_path, lambda tensors: tensors.update(odd))
    with pytest.raises(ModelError, match="no floating-point numbers"):
        load(tmp_path)


def test_a_tied_model_that_stores_its_head_again(tmp_path: Path) -> None:
    _tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    load(tmp_path)


def test_a_tied_model_with_another_head(tmp_path: Path) -> None:
    _tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match=r"ties the LM head .* differs"):
        load(tmp_path)


def test_quantization_that_the_specification_alone_states(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"said to be quantized \(gptq\)"):
        model.load_model(ModelSpec(str(write_model(tmp_path)), "cpu", "float32", "gptq"))


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    device = "metal" if sys.platform != "darwin" else "cuda"
    with pytest.raises(BackendError, match=f"cannot use device '{device}' here"):
        model.load_model(ModelSpec(str(write_model(tmp_path)), device, "float32"))


class TestEveryFieldIsAccountedFor:
    """A field that mlx-lm would drop, and that may change the computation, is never dropped in silence."""

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("logit_divisor", 4.0, r"says logit_divisor = 4\.0, and mlx-lm's class does not know it"),
            ("attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50"),
            ("pretraining_tp", 2, "pretraining_tp = 2"),
            ("hidden_act", "gelu", "asks for gelu, mlx-lm's class has silu"),
            ("hidden_activation", "gelu", "names several activations"),
            ("hidden_act", "mish", "activation 'mish' is not supported"),
            ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic' is not supported"),
            ("rope_parameters", {"rope_type": "llama3", "factor": 2.0}, "needs 'low_freq_factor' in rope_parameters"),
            (
                "rope_parameters",
                {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1},
                "llama_4_scaling_beta = 0.1, which is",
            ),
            ("layer_types", ["full_attention", "linear_attention"], "type linear_attention are not supported"),
            ("layer_types", ["full_attention"], "names 1 of 2 layers"),
            ("layer_types", ["sliding_attention"] * 2, "does not say sliding_window"),
        ],
    )
    def test_refused(self, tmp_path: Path, field: str, value: Any, message: str) -> None:
        changes = {field: value}
        if field == "layer_types" and value == ["sliding_attention"] * 2:
            changes |= {"sliding_window": 0, "use_sliding_window": True}
        with pytest.raises(ModelError, match=message):
            load(write_model(tmp_path, **changes))

    @pytest.mark.parametrize(
        ("field", "value"),
        [("pretraining_tp", 1), ("attn_logit_softcapping", None), ("task_specific_params", {}), ("use_cache", False)],
    )
    def test_without_effect(self, tmp_path: Path, field: str, value: Any) -> None:
        load(write_model(tmp_path, **{field: value}))

    @pytest.mark.parametrize(
        ("version", "refused"), [("4.46.1", False), ("5.23.0", False), ("6.0.0", True), (None, True)]
    )
    def test_a_field_that_transformers_ignores(self, tmp_path: Path, version: str | None, refused: bool) -> None:
        """Known to be ignored only if no transformers newer than our facts wrote the file."""
        folder = write_model(tmp_path, full_attn_mod=4, transformers_version=version)
        if refused:
            with pytest.raises(ModelError, match="full_attn_mod = 4"):
                load(folder)
        else:
            load(folder)

    def test_a_field_that_mlx_lm_reads_and_transformers_ignores(self, tmp_path: Path) -> None:
        """mlx-lm's class would rotate otherwise; transformers has no such field."""
        plain = load(write_model(tmp_path / "plain"))
        odd = load(write_model(tmp_path / "odd", rope_traditional=True, transformers_version="5.0.0"))
        tokens = mx.array([list(range(20))])
        assert mx.array_equal(plain.handle.module(tokens), odd.handle.module(tokens)).item()

    def test_a_bias_that_the_class_would_leave_out(self, tmp_path: Path) -> None:
        """What such a field says shows in the weights, and is caught there."""
        write_model(tmp_path, "llama")
        _change(tmp_path, attention_bias=True)
        with pytest.raises(ModelError, match=r"lack model\.layers\.0\.self_attn\.k_proj\.bias"):
            load(tmp_path)

    def test_a_family_that_no_test_compares_is_loaded_with_a_note(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(architectures, "COMPARED", frozenset({"qwen2"}))
        (note,) = load(write_model(tmp_path / "llama", "llama")).notes
        assert "'llama' passed every check" in note
        assert load(write_model(tmp_path / "qwen2")).notes == ()

    def test_what_mlx_lm_would_assume_is_refused_where_transformers_is_not_known(self, tmp_path: Path) -> None:
        write_model(tmp_path, "llama")
        _change(tmp_path, model_type="internlm2")
        with pytest.raises(ModelError, match=r"config\.json does not say bias"):
            load(tmp_path)

    def test_an_old_rope_base_changes_the_logits(self, tmp_path: Path) -> None:
        """The base is taken from either place, and matters."""
        new = load(write_model(tmp_path / "new"))
        old = load(write_model(tmp_path / "old", rope_parameters=None, rope_theta=500000.0))
        other = load(write_model(tmp_path / "other", rope_parameters=None, rope_theta=10000.0))
        none = load(write_model(tmp_path / "none", rope_parameters=None))
        tokens = mx.array([list(range(20))])
        new_, old_, other_, none_ = (loaded.handle.module(tokens) for loaded in (new, old, other, none))
        assert mx.array_equal(new_, old_).item()
        assert mx.array_equal(other_, none_).item()
        assert mx.abs(new_ - other_).max().item() > 1e-3


IMPORTS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from mlx_samples import *
from mindprint.plugins.backend import load_backend
from mindprint.contract import Sampling, Update
from mindprint.losses import PreferenceLoss
backend = load_backend("mlx")
loaded = backend.load_model(ModelSpec(str(write_model(Path({folder!r}))), "cpu", "float32"))
backend.inject_adapter(loaded, lora(linear_sites(loaded)))
batch, pairs = token_batch(), preference_batch()
backend.sft_step(loaded, [batch], Update(1e-3, batch.loss_tokens))
backend.dpo_step(loaded, [pairs], PreferenceLoss(), Update(1e-3, 9, 3))
backend.generate(loaded, [batch.tokens[0, :5]], Sampling(3, ()))
backend.log_probs(loaded, batch)
backend.restore(loaded, backend.save(loaded))
backend.base_digest(loaded)
backend.release(loaded)
print([name for name in ("torch", "transformers", "datasets", "mlx_lm", "mlx_lm.tuner") if name in sys.modules])
import mlx_lm.models.qwen2
import mlx_lm
print(mlx_lm.__version__ is not None, type(loaded.handle.module).__module__)
"""


def test_a_whole_run_imports_no_torch(tmp_path: Path) -> None:
    """Also where torch is installed; and a real `import mlx_lm` still works after it."""
    code = IMPORTS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[0] == "[]"
    assert result.stdout.splitlines()[1].startswith("True")


def test_the_plugin_module_imports_no_framework() -> None:
    code = (
        "import sys, mindprint_mlx.plugin; print({m.split('.')[0] for m in sys.modules} & {'mlx', 'mlx_lm', 'torch'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_layers_are_counted(tmp_path: Path) -> None:
    assert len(load(write_model(tmp_path)).handle.module.layers) == LAYERS


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = write_model(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("printed", ["To run olmo install ai2-olmo: pip install ai2-olmo", ""])
def test_a_model_class_that_ends_the_process_is_an_error_that_names_it(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's OLMo prints a line and exits where a package is missing; any class might, when imported or built."""

    def exit_on_import(name: str) -> ModuleType:
        if printed:
            print(printed)
        raise SystemExit(0)

    monkeypatch.setattr(imports.importlib, "import_module", exit_on_import)
    folder = write_model(tmp_path, model_type="mamba2")
    with pytest.raises(ModelError, match=f"model_type 'mamba2' cannot be used: .*{printed or 'it exits with 0'}"):
        load(folder)


def test_a_model_class_that_exits_when_it_is_built_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object) -> None:
        raise SystemExit(3)

    module = mlx_lm_module("models.qwen2")
    monkeypatch.setattr(module.Model, "__init__", leave)
    with pytest.raises(ModelError, match="cannot build this model from its config.json"):
        load(write_model(tmp_path))
