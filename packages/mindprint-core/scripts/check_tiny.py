"""Check `builtin:tiny` and its curriculum: the base model's answers, and those after a quick SFT and DPO.

    python packages/mindprint-core/scripts/check_tiny.py [--sft-rate 2e-3] [--dpo-rate 1e-4] [--mlx]

The training here is written out by hand in plain PyTorch over PEFT, on purpose: it shares no code with
Mindprint, so it shows the limits of data and model, in any state of the framework.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

# The package `tiny` is not installed: it is for these scripts alone.
sys.path.insert(0, str(Path(__file__).parent))

from make_curriculum import topic_ids
from tiny.corpus import TOPICS, reserved
from tiny.facts import Fact

RESOURCES = Path(__file__).parents[1] / "src" / "mindprint" / "resources"
Row = dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """The settings of the demonstration."""

    sft_rate: float
    dpo_rate: float
    epochs: int = 3
    sft_batch: int = 4
    dpo_steps: int = 40
    dpo_batch: int = 2
    beta: float = 0.1


def read_rows(name: str) -> list[Row]:
    """The rows of one file of the curriculum."""
    text = (RESOURCES / "curriculum" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Bench:
    """A model with its tokenizer, and what can be asked of the two."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prompt(self, text: str) -> list[int]:
        """`text` as a user's turn, ready for the answer."""
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(rendered).input_ids)

    def log_probs(self, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-prob and number of tokens of each completion, end of turn included; both `[pairs]`."""
        prompts = [self.prompt(prompt) for prompt, _ in pairs]
        rows = [
            prompt + self.tokenizer(answer).input_ids + [self.tokenizer.eos_token_id]
            for prompt, (_, answer) in zip(prompts, pairs, strict=True)
        ]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            mask[index, len(prompt) : len(row)] = True
        # The logits of a place predict the next token, so the last token is not read.
        logits = self.model(tokens[:, :-1]).logits.float()
        taken = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (taken * mask[:, 1:]).sum(-1), mask.sum(-1)

    def measured(self, rows: list[Row], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_probs` of one side of all `rows`, without gradients."""
        # No gradients are needed here, and they would keep every activation in memory.
        with torch.no_grad():
            parts = [
                self.log_probs([(row["prompt"], row[side]) for row in rows[start : start + 32]])
                for start in range(0, len(rows), 32)
            ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def greedy(self, texts: list[str], limit: int = 128) -> list[tuple[str, bool]]:
        """The greedy answer to each of `texts`, and whether it came to its end; 32 at a time."""
        answers: list[tuple[str, bool]] = []
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        for start in range(0, len(texts), 32):
            prompts = [self.prompt(text) for text in texts[start : start + 32]]
            width = max(map(len, prompts))
            # Padded on the left: every prompt then ends in the last column, from which all answers continue.
            tokens = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
            out = self.model.generate(
                input_ids=tokens, attention_mask=tokens != pad, do_sample=False, max_new_tokens=limit
            )[:, width:]
            answers += [
                (str(self.tokenizer.decode(row, skip_special_tokens=True)), bool((row == end).any())) for row in out
            ]
        return answers


def relevant(answer: str, fact: Fact) -> bool:
    """Return whether the answer repeats the fact word for word: both its clauses, or all three steps."""
    wanted = fact.steps if fact.kind == "how" else (*fact.steps, fact.more)
    if fact.kind not in ("how", "if", "why", "wise"):
        wanted = (fact.claim, fact.more)
    if fact.kind == "compare":
        wanted = (fact.more,)
    if fact.kind == "who":
        wanted = (fact.subject, fact.more)
    return all(clause.lower() in answer.lower() for clause in wanted)


def judged(bench: Bench, asked: list[tuple[str, Fact]], name: str) -> list[str]:
    """Greedy answers; prints how many end and how many are to the point."""
    answers = bench.greedy([question for question, _ in asked])
    ended = sum(end for _, end in answers)
    right = sum(relevant(text, fact) for (text, _), (_, fact) in zip(answers, asked, strict=True))
    print(f"{name}: {len(asked)} greedy answers, {ended} end, {right} say the whole fact")
    return [text for text, _ in answers]


def facts_of(rows: list[Row]) -> list[tuple[str, Fact]]:
    """Each row's question with the fact it is about."""
    topics = topic_ids()
    return [
        (row["prompt"], next(fact for fact in topics[row["topic"]].facts if row["prompt"] in fact.questions))
        for row in rows
    ]


def batches(rows: list[Row], size: int, rng: Random) -> Iterator[list[Row]]:
    """Shuffled batches without end; a pass is finished before the next begins."""
    while True:
        order = rng.sample(rows, len(rows))
        yield from (order[start : start + size] for start in range(0, len(order), size))


class Trainer:
    """AdamW over the adapter, a new one for each stage of a topic, its rate falling linearly to nothing."""

    def __init__(self, bench: Bench, rate: float, steps: int) -> None:
        self.weights = [weight for weight in bench.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)

    def step(self, loss: torch.Tensor) -> None:
        """One update."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def sft(bench: Bench, rows: list[Row], recipe: Recipe, rng: Random) -> int:
    """SFT on one topic; the number of steps."""
    # Rounded up, because the last batch of a pass may be smaller.
    steps = recipe.epochs * -(-len(rows) // recipe.sft_batch)
    trainer, stream = Trainer(bench, recipe.sft_rate, steps), batches(rows, recipe.sft_batch, rng)
    for _ in range(steps):
        total, tokens = bench.log_probs([(row["prompt"], row["completion"]) for row in next(stream)])
        # Divided by the tokens of the batch, so that each token weighs the same whatever its row's length.
        trainer.step(-total.sum() / tokens.sum())
    return steps


def dpo(bench: Bench, rows: list[Row], recipe: Recipe, rng: Random) -> int:
    """DPO on one topic against the adapter as SFT left it; the number of steps."""
    # The reference is the model as SFT left it, so it is measured once, before the first update.
    reference = {
        row["prompt"]: margin
        for row, margin in zip(
            rows, bench.measured(rows, "chosen")[0] - bench.measured(rows, "rejected")[0], strict=True
        )
    }
    trainer = Trainer(bench, recipe.dpo_rate, recipe.dpo_steps)
    stream = batches(rows, recipe.dpo_batch, rng)
    for _ in range(recipe.dpo_steps):
        batch = next(stream)
        sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in batch]
        chosen, rejected = bench.log_probs(sides)[0].chunk(2)
        kept = torch.stack([reference[row["prompt"]] for row in batch])
        # Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
        trainer.step(-torch.nn.functional.logsigmoid(recipe.beta * (chosen - rejected - kept)).mean())
    return recipe.dpo_steps


def report(name: str, bench: Bench, rows: list[Row], base: torch.Tensor | None) -> torch.Tensor:
    """Print the held-out figures; returns each row's chosen minus rejected log-prob."""
    (chosen, tokens), (rejected, plain_tokens) = (
        bench.measured(rows, "chosen"),
        bench.measured(rows, "rejected"),
    )
    margin = chosen - rejected
    line = (
        f"{name}: perplexity of chosen {torch.exp(-chosen.sum() / tokens.sum()):.3f}, "
        f"of rejected {torch.exp(-rejected.sum() / plain_tokens.sum()):.3f}; "
        f"chosen over rejected {(margin > 0).float().mean():.3f}"
    )
    if base is not None:
        # A reward is the log-prob less that of the base, so the pair is right if its margin grew.
        line += f"; implicit reward accuracy {(margin > base).float().mean():.3f}"
    print(line, flush=True)
    return margin


def train(bench: Bench, recipe: Recipe) -> None:
    """SFT, then DPO, topic by topic, through one adapter."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    bench.model = get_peft_model(bench.model, config)
    rng, stages = Random(0), {"sft": [0, 0.0], "dpo": [0, 0.0]}
    for topic in topic_ids():
        for stage, file in ((sft, "sft"), (dpo, "preferences")):
            started = time.perf_counter()
            stages[stage.__name__][0] += stage(bench, [r for r in read_rows(file) if r["topic"] == topic], recipe, rng)
            stages[stage.__name__][1] += time.perf_counter() - started
        print(f"trained on {topic}", file=sys.stderr, flush=True)
    for stage_name, (steps, seconds) in stages.items():
        print(f"{stage_name}: {steps} steps, {1000 * seconds / steps:.1f} ms a step")


def check_mlx(folder: Path, bench: Bench, text: str) -> None:
    """Logits of mlx-lm against PyTorch; the rope base is given by hand, as mlx-lm skips `rope_parameters`."""
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        print("mlx: no OpenBLAS here; slower, not different")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    tokens = bench.prompt(text)
    with torch.no_grad():
        torch_logits = bench.model(torch.tensor([tokens])).logits[0].numpy()
    theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
    for name, extra in (("rope base given", {"rope_theta": theta}), ("as it loads by itself", {})):
        model, _ = load_model(folder, model_config=extra)
        # The file holds float16, and PyTorch computes in float32 here.
        model.set_dtype(mx.float32)
        mlx_logits = np.array(model(mx.array([tokens]))[0])
        print(f"mlx, {name}: greatest difference of logits {np.abs(torch_logits - mlx_logits).max():.2e}")


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESOURCES / "tiny")
    parser.add_argument("--sft-rate", type=float, default=2e-3)
    parser.add_argument("--dpo-rate", type=float, default=1e-4)
    parser.add_argument("--dpo-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="more only pays on an idle machine")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--mlx", action="store_true", help="also compare logits with mlx-lm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench, rows = Bench(options.folder), read_rows("heldout")
    print(f"{bench.model.num_parameters():,} parameters, {len(bench.tokenizer)} tokens")
    if options.mlx:
        check_mlx(options.folder, bench, rows[0]["prompt"])
    unseen = [
        (question, fact)
        for topic in TOPICS
        for fact in topic.facts
        for question in fact.questions
        if reserved(question)
    ]
    judged(bench, Random(0).sample(unseen, 60), "base, questions kept out of pretraining")
    before = judged(bench, facts_of(rows), "base, held-out rows")
    base = report("base", bench, rows, None)
    train(bench, Recipe(options.sft_rate, options.dpo_rate, dpo_steps=options.dpo_steps))
    report("tuned", bench, rows, base)
    after = judged(bench, facts_of(rows), "tuned, held-out rows")
    assert isinstance(bench.model, PeftModel)
    for index in Random(1).sample(range(len(rows)), options.samples):
        row = rows[index]
        print(f"\n{row['prompt']}\n  base   {before[index]}\n  tuned  {after[index]}\n  hers   {row['chosen']}")


if __name__ == "__main__":
    main()
