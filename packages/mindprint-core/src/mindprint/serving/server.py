"""The running server: an adapter verified and opened, the model in this thread, HTTP in another."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from mindprint.api import verify
from mindprint.api.options import Notices, OnNotice, backend_section
from mindprint.errors import ConfigError, GuardError, MissingLibraryError
from mindprint.models.positions import longest_sequence
from mindprint.runs import opened as runs_opened
from mindprint.runs.opened import OpenedModel
from mindprint.serving.batching import Batcher
from mindprint.serving.protocol import Limits

LOOPBACK = "127.0.0.1"

CONNECTIONS = 256
"""The most connections at once. Further ones are refused by uvicorn itself."""


def serve(
    path: str | PathLike[str],
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    api_key: str | None = None,
    verified: bool = True,
    backend: str | None = None,
    device: str | None = None,
    model: str | None = None,
    max_tokens: int = 4096,
    max_together: int = 8,
    max_requests: int = 64,
    timeout: float = 600.0,
    on_notice: OnNotice | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a trained adapter, and its base model, with OpenAI's API, until interrupted.

    Args:
        path: A project (its newest complete run), the folder of a run or of an adapter, or that of a whole model.
        host: The address to listen on. Any other than that of this machine alone needs `api_key`.
        port: The port, 0 for any free one.
        api_key: The key that requests must have.
        verified: Refuse an adapter that does not verify. False serves it without a look.
        backend: `torch`, `mlx`, or any installed backend. Default: the run's.
        device: `cpu`, `cuda`, `mps`, `metal`. Default: the run's.
        model: Where the base model is, if not where the run or the adapter says.
        max_tokens: The longest answer that a request may ask for.
        max_together: The most requests that are answered in one batch.
        max_requests: The most requests that wait or are being answered.
        timeout: The longest time for an answer, waiting included, in seconds.
        on_notice: Receives messages about loading as they come.
        on_ready: Receives the server's address when it can be asked.

    Raises:
        ConfigError: The address needs a key, or cannot be listened on.
        GuardError: The adapter does not verify.
        MissingLibraryError: The extra `serve` is not installed.
        MindprintError: The adapter or its base model cannot be found, read or loaded.
    """
    check_address(host, api_key)
    _uvicorn()
    notices = Notices(on_notice)
    with ExitStack() as closing:
        # Before the model is loaded, which takes long: a busy port is known at once.
        listening = closing.enter_context(listen(host, port))
        is_model = runs_opened.is_model_folder(path)
        if verified and not is_model:
            result = verify(path, model=model, backend=backend, device=device, on_notice=on_notice)
            if not result.ok:
                failures = "; ".join(finding.message for finding in result.findings if finding.fails)
                raise GuardError(f"{os.fspath(path)}: does not verify: {failures}; --no-verify serves it all the same")
        opening = runs_opened.open_model if is_model else runs_opened.open_adapter
        opened = closing.enter_context(opening(path, backend_section(backend, device), model=model, notice=notices))
        limits = Limits(new_tokens=max_tokens, context=longest_sequence(opened.base.path))
        # A merged model is the voice itself. Its base is elsewhere.
        sides = {"voice": False} if is_model else {"voice": True, "base": False}
        batcher = Batcher(opened, sides, limits, most_together=max_together, most_jobs=max_requests)
        app = _app(
            batcher, opened, sides, limits, api_key, allowed_hosts(host, api_key), timeout, Path(path).resolve().name
        )
        run_server(app, batcher, listening, on_ready)


def run_server(
    app: Any, batcher: Batcher, listening: socket.socket, on_ready: Callable[[str], None] | None = None
) -> None:
    """Answer requests until the queue is closed or the user interrupts: the model in this thread, HTTP in another."""
    uvicorn = _uvicorn()
    config = uvicorn.Config(
        app, log_level="error", access_log=False, lifespan="off", limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5, timeout_graceful_shutdown=5, server_header=False, ws="none",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True, name="http")
    thread.start()
    host, port = listening.getsockname()[:2]
    try:
        if on_ready is not None:
            on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        # The model stays in the thread that loaded it, as frameworks expect. Ctrl-C comes here, too.
        batcher.run()
    except KeyboardInterrupt:
        # This is how a server is meant to end.
        pass
    finally:
        batcher.close()
        server.should_exit = True
        thread.join(timeout=10)


def check_address(host: str, api_key: str | None) -> None:
    """Raise `ConfigError` for an address that others can reach without a key, and for a key that is too short."""
    if api_key is not None and (len(api_key) < 8 or not api_key.isascii() or not api_key.isprintable()):
        raise ConfigError("--api-key: needs at least 8 printable ASCII characters")
    if api_key is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host}: others could use this server: give it a key with --api-key, or leave --host out"
        )


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str, api_key: str | None) -> Collection[str]:
    """Return the names under which a server without a key may be asked. With a key it may have any name."""
    return () if api_key is not None else {"localhost", "127.0.0.1", "::1", host}


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `ConfigError` for a busy port, and for an address that is not here."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: cannot be listened on: {error.strerror or error}") from None
    try:
        # Without it a port stays busy for a minute after a server has ended.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)
    except OSError as error:
        listening.close()
        raise ConfigError(f"{host}:{port}: cannot be listened on: {error.strerror}; choose another --port") from None
    return listening


def _app(
    batcher: Batcher,
    opened: OpenedModel,
    sides: dict[str, bool],
    limits: Limits,
    api_key: str | None,
    hosts: Collection[str],
    timeout: float,
    title: str,
) -> Any:
    from mindprint.serving.app import Settings, make_app  # noqa: PLC0415 (needs the extra)

    defaults = opened.config.generation
    return make_app(batcher, Settings(tuple(sides), defaults, limits, api_key, hosts, timeout, title=title))


def _uvicorn() -> Any:
    try:
        import starlette  # noqa: F401, PLC0415 (an extra)
        import uvicorn  # noqa: PLC0415
    except ImportError:
        raise MissingLibraryError(
            "mindprint serve needs starlette and uvicorn: pip install 'mindprint-core[serve]'"
        ) from None
    return uvicorn
