"""Model folders: found, checked, digested; and one line for everything that is none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file
from small_tokenizers import write_tokenizer

from mindprint.config import ModelConfig
from mindprint.errors import ModelError
from mindprint.models.folder import (
    ModelFolder,
    base_digest,
    check_model_folder,
    config_digest,
    quantization,
    resolve_model,
    tensors,
    weight_files,
)

WEIGHTS: dict[str, Any] = {"a": np.arange(2000, dtype=np.float32).reshape(40, 50), "b": np.ones(3, dtype=np.float16)}


def write_model(folder: Path, **config: Any) -> Path:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "np"})
    return folder


def shard(folder: Path) -> None:
    """The same weights in two files and an index."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, key in zip(names, WEIGHTS, strict=True):
        save_file({key: WEIGHTS[key]}, folder / name)
    index = {"metadata": {}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").unlink()


def resolve(name: str, folder: Path, revision: str | None = None) -> ModelFolder:
    return resolve_model(ModelConfig(name=name, revision=revision), folder)


def test_a_folder_is_found_from_the_configurations_folder_or_absolutely(tmp_path: Path) -> None:
    model = write_model(tmp_path / "bases" / "mine")
    for name in ("bases/mine", "./bases/mine", str(model)):
        assert resolve(name, tmp_path) == ModelFolder(model, str(model))


def test_the_builtin_model_is_package_data() -> None:
    tiny = Path(str(files("mindprint") / "resources" / "tiny"))
    assert resolve("builtin:tiny", Path("/nowhere")) == ModelFolder(tiny, "builtin:tiny")
    with pytest.raises(ModelError, match=r"^builtin:small: no such built-in model; known: builtin:tiny$"):
        resolve("builtin:small", Path("/nowhere"))


@pytest.mark.parametrize("name", ["./bases/mime", "bases/mime/", "/nowhere/at/all", "mime", "~/mime-of-mine"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=f"^{re.escape(name)}: no such folder .*a hub model is written owner/name$"):
        resolve(name, tmp_path)


def test_the_nearest_folder_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "bases" / "mine")
    with pytest.raises(ModelError, match=rf"did you mean {tmp_path}/bases/mine\?"):
        resolve("./bases/mime", tmp_path)


def test_a_revision_belongs_to_the_hub(tmp_path: Path) -> None:
    write_model(tmp_path / "mine")
    with pytest.raises(ModelError, match="model.revision is for models on the hub: remove it"):
        resolve("mine", tmp_path, revision="main")


def test_a_hub_name_goes_to_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "cache")
    calls: list[tuple[str, str | None]] = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision))
        assert "model*.safetensors" in allow_patterns
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("Qwen/Qwen3-0.6B", tmp_path, "v1") == ModelFolder(model, "Qwen/Qwen3-0.6B", "v1")
    assert calls == [("Qwen/Qwen3-0.6B", "v1")]


