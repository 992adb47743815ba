"""Measure how the code and the documentation are written, and print the figures.

    python tests/house/language.py            # the figures
    python tests/house/language.py --where    # and each place that counts against one

`tests/docs/test_language.py` asserts bounds for the same figures.
"""

from __future__ import annotations

import argparse
import ast
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

ROOT = Path(__file__).resolve().parents[2]

SOURCES = ("packages/*/src", "examples/*/src", "benchmarks", "packages/*/scripts", "docs", "examples")
"""Folders whose Python files count as source."""

PAGES = ("docs", "packages", "examples")
"""Folders whose Markdown files count as documentation, in addition to those at the root."""

PHRASES = {
    '"what of", "what is", "what does" as a noun': (
        r"\bwhat (?:of|is|does|was|are|were|did|has|had|it|they|a|an|the|this)\b(?![^.\n]*\?)"
    ),
    '"beside"': r"\bbeside\b",
    '"goes on", "go on"': r"\bgo(?:es)? on\b",
    '"stands", "stand"': r"\bstands?\b",
    '"of its own", "of their own"': r"\bof (?:its|their) own\b",
    '"anew"': r"\banew\b",
    '"so many", "the more"': r"\b(?:so many|the more)\b",
    '"mend", "be had", "aloud", "is no"': r"\b(?:mend(?:s|ed|ing)?|be had|aloud|is no)\b",
    '"for one in"': r"\bfor one in\b",
}
"""The phrases that strangers stumble over, as regular expressions."""

EMPTY_NAMES = frozenset({"found", "one", "mine", "theirs"})
"""Names of variables that do not say what they hold."""

LONGEST_FUNCTION = 60
"""Lines of a function's body above which its place is shown."""

ASKING_WORDS = ("What", "Which", "Whether", "How")
"""Openings of docstrings that should have been a verb."""


@dataclass(frozen=True)
class Place:
    """One line that counts against a bound."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text.strip()[:120]}"


@dataclass(frozen=True)
class Function:
    """A function's size in lines of its body, without its docstring, and whether it is fully annotated."""

    place: Place
    lines: int
    annotated: bool


def source_files() -> list[Path]:
    """Return every Python file that counts as source: no tests, and not the sample texts of the tiny model."""
    files = {file for pattern in SOURCES for folder in ROOT.glob(pattern) for file in folder.rglob("*.py")}
    return sorted(file for file in files if not {"tests", "tiny"} & set(file.relative_to(ROOT).parts))


def page_files() -> list[Path]:
    """Return every Markdown page."""
    pages = {page for folder in PAGES for page in (ROOT / folder).rglob("*.md")}
    return sorted(page for page in {*pages, *ROOT.glob("*.md")} if ".nox" not in page.parts)


def count_words(files: Sequence[Path]) -> int:
    """Return the number of words in the files."""
    return sum(len(re.findall(r"[A-Za-z']+", file.read_text(encoding="utf-8"))) for file in files)


def find_phrase(pattern: str, files: Sequence[Path]) -> Iterator[Place]:
    """Yield each line in which the phrase appears, once for each appearance."""
    compiled = re.compile(pattern, re.IGNORECASE)
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for _ in compiled.finditer(line):
                yield Place(file, number, line)


def find_banners(files: Sequence[Path]) -> Iterator[Place]:
    """Yield each comment that is a banner between two parts of a file."""
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if re.match(r"\s*#\s?[-=*#]{3,}", line):
                yield Place(file, number, line)


def find_empty_names(files: Sequence[Path]) -> Iterator[Place]:
    """Yield each place where a variable or an argument gets a name that does not say what it holds."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_variable = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES
            is_argument = isinstance(node, ast.arg) and node.arg in EMPTY_NAMES
            if is_variable or is_argument:
                yield Place(file, node.lineno, ast.unparse(node))


def prose_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a page with their numbers, without code blocks, inline code, comments and link targets."""
    text = page.read_text(encoding="utf-8")
    blank = [
        (r"```.*?^```|<!--.*?-->", re.DOTALL | re.MULTILINE),
        # An indented block follows an empty line. Other indented lines continue an item of a list.
        (r"(?<=\n\n)(?:    .*\n+)+", 0),
        (r"`[^`]*`", 0),
        (r"\]\([^)\s]*\)", 0),
    ]
    for pattern, flags in blank:
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=flags)
    yield from enumerate(text.splitlines(), 1)


def find_semicolons(pages: Sequence[Path]) -> Iterator[Place]:
    """Yield each semicolon in the prose of the pages."""
    for page in pages:
        for number, line in prose_lines(page):
            for _ in range(line.count(";")):
                yield Place(page, number, line)


