"""Answers that end in a loop, by repetition penalty: how many, and the price of the penalty.

    python benchmarks/loops.py PATH [--penalties 1 1.05 1.1 1.2] [--prompts 32] [--tokens 128] [--backend torch]

PATH is the folder of a model, such as SmolLM2-135M-Instruct, a project, or an adapter. The prompts are those that are
held out in the sample of `mindprint init`. They are answered greedily, as `mindprint generate` does. A loop is what
`mindprint.text.ngrams.is_loop` says. The log-prob is the mean of an answer's tokens under the model
without a penalty: it falls as far as the penalty forces other words on the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from mindprint.config import BackendConfig
from mindprint.contract import Generation, Int32
from mindprint.data.render import SftExample
from mindprint.data.row_files import Origin
from mindprint.models.likelihoods import sum_texts
from mindprint.runs.opened import OpenedAdapter, OpenedModel, is_model_folder, open_adapter, open_model
from mindprint.text.ngrams import is_loop
from mindprint.text.words import words


def main() -> int:
    options = arguments()
    opening = open_model if is_model_folder(options.path) else open_adapter
    lines = files("mindprint").joinpath("resources", "curriculum", "heldout.jsonl").read_text("utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:: max(1, len(lines) // options.prompts)]]
    with opening(options.path, BackendConfig(type=options.backend, dtype="float32")) as opened:
        for adapter in (False, True) if isinstance(opened, OpenedAdapter) else (False,):
            print("tuned model" if adapter else "base model" if isinstance(opened, OpenedAdapter) else "model")
            for penalty in options.penalties:
                report(opened, prompts[: options.prompts], penalty, options.tokens, adapter=adapter)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="folder of a model, a project, or an adapter")
    parser.add_argument("--penalties", type=float, nargs="+", default=[1.0, 1.05, 1.1, 1.2])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--backend", default="torch")
    return parser.parse_args()


def report(opened: OpenedModel, asked: Sequence[str], penalty: float, tokens: int, *, adapter: bool) -> None:
    """Print the figures of greedy answers with a repetition penalty."""
    settings = opened.config.generation.changed(temperature=0.0, max_new_tokens=tokens, repetition_penalty=penalty)
    prompts = [opened.render(prompt) for prompt in asked]
    made = opened.backend.generate(opened.model, prompts, opened.sampling(settings), adapter=adapter)
    texts = [words(opened.tokenizer.answer_text(answer.tokens.tolist())) for answer in made]
    loops, ended = sum(map(is_loop, texts)), sum(answer.stop_reason == "stop" for answer in made)
    length = sum(map(len, texts)) / len(texts)
    log_prob = mean_log_prob(opened, prompts, made, adapter=adapter)
    print(
        f"  repetition penalty {penalty:4.2f}: {loops:3d} of {len(made)} answers are loops, {ended:3d} end by "
        f"themselves, {length:5.1f} words, {log_prob:6.3f} nats a token",
        flush=True,
    )


def mean_log_prob(opened: OpenedModel, prompts: Sequence[Int32], made: Sequence[Generation], *, adapter: bool) -> float:
    """Return the mean log-prob of the tokens of answers under the model that gave them, in nats."""
    examples = []
    for prompt, answer in zip(prompts, made, strict=True):
        tokens = np.concatenate([prompt, answer.tokens]).astype(np.int32)
        examples.append(SftExample("", tokens, np.arange(len(tokens)) >= len(prompt), Origin("an answer", 0)))
    sums = sum_texts(opened.backend, opened.model, examples, opened.tokenizer.pad_id, adapter=adapter)
    return float(sums.sum()) / sum(len(answer.tokens) for answer in made)


if __name__ == "__main__":
    raise SystemExit(main())
