"""The time to the first token of each turn of a chat, with the caches of earlier turns and without them.

    python benchmarks/chat_turns.py MODEL [--backend torch] [--turns 5] [--length 100] [--tokens 16]

MODEL is the folder of a base model, such as SmolLM2-135M-Instruct. Each turn adds `--length` random tokens to the
history and gets an answer of `--tokens` tokens. The time is that of the processor, and the best of two chats. The exit
code says whether both kinds of chat got the same answers, and whether the last turn is at least twice as fast.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from mindprint.contract import LoadedModel, ModelSpec, Sampling
from mindprint.plugins.backend import Backend, load_backend


def main() -> int:
    """Print a line for each turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a base model")
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--length", type=int, default=100, help="tokens that a turn adds")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of an answer")
    options = parser.parse_args()
    backend = load_backend(options.backend)
    model = backend.load_model(ModelSpec(options.model, "cpu", "float32"))
    times, answers = {}, {}
    for keeps in (False, True):
        chats = [chat(backend, model, options, keeps=keeps) for _ in range(2)]
        times[keeps] = np.min([seconds for seconds, _ in chats], axis=0)
        answers[keeps] = chats[0][1]
    print(f"{options.backend}: milliseconds of processor to the first token, of a history that is read again and kept")
    for turn, (again, kept) in enumerate(zip(times[False], times[True], strict=True)):
        print(f"  turn {turn + 1}{1000 * again:9.0f}{1000 * kept:9.0f}")
    same = answers[False] == answers[True]
    print("the answers are the same" if same else "the answers DIFFER")
    return 0 if same and times[False][-1] >= 2 * times[True][-1] else 1


def chat(
    backend: Backend, model: LoadedModel, options: argparse.Namespace, *, keeps: bool
) -> tuple[list[float], list[list[int]]]:
    """Return each turn's seconds to its first token, and the answers."""
    rng = np.random.default_rng(0)
    history, seconds, answers = np.zeros(0, np.int32), [], []
    model.handle.kept.forget()
    for _ in range(options.turns):
        history = np.concatenate([history, rng.integers(100, 10_000, options.length)]).astype(np.int32)
        if not keeps:
            model.handle.kept.forget()
        times: list[float] = []
        start = time.process_time()
        (answer,) = backend.generate(
            model,
            [history],
            Sampling(options.tokens, ()),
            on_token=lambda *_, times=times: times.append(time.process_time()),
        )
        seconds.append(times[0] - start)
        answers.append(answer.tokens.tolist())
        history = np.concatenate([history, answer.tokens])
    return seconds, answers


if __name__ == "__main__":
    sys.exit(main())
