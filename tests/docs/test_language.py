"""Code and pages stay readable for strangers: the figures of tests/house/language.py, each with its bound.

`python tests/house/language.py --where` shows the places that count against a figure.
"""

from __future__ import annotations

import pytest
from language import PHRASES, Figure, measure_pages, measure_phrases, measure_source

BEFORE = {
    '"what of", "what is", "what does" as a noun': 249.0,
    '"beside"': 51.6,
    '"goes on", "go on"': 32.6,
    '"stands", "stand"': 34.8,
    '"of its own", "of their own"': 29.9,
    '"anew"': 13.6,
    '"so many", "the more"': 8.2,
    '"mend", "be had", "aloud", "is no"': 41.9,
    '"for one in"': 50.0,
}
"""The phrases per 100,000 words when this test was written. At most a tenth of that may come back."""

AT_MOST = {
    "docstrings that open with What/Which/Whether/How": 2.0,
    "lines of a function: median": 8.0,
    "lines of a function: 90th percentile": 24.0,
    "lines of a function: most": 60.0,
    "banners": 0.0,
    "semicolons": 0.1,
}
AT_LEAST = {
    "annotated functions": 100.0,
    "comment lines": 3.0,
    '"you"': 0.6,
}


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    return {figure.name: figure for figure in (*measure_phrases(), *measure_source(), *measure_pages())}


def places(figure: Figure, most: int = 40) -> str:
    """Return the first places that count against the figure, one a line."""
    return "\n".join([str(figure), *map(str, figure.places[:most])])


def test_every_phrase_has_a_bound() -> None:
    assert BEFORE.keys() == PHRASES.keys()


@pytest.mark.parametrize("name", BEFORE)
def test_the_phrases_that_strangers_stumble_over_are_gone(figures: dict[str, Figure], name: str) -> None:
    assert figures[name].value <= BEFORE[name] / 10, places(figures[name])


@pytest.mark.parametrize("name", AT_MOST)
def test_no_more_than_the_bound(figures: dict[str, Figure], name: str) -> None:
    assert figures[name].value <= AT_MOST[name], places(figures[name])


@pytest.mark.parametrize("name", AT_LEAST)
def test_no_less_than_the_bound(figures: dict[str, Figure], name: str) -> None:
    assert figures[name].value >= AT_LEAST[name], places(figures[name])
