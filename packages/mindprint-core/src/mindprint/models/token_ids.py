"""Token ids that a base has no embedding for: refused before anything computes with them.

A tokenizer can have more tokens than its base has rows. PyTorch then stops with an index error that names nothing, and
MLX reads whatever is behind the table in memory: another loss at every run, and no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mindprint.config import DataConfig
from mindprint.contract import Int32
from mindprint.data.render import PreferenceExample, SftExample, render_preferences, render_prompt, render_sft
from mindprint.data.split import HeldOut
from mindprint.data.tokenizer import Tokenizer
from mindprint.errors import DataError
from mindprint.models.folder import ModelFolder, model_config, tensors
from mindprint.models.layer_names import is_embedding


def embedding_rows(folder: Path) -> int | None:
    """Return how many tokens a base has embeddings for, from its files' headers; None where they do not tell.

    A model of text and images has several tables, of which config.json's `vocab_size` says which is the text's.
    """
    config = model_config(folder)
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, dict) else (config,)
    configured = next((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), None)
    rows = {
        info.shape[0]
        for name, info in tensors(folder).items()
        if len(info.shape) == 2 and is_embedding(name.removesuffix(".weight"))
    }
    # Where there is one table, its own size is believed: it is the table that computes. Among several, or with none
    # that is known, only config.json can tell.
    if configured is not None and (configured in rows or len(rows) != 1):
        return int(configured)
    return rows.pop() if len(rows) == 1 else None


def check_token_ids(sequences: Iterable[tuple[object, Int32]], base: ModelFolder, tokenizer: Tokenizer) -> None:
    """Raise `DataError` if a token of the sequences has no row in the base's embedding table.

    Args:
        sequences: Token ids, each with the place that they come from, which the error names.
        base: The base whose table is meant.
        tokenizer: The tokenizer that made the ids.
    """
    rows = embedding_rows(base.path)
    # Nearly every base has a row for each token of its tokenizer: then no sequence needs a look.
    if rows is None or tokenizer.largest_id < rows:
        return
    for place, ids in sequences:
        outside = ids[(ids < 0) | (ids >= rows)]
        if len(outside):
            raise DataError(f"{place}: {missing_row(int(outside[0]), rows, base.name, tokenizer)}")


def placed_ids(examples: Iterable[SftExample | PreferenceExample]) -> Iterator[tuple[object, Int32]]:
    """Yield the token ids of rendered rows, each with the row's place."""
    for example in examples:
        if isinstance(example, SftExample):
            yield example.origin, example.tokens
        else:
            yield from ((example.origin, ids) for ids in (example.prompt, example.chosen, example.rejected))


def held_out_ids(held_out: HeldOut, tokenizer: Tokenizer, data: DataConfig) -> Iterator[tuple[object, Int32]]:
    """Yield the token ids of held-out text and questions, rendered only when they are asked for."""
    yield from placed_ids(render_preferences(held_out.pairs, tokenizer, data, held_out=True).examples)
    yield from placed_ids(render_sft(held_out.texts, tokenizer, data, held_out=True).examples)
    for question in held_out.questions:
        yield question.origin, render_prompt(question.question, tokenizer, data.format)


def check_padding(base: ModelFolder, tokenizer: Tokenizer) -> None:
    """Raise `DataError` if the padding token has no row in the base's embedding table: padding is embedded as well."""
    rows = embedding_rows(base.path)
    if rows is not None and not 0 <= tokenizer.pad_id < rows:
        raise DataError(f"padding: {missing_row(tokenizer.pad_id, rows, base.name, tokenizer)}")


def missing_row(token: int, rows: int, base: str, tokenizer: Tokenizer | None = None) -> str:
    """Return the words for a token without an embedding, and what to do about it."""
    text = None if tokenizer is None else tokenizer.token_text(token)
    named = f"token {token}" if text is None else f"token {token} ({text!r})"
    return (
        f"{named} is not in the embedding table of {base}, which has {rows} rows: use the base's own tokenizer, or "
        "give the base the missing rows (transformers: model.resize_token_embeddings(len(tokenizer)), then save it)"
    )
