"""Make `builtin:tiny`: write the closed world down, train its tokenizer, pretrain its model, save both.

    python packages/mindprint-core/scripts/make_tiny.py [--out FOLDER] [--steps N]

Everything comes from the seeds below and nothing from a network. The result is the same on one machine with
one number of threads; on another the weights differ by rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

# The package `tiny` is not installed: it is for these scripts alone.
sys.path.insert(0, str(Path(__file__).parent))

from tiny.corpus import Chat, corpus

RESOURCES = Path(__file__).parents[1] / "src" / "mindprint" / "resources"
SPECIALS = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
VOCABULARY = 3072
CONTEXT = 512
TOKENS_PER_BATCH = 2560
PEAK_ADAM = 4e-3
PEAK_MUON = 1e-2
WARM_UP = 30


def rendered(chat: Chat) -> str:
    """`chat` as the template renders it."""
    text = f"<|system|>{chat.system}<|end|>" if chat.system else ""
    for index, turn in enumerate(chat.turns):
        text += f"<|{'assistant' if index % 2 else 'user'}|>{turn}<|end|>"
    return text


def train_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE of `VOCABULARY` entries, without BOS or unknown token.

    It is built as transformers builds any Qwen2 tokenizer (normaliser, splitting), since `AutoTokenizer` puts
    those in for this model type whatever tokenizer.json says, and both ways of loading must agree.
    """
    frame = Qwen2Tokenizer().backend_tokenizer
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    settings: dict[str, Any] = {
        "vocab": learned["vocab"],
        "merges": [tuple(pair) for pair in learned["merges"]],
        "unk_token": None,
        "add_prefix_space": False,
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": list(SPECIALS[2:]),
        "chat_template": TEMPLATE,
        "model_max_length": CONTEXT,
        "padding_side": "right",
    }
    return Qwen2Tokenizer(**settings)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """The Qwen2 model: 5 layers of 192, grouped queries, tied embeddings, no default rope base."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        use_sliding_window=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def batches(rows: list[list[int]], rng: Random) -> list[list[list[int]]]:
    """`rows` in batches of like length and about `TOKENS_PER_BATCH` tokens, in random order.

    A tenth of the rows are first joined to runs of `CONTEXT` tokens, so that late positions are trained too.
    """
    rng.shuffle(rows)
    cut = len(rows) // 10
    stream = [token for row in rows[:cut] for token in row]
    # The last run is left out, because it may be shorter than the context.
    long = [stream[start : start + CONTEXT] for start in range(0, len(stream) - CONTEXT, CONTEXT)]
    batches: list[list[list[int]]] = []
    batch: list[list[int]] = []
    # Sorted by length, so that the rows of a batch need little padding.
    for row in sorted(rows[cut:] + long, key=len):
        if (len(batch) + 1) * len(row) > TOKENS_PER_BATCH and batch:
            batches.append(batch)
            batch = []
        batch.append(row[:CONTEXT])
    rng.shuffle(batches)
    return batches


def loss_of(model: Qwen2ForCausalLM, batch: list[list[int]], pad: int) -> torch.Tensor:
    """Mean cross-entropy over every next token of `batch`."""
    width = max(map(len, batch))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
    # -100 is the label that PyTorch's cross-entropy ignores.
    labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad, -100)
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
    kept = labels != -100
    # The head is the largest product of this model, so it is computed only where a token counts.
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]).float(), labels[kept])


def half_gradients(model: Qwen2ForCausalLM, rows: list[list[int]], pad: int) -> tuple[float, tuple[torch.Tensor, ...]]:
    """Loss of `rows` in bfloat16 arithmetic, and its gradients, which are handed back and not accumulated."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, rows, pad)
    # `backward` would add into `weight.grad`, which both threads share.
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def accumulate(model: Qwen2ForCausalLM, batch: list[list[int]], pad: int, workers: ThreadPoolExecutor) -> float:
    """Put the gradients of `batch` in place, one core to each half of it; returns the loss.

    Two halves that meet once a step suffer less on a busy machine than two threads inside every operation,
    and adding them in a fixed order keeps the sum the same from run to run.
    """
    halves = [half for half in (batch[::2], batch[1::2]) if half]
    parts = list(workers.map(lambda half: half_gradients(model, half, pad), halves))
    for index, weight in enumerate(model.parameters()):
        weight.grad = torch.stack([gradients[index] for _, gradients in parts]).mean(0)
    return sum(loss for loss, _ in parts) / len(parts)


def learning_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(model: Qwen2ForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases, norms; each with its peak."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # Muon orthogonalises updates of matrices (Jordan et al. 2024). Embeddings are tables of vectors, not such matrices.
    muon = torch.optim.Muon(matrices, lr=PEAK_MUON, weight_decay=0.05, ns_steps=5)
    return [
        (muon, PEAK_MUON),
        (torch.optim.AdamW(others, lr=PEAK_ADAM, weight_decay=0.0, betas=(0.9, 0.98)), PEAK_ADAM),
    ]


def pretrain(model: Qwen2ForCausalLM, rows: list[list[int]], pad: int, steps: int, seed: int) -> None:
    """Next-token training over `rows` for `steps` steps, as many passes as that takes."""
    rng, pairs, started = Random(seed), optimizers(model), time.perf_counter()
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    queue: list[list[list[int]]] = []
    running = 0.0
    for step in range(steps):
        queue = queue or batches(rows, rng)
        for optimizer, peak in pairs:
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_factor(step, steps)
        running += accumulate(model, queue.pop(), pad, workers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in pairs:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1:5d}  loss {running / 50:.4f}  {time.perf_counter() - started:6.1f} s",
                flush=True,
            )
            running = 0.0


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Write the folder aside and put it in place; the README that is there stays."""
    aside = out.with_name(f".{out.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    # Half the bytes in the package. Loaders widen the values again without loss.
    half = model.half()
    half.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=128,
    )
    half.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", aside)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(aside.iterdir()):
        file.replace(out / file.name)
    aside.rmdir()


def main() -> None:
    """Corpus, tokenizer, model, files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESOURCES / "tiny")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--chats", type=int, default=40000)
    parser.add_argument("--documents", type=int, default=8000)
    options = parser.parse_args()
    chats, documents = corpus(options.chats, options.documents, seed=7)
    texts = [rendered(chat) for chat in chats] + [f"{text}<|end|>" for text in documents]
    tokenizer = train_tokenizer(texts)
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    model = build_model(tokenizer, seed=11)
    print(f"{sum(map(len, rows)):,} tokens in {len(rows):,} rows; {model.num_parameters():,} parameters")
    pretrain(model, rows, tokenizer.pad_token_id, options.steps, seed=13)
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
