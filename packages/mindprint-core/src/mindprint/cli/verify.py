"""`mindprint verify`: does an adapter, or a merged model, still do what it did where it was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mindprint.api import verify
from mindprint.cli.options import backend_option, device_option, model_option
from mindprint.cli.output import json_option, show, tell_notice


@click.command("verify", short_help="Prove that an adapter or a merge does what it did.")
@click.argument("path", metavar="ADAPTER", type=click.Path(path_type=Path), default=".")
@model_option
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter that ADAPTER, a merged model, came from.")
@backend_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in; default: float32 where it fits.",
)
@click.option("--require-fingerprint", is_flag=True, help="Let an adapter without a fingerprint fail.")
@click.option("--any-quantization", is_flag=True, help="Accept a base in other bits, if 0.95 of the effect is left.")
@json_option
def command(
    *,
    path: Path,
    model: str | None,
    adapter: Path | None,
    backend: str | None,
    device: str | None,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    require_fingerprint: bool,
    any_quantization: bool,
    as_json: bool,
) -> int:
    """Recompute an adapter's fingerprint and name what differs.

    ADAPTER is a project (its newest complete run), the folder of a run or of an adapter, or that of a merged model.
    Exit code 0 if it does what it did where it was trained, 1 if not, 2 if its files cannot be read.
    """
    result = verify(
        path,
        model=model,
        adapter=adapter,
        backend=backend,
        device=device,
        dtype=dtype,
        require_fingerprint=require_fingerprint,
        any_quantization=any_quantization,
        on_notice=tell_notice,
    )
    show(result, as_json=as_json)
    return 0 if result.ok else 1
