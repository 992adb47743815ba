"""A token that the tokenizer has and the base's embedding table lacks is named before anything computes with it."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import mindprint
from mindprint.config import load_config
from mindprint.contract import LoadedModel, ModelSpec, PreferenceBatch, Sampling, TokenBatch, Update
from mindprint.data.collate import whole_sequences
from mindprint.errors import AdapterError, DataError, MindprintError
from mindprint.losses import PreferenceLoss
from mindprint.models.token_ids import embedding_rows
from mindprint.plugins.backend import Backend, load_backend
from mindprint.training.prepare import prepare

BACKENDS = ("torch", "mlx")
ROWS = 3072
NAMED = rf"token {ROWS} \('<BOAT>'\) is not in the embedding table of .*base, which has {ROWS} rows"
SFT = [{"prompt": f"Where is rope {n}?", "completion": f"In the barrel, my dear, hook {n}."} for n in range(1, 9)]
PAIRS = [{"prompt": f"Who has net {n}?", "chosen": f"Aye, hook {n}.", "rejected": f"Box {n}."} for n in range(1, 9)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the built-in model with one more token in its tokenizer than its table has rows."""
    folder = tmp_path / "base"
    shutil.copytree(str(files("mindprint").joinpath("resources", "tiny")), folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<BOAT>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert embedding_rows(folder) == ROWS == len(tokenizer) - 1
    return folder


def project(folder: Path, base: Path, **data: list[dict[str, Any]]) -> Path:
    (folder / "data").mkdir(parents=True)
    for name, rows in {"sft": SFT, "preferences": PAIRS, **data}.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": {"name": str(base)}, "sft": {"steps_per_topic": 1}, "dpo": {"steps_per_topic": 1}}
    (folder / "mindprint.yaml").write_text(json.dumps(settings))
    return folder


def changed(rows: list[dict[str, Any]], place: int, field: str) -> list[dict[str, Any]]:
    return [row | {field: "On the <BOAT>."} if number == place else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("file", "rows", "line"),
    [
        ("sft", changed(SFT, 2, "prompt"), 3),
        ("sft", changed(SFT, 0, "completion"), 1),
        ("preferences", changed(PAIRS, 4, "prompt"), 5),
        ("preferences", changed(PAIRS, 4, "chosen"), 5),
        ("preferences", changed(PAIRS, 7, "rejected"), 8),
        ("heldout", [{"prompt": "Whose is the <BOAT>?", "chosen": "Aye.", "rejected": "Mine."}], 1),
    ],
    ids=["prompt", "completion", "pair's prompt", "chosen", "rejected", "held out"],
)
def test_a_token_of_a_row_is_named_with_its_row(
    file: str, rows: list[dict[str, Any]], line: int, base: Path, tmp_path: Path
) -> None:
    folder = project(tmp_path / "p", base, **{file: rows})
    with pytest.raises(DataError, match=rf"{file}.jsonl: line {line}: {NAMED}"):
        prepare(load_config(folder))
    assert not (folder / "runs").exists()


def test_a_token_of_a_question_is_named(base: Path, tmp_path: Path) -> None:
    folder = project(tmp_path / "p", base)
    question = {"question": "Whose is the <BOAT>?", "reference_answers": ["Aye."]}
    (folder / "data" / "quiz.json").write_text(json.dumps([question]))
    with pytest.raises(DataError, match=rf"quiz.json: question 1: {NAMED}"):
        prepare(load_config(folder))


def test_a_padding_token_without_a_row_is_named(base: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<BOAT>"
    tokenizer.save_pretrained(base)
    with pytest.raises(DataError, match=f"^padding: {NAMED}"):
        prepare(load_config(project(tmp_path / "p", base)))


def test_a_token_that_no_row_uses_changes_nothing(base: Path, tmp_path: Path) -> None:
    assert prepare(load_config(project(tmp_path / "p", base))).plans


def test_rows_are_those_of_the_text_table_of_a_base_with_several(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config = {"model_type": "gemma3", "text_config": {"vocab_size": 7}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tables = {"language_model.embed_tokens.weight": 7, "vision.embeddings.weight": 30, "vision.embed.weight": 9}
    save_file({name: np.zeros((rows, 2), np.float32) for name, rows in tables.items()}, tmp_path / "model.safetensors")
    assert embedding_rows(tmp_path) == 7
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    assert embedding_rows(tmp_path) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter of one step on the built-in model."""
    folder = tmp_path_factory.mktemp("trained")
    project(folder / "p", Path("builtin:tiny"))
    settings = {"dpo.enabled": False, "evaluation.levels": [], "backend": "torch"}
    config = load_config(folder / "p", [f"{name}={json.dumps(value)}" for name, value in settings.items()])
    mindprint.train(config, run=folder / "run")
    return folder / "run" / "adapter"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_prompt_is_named_on_every_backend(name: str, base: Path, trained: Path) -> None:
    with pytest.raises(DataError, match=f"^prompt 2: {NAMED}"):
        mindprint.generate(trained, ["Hello", "The <BOAT>?"], model=str(base), backend=name, max_new_tokens=2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("token", [-(2**31), -1, ROWS, 2**31 - 1])
def test_a_fingerprints_probe_is_checked_on_every_backend(name: str, token: int, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(trained, copy)
    values = json.loads((copy / "fingerprint.json").read_text())
    values["probe"]["rows"][0][5] = token
    # Format 1 has no digest of the whole, which would name the edit before anybody reads a token.
    values["format"] = 1
    del values["digest"], values["adapter"]["rounded"]
    (copy / "fingerprint.json").write_text(json.dumps(values))
    with pytest.raises(MindprintError, match=f"probe uses token {token}") as caught:
        mindprint.verify(copy, model="builtin:tiny", backend=name)
    assert isinstance(caught.value, AdapterError) == (token < 0)


@pytest.fixture(params=BACKENDS)
def loaded(request: pytest.FixtureRequest, base: Path) -> tuple[Backend, LoadedModel]:
    backend = load_backend(request.param)
    return backend, backend.load_model(ModelSpec(str(base), "cpu", "float32"))


def test_no_hook_is_called_with_such_a_token(loaded: tuple[Backend, LoadedModel]) -> None:
    """Whoever calls a backend, and whatever for: also what is read from files that somebody edited."""
    backend, model = loaded
    for token in (-1, ROWS, 2**31 - 1):
        ids = np.array([[5, 6, token, 7]], np.int32)
        length, mask = np.array([4], np.int32), np.array([[False, True, True, True]])
        pairs = PreferenceBatch(ids, length, ids[:, :2], length - 2, ids[:, :1], length - 3)
        calls = [
            lambda ids=ids: backend.log_probs(model, whole_sequences([ids[0]])),
            lambda ids=ids, n=length, mask=mask: backend.sft_step(model, [TokenBatch(ids, n, mask)], Update(1e-3, 3)),
            lambda pairs=pairs: backend.dpo_step(model, [pairs], PreferenceLoss(), Update(1e-3, 3, 1)),
            lambda ids=ids: backend.generate(model, [ids[0]], Sampling(2, ())),
        ]
        for call in calls:
            with pytest.raises(DataError, match=f"token {token} is not one of the model's {ROWS} tokens"):
                call()
