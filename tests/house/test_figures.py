"""The figures of language.py count what they say, and nothing in code blocks or in reading position."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from language import find_banners, find_empty_names, find_semicolons

PAGE = """\
One; two.

    code; in a block

`code;` in a line, and [a link](https://example.org/;) count for nothing; the last one does.

```python
a = 1; b = 2
```
"""

SOURCE = """\
# --- a banner
# -- no banner
found = 1
print(found)
def one(mine): return mine
"""


def test_semicolons_count_in_prose_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert [place.line for place in find_semicolons([page])] == [1, 5]


def test_names_count_where_they_are_given_and_banners_by_their_length(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(SOURCE, encoding="utf-8")
    assert [(place.line, place.text) for place in find_empty_names([source])] == [(3, "found"), (5, "mine")]
    assert [place.line for place in find_banners([source])] == [1]
