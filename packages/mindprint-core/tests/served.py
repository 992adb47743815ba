"""A server on any backend: made in this process or on loopback, and what every backend must show through it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from mindprint.adapter.peft_format import write_adapter
from mindprint.contract import AdapterState, LoraConfig, LoraFactors
from mindprint.runs.opened import OpenedModel
from mindprint.serving.app import Settings, make_app
from mindprint.serving.batching import Batcher
from mindprint.serving.protocol import Limits
from mindprint.serving.server import allowed_hosts, listen, run_server

SIDES = {"voice": True, "base": False}
LIMITS = Limits(body_bytes=2000, new_tokens=20000)
PROMPTS = [f"sea {n}?" for n in range(8)]


def write_tiny_voice(folder: Path) -> Path:
    """Write a random adapter on the embedded model, strong enough that its answers are not the base's."""
    return write_random_voice(folder, "builtin:tiny", layers=5, width=192, rows={"q_proj": 192, "v_proj": 64})


def write_random_voice(folder: Path, base: str, layers: int, width: int, rows: Mapping[str, int]) -> Path:
    """Write a random adapter on the projections of attention that have these numbers of rows."""
    rng, tensors = np.random.default_rng(0), dict[str, LoraFactors]()
    for layer in range(layers):
        for name, size in rows.items():
            a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, width), (size, 4)))
            tensors[f"model.layers.{layer}.self_attn.{name}"] = LoraFactors(a / width**0.5, b / 8)
    folder.mkdir()
    write_adapter(folder, AdapterState(LoraConfig(4, 8.0, tuple(tensors)), tensors), base)
    return folder


@contextmanager
def running(opened: OpenedModel, **settings: Any) -> Iterator[Batcher]:
    """A queue whose model computes in another thread."""
    batcher = Batcher(opened, SIDES, LIMITS, **settings)
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    try:
        yield batcher
    finally:
        batcher.close()
        thread.join(timeout=10)


def settings(opened: OpenedModel, **changes: Any) -> Settings:
    return Settings(("voice", "base"), opened.config.generation, LIMITS, **changes)


def in_process(app: Any, work: Callable[[Any], Any]) -> Any:
    """Return the result of `work(client)`, a coroutine, with a client of the application."""

    async def run() -> Any:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await work(client)

    return asyncio.run(run())


def chat(prompt: str = "sea 1?", model: str = "voice", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}


def text_of(response: Any) -> str:
    """Return the text of an answer."""
    return str(response.json()["choices"][0]["message"]["content"])


def assert_served_as_generated(opened: OpenedModel, new_tokens: int = 6) -> None:
    """Ask for each side's answers, one alone and eight at once. All must be those of `generate`."""
    asked = opened.config.generation.changed(max_new_tokens=new_tokens)
    expected = {side: [a.text for a in opened.answer(PROMPTS, asked, adapter=SIDES[side])] for side in SIDES}
    assert expected["voice"] != expected["base"]
    with running(opened) as batcher:

        async def ask(client: Any) -> None:
            def post(prompt: str, side: str) -> Any:
                return client.post("/v1/chat/completions", json=chat(prompt, side, max_tokens=new_tokens))

            for side in SIDES:
                assert text_of(await post(PROMPTS[2], side)) == expected[side][2]
                together = await asyncio.gather(*(post(prompt, side) for prompt in PROMPTS))
                assert [text_of(answer) for answer in together] == expected[side]

        in_process(make_app(batcher, settings(opened)), ask)
        # The first of eight may start alone. The others share a batch.
        assert batcher.batches[0] == 1
        assert max(batcher.batches) >= 7
        assert batcher.jobs == 0


MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"temperature": 1.5, "top_p": 0.6, "seed": 2, "max_tokens": 4},
    {"temperature": 2.0, "top_k": 5, "seed": 3},
    {"repetition_penalty": 1.5},
    {"stop": ["e", "a"]},
    {"max_tokens": 1},
)
"""Settings of eight requests, no two alike."""


