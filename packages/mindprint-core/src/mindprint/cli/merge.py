"""`mindprint merge`: the base model with the adapter in it, as a new model."""

from __future__ import annotations

from pathlib import Path

import click

from mindprint.adapter.gguf_files import FileType
from mindprint.api import NotVerifiedError, merge
from mindprint.api.adapters import ModelFormat
from mindprint.cli.options import device_option, model_option
from mindprint.cli.output import json_option, say, show, tell_notice


@click.command("merge", short_help="Merge an adapter into its base.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@model_option
@click.option("--into", help="Another form of the base to merge into: a full-precision model, or its GGUF file.")
@click.option("--to", type=click.Choice(["folder", "gguf"]), default="folder", help="What OUT is. Default: folder.")
@click.option("--type", "file_type", type=click.Choice(["f32", "f16", "bf16", "q8_0"]), help="Type of GGUF weights.")
@click.option("--quantize", is_flag=True, help="Quantize the result as the base was; kept if the effect survives.")
@click.option("--backend", help="What verifies the result: auto, torch, mlx, ...; default: the run's.")
@device_option
@click.option("--no-verify", is_flag=True, help="Compare the files only; compute nothing.")
@click.option("--fix-config", is_flag=True, help="Add the keys to config.json that mlx-lm needs.")
@json_option
def command(
    *,
    adapter: Path,
    out: Path,
    model: str | None,
    into: str | None,
    to: ModelFormat,
    file_type: FileType | None,
    quantize: bool,
    backend: str | None,
    device: str | None,
    no_verify: bool,
    fix_config: bool,
    as_json: bool,
) -> None:
    """Write the base of ADAPTER with the adapter in it to the new folder or GGUF file OUT, and verify it.

    ADAPTER is a project (its newest complete run), a run, or an adapter of Mindprint's, PEFT's or mlx-lm's. Nothing is
    computed by a framework but the verification. A merge that does not verify is removed: exit code 1. A quantized
    base becomes a model in full precision, because its grid has no place for the adapter's change.

    With --to gguf OUT is a file for llama.cpp and Ollama. --into base.gguf writes the base's own GGUF file with all its
    keys. Without it the file is written from the base's folder.
    """
    try:
        result = merge(
            adapter,
            out,
            verify=not no_verify,
            fix_config=fix_config,
            model=model,
            into=into,
            quantize=quantize,
            to=to,
            file_type=file_type,
            backend=backend,
            device=device,
            on_notice=tell_notice,
        )
    except NotVerifiedError as error:
        # In JSON the error alone is printed, because two documents on one stream could not be parsed.
        if error.verification is not None and not as_json:
            say(str(error.verification))
        raise
    show(result, as_json=as_json)
