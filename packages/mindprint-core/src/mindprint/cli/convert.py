"""`mindprint convert`: an adapter in the format of another tool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from mindprint import atomic
from mindprint.adapter import mlx_lm_format, peft_format
from mindprint.adapter.base_facts import BaseFacts, read_base_facts
from mindprint.adapter.formats import Format, adapter_format, named_base, read_any_adapter
from mindprint.adapter.merging import refuse_taken
from mindprint.adapter.targets import is_router, is_stack
from mindprint.cli.output import emit, json_option, notice, say
from mindprint.contract import AdapterState
from mindprint.errors import AdapterError
from mindprint.runs.opened import find_base, locate_adapter


@click.command("convert", short_help="Convert an adapter.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["peft", "mlx-lm"]), required=True, help="Whose format to write.")
@click.option("--model", help="Where the base model is, if not where the run or the adapter says.")
@json_option
def command(*, adapter: Path, out: Path, to: Format, model: str | None, as_json: bool) -> None:
    """Write ADAPTER in the format of PEFT or of mlx-lm to the new folder OUT.

    ADAPTER is a project (its newest complete run), a run, or an adapter of Mindprint's, PEFT's or mlx-lm's. What the
    format cannot hold is refused by name.
    """
    refuse_taken(out)
    located = locate_adapter(adapter)
    source = adapter_format(located.adapter)
    if source == to:
        raise AdapterError(f"{located.adapter}: is in the format of {to} already")
    base = find_base(located, model)
    facts = read_base_facts(base.path)
    state, _ = read_any_adapter(located.adapter, base.path)
    named = named_base(located.adapter) or base.name
    with atomic.new_folder(out) as aside:
        notes = [*_write(aside, state, facts, named, to), *_uncompared(facts)]
    for note in notes:
        notice(note)
    if as_json:
        emit({"folder": str(out.resolve()), "from": source, "to": to, "modules": len(state.tensors), "notes": notes})
    else:
        say(f"{out}: {len(state.tensors)} modules, in the format of {to}")


def _write(folder: Path, state: AdapterState, facts: BaseFacts, named: str, to: Format) -> Iterator[str]:
    if to == "mlx-lm":
        yield from mlx_lm_format.write_adapter(folder, state, facts, named)
        return
    parameters = [site for site in state.tensors if is_stack(site) or is_router(site)]
    if state.config.dropout and parameters:
        yield f"dropout {state.config.dropout:g} is left out: PEFT has none on {parameters[0]}"
        state = AdapterState(replace(state.config, dropout=0.0), state.tensors)
    peft_format.write_adapter(folder, state, named)


def _uncompared(facts: BaseFacts) -> Iterator[str]:
    if not facts.compared:
        yield (
            f"what mlx-lm calls the modules of model_type {facts.model_type!r} was not compared with transformers' "
            "names; mlx-lm refuses an adapter whose names do not fit"
        )
