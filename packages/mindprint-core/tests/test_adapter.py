"""Where LoRA goes, how it starts, and how it lies in files."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.module_names import FAMILIES, WRAPPERS, file_names, from_file
from mindprint.adapter.peft_format import adapter_digest, from_tensors, read_adapter, to_tensors, write_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.contract import AdapterSite, AdapterState, LoraConfig, LoraFactors
from mindprint.errors import AdapterError

SITES = [
    AdapterSite("model.embed_tokens", "embedding", 100, 8),
    AdapterSite("model.layers.0.self_attn.q_proj", "linear", 8, 8),
    AdapterSite("model.layers.0.self_attn.o_proj", "linear", 8, 8),
    AdapterSite("model.layers.0.mlp.gate_proj", "linear", 8, 16),
    AdapterSite("model.layers.1.mlp.gate", "linear", 8, 4),
    AdapterSite("model.layers.1.mlp.shared_expert_gate", "linear", 8, 1),
    AdapterSite("model.layers.1.mlp.shared_expert.down_proj", "linear", 16, 8),
    AdapterSite("model.layers.1.mlp.experts.gate_up_proj", "experts", 8, 32, 4),
    AdapterSite("model.layers.1.mlp.experts.down_proj", "experts", 16, 8, 4),
    AdapterSite("model.layers.1.mlp.experts.0.up_proj", "linear", 8, 16),
    AdapterSite("model.layers.2.block_sparse_moe.gate", "linear", 8, 4),
    AdapterSite("lm_head", "linear", 8, 100),
]


def config(*targets: str, r: int = 4, alpha: float = 8.0) -> LoraConfig:
    return LoraConfig(r, alpha, targets)


def test_all_linear_takes_no_router_no_head_no_experts() -> None:
    assert resolve_targets(SITES, "all-linear") == (
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.shared_expert.down_proj",
    )


def test_names_match_in_full_or_by_their_ending_at_a_dot() -> None:
    assert resolve_targets(SITES, ["self_attn.q_proj", "o_proj"]) == (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.q_proj",
    )
    assert resolve_targets(SITES, ["lm_head"]) == ("lm_head",)


def test_the_order_is_not_the_backends() -> None:
    sites = [AdapterSite(f"model.layers.{layer}.q_proj", "linear", 8, 8) for layer in range(12)]
    names = resolve_targets(sites, "all-linear")
    assert names == tuple(site.name for site in sites) == resolve_targets(sites[::-1], "all-linear")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(AdapterError, match="no module of this base is called 'q_porj'; did you mean 'q_proj'"):
        resolve_targets(SITES, ["o_proj", "q_porj"])


def test_an_embedding_that_files_would_not_know_for_one_is_refused() -> None:
    """Its factors have names of their own in PEFT's file, and only the site's name tells a reader."""
    with pytest.raises(AdapterError, match="model.tokens cannot be adapted: its kind does not show in its name"):
        resolve_targets([AdapterSite("model.tokens", "embedding", 100, 8)], ["tokens"])
    assert resolve_targets(SITES, ["embed_tokens"]) == ("model.embed_tokens",)


@pytest.mark.parametrize(
    ("names", "parameters"),
    [
        (["experts"], ["down_proj", "gate_up_proj"]),
        (["mlp.experts"], ["down_proj", "gate_up_proj"]),
        (["experts.down_proj"], ["down_proj"]),
        (["model.layers.1.mlp.experts.gate_up_proj"], ["gate_up_proj"]),
    ],
)
def test_stacks_of_experts_are_named_by_their_parameters(names: list[str], parameters: list[str]) -> None:
    stacks = [f"model.layers.1.mlp.experts.{parameter}" for parameter in parameters]
    assert resolve_targets(SITES, [], names) == tuple(stacks)
    assert set(resolve_targets(SITES, "all-linear", names)) == {*resolve_targets(SITES, "all-linear"), *stacks}


def test_names_of_modules_are_not_those_of_stacks() -> None:
    assert resolve_targets(SITES, ["down_proj"]) == ("model.layers.1.mlp.shared_expert.down_proj",)


@pytest.mark.parametrize(
    ("modules", "parameters", "words"),
    [
        (
            "all-linear",
            ["up_proj"],
            "no stack of experts of this base is called 'up_proj'; this base has: experts.down",
        ),
        (["gate_up_proj"], [], "'gate_up_proj' is not a module but the parameters of stacked experts"),
        (["experts"], [], "name it in adapter.target_parameters"),
        ([], [], "adapter.target_modules is empty"),
    ],
)
def test_targets_that_mean_nothing_are_refused(modules: str | list[str], parameters: list[str], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        resolve_targets(SITES, modules, parameters)


def test_a_base_without_stacks_is_named() -> None:
    with pytest.raises(
        AdapterError, match=r"this base has no stacked experts .*gpt_oss, mixtral, .*leave the setting out"
    ):
        resolve_targets(SITES[:3], "all-linear", ["experts"])


def test_stacks_start_as_linear_layers_do_and_each_expert_otherwise() -> None:
    site = AdapterSite("m.experts.down_proj", "experts", 400, 30, 3)
    a, b = initial_adapter([site], config(site.name, r=8), seed=5).tensors[site.name]
    assert (a.shape, b.shape) == ((3, 8, 400), (3, 30, 8))
    assert not b.any()
    assert np.abs(a).max() <= 1 / 20
    assert len({part.tobytes() for part in a}) == 3


def test_moments_of_stacks_lie_in_files_as_their_factors_do() -> None:
    """`down_proj` is outermost in PEFT's file, and `gate_up_proj` within it."""
    random = np.random.default_rng(0)
    ranks = {"m.experts.down_proj": 2, "m.experts.gate_up_proj": 3, "m.q": 2}
    shapes = {"m.experts.down_proj": (4, 16, 8), "m.experts.gate_up_proj": (4, 8, 32), "m.q": (8, 8)}
    moments = {}
    for site, rank in ranks.items():
        *experts, columns, rows = shapes[site]
        a, b = (*experts, rank, columns), (*experts, rows, rank)
        moments[site] = LoraFactors(*(random.normal(size=shape).astype(np.float32) for shape in (a, b)))
    flat = to_tensors(moments, "first.")
    assert flat["first.base_model.model.m.experts.lora_A.weight"].shape == (8, 16)
    assert flat["first.base_model.model.m.experts.base_layer.lora_B.weight"].shape == (32, 12)
    again = from_tensors(flat, ranks, "first.")
    assert all(np.array_equal(x, y) for site in ranks for x, y in zip(moments[site], again[site], strict=True))
    del flat["first.base_model.model.m.experts.base_layer.lora_B.weight"]
    with pytest.raises(AdapterError, match="experts.base_layer.lora_B.weight is missing"):
        from_tensors(flat, ranks, "first.")


