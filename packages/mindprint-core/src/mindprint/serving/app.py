"""The server's HTTP: routes, keys, limits, and answers as JSON or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mindprint.config import GenerationConfig
from mindprint.serving.batching import Batcher, Event, Finished, Job
from mindprint.serving.protocol import DEFAULT_LIMITS, Asked, Kind, Limits, RequestError, Writer, read_request

LEFT = 499
"""The status of a request whose client has left, as nginx numbers it. Nobody receives it."""


@dataclass(frozen=True)
class Settings:
    """The settings of the HTTP side.

    Args:
        models: The names of the models.
        defaults: The settings for fields that a request leaves out.
        limits: The bounds of a request.
        api_key: The key that every request under `/v1` must have, None for a server that only this machine reaches.
        hosts: The host names under which the server may be asked. Empty for any.
        timeout: The longest time for an answer, in seconds.
        body_timeout: The longest time for a request to arrive, in seconds.
        title: The name of the adapter, which the page shows.
        created: When the adapter was opened, in seconds since 1970.
    """

    models: tuple[str, ...]
    defaults: GenerationConfig
    limits: Limits = DEFAULT_LIMITS
    api_key: str | None = None
    hosts: Collection[str] = ()
    timeout: float = 600.0
    body_timeout: float = 30.0
    title: str = ""
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(batcher: Batcher, settings: Settings) -> ASGIApp:
    """Return the ASGI application. It answers while another thread runs `batcher.run()`."""
    endpoints = Endpoints(batcher, settings)
    routes = [
        Route("/", endpoints.page),
        Route("/health", endpoints.health),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model}", endpoints.model),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[..., Any]] = {
        RequestError: _refused,
        HTTPException: _not_found,
        Exception: _failed,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), settings)


class Guard:
    """Refuses requests before their body is read: from another site, or without the key."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except RequestError as error:
                await _json(error.body(), error.status)(scope, receive, send)
                return
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        settings = self._settings
        # A page of another site can make a browser send requests here, under a name that leads to this machine too (DNS
        # rebinding). The browser then names that site as host or origin.
        if settings.hosts and _host(f"//{request.headers.get('host', '')}") not in settings.hosts:
            raise RequestError("this server is not known under that host name", 403, code="forbidden_host")
        origin = request.headers.get("origin")
        if origin is not None and settings.hosts and _host(origin) not in settings.hosts:
            raise RequestError("requests from other sites are refused", 403, code="forbidden_origin")
        if settings.api_key is not None and request.url.path.startswith("/v1"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), settings.api_key.encode()):
                raise RequestError("the API key is missing or wrong", 401, code="invalid_api_key")


class Endpoints:
    """The handlers of the routes."""

    def __init__(self, batcher: Batcher, settings: Settings) -> None:
        self._batcher = batcher
        self._settings = settings

    async def page(self, _: Request) -> Response:
        page = (files("mindprint") / "resources" / "chat.html").read_text(encoding="utf-8")
        facts = {"models": self._settings.models, "title": self._settings.title, "key": bool(self._settings.api_key)}
        # In a script, `</` would end it.
        html = page.replace("__FACTS__", json.dumps(facts).replace("</", "<\\/"))
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"content-security-policy": policy, "x-frame-options": "DENY", "cache-control": "no-store"}
        return HTMLResponse(html, headers=headers)

    async def health(self, _: Request) -> Response:
        return _json({"status": "ok", "jobs": self._batcher.jobs})

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._settings.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._settings.models:
            raise RequestError("this model does not exist here", 404, param="model", code="model_not_found")
        return _json(self._model(name))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, "completion")

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._settings.created, "owned_by": "mindprint"}

    async def _answer(self, request: Request, kind: Kind) -> Response:
        settings = self._settings
        body = await self._body(request)
        asked = read_request(body, kind, settings.models, settings.defaults, settings.limits)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + settings.timeout

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._batcher.submit(asked, listen)
        writer = Writer(asked, secrets.token_hex(12), int(time.time()))
        incoming = Incoming(events, request, deadline)
        try:
            # Of a stream, too: errors that come before its first piece get HTTP's own status.
            event = await incoming.next()
            while not asked.stream and not isinstance(event, Finished):
                event = await incoming.next()
        except BaseException:
            job.cancel()
            incoming.close()
            raise
        if asked.stream:
            return EventStream(_events(asked, writer, event, incoming), job)
        # Done is done: it counts no longer, even if the model's thread has not put it away yet.
        job.cancel()
        incoming.close()
        assert isinstance(event, Finished)
        return _json(writer.whole(event.text, event.reason, event.usage))

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.limits.body_bytes
        too_large = RequestError(f"the body is larger than {limit} bytes", 413, code="body_too_large")
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated[:20]) > limit:
            raise too_large
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                async for part in request.stream():
                    parts.append(part)
                    # A body that is sent in chunks states no length.
                    if sum(map(len, parts)) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError("the request did not arrive in time", 408, code="timeout") from None
        except ClientDisconnect:
            raise RequestError("the client has left", LEFT) from None
        return b"".join(parts)