ANSWER: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.RepositoryNotFoundError("x", response=ANSWER),
            "owner/name: no such model on the hub and no such folder",
        ),
        (
            errors.GatedRepoError("x", response=ANSWER),
            "owner/name: is gated: accept its terms on huggingface.co, then `hf auth",
        ),
        (
            errors.RevisionNotFoundError("x", response=ANSWER),
            "owner/name: has no revision 'v1' on the hub: correct model.revision",
        ),
        (
            errors.LocalEntryNotFoundError("offline\nmore"),
            "owner/name at revision v1: is not a folder here and cannot be ",
        ),
        (OSError("No space left on device"), "cannot be downloaded from the hub: No space left on device"),
    ],
)
def test_a_failed_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def snapshot_download(repo: str, **_: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        resolve("owner/name", tmp_path, "v1")
    assert "\n" not in str(caught.value)


def test_the_real_client_offline(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from mindprint.config import ModelConfig\n"
        "from mindprint.models.folder import ModelError, resolve_model\n"
        "try: resolve_model(ModelConfig(name='owner/name'), Path('.'))\n"
        "except ModelError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.stdout.startswith("owner/name: is not a folder here and cannot be downloaded from the hub: ")
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json: this is not a model folder"),
        ("model.safetensors", "has no weights (model.safetensors, or model.safetensors.index.json with its shards)"),
        ("tokenizer.json", "has no tokenizer (tokenizer.json): copy its files into the model folder"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path: Path, remove: str, message: str) -> None:
    (write_model(tmp_path) / remove).unlink()
    with pytest.raises(ModelError, match=f"^{re.escape(f'{tmp_path}: {message}')}"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object, found list"), ("{}", "has no model_type")],
)
def test_a_broken_config(tmp_path: Path, content: str, message: str) -> None:
    (write_model(tmp_path) / "config.json").write_text(content)
    with pytest.raises(ModelError, match=f"config.json: {message}"):
        check_model_folder(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"as a pickle \(pytorch_model.bin\), .* refused: save them as safetensors"):
        check_model_folder(tmp_path)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="is an adapter, no base model: give its base as model.name"):
        check_model_folder(tmp_path)


def test_shards_are_all_needed(tmp_path: Path) -> None:
    shard(write_model(tmp_path))
    assert check_model_folder(tmp_path) == tmp_path
    assert [file.name for file in weight_files(tmp_path)] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weight_files(tmp_path)[1].unlink()
    with pytest.raises(ModelError, match="1 of 2 weight files are missing, first model-00002-of-00002.safetensors"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1",
            "is not a safetensors file but a Git LFS pointer: run `git lfs pull`",
        ),
        (b"", "is not a safetensors file: download it again"),
        (b"\x02\0\0\0\0\0\0\0[]", "has a broken safetensors header"),
        (b"\x02\0\0\0\0\0\0\0{]", "has a broken safetensors header"),
    ],
)
def test_weights_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (write_model(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(message)):
        check_model_folder(tmp_path)


def test_truncated_weights_are_seen_before_they_are_loaded(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ModelError, match=rf"is truncated \({size - 1} of {size} bytes\)"):
        check_model_folder(tmp_path)


def test_tensors_are_found_where_they_lie(tmp_path: Path) -> None:
    found = tensors(write_model(tmp_path))
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        "a": ("F32", (40, 50)),
        "b": ("F16", (3,)),
    }
    info = found["a"]
    assert info.file.read_bytes()[info.start : info.end] == WEIGHTS["a"].tobytes()


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx-4bit"),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "mlx-4bit"),
    ],
)
def test_quantization(tmp_path: Path, config: dict[str, Any], scheme: str | None) -> None:
    assert quantization(write_model(tmp_path, **config)) == scheme


def test_the_digest_is_of_the_weights_not_of_their_files(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    shard(other)
    assert base_digest(one) == base_digest(other)


@pytest.mark.parametrize("place", [(0, 0), (20, 0), (39, 49)])
def test_a_changed_weight_changes_the_digest(tmp_path: Path, place: tuple[int, int]) -> None:
    before = base_digest(write_model(tmp_path))
    changed = WEIGHTS["a"].copy()
    changed[place] += 1
    save_file({**WEIGHTS, "a": changed}, tmp_path / "model.safetensors")
    assert base_digest(tmp_path) != before


@pytest.mark.parametrize(
    "other", [{"c": WEIGHTS["a"]}, {"a": WEIGHTS["a"].T.copy()}, {"a": WEIGHTS["a"].view(np.int32)}]
)
def test_names_shapes_and_dtypes_are_in_the_digest(tmp_path: Path, other: dict[str, Any]) -> None:
    write_model(tmp_path)
    save_file({"a": WEIGHTS["a"]}, tmp_path / "model.safetensors")
    before = base_digest(tmp_path)
    save_file(other, tmp_path / "model.safetensors")
    assert base_digest(tmp_path) != before


def test_the_config_is_in_the_digest_but_not_where_it_came_from(tmp_path: Path) -> None:
    before = (config_digest(write_model(tmp_path)), base_digest(tmp_path))
    write_model(tmp_path, transformers_version="5.0.0", _name_or_path="/home/me/model")
    assert (config_digest(tmp_path), base_digest(tmp_path)) == before
    write_model(tmp_path, rope_theta=500000.0)
    assert config_digest(tmp_path) != before[0]
    assert base_digest(tmp_path) != before[1]


def test_a_folder_with_gguf_files_alone_says_how_to_make_a_model_folder_of_them(tmp_path: Path) -> None:
    (tmp_path / "writer-Q4_K_M.gguf").write_bytes(b"GGUF")
    words = "holds a model in GGUF.*from_pretrained.folder, gguf_file='writer-Q4_K_M.gguf'.*AutoTokenizer"
    with pytest.raises(ModelError, match=words):
        check_model_folder(tmp_path)
