"""Checkpoints with a vision or audio part: their language model alone is loaded, trained, and merged.

Small random models of each class, which transformers saves. What is compared is what the whole class computes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from architectures import RELATIVE, SMALL, TEN_STEPS, linear_sites, relative_distance
from mindprint.adapter import peft_format
from mindprint.adapter.merging import merged_folder
from mindprint.contract import AdapterState, ModelSpec, TokenBatch, Update
from mindprint.errors import ModelError
from mindprint.models.folder import ModelFolder
from mindprint.plugins.backend import load_backend
from parity_cases import Opened, open_model, token_batch

TEXT = {**SMALL, "num_hidden_layers": 2, "head_dim": 16}

WORDS = 120
"""Tokens from here on are those of images, which no row has."""

IMAGES = {"image_token_id": 130, "video_token_id": 129, "vision_start_token_id": 128, "vision_end_token_id": 127}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}
POSITIONS = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 3, 3]}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

WRAPPERS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, **SLIDING, "query_pre_attn_scalar": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "image_size": 28},
        "mm_tokens_per_image": 4,
        "image_token_index": 130,
    },
    "gemma4": {
        "text_config": {
            "model_type": "gemma4_text",
            **TEXT,
            **SLIDING,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": 131,
        },
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
        "image_token_id": 130,
        "video_token_id": 129,
        "audio_token_id": 128,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "image_size": 28},
        "image_token_index": 130,
    },
    "mistral3": {
        "text_config": {"model_type": "ministral3", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION, "image_size": 28},
        "image_token_index": 130,
    },
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": POSITIONS}, "vision_config": QWEN_VISION, **IMAGES},
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {**POSITIONS, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
        },
        "vision_config": QWEN_VISION,
        **IMAGES,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": POSITIONS},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        **IMAGES,
    },
}
"""Arguments of each configuration. Its text has a rope base that no library has as its default, where it has one."""

LENGTHS = (23, 9, 14)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk, and the logits `[rows, tokens, vocabulary]` that its whole class computes."""

    folder: Path
    tokens: np.ndarray
    logits: np.ndarray
    linears: frozenset[str]
    sizes: frozenset[int]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Save each checkpoint once, whichever test asks for it first."""
    return cache(lambda kind: save_wrapper(tmp_path_factory.mktemp(kind), kind))


def save_wrapper(folder: Path, kind: str, **changes: Any) -> Case:
    """Save a random model of a kind and compute its logits."""
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**{**WRAPPERS[kind], **changes})).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        network.save_pretrained(folder)
        tokens = torch.randint(3, WORDS, (2, 24))
        logits = network(input_ids=tokens).logits.float().numpy()
    (folder / "tokenizer.json").write_text("{}")
    decoder = network.get_decoder()
    (prefix,) = (name for name, module in network.named_modules() if module is decoder)
    linears = {f"{prefix}.{name}" for name, part in decoder.named_modules() if type(part) is torch.nn.Linear}
    # With Gemma 4's factors of layers, which are buffers on PyTorch, or without; and an untied head is counted too.
    sizes = {decoder.num_parameters(), sum(values.numel() for values in decoder.state_dict().values())}
    head = logits.shape[-1] * TEXT["hidden_size"]
    return Case(folder, tokens.numpy(), logits, frozenset(linears), frozenset(sizes | {size + head for size in sizes}))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("kind", sorted(WRAPPERS))
def test_the_language_model_computes_what_the_whole_class_does(
    kind: str, backend: str, case: Callable[[str], Case]
) -> None:
    saved = case(kind)
    loaded = load_backend(backend).load_model(ModelSpec(str(saved.folder), "cpu", "float32"))
    if backend == "torch":
        with torch.no_grad():
            logits = loaded.handle.network(input_ids=torch.tensor(saved.tokens)).logits.numpy()
    else:
        with loaded.handle.in_use():
            logits = np.array(loaded.handle.module(mx.array(saved.tokens)))
    assert relative_distance(logits, saved.logits) < RELATIVE
    sites = {site.name for site in loaded.handle.sites if site.kind == "linear"}
    assert sites - {"lm_head"} == saved.linears
    assert loaded.parameters in saved.sizes


@pytest.mark.parametrize("kind", sorted(WRAPPERS))
def test_trained_loaded_in_peft_and_merged(kind: str, case: Callable[[str], Case], tmp_path: Path) -> None:
    """The same steps on both backends. PEFT computes the same with the adapter on the whole class, and so does a merge.

    The merge has every other tensor of the checkpoint byte for byte.
    """
    saved = case(kind)
    both = [open_model(name, saved.folder) for name in ("torch", "mlx")]
    assert linear_sites(both[0]) == linear_sites(both[1])
    curves = np.array([three_losses(opened) for opened in both])
    assert (np.abs(curves[0] - curves[1]) < TEN_STEPS * (1 + np.abs(curves[0]))).all()
    state = both[1].save()
    adapter = state.adapter
    batch = token_batch(9, LENGTHS, WORDS)
    wanted = both[1].backend.log_probs(both[1].model, batch)
    (tmp_path / "adapter").mkdir()
    peft_format.write_adapter(tmp_path / "adapter", adapter, str(saved.folder))
    whole = AutoModelForImageTextToText.from_pretrained(saved.folder, dtype=torch.float32)
    assert type(whole).__name__ == json.loads((saved.folder / "config.json").read_text())["architectures"][0]
    tuned = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert np.abs(log_probs(tuned, batch) - wanted)[batch.loss_mask].max() < 1e-4
    check_merge(saved.folder, tmp_path, adapter)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert np.abs(log_probs(merged, batch) - wanted)[batch.loss_mask].max() < 1e-4


def three_losses(opened: Opened) -> list[float]:
    """Return the losses of three optimizer steps."""
    losses = []
    for step in range(3):
        batch = token_batch(step, LENGTHS, WORDS)
        update = Update(1e-3, tokens=batch.loss_tokens)
        losses.append(opened.backend.sft_step(opened.model, [batch], update).loss)
    return losses


def check_merge(base: Path, folder: Path, adapter: AdapterState) -> None:
    with merged_folder(folder / "merged", ModelFolder(base, "base"), adapter, folder / "adapter") as merge:
        changed = set(merge.changed)
    assert len(changed) == len(adapter.tensors)
    before, after = (safe_open(path / "model.safetensors", "np") for path in (base, folder / "merged"))
    assert set(before.keys()) == set(after.keys())
    for name in before.keys():  # noqa: SIM118  it is no mapping
        same = before.get_tensor(name).tobytes() == after.get_tensor(name).tobytes()
        assert same == (name not in changed), name


def log_probs(network: Any, batch: TokenBatch) -> np.ndarray:
    """Return the log-probs of a batch's tokens, each row read alone."""
    result = np.zeros(batch.tokens.shape, np.float32)
    for row, length in enumerate(batch.lengths):
        tokens = torch.tensor(batch.tokens[row : row + 1, :length], dtype=torch.long)
        with torch.no_grad():
            scores = network(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        result[row, 1:length] = scores.gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    return result


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of the process from Linux")
@pytest.mark.parametrize(("backend", "stored"), [("torch", torch.float32), ("mlx", torch.bfloat16)])
def test_peak_memory_of_loading_is_that_of_the_language_model(
    backend: str, stored: torch.dtype, tmp_path: Path
) -> None:
    """The other part is more than twice as large, and none of it gets into memory.

    MLX reads another dtype than it keeps here, which must not cost memory either. PyTorch maps files into memory, so
    that the system counts their pages too for as long as it has room for them.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    text = {"model_type": "llama", **TEXT, **sizes, "num_hidden_layers": 4, "head_dim": 64, "num_key_value_heads": 8}
    vision = {**WRAPPERS["llava"]["vision_config"], **sizes, "num_hidden_layers": 12}
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llava"](**{**WRAPPERS["llava"], "text_config": text, "vision_config": vision})
    network = AutoModelForImageTextToText.from_config(config, dtype=stored)
    network.save_pretrained(tmp_path)
    # In another process, which has nothing freed that it could use again.
    done = subprocess.run(
        [sys.executable, "-c", LOADING, backend, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, parameters = map(int, done.stdout.split())
    ratio = grown / (4 * parameters)
    whole = (tmp_path / "model.safetensors").stat().st_size / (stored.itemsize * parameters)
    print(f"{backend}: loading takes {ratio:.2f} times the language model's weights, the file has {whole:.2f}")
    assert whole > 3
    assert 0.9 < ratio < 1.1


LOADING = """
import sys, threading
from pathlib import Path
from mindprint.contract import ModelSpec
from mindprint.plugins.backend import load_backend

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:")))

backend = load_backend(sys.argv[1])
# A model of the library's own first, so that what is imported late is there before anything is measured.
from mindprint.models.folder import resolve_model
from mindprint.config import ModelConfig
tiny = resolve_model(ModelConfig(name="builtin:tiny"), Path("."))
backend.release(backend.load_model(ModelSpec(str(tiny.path), "cpu", "float32")))
before, peak, done = memory(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], memory())

