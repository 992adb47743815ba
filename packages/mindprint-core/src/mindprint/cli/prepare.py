"""`mindprint prepare`: from a folder of writing to a project."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mindprint.api.preparation import prepare
from mindprint.cli.output import json_option, notice, show, tell_notice
from mindprint.errors import ConfigError
from mindprint.writing.making import RowKind


@click.command("prepare", short_help="Make a project of a person's files.")
@click.argument("writing", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--into", required=True, type=click.Path(path_type=Path), help="The project's folder; may exist.")
@click.option("--model", help="Base model: a hub name or a folder; default: the project's.")
@click.option("--author", help="The person's name, as mails and chats have it.")
@click.option("--passage-words", nargs=2, type=int, metavar="LEAST MOST", help="Words of a passage; default: 60 250.")
@click.option("--mix", multiple=True, metavar="KIND=SHARE", help="Share of answer, continue, topic or rewrite rows.")
@click.option("--heldout", type=float, default=0.1, show_default=True, help="Share that is only measured with.")
@click.option("--redact", is_flag=True, help="Replace addresses, numbers of telephones, accounts and cards, and keys.")
@click.option("--templates", type=click.Path(path_type=Path), help="Folder of texts to ask the model with.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every draw.")
@click.option("--backend", help="auto, torch, mlx, ...; default: the project's.")
@click.option("--device", help="auto, cpu, cuda, mps, metal.")
@json_option
def command(
    *,
    writing: tuple[Path, ...],
    into: Path,
    model: str | None,
    author: str | None,
    passage_words: tuple[int, int] | None,
    mix: tuple[str, ...],
    heldout: float,
    redact: bool,
    templates: Path | None,
    seed: int,
    backend: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Make a project of WRITING: texts, Markdown, HTML, EPUB, DOCX, PDF, mailboxes, exported chats, or folders of them.

    The base model itself finds a prompt for each passage, and gives the answer that is not the person's. Nothing leaves
    this machine. A command that was stopped continues where it was, and a later one only makes the rows of new writing.
    """
    result = prepare(
        writing,
        into,
        model=model,
        author=author,
        passage_words=passage_words,
        mix=_shares(mix),
        heldout=heldout,
        redact=redact,
        templates=templates,
        seed=seed,
        backend=backend,
        device=device,
        on_notice=tell_notice,
        on_batch=_tell,
    )
    show(result, as_json=as_json)


def _shares(mix: tuple[str, ...]) -> dict[RowKind, float] | None:
    shares: dict[RowKind, float] = {}
    for text in mix:
        kind, _, share = text.partition("=")
        try:
            shares[kind] = float(share)  # type: ignore[index]
        except ValueError:
            raise ConfigError(f"--mix {text!r}: write KIND=SHARE, for example answer=0.5") from None
    return shares or None


def _tell(kind: str, done: int, total: int) -> None:
    # On a terminal one line that counts up; elsewhere a line for each tenth.
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{kind}: {done}/{total}" + ("\n" if done == total else ""))
        sys.stderr.flush()
    elif done == total or (10 * done) // total != (10 * max(0, done - 16)) // total:
        notice(f"{kind}: {done}/{total}")