def count_prose_words(pages: Sequence[Path]) -> int:
    """Return the number of words in the prose of the pages."""
    return sum(len(re.findall(r"[A-Za-z']+", line)) for page in pages for _, line in prose_lines(page))


def docstring_openings(files: Sequence[Path]) -> Iterator[tuple[Place, str]]:
    """Yield the first word of each docstring."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield Place(file, getattr(node, "lineno", 1), text.splitlines()[0]), text.split()[0]


def functions(files: Sequence[Path]) -> Iterator[Function]:
    """Yield each function with the number of lines of its body."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                yield Function(Place(file, node.lineno, node.name), lines, _is_annotated(node))


def _is_annotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    named = [a for a in arguments if a is not None and a.arg not in ("self", "cls")]
    return node.returns is not None and all(argument.annotation is not None for argument in named)


def comment_share(files: Sequence[Path]) -> float:
    """Return the number of comment lines per 100 lines of code."""
    comments = code = 0
    for file in files:
        lines: set[int] = set()
        with tokenize.open(file) as stream:
            for token in tokenize.generate_tokens(stream.readline):
                if token.type == tokenize.COMMENT:
                    comments += not re.match(r"# (?:fmt|type|noqa|ruff|mypy)\b", token.string)
                elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                    lines.update(range(token.start[0], token.end[0] + 1))
        code += len(lines)
    return 100 * comments / code


def you_share(pages: Sequence[Path]) -> float:
    """Return how often the pages address the reader, per 100 words."""
    text = " ".join(page.read_text(encoding="utf-8") for page in pages)
    return 100 * len(re.findall(r"\byou(?:r|rs|rself)?\b", text, re.IGNORECASE)) / count_words(pages)


@dataclass(frozen=True)
class Figure:
    """A measured figure, and the places that count against it."""

    name: str
    value: float
    unit: str = ""
    places: tuple[Place, ...] = ()

    def __str__(self) -> str:
        return f"{self.name:52} {self.value:8.2f} {self.unit}"


def measure_phrases() -> Iterator[Figure]:
    """Yield how often each phrase appears in source and pages, per 100,000 words."""
    files = [*source_files(), *page_files()]
    words = count_words(files)
    for name, pattern in PHRASES.items():
        places = tuple(find_phrase(pattern, files))
        yield Figure(name, 1e5 * len(places) / words, f"per 100,000 words ({len(places)} times)", places)


def measure_source() -> Iterator[Figure]:
    """Yield the figures of the source: docstrings, functions, comments, banners and names."""
    source = source_files()
    openings = list(docstring_openings(source))
    asking = tuple(place for place, word in openings if word in ASKING_WORDS)
    yield Figure("docstrings that open with What/Which/Whether/How", 100 * len(asking) / len(openings), "%", asking)
    sizes = list(functions(source))
    tenths = quantiles([function.lines for function in sizes], n=10)
    long = tuple(function.place for function in sizes if function.lines > LONGEST_FUNCTION)
    yield Figure("lines of a function: median", tenths[4])
    yield Figure("lines of a function: 90th percentile", tenths[8])
    yield Figure("lines of a function: most", max(function.lines for function in sizes), places=long)
    bare = tuple(function.place for function in sizes if not function.annotated)
    yield Figure("annotated functions", 100 - 100 * len(bare) / len(sizes), "%", bare)
    yield Figure("comment lines", comment_share(source), "per 100 lines of code")
    banners = tuple(find_banners(source))
    yield Figure("banners", len(banners), places=banners)
    empty = tuple(find_empty_names(source))
    yield Figure("variables called found, one, mine or theirs", len(empty), places=empty)


def measure_pages() -> Iterator[Figure]:
    """Yield the figures of the pages: how they address the reader, and their punctuation."""
    pages = page_files()
    yield Figure('"you"', you_share(pages), "per 100 words of documentation")
    semicolons = tuple(find_semicolons(pages))
    yield Figure("semicolons", 100 * len(semicolons) / count_prose_words(pages), "per 100 words of prose", semicolons)


def print_figures(*, where: bool) -> None:
    """Print every figure, and with `where` the places that count against it."""
    for figure in (*measure_phrases(), *measure_source(), *measure_pages()):
        print(figure)
        for place in figure.places if where else ():
            print(f"    {place}")


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", action="store_true", help="print each place that counts")
    print_figures(where=parser.parse_args().where)


if __name__ == "__main__":
    main()
