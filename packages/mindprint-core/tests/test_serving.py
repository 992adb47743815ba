"""The server on the toy backend: the same answers as `generate`, shared batches, and clients of every kind."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_voice import opened_voice

from mindprint.config import GenerationConfig
from mindprint.data.rows import Message
from mindprint.errors import ConfigError, GuardError, RunError
from mindprint.runs.opened import OpenedAdapter
from mindprint.serving.batching import Batcher, Event, Finished
from mindprint.serving.protocol import Asked, Limits, RequestError
from mindprint.serving.server import allowed_hosts, check_address, listen, serve

httpx = pytest.importorskip("httpx2")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from served import (  # noqa: E402
    LIMITS,
    PROMPTS,
    SIDES,
    assert_leaving_frees_a_place,
    assert_malformed_requests_are_refused,
    assert_served_as_generated,
    chat,
    in_process,
    real_server,
    running,
    settings,
)

from mindprint.serving.app import make_app  # noqa: E402

KEY = "a-long-enough-key"


@pytest.fixture(scope="module")
def opened(toy_site: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedAdapter]:
    """A trained adapter."""
    with opened_voice(toy_site, toy_model, tmp_path_factory.mktemp("serving")) as adapter:
        yield adapter


def events(text: str) -> list[Any]:
    lines = text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_answers_are_those_of_generate_alone_and_eight_at_once(opened: OpenedAdapter) -> None:
    assert_served_as_generated(opened)


def test_a_stream_is_the_answer_in_pieces(opened: OpenedAdapter) -> None:
    (answer,) = opened.answer(["sea 1?"])
    with running(opened) as batcher:

        async def ask(client: Any) -> None:
            body = chat(stream=True, stream_options={"include_usage": True})
            got = await client.post("/v1/chat/completions", json=body)
            assert got.headers["content-type"].startswith("text/event-stream")
            first, *pieces, last, usage = events(got.text)
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == answer.text
            assert last["choices"][0]["finish_reason"] == answer.stop_reason
            assert usage["usage"]["completion_tokens"] == 6
            assert usage["choices"] == []
            body = {"model": "voice", "prompt": "sea", "max_tokens": 3}
            whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
            streamed = events((await client.post("/v1/completions", json=body | {"stream": True})).text)
            assert "".join(event["choices"][0]["text"] for event in streamed) == whole

        in_process(make_app(batcher, settings(opened)), ask)


def collect(batcher: Batcher, *asked: Asked) -> list[list[Event]]:
    """Return the events of requests that are submitted at once."""
    heard: list[list[Event]] = [[] for _ in asked]
    done = threading.Semaphore(0)

    def listener(place: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            heard[place].append(event)
            if not isinstance(event, str):
                done.release()

        return listen

    for place, request in enumerate(asked):
        batcher.submit(request, listener(place))
    for _ in asked:
        assert done.acquire(timeout=30)
    return heard


def asked(prompt: str, **changes: Any) -> Asked:
    generation = GenerationConfig(max_new_tokens=6, **changes.pop("generation", {}))
    return Asked("chat", changes.pop("model", "voice"), (Message("user", prompt),), generation, **changes)


def test_requests_for_one_model_share_a_batch(opened: OpenedAdapter) -> None:
    drawn = {"temperature": 1.5}
    with running(opened) as batcher:
        heard = collect(
            batcher,
            *(asked(prompt) for prompt in PROMPTS[:3]),
            asked("sea", model="base"),
            asked("sea", generation=drawn, seed=5),
            *(asked("sea", generation=drawn) for _ in range(3)),
        )
        assert sorted(batcher.batches) == [1, 7]
        assert all(isinstance(events[-1], Finished) for events in heard)
        # The same words three times, without a seed: three draws.
        assert len({events[-1].text for events in heard[-3:] if isinstance(events[-1], Finished)}) > 1
        (drawn_alone,) = opened.answer(["sea"], GenerationConfig(max_new_tokens=6, temperature=1.5), seed=5)
        assert isinstance(heard[4][-1], Finished)
        assert heard[4][-1].text == drawn_alone.text


def test_a_stop_string_ends_an_answer(opened: OpenedAdapter) -> None:
    (answer,) = opened.answer(["sea 1?"])
    stop = answer.text[3:5]
    with running(opened) as batcher:
        ((*pieces, last),) = collect(batcher, asked("sea 1?", stop=(stop,)))
    assert isinstance(last, Finished)
    assert last.text == "".join(map(str, pieces)) == answer.text.partition(stop)[0]
    assert last.reason == "stop"


def test_what_only_the_model_can_refuse(opened: OpenedAdapter) -> None:
    batcher = Batcher(opened, SIDES, Limits(context=20))
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    ((refused,), (*_, fine)) = collect(batcher, asked("sea " * 20), asked("sea"))
    assert isinstance(refused, RequestError)
    assert refused.code == "context_length_exceeded"
    assert isinstance(fine, Finished)
    batcher.close()
    thread.join(timeout=10)
    with pytest.raises(RequestError, match="is being stopped"):
        batcher.submit(asked("sea"), lambda _: None)


def test_a_backend_that_fails_fails_its_requests_and_nothing_else(
    opened: OpenedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(opened) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(opened.backend, "generate", _out_of_memory)
            ((failed,),) = collect(batcher, asked("sea"))
        assert isinstance(failed, RequestError)
        assert (failed.status, str(failed)) == (500, "the model failed: no room")
        ((*_, last),) = collect(batcher, asked("sea"))
        assert isinstance(last, Finished)


def _out_of_memory(*_: Any, **__: Any) -> None:
    raise MemoryError("no room")


def test_too_many_requests_are_told_to_come_again(opened: OpenedAdapter) -> None:
    # Nothing is answered: the model's thread does not run.
    batcher = Batcher(opened, SIDES, LIMITS, most_jobs=2)
    first, _ = (batcher.submit(asked(prompt), lambda _: None) for prompt in PROMPTS[:2])
    with pytest.raises(RequestError, match="2 requests are waiting already") as refused:
        batcher.submit(asked("sea"), lambda _: None)
    assert refused.value.status == 429
    first.cancel()
    assert batcher.jobs == 1
    batcher.submit(asked("sea"), lambda _: None)


def test_addresses_keys_and_other_sites(opened: OpenedAdapter) -> None:
    with running(opened) as batcher:

        async def ask(client: Any) -> None:
            models = (await client.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["voice", "base"]
            assert (await client.get("/v1/models/base")).json()["object"] == "model"
            assert (await client.get("/health")).json() == {"status": "ok", "jobs": 0}
            page = await client.get("/")
            assert "__FACTS__" not in page.text
            assert "default-src 'none'" in page.headers["content-security-policy"]
            for method, path, status in (
                ("GET", "/v1/models/gpt", 404), ("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405),
                ("PUT", "/health", 405),
            ):  # fmt: skip
                got = await client.request(method, path)
                assert (got.status_code, set(got.json()["error"])) == (status, {"message", "type", "param", "code"})
            for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"host": "a:b:c["}):
                got = await client.post("/v1/chat/completions", json=chat(), headers=headers)
                assert got.status_code == 403
            large = await client.post("/v1/chat/completions", json=chat("sea" * 1000))
            assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")

        in_process(make_app(batcher, settings(opened, hosts=allowed_hosts("127.0.0.1", None))), ask)

        async def with_a_key(client: Any) -> None:
            for given, status in (("", 401), ("Bearer wrong", 401), ("Bearer é", 401), (f"Bearer {KEY}", 200)):
                got = await client.get("/v1/models", headers={"authorization": given.encode()})
                assert got.status_code == status
            assert (await client.get("/health", headers={"host": "any.example"})).status_code == 200

        in_process(make_app(batcher, settings(opened, api_key=KEY)), with_a_key)


def test_an_answer_that_takes_too_long(opened: OpenedAdapter) -> None:
    with running(opened) as batcher:

        async def ask(client: Any) -> None:
            body = chat(max_tokens=20000)
            late = await client.post("/v1/chat/completions", json=body)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
            stream = await client.post("/v1/chat/completions", json=body | {"stream": True})
            assert '"code": "timeout"' in stream.text.rstrip().splitlines()[-1]

        in_process(make_app(batcher, settings(opened, timeout=0.2)), ask)
        assert batcher.jobs == 0


def test_a_thousand_malformed_requests(opened: OpenedAdapter, capfd: pytest.CaptureFixture[str]) -> None:
    assert_malformed_requests_are_refused(opened, 1000)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("default")
def test_the_openai_client_and_clients_that_leave(opened: OpenedAdapter) -> None:
    openai = pytest.importorskip("openai")
    expected = [answer.text for answer in opened.answer(PROMPTS)]
    with real_server(opened) as (batcher, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["voice", "base"]
        ask: Any = chat(PROMPTS[0])
        assert client.chat.completions.create(**ask).choices[0].message.content == expected[0]
        pieces = client.chat.completions.create(**ask, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected[0]
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            client.chat.completions.create(**{**ask, "model": "gpt-4o"})

        async def eight() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as many:
                made = await asyncio.gather(*(many.chat.completions.create(**chat(prompt)) for prompt in PROMPTS))
                return [answer.choices[0].message.content for answer in made]

        assert asyncio.run(eight()) == expected
        client.close()
        assert_leaving_frees_a_place(batcher, address, max_tokens=20000)
        assert httpx.get(f"{address}/health").json()["jobs"] == 0


def test_others_need_a_key() -> None:
    for host in ("0.0.0.0", "192.168.0.7", "my-machine", "::"):
        with pytest.raises(ConfigError, match=f"--host {host}: others could use this server: .* --api-key"):
            check_address(host, None)
        check_address(host, KEY)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, None)
    with pytest.raises(ConfigError, match="at least 8 printable"):
        check_address("127.0.0.1", "short")


def test_before_anything_is_loaded(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: cannot be listened on: .* choose another --port"):
            serve(tmp_path, port=port)
    with pytest.raises(ConfigError, match=r"--host no\.such\.host\.invalid: cannot be listened on"):
        serve(tmp_path, host="no.such.host.invalid", api_key=KEY)
    with pytest.raises(RunError, match="no such folder"):
        serve(tmp_path / "nothing", port=0)


def test_an_adapter_that_does_not_verify_is_refused(opened: OpenedAdapter) -> None:
    folder = opened.located.adapter
    config = folder / "adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace('"lora_alpha": 16', '"lora_alpha": 32'))
    try:
        with pytest.raises(
            GuardError,
            match="does not verify: .* 2 times as strongly as trained .*; --no-verify serves it all the same",
        ):
            serve(folder, port=0)
        with pytest.raises(KeyError):
            serve(folder, port=0, verified=False, on_ready=_leave)
    finally:
        config.write_text(before)


def _leave(address: str) -> None:
    raise KeyError(address)
