"""A base consists of the same files for core and for every backend, all of them inside its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindprint.contract import Float32, ModelSpec
from mindprint.data.collate import whole_sequences
from mindprint.errors import ModelError
from mindprint.models.folder import INDEX_FILE, SINGLE_FILE, base_digest, check_model_folder, weight_files
from mindprint.plugins.backend import load_backend
from random_models import save_qwen2

BACKENDS = ("torch", "mlx")
ROWS = [np.arange(3, 40, dtype=np.int32)]


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("single") / "base")


@pytest.fixture
def sharded(single: Path, tmp_path: Path) -> Path:
    """Return the same base in two files with an index."""
    folder = tmp_path / "base"
    shutil.copytree(single, folder)
    values = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(values)}
    for file in set(files.values()):
        save_file({name: values[name] for name in values if files[name] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def log_probs(name: str, folder: Path) -> Float32:
    backend = load_backend(name)
    model = backend.load_model(ModelSpec(str(folder), "cpu", "float32"))
    try:
        return backend.log_probs(model, whole_sequences(ROWS))
    finally:
        backend.release(model)


def noise(file: Path) -> dict[str, np.ndarray]:
    return {name: np.full_like(values, 0.5) for name, values in load_file(file).items()}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_file_that_the_index_does_not_name_is_not_read(name: str, sharded: Path) -> None:
    expected, digest = log_probs(name, sharded), base_digest(sharded)
    shard = sharded / "model-00001-of-00002.safetensors"
    save_file(noise(shard), sharded / "model-00003-of-00002.safetensors")
    save_file(noise(shard), sharded / "model_backup.safetensors")
    np.testing.assert_array_equal(log_probs(name, sharded), expected)
    assert base_digest(sharded) == digest


@pytest.mark.parametrize("name", BACKENDS)
def test_a_single_file_goes_before_an_index(name: str, single: Path, sharded: Path) -> None:
    expected = log_probs(name, single)
    for file in weight_files(sharded):
        save_file(noise(file), file)
    shutil.copy(single / SINGLE_FILE, sharded)
    assert weight_files(sharded) == (sharded / SINGLE_FILE,)
    np.testing.assert_array_equal(log_probs(name, sharded), expected)


def point_outside(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "other.safetensors")
    index = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(index.replace("model-00001-of-00002", "../other"))


def point_at_a_pickle(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").rename(folder / "pytorch_model.bin")
    index = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(index.replace("model-00001-of-00002.safetensors", "pytorch_model.bin"))


def leave_only_a_pickle(folder: Path) -> None:
    for file in (*weight_files(folder), folder / INDEX_FILE):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


REFUSED = {
    "outside": (point_outside, "'../other.safetensors' leads out of the folder"),
    "pickle in the index": (point_at_a_pickle, "'pytorch_model.bin' is not a safetensors file"),
    "pickle": (leave_only_a_pickle, "as a pickle"),
    "missing": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "1 of 2 weight files are missing"),
}


@pytest.mark.parametrize("name", ["core", *BACKENDS])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_core_refuses_is_refused_by_every_backend(name: str, kind: str, sharded: Path) -> None:
    spoil, words = REFUSED[kind]
    spoil(sharded)
    with pytest.raises(ModelError, match=words):
        check_model_folder(sharded) if name == "core" else log_probs(name, sharded)


def test_a_tensor_that_two_files_have_is_refused(sharded: Path) -> None:
    first, second = weight_files(sharded)
    values = load_file(first)
    name = next(iter(values))
    save_file({**load_file(second), name: values[name]}, second)
    with pytest.raises(ModelError, match=f"{name} is in {first.name} as well"):
        check_model_folder(sharded)
