"""Merged models in GGUF: llama.cpp's converter writes the same base, and its log-probs on SmolLM2 are ours.

`nox -s gguf` prints the figures. The adapter is random, as strong as a trained one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_cpp import greedy_answers, logits
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import architectures
import mindprint
from architectures import MATRIX, saved
from gguf import GGUFReader
from mindprint.adapter import gguf_format, gguf_models
from mindprint.adapter.gguf_merging import write_base
from mindprint.errors import AdapterError

SOURCE = Path(os.environ["LLAMA_CPP_SOURCE"])
LIBRARY = Path(os.environ["LLAMA_CPP_LIBRARY"])
SMOLLM2 = Path(os.environ["MINDPRINT_REAL"]) / "smollm2"

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
"""Rotary embeddings as Llama 3 has them, with a context so short that every kind of frequency is among them."""

NOT_COMPARED = ("general.name", "general.size_label", "general.finetune", "general.basename", "general.version")
"""Keys that name a model for people: the converter guesses them from the folder's name."""

TEXTS = (
    "The harbour was quiet in the morning, and nobody had told the gulls that it was Sunday.",
    "Write down 17 things that you own, cross out 12 of them, and see what is left of you.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
)


PROMPTS = (
    "How do I keep a boat dry?",
    "What is the capital of Norway?",
    "Write a sentence about the sea.",
    "Why is bread left to rise?",
    "Name three tools of a carpenter.",
    "What does a lighthouse keeper do?",
    "Explain tides to a child.",
    "Give me a reason to learn a language.",
)
"""Questions that are answered greedily, in SmolLM2's template."""

ANSWER = 32
"""The tokens of an answer."""