def assert_requests_with_unlike_settings_are_answered_as_alone(opened: OpenedModel) -> None:
    """Ask eight times with unlike settings, first one after the other and then at once."""
    requests = [{"max_tokens": 6, **settings} for settings in MIXED]
    with running(opened) as batcher:

        async def ask(client: Any) -> None:
            def post(prompt: str, request: dict[str, Any]) -> Any:
                return client.post("/v1/chat/completions", json=chat(prompt, **request))

            pairs = list(zip(PROMPTS, requests, strict=True))
            alone = [text_of(await post(*pair)) for pair in pairs]
            together = await asyncio.gather(*(post(*pair) for pair in pairs))
            assert [text_of(answer) for answer in together] == alone
            # One prompt with the same settings: each of them is heeded.
            of_one = await asyncio.gather(*(post(PROMPTS[0], request) for request in requests))
            assert len({text_of(answer) for answer in of_one}) >= 6

        in_process(make_app(batcher, settings(opened)), ask)
        assert batcher.batches[: len(MIXED)] == [1] * len(MIXED)
        assert max(batcher.batches) >= 7


def malformed(count: int) -> Iterator[bytes]:
    """Bodies that are no request: damaged ones, wrong values in every field, and noise."""
    rng = random.Random(1)
    values = [None, True, -1, 0, 1e308, 10**40, "", "x" * 300, [], [[]], {}, {"a": None}, "\x00", [None], "voice"]
    names = ["model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "tools", "n"]
    sound = json.dumps(chat(max_tokens=1)).encode()
    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield rng.randbytes(rng.randrange(60))
        elif kind == 1:
            yield sound[: rng.randrange(len(sound) - 1)]
        elif kind == 2:
            yield json.dumps(chat(max_tokens=1) | {rng.choice(names): rng.choice(values), "model": "nobody"}).encode()
        else:
            messages = [rng.choice([{"role": rng.choice(values), "content": rng.choice(values)}, *values])]
            yield json.dumps(chat() | {"messages": messages, "max_tokens": rng.choice([0, -5, "1", 2**70])}).encode()


def assert_malformed_requests_are_refused(opened: OpenedModel, count: int) -> None:
    """Send bodies that are no request. Each must be refused with a message, and the server must answer afterwards."""
    with running(opened) as batcher:

        async def ask(client: Any) -> None:
            for body in malformed(count):
                got = await client.post("/v1/chat/completions", content=body)
                assert 400 <= got.status_code < 500, body
                assert got.json()["error"]["message"]
            assert (await client.post("/v1/chat/completions", json=chat(max_tokens=3))).status_code == 200

        in_process(make_app(batcher, settings(opened)), ask)
        assert batcher.jobs == 0


@contextmanager
def real_server(opened: OpenedModel) -> Iterator[tuple[Batcher, str]]:
    """A server on loopback, and its address."""
    batcher, ready = Batcher(opened, SIDES, LIMITS), threading.Event()
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    app = make_app(batcher, settings(opened, hosts=allowed_hosts("127.0.0.1", None)))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=run_server, args=(app, batcher, listening, on_ready), daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield batcher, addresses[0]
        finally:
            batcher.close()
            thread.join(timeout=15)
            assert not thread.is_alive()


def assert_leaving_frees_a_place(batcher: Batcher, address: str, max_tokens: int) -> None:
    """Close the connection of a request that is being answered. Its place must be free within a second."""
    for stream in (False, True):
        leave_after_a_while(address, chat(max_tokens=max_tokens, stream=stream), batcher)
        start = time.perf_counter()
        while batcher.jobs:
            assert time.perf_counter() - start < 1
            time.sleep(0.01)


def leave_after_a_while(address: str, body: dict[str, Any], batcher: Batcher) -> None:
    """Send a request, wait until it is answered, and close the connection without reading the answer."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        while not batcher.jobs:
            time.sleep(0.01)
        time.sleep(0.1)
        assert batcher.jobs == 1
