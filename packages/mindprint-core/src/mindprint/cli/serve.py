"""`mindprint serve`: a trained adapter and its base model behind OpenAI's API, and a page to chat with both."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.cli.options import backend_option, device_option, model_option
from mindprint.cli.output import emit, json_option, notice, tell_notice
from mindprint.serving.server import LOOPBACK, serve


@click.command("serve", short_help="Serve an adapter with OpenAI's API.")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--host", default=LOOPBACK, show_default=True, help="Another address needs --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option("--api-key", envvar="MINDPRINT_API_KEY", help="Key that requests must have; or MINDPRINT_API_KEY.")
@click.option("--no-verify", is_flag=True, help="Serve an adapter without verifying it first.")
@backend_option
@device_option
@model_option
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Of an answer.")
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Requests in one batch.")
@click.option("--max-requests", type=click.IntRange(min=1), default=64, show_default=True, help="Waiting or answered.")
@click.option("--timeout", type=click.FloatRange(min=1), default=600, show_default=True, help="Seconds for an answer.")
@json_option
def command(
    *,
    path: Path,
    host: str,
    port: int,
    api_key: str | None,
    no_verify: bool,
    backend: str | None,
    device: str | None,
    model: str | None,
    max_tokens: int,
    max_batch: int,
    max_requests: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Serve the adapter and its base model on this machine, until Ctrl-C.

    PATH is a project (its newest complete run), the folder of a run, of an adapter, or of a whole model. Clients of
    OpenAI's API ask for the models `voice` and `base`. The address itself shows a page to chat with both.
    """

    def ready(address: str) -> None:
        if as_json:
            emit({"address": address, "api": f"{address}/v1"})
        else:
            notice(f"serving at {address} (API: {address}/v1); Ctrl-C ends it")

    serve(
        path, host=host, port=port, api_key=api_key, verified=not no_verify, backend=backend, device=device,
        model=model, max_tokens=max_tokens, max_together=max_batch, max_requests=max_requests, timeout=timeout,
        on_notice=tell_notice, on_ready=ready,
    )  # fmt: skip