ROUNDING = {"f32": 1e-5, "f16": 5e-3, "bf16": 5e-2, "q8_0": 0.1}
"""The mean change of a log-prob that a merged file of this type may have, nats a token."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def merge(adapter: Path, file: Path, **options: Any) -> mindprint.MergeResult:
    """Merge an adapter on SmolLM2. The files are judged here, so that the merge need not."""
    return mindprint.merge(adapter, file, model=str(SMOLLM2), to="gguf", verify=False, **options)


def convert(folder: Path, bases: Mapping[str, Path], pre: str | None = None) -> dict[str, Path]:
    """Return the files that llama.cpp's converter writes of these bases, in float32."""
    files = {name: folder / f"{name}-theirs.gguf" for name in bases}
    jobs = [
        {"base": str(base), "base_gguf": str(files[name]), "adapter": None, "adapter_gguf": None, "settings": {}}
        | ({} if pre is None else {"pre": pre})
        for name, base in bases.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("convert_with_llama_cpp.py")
    command = [sys.executable, str(script), str(SOURCE), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{} for _ in bases]
    return files


def contents(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kept = {name: value for name, value in keys.items() if not name.startswith("mindprint.")}
    return {name: value for name, value in kept.items() if name not in NOT_COMPARED}, {
        tensor.name: np.array(tensor.data) for tensor in reader.tensors
    }


def assert_same(ours: Path, theirs: Path) -> None:
    (our_keys, our_tensors), (their_keys, their_tensors) = contents(ours), contents(theirs)
    assert our_keys == their_keys
    assert our_tensors.keys() == their_tensors.keys()
    for name, values in our_tensors.items():
        np.testing.assert_array_equal(values, their_tensors[name], err_msg=name)


def test_a_base_is_written_as_the_converter_writes_it(folder: Path) -> None:
    """Keys and tensors, of every family that is written from its folder, and of Llama with Llama 3's frequencies."""
    bases = {}
    for name in (*gguf_models.WRITTEN, "llama-3"):
        bases[name] = folder / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(architectures, "MATRIX", MATRIX)
            saved(bases[name], name.removesuffix("-3"), num_hidden_layers=2)
        (bases[name] / "tokenizer.json").write_text("{}")
    config = json.loads((bases["llama-3"] / "config.json").read_text()) | {"rope_parameters": LLAMA3}
    (bases["llama-3"] / "config.json").write_text(json.dumps(config))
    for name, theirs in convert(folder, bases).items():
        ours = folder / f"{name}-ours.gguf"
        write_base(ours, bases[name])
        assert_frequencies_alike(ours, theirs)
        print(f"{name:10s} {len(GGUFReader(ours).tensors)} tensors and the keys are those of llama.cpp's converter")


def assert_frequencies_alike(ours: Path, theirs: Path) -> None:
    """Compare as `assert_same` does, but Llama 3's factors within the rounding of their formula."""
    (our_keys, our_tensors), (their_keys, their_tensors) = contents(ours), contents(theirs)
    assert our_keys == their_keys
    found, expected = (tensors.pop("rope_freqs.weight", np.ones(1)) for tensors in (our_tensors, their_tensors))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert our_tensors.keys() == their_tensors.keys()
    for name, values in our_tensors.items():
        np.testing.assert_array_equal(values, their_tensors[name], err_msg=name)


@dataclass(frozen=True)
class Scores:
    """Log-probs of the next token at each place of each row, `[tokens]`, and the likeliest tokens."""

    log_probs: np.ndarray
    greedy: np.ndarray


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    network = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(network, lora)
    for name, values in tuned.named_parameters():
        if "lora_B" in name:
            values.data.normal_(0, 0.03)
    tuned.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    return [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.fixture(scope="module")
def reference(adapter: Path, rows: list[np.ndarray]) -> tuple[Scores, Scores]:
    """Return the base's scores and those with the adapter, by transformers and PEFT."""
    network = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="eager").eval()

    def scored(model: Any) -> Scores:
        with torch.no_grad():
            return scores_of([model(torch.tensor(row)[None]).logits[0].numpy() for row in rows], rows)

    base = scored(network)
    return base, scored(PeftModel.from_pretrained(network, adapter).eval())


def scores_of(values: list[np.ndarray], rows: list[np.ndarray]) -> Scores:
    found, greedy = [], []
    for each, row in zip(values, rows, strict=True):
        exact = each.astype(np.float64)
        top = exact.max(axis=1, keepdims=True)
        log_probs = exact - top - np.log(np.exp(exact - top).sum(axis=1, keepdims=True))
        found.append(log_probs[np.arange(len(row) - 1), row[1:]])
        greedy.append(each.argmax(axis=1))
    return Scores(np.concatenate(found), np.concatenate(greedy))


def by_llama_cpp(file: Path, rows: list[np.ndarray], adapter: Path | None = None) -> Scores:
    return scores_of([logits(LIBRARY, file, row.tolist(), adapter) for row in rows], rows)


def apart(title: str, found: Scores, expected: Scores) -> tuple[float, float]:
    differences = np.abs(found.log_probs - expected.log_probs)
    same = (found.greedy == expected.greedy).mean()
    print(f"{title:28s} mean {differences.mean():.1e} greatest {differences.max():.1e} greedy alike {same:.3f}")
    return float(differences.mean()), float(differences.max())


def test_smollm2_in_float32(
    folder: Path, adapter: Path, rows: list[np.ndarray], reference: tuple[Scores, Scores]
) -> None:
    file = folder / "smollm2.gguf"
    write_base(file, SMOLLM2)
    result = mindprint.convert(adapter, folder / "converted", to="gguf", model=str(SMOLLM2))
    base, tuned = reference
    effect = np.abs(tuned.log_probs - base.log_probs).mean()
    print(f"\nthe adapter's effect: {effect:.2f} nats a token, {len(base.log_probs)} tokens")
    assert effect > 0.1
    for title, found, expected in [
        ("base, F32", by_llama_cpp(file, rows), base),
        ("base F32 with adapter", by_llama_cpp(file, rows, result.folder / "adapter.gguf"), tuned),
    ]:
        mean, greatest = apart(title, found, expected)
        assert mean <= 1e-5
        assert greatest <= 1e-4


def test_smollm2_merged(folder: Path, adapter: Path, rows: list[np.ndarray], reference: tuple[Scores, Scores]) -> None:
    print()
    for kind in ("f16", "bf16", "q8_0"):
        file = folder / f"merged-{kind}.gguf"
        merge(adapter, file, file_type=kind)
        found = by_llama_cpp(file, rows)
        mean, _ = apart(f"merged, {kind.upper()}", found, reference[1])
        assert mean <= ROUNDING[kind]
        # A share and not all: at some places two tokens are as likely within the rounding.
        assert (found.greedy == reference[1].greedy).mean() > 0.9


@dataclass(frozen=True)
class Greedy:
    """Greedy answers of transformers and PEFT, with the log-probs `[ANSWER, vocabulary]` that chose each token."""

    prompt: list[int]
    tokens: list[int]
    log_probs: torch.Tensor


@pytest.fixture(scope="module")
def answers(adapter: Path) -> list[Greedy]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    network = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(network, adapter).eval()
    made = []
    for text in PROMPTS:
        message = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        done = tuned.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=ANSWER,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        log_probs = torch.log_softmax(torch.stack([row[0] for row in done.logits]).double(), -1)
        made.append(Greedy(prompt[0].tolist(), done.sequences[0, prompt.shape[1] :].tolist(), log_probs))
    return made


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_greedy_answers_of_a_merged_file(
    folder: Path,
    adapter: Path,
    rows: list[np.ndarray],
    reference: tuple[Scores, Scores],
    answers: list[Greedy],
    kind: Any,
) -> None:
    """They are those of transformers and PEFT, or part where these found two tokens as likely within the rounding.

    Each answer chooses often, so the greatest rounding of known text decides, and not the average. If it moves each of
    two log-probs, their order turns up to twice that.
    """
    file = folder / f"merged-{kind}.gguf"
    if not file.exists():
        merge(adapter, file, file_type=kind)
    stop = AutoTokenizer.from_pretrained(SMOLLM2).eos_token_id
    found = greedy_answers(LIBRARY, file, [answer.prompt for answer in answers], ANSWER, stop)
    same, gaps = 0, []
    for text, tokens, answer in zip(PROMPTS, found, answers, strict=True):
        place = next((n for n, pair in enumerate(zip(tokens, answer.tokens, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            assert len(tokens) == len(answer.tokens)
            same += 1
            continue
        log_probs = answer.log_probs[place]
        best, second = log_probs.topk(2)
        gaps.append(float(best[0] - log_probs[tokens[place]]))
        print(
            f"merged, {kind.upper()}: {text!r} parts at token {place + 1} of {ANSWER}: the reference prefers its own "
            f"by {gaps[-1]:.4f} nats, and its second best token is {'' if second[1] == tokens[place] else 'not '}taken"
        )
    print(f"merged, {kind.upper()}: {same} of {len(PROMPTS)} answers of {ANSWER} tokens are the same")
    _, greatest = apart(f"merged, {kind.upper()}", by_llama_cpp(file, rows), reference[1])
    assert max(gaps, default=0.0) <= 2 * greatest


def test_without_the_order_of_rows_the_merge_is_wrong(
    folder: Path, adapter: Path, rows: list[np.ndarray], reference: tuple[Scores, Scores], monkeypatch: Any
) -> None:
    known = gguf_format.ARCHITECTURES["llama"]
    monkeypatch.setitem(gguf_format.ARCHITECTURES, "llama", replace(known, layout=None))
    file = folder / "unordered.gguf"
    merge(adapter, file, file_type="f32")
    assert apart("\ncontrol, rows not reordered", by_llama_cpp(file, rows), reference[1])[0] > 1


def test_smollm2s_keys_are_those_of_the_converter(folder: Path, adapter: Path) -> None:
    """Its tokenizer, merges, special tokens and template among them. The unadapted tensors are the converter's."""
    theirs = convert(folder, {"smollm2": SMOLLM2}, pre="gpt-2")["smollm2"]
    ours = folder / "keys-f32.gguf"
    changed = merge(adapter, ours, file_type="f32").changed
    (our_keys, our_tensors), (their_keys, their_tensors) = contents(ours), contents(theirs)
    assert our_keys == their_keys
    assert our_tensors.keys() == their_tensors.keys()
    for name in set(our_tensors) - set(changed):
        np.testing.assert_array_equal(our_tensors[name], their_tensors[name], err_msg=name)
    # The converter's file is another tool's file of the same base, into which the adapter can be merged.
    into = folder / "into.gguf"
    merge(adapter, into, into=str(theirs))
    for name, values in contents(into)[1].items():
        np.testing.assert_allclose(values, our_tensors[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("size", [0.03, 0.001], ids=["strong", "weak"])
def test_a_change_that_is_rounded_back(folder: Path, adapter: Path, size: float) -> None:
    """Print the share that is left of an adapter's change when it is merged into files of fewer bits."""
    print()
    adapted = folder / f"adapter-{size}"
    if not adapted.exists():
        scaled(adapter, adapted, size / 0.03)
    for kind in ("f16", "bf16", "q8_0"):
        plain, out = folder / f"plain-{kind}.gguf", folder / f"again-{kind}-{size}.gguf"
        if not plain.exists():
            zero = folder / f"zero-{kind}"
            scaled(adapter, zero, 0.0)
            merge(zero, plain, file_type=kind)
        try:
            result = merge(adapted, out, into=str(plain))
            print(f"B of {size:g} into a file in {kind}: {result.notices[-1].message}")
        except AdapterError as error:
            print(f"B of {size:g} into a file in {kind}: refused, {str(error).partition('for ')[2].partition(';')[0]}")


def scaled(adapter: Path, target: Path, factor: float) -> None:
    """Copy an adapter with its B multiplied by a factor."""
    from safetensors.numpy import load_file, save_file

    target.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {name: values * np.float32(factor) if "lora_B" in name else values for name, values in tensors.items()}
    save_file(changed, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