def test_the_initial_adapter_changes_nothing_and_has_pefts_distribution() -> None:
    site = AdapterSite("layer", "linear", 400, 30)
    adapter = initial_adapter([site], config("layer", r=64), seed=5)
    a, b = adapter.tensors["layer"]
    assert (a.shape, a.dtype, b.shape) == ((64, 400), np.float32, (30, 64))
    assert not b.any()
    bound = 1 / 20  # 1 / sqrt(400)
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_initial_values_follow_from_seed_and_name_alone() -> None:
    first = initial_adapter(SITES, config(SITES[1].name, SITES[2].name), seed=1)
    other = initial_adapter(SITES, config(SITES[2].name), seed=1)
    assert np.array_equal(first.tensors[SITES[2].name].a, other.tensors[SITES[2].name].a)
    assert not np.array_equal(first.tensors[SITES[1].name].a, first.tensors[SITES[2].name].a)


def test_scale() -> None:
    assert config("x").scale("x") == 2.0
    assert LoraConfig(4, 8.0, ("x",), use_rslora=True).scale("x") == 4.0
    assert LoraConfig(4, 8.0, ("x",), rank_pattern={"x": 2}, alpha_pattern={"x": 3.0}).scale("x") == 1.5


def test_files_round_trip_and_say_everything(tmp_path: Path) -> None:
    adapter = _adapter()
    write_adapter(tmp_path, adapter, "org/base", "main")
    read, base = read_adapter(tmp_path)
    assert base == "org/base"
    assert read.config == adapter.config
    assert adapter_digest(read) == adapter_digest(adapter)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["m.q"]
    assert (written["r"], written["lora_alpha"], written["revision"]) == (2, 8, "main")


def test_the_digest_sees_values_and_scale() -> None:
    adapter = _adapter()
    a, b = adapter.tensors["m.q"]
    nudged = AdapterState(adapter.config, {"m.q": LoraFactors(a, np.nextafter(b, np.float32(9)))})
    rescaled = AdapterState(LoraConfig(2, 9.0, ("m.q",)), adapter.tensors)
    assert len({adapter_digest(adapter), adapter_digest(nudged), adapter_digest(rescaled)}) == 3


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "r is missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"garbage"), "adapter_model.safetensors"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, break_it: object, words: str) -> None:
    write_adapter(tmp_path, _adapter(), "org/base")
    break_it(tmp_path)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path)


def _adapter() -> AdapterState:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    return AdapterState(LoraConfig(2, 8.0, ("m.q",)), {"m.q": LoraFactors(a, b)})


@pytest.mark.parametrize(
    ("family", "site", "file"),
    [
        ("nemotron_h", "model.layers.1.mixer.k_proj", "backbone.layers.1.mixer.k_proj"),
        ("mixtral", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
        ("gpt_neox", "lm_head", "embed_out"),
        ("gpt2", "transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("gpt2", "lm_head", "lm_head"),
        ("llava", "model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("llava", "lm_head", "language_model.lm_head"),
        ("qwen2_5_vl", "model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("qwen2_5_vl", "model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_a_module_has_one_name_whatever_the_files_call_it(family: str, site: str, file: str) -> None:
    known = {**FAMILIES, **WRAPPERS}[family]
    assert from_file(file, known) == site
    assert f"{file}.weight" in file_names(site, known)
