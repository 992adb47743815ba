"""The page about a preparation: files, rows, everything that was left out, and examples to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median

from mindprint.reports.document import Block, Bullets, Document, Paragraph, Section, SideBySide, Table
from mindprint.text.words import words
from mindprint.writing.gathering import Gathered
from mindprint.writing.making import KINDS, Made, MadeRow

MOST_FILES = 200
"""Files and private things that the page lists."""

EXAMPLES = 3
"""Rows of each kind that are shown."""

RUN = 4
"""Words of the runs that are looked for in both prompt and passage."""

MEASURED = (("10,000", "7", "0.87", "0.62"), ("20,000", "82", "0.73", "1.00"))
"""Words, pairs, perplexity and area under the curve that `benchmarks/prepare.py voice` printed: docs/prepare.md."""

HIDDEN = 4
"""Characters of a private thing that the page shows: enough to find it, and not to use it."""


def preparation_report(gathered: Gathered, made: Made, counts: Mapping[str, int]) -> Document:
    """Return the report of a preparation. `counts` are rows by file."""
    sections = (
        Section("Rows", tuple(_made(gathered, made, counts))),
        Section("Examples", tuple(_examples(made))),
        Section("Files", tuple(_read(gathered))),
        Section("Private things", tuple(_private(gathered))),
    )
    return Document("The rows of a voice", f"{gathered.words:,} words", sections)


def _made(gathered: Gathered, made: Made, counts: Mapping[str, int]) -> Iterator[Block]:
    yield Table("Rows", ("file", "rows"), tuple((name, f"{count:,}") for name, count in counts.items()), frozenset({1}))
    yield Paragraph(f"The writing has {gathered.words:,} words in {_language(gathered)}.")
    yield from _expected()
    by_kind = {kind: [row for row in made.rows if row.kind == kind] for kind in KINDS}
    rows = tuple(
        (
            kind,
            f"{len(of_kind)}",
            f"{median(row.gain for row in of_kind):.2f}",
            f"{median(len(words(row.passage.text)) for row in of_kind):.0f}",
            f"{sum(row.rejected is not None for row in of_kind)}",
            f"{fmean(_copied(row) for row in of_kind):.1%}",
        )
        for kind, of_kind in by_kind.items()
        if of_kind
    )
    header = (
        "kind",
        "rows",
        "gain of the prompt (nats a token)",
        "words of the passage",
        "with a rejected answer",
        "of the prompt in the passage",
    )
    yield Table("Kinds of row", header, rows, frozenset(range(1, 6)))
    yield Paragraph(f"The last column is the share of a prompt's runs of {RUN} words that its passage has too.")
    if made.proposed:
        yield Paragraph(f"Of {made.proposed} prompts that the base model proposed {made.served} can be used.")
    if made.named:
        yield Paragraph(f"For {made.named} passages none gained enough: their topic is their names and long words.")
    if made.continued:
        yield Paragraph(f"For {made.continued} passages no prompt was found: they continue the text before them.")
    if reasons := (*_reasons(made.dropped, "passages: "), *_reasons(made.unpaired, "rows without a pair: ")):
        yield Bullets(reasons)


def _expected() -> Iterator[Block]:
    """Yield what an amount of writing has given, where it was measured."""
    yield Paragraph(
        "More words move a voice further. This was measured with SmolLM2-135M-Instruct and one work of Doyle, on "
        "another work of his. Perplexity is that of unseen text, compared with the base model's. The "
        "area under the curve is how often a scorer takes a trained answer for the person's rather than the base "
        "model's: 0.5 is chance, 1 is always."
    )
    header = ("words", "pairs", "perplexity", "area under the curve")
    yield Table("What to expect", header, MEASURED, frozenset(range(4)))


def _reasons(counts: Counter[str], subject: str) -> tuple[str, ...]:
    return tuple(f"{count} {subject}{reason}" for reason, count in counts.most_common())


def _examples(made: Made) -> Iterator[Block]:
    for kind in KINDS:
        of_kind = [row for row in made.rows if row.kind == kind]
        # From the middle: the first passages of a book are its front matter.
        middle = len(of_kind) // 2
        for row in of_kind[middle : middle + EXAMPLES]:
            yield _example(row)


def _copied(row: MadeRow) -> float:
    """Return the share of the prompt's runs of words that are in the passage."""
    asked, said = (
        [tuple(text[at : at + RUN]) for at in range(len(text) - RUN + 1)]
        for text in (words(row.prompt), words(row.passage.text))
    )
    present = set(said)
    return sum(run in present for run in asked) / len(asked) if asked else 0.0


def _example(row: MadeRow) -> SideBySide:
    texts = [("the person (chosen)", row.passage.text)]
    if row.rejected is not None:
        texts.append(("the base model (rejected)", row.rejected))
    note = f"{row.passage.document}, passage {row.passage.place + 1}; the prompt gains {row.gain:.2f} nats a token"
    return SideBySide(row.kind, row.prompt, tuple(texts), note)


def _read(gathered: Gathered) -> Iterator[Block]:
    reading = gathered.reading
    left_out = [f"{gathered.duplicates} passages nearly equal others and were left out"] if gathered.duplicates else []
    left_out += [
        f"{count} passages are in {name} and were left out" for name, count in gathered.other_languages.items()
    ]
    if gathered.others_documents:
        left_out.append(f"{gathered.others_documents} mails are by other people and were left out")
    if left_out:
        yield Bullets(tuple(left_out))
    rows = tuple((name, f"{count}") for name, count in reading.read.items())
    yield from _listed("Files that were read", ("file", "documents"), rows)
    yield from _listed("Files that could not be read", ("file", "why"), tuple(reading.skipped.items()))


def _private(gathered: Gathered) -> Iterator[Block]:
    if not gathered.private:
        yield Paragraph("No addresses, telephone numbers, accounts, cards or keys were found by their patterns.")
        return
    kinds = Counter(private.kind for private in gathered.private)
    counts = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    yield Paragraph(f"Found by their patterns: {counts}. `--redact` replaces them. Names of people are not found.")
    rows = tuple((private.kind, private.place, f"{private.thing[:HIDDEN]}…") for private in gathered.private)
    yield from _listed("Private things", ("kind", "file and line", "begins with"), rows)


def _listed(caption: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[Block]:
    if rows:
        yield Table(caption, header, tuple(rows[:MOST_FILES]))
    if len(rows) > MOST_FILES:
        yield Paragraph(f"And {len(rows) - MOST_FILES:,} more.")


def _language(gathered: Gathered) -> str:
    return f"the language {gathered.language!r}" if gathered.language else "an unknown language"