class Incoming:
    """The events of one answer, until its client leaves or its time is up."""

    def __init__(self, events: asyncio.Queue[Event], request: Request, deadline: float) -> None:
        self._events = events
        self._deadline = deadline
        # The body has been read, so the next message can only be that the client has left.
        self._left: asyncio.Future[Any] = asyncio.ensure_future(request.receive())

    async def next(self) -> str | Finished:
        """Return the next event. Raises `RequestError` for a failure, and if there will be none."""
        event = asyncio.ensure_future(self._events.get())
        remaining = max(0.0, self._deadline - asyncio.get_running_loop().time())
        try:
            done, _ = await asyncio.wait({event, self._left}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not event.done():
                event.cancel()
        if event in done:
            return _sound(event.result())
        if self._left in done:
            raise RequestError("the client has left", LEFT)
        raise RequestError("the answer took too long", 504, code="timeout")

    def close(self) -> None:
        """Wait for the client no longer."""
        self._left.cancel()


class EventStream(StreamingResponse):
    """A stream of events that gives its job up when it ends, in whichever way."""

    def __init__(self, content: AsyncIterator[str], job: Job) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(asked: Asked, writer: Writer, first: str | Finished, incoming: Incoming) -> AsyncIterator[str]:
    if opening := writer.opening():
        yield _event(opening)
    event = first
    try:
        while not isinstance(event, Finished):
            yield _event(writer.piece(event))
            event = await incoming.next()
        yield _event(writer.ending(event.reason))
        if asked.usage:
            yield _event(writer.usage(event.usage))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        # The status has been sent already, so the error is an event, as OpenAI does it.
        if error.status != LEFT:
            yield _event(error.body())
    finally:
        incoming.close()


def _sound(event: Event) -> str | Finished:
    if isinstance(event, RequestError):
        raise event
    return event


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _json(value: dict[str, Any], status: int = 200) -> Response:
    headers = {"www-authenticate": "Bearer"} if status == 401 else {"retry-after": "1"} if status == 429 else None
    return JSONResponse(value, status, headers)


def _host(url: str) -> str:
    """Return the host of a URL in small letters, empty for any other text."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _refused(_: Request, error: RequestError) -> Response:
    return _json(error.body(), error.status)


async def _not_found(_: Request, error: HTTPException) -> Response:
    messages = {
        404: "this address is unknown here",
        405: "this address takes the other method: GET instead of POST, or POST instead of GET",
    }
    refusal = RequestError(messages.get(error.status_code, str(error.detail)), error.status_code, code="not_found")
    return _json(refusal.body(), error.status_code)


async def _failed(_: Request, __: Exception) -> Response:
    return _json(RequestError("the server made a mistake", 500, code="internal_error").body(), 500)
