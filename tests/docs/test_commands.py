"""Every command block of the documentation runs, in order and as written, or is marked with why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_blocks import Block, command_blocks
from sample_rows import cut_sample_rows

from mindprint.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for place in ("docs", "packages/*", "examples/*") for path in ROOT.glob(f"{place}/*.md")),
    ]
)
BLOCKS = {page: command_blocks(page.read_text(encoding="utf-8")) for page in PAGES}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.reason is None for b in BLOCKS[page])], ids=relative)
def test_the_commands_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each ends with exit code 0. The sample rows that `init` writes are cut. Nothing else is changed."""
    monkeypatch.chdir(tmp_path)
    # `doctor` asks every backend, and this example can load only the models that it made.
    monkeypatch.setenv("MINDPRINT_DISABLE_PLUGINS", "mindprint-hello")
    for block in BLOCKS[page]:
        for program, *words in block.commands() if block.reason is None else ():
            assert program == "mindprint", (
                f"{program}: only mindprint is run here; mark the block with why it is not run"
            )
            code = main(words)
            assert code == 0, f"{page.name}: mindprint {' '.join(words)}: {capsys.readouterr().err}"
            if words[0] == "init":
                cut_sample_rows(tmp_path / words[1] / "data")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in BLOCKS[page]:
        assert block.reason is None or len(block.reason.split()) >= 3, block


def test_the_pages_have_the_blocks_that_they_should() -> None:
    """A mistake in how pages are read would change the README's sequence, or lose blocks."""
    readme = [words for block in BLOCKS[ROOT / "README.md"] if not block.reason for words in block.commands()]
    assert [words[1] for words in readme] == [
        "init", "plan", "train", "generate", "eval", "report", "verify", "train", "compare", "merge", "convert",
    ]  # fmt: skip
    assert sum(map(len, BLOCKS.values())) >= 20


def test_how_blocks_are_read() -> None:
    page = """Text with mindprint train in it.

    mindprint init a   # a comment
    mindprint train a

<!-- not run: needs a GPU -->

    pip install x

```text
mindprint doctor
```

<!-- after: mindprint init b; mindprint
train b -->
```bash
mindprint eval b
```

    {"not": "a command"}

```python
    mindprint = 3
```
"""
    assert command_blocks(page) == (
        Block(("mindprint init a   # a comment", "mindprint train a")),
        Block(("pip install x",), "needs a GPU"),
        Block(("mindprint doctor",)),
        Block(("mindprint eval b",), after=("mindprint init b", "mindprint train b")),
    )
    assert command_blocks(page)[0].commands() == (("mindprint", "init", "a"), ("mindprint", "train", "a"))