watcher = threading.Thread(target=watch)
watcher.start()
loaded = backend.load_model(ModelSpec(sys.argv[2], "cpu", "float32"))
done.set()
watcher.join()
print(max(peak[0], memory()) - before, loaded.parameters)
"""


@pytest.mark.parametrize("backend", ["torch", "mlx"])
class TestBadInput:
    def refusal(self, backend: str, folder: Path) -> str:
        with pytest.raises(ModelError) as error:
            load_backend(backend).load_model(ModelSpec(str(folder), "cpu", "float32"))
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_a_model_of_two_parts_of_which_none_generates_text(self, backend: str, tmp_path: Path) -> None:
        CONFIG_MAPPING["clip"](architectures=["CLIPModel"]).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        message = self.refusal(backend, tmp_path)
        assert "no language model" in message or "language model is not known on MLX" in message

    def test_text_weights_under_other_names_than_the_class_has(self, backend: str, tmp_path: Path) -> None:
        save_wrapper(tmp_path, "llava")
        path = tmp_path / "model.safetensors"
        renamed = {f"writer.{name}" if "language" in name else name: v for name, v in load_file(path).items()}
        save_file(renamed, path, {"format": "pt"})
        message = self.refusal(backend, tmp_path)
        assert "missing" in message or "lack" in message
        assert "writer.language_model" in message

    def test_code_in_the_folder_is_never_run(self, backend: str, tmp_path: Path) -> None:
        (tmp_path / "modeling_own.py").write_text("raise SystemExit('run')\n")
        names = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        config = {"model_type": "own_model", "architectures": ["OwnModel"], "auto_map": names}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        assert "code in the folder (auto_map), which is never run" in self.refusal(backend, tmp_path)

    def test_an_encoder_decoder(self, backend: str, tmp_path: Path) -> None:
        CONFIG_MAPPING["t5"]().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        assert "encoder-decoder" in self.refusal(backend, tmp_path)
