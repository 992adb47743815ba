"""The first token of a streamed answer of `mindprint serve`, next to the framework's own forward pass over the prompt.

    python benchmarks/first_token.py MODEL [--backend torch] [--length 128] [--turns 5]

MODEL is the folder of a base model, such as SmolLM2-135M-Instruct. Each backend is measured in its own process. The
prefill is one pass of the framework over the prompt, with a cache and the logits of the last token: `transformers`,
mlx-lm, and `llama_decode`. The first token is measured from the request to the first piece of text that a client on
loopback gets. Figures are processor time of the process, the least of all turns. The exit code says whether each first
token takes at most 1.5 times its prefill.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from each_backend import each_backend
from mindprint.config import BackendConfig
from mindprint.contract import Int32
from mindprint.runs.opened import OpenedModel, open_model
from mindprint.serving.app import Settings, make_app
from mindprint.serving.batching import Batcher
from mindprint.serving.server import listen, run_server

AT_MOST = 1.5
TEXT = "The harbour was quiet in the morning, and nobody had told the gulls that it was Sunday. "


def main() -> int:
    """Print both figures of every backend. Exit with 1 if a first token takes longer than 1.5 prefills."""
    options = arguments()
    if options.measure:
        print(json.dumps(measured(options)))
        return 0
    holds = []
    for backend, (tokens, prefill, first) in each_backend(options.backend or PREFILL):
        holds.append(first <= AT_MOST * prefill)
        print(
            f"{'ok' if holds[-1] else 'MISSED'}: {backend}, a prompt of {tokens} tokens: prefill {prefill:.3f} s, "
            f"first token through serve {first:.3f} s, {first / prefill:.2f} times as long, at most {AT_MOST}",
            flush=True,
        )
    return 0 if all(holds) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a base model")
    parser.add_argument("--backend", action="append", choices=PREFILL, help="may be given again; default: all three")
    parser.add_argument("--length", type=int, default=128, help="words of the prompt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--measure", choices=PREFILL, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace) -> tuple[int, float, float]:
    """Return the tokens of the prompt, the time of its prefill, and the time to the first token."""
    words = (TEXT * options.length).split()
    text = " ".join(words[: options.length])
    section = BackendConfig(type=options.measure, device="cpu", dtype="float32")
    with open_model(options.model, section) as opened:
        prompt = opened.render(text, data_format="raw")
        first = served(opened, text, options.turns)
        run = PREFILL[options.measure](options.model, opened)
        run(prompt)  # warms up
        times = []
        for _ in range(options.turns):
            start = time.process_time()
            run(prompt)
            times.append(time.process_time() - start)
    return len(prompt), min(times), first


def served(opened: OpenedModel, text: str, turns: int) -> float:
    """Return the least processor time to the first piece of an answer that a client of the server gets."""
    batcher = Batcher(opened, {"voice": False})
    app = make_app(batcher, Settings(("voice",), opened.config.generation))
    body = json.dumps({"model": "voice", "prompt": text, "stream": True, "max_tokens": 4, "temperature": 0})
    times: list[float] = []

    def ask(address: str) -> None:
        try:
            for _ in range(turns + 1):
                connection = http.client.HTTPConnection(address.removeprefix("http://"))
                start = time.process_time()
                connection.request("POST", "/v1/completions", body)
                response = connection.getresponse()
                while b'"text": "' not in (line := response.readline()) or b'"text": ""' in line:
                    if not line:
                        raise SystemExit("the server sent no text")
                times.append(time.process_time() - start)
                response.read()
                connection.close()
        finally:
            batcher.close()

    client: list[threading.Thread] = []

    def start_client(address: str) -> None:
        client.append(threading.Thread(target=ask, args=(address,)))
        client[0].start()

    # The model computes in this thread, as in `mindprint serve`.
    with listen("127.0.0.1", 0) as listening:
        run_server(app, batcher, listening, start_client)
    client[0].join()
    return min(times[1:])  # the first turn warms up


Prefill = Callable[[Int32], object]


def with_transformers(folder: str, _: OpenedModel) -> Prefill:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def run(prompt: Int32) -> object:
        with torch.no_grad():
            return model(torch.from_numpy(prompt.astype(np.int64))[None], use_cache=True, logits_to_keep=1)

    return run


def with_mlx_lm(folder: str, _: OpenedModel) -> Prefill:
    import mlx.core as mx  # noqa: PLC0415
    from mlx_lm import load  # noqa: PLC0415
    from mlx_lm.models.cache import make_prompt_cache  # noqa: PLC0415

    mx.set_default_device(mx.cpu)
    model: Any = load(folder)[0]
    model.set_dtype(mx.float32)

    def run(prompt: Int32) -> object:
        logits = model(mx.array(prompt)[None], cache=make_prompt_cache(model))
        mx.eval(logits[:, -1])
        return logits

    return run


def with_llama_cpp(_: str, opened: OpenedModel) -> Prefill:
    model: Any = opened.model.handle

    def run(prompt: Int32) -> object:
        with model.context(1, len(prompt) + 1, adapter=False) as context:
            return list(context.decode(0, prompt, 0, [len(prompt) - 1]))

    return run


PREFILL = {"torch": with_transformers, "mlx": with_mlx_lm, "llamacpp": with_llama_cpp}

if __name__ == "__main__":
    sys.exit(main())
