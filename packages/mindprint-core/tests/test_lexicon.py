"""The lexicon: what is used, what is denied, what is confused; and its way in as a plugin."""

from pathlib import Path

import pytest

from mindprint.config import make_config
from mindprint.errors import ConfigError, MindprintError, ScorerError
from mindprint.plugins.scoring import load_scorers
from mindprint.voice.lexicon import Lexicon, mindprint_scorers

LEXICON = Lexicon(("mind you", "never you"), ("utilise", "at the end of the day"), (("tide", "current"),))


def test_the_hook_makes_one_measure_of_its_settings() -> None:
    (measure,) = mindprint_scorers(settings={"wanted": ["mind you"]})
    assert measure == Lexicon(("mind you",), (), ())
    assert measure.name == "lexicon"


@pytest.mark.parametrize(
    ("text", "wanted", "unwanted"),
    [
        ("Mind you, it rains. And MIND YOU it pours.", 2, 0),
        ("Do not say mind you.", 0, 0),
        ("It was not dry, mind you.", 1, 0),
        ("Never you fear.", 1, 0),
        ("We utilise it at the end of the day.", 0, 2),
        ("We don't utilise it.", 0, 0),
        ("We don’t ever utilise it.", 0, 0),
        ("That is not good but we utilise it.", 0, 1),
        ("No. Utilise it.", 0, 1),
        ("No one here has ever seen fit to utilise it.", 0, 1),  # the negation is too far off to be about it
        ("Utilised, minded youth.", 0, 0),
    ],
)
def test_negation(text: str, wanted: int, unwanted: int) -> None:
    found = LEXICON.find(text)
    assert (len(found.wanted), len(found.unwanted)) == (wanted, unwanted)


@pytest.mark.parametrize(
    ("text", "confused"),
    [
        ("The tide is a current.", True),
        ("A current is called a tide here.", True),
        ("The tide is not a current.", False),
        ("The tide isn't a current.", False),
        ("Nobody says no tide is a current.", False),
        ("The tide is high, and the current is strong.", False),
        ("The tide and the current are two things.", False),
    ],
)
def test_distinctions(text: str, confused: bool) -> None:
    assert bool(LEXICON.find(text).confused) is confused


def test_the_rate_by_hand() -> None:
    """Of 8 words: one wanted, two unwanted: −1 in 8 is −12.5 in a hundred."""
    decide = LEXICON.fit([], [])
    assert decide(["Utilise it, mind you. Utilise all of it", ""]).tolist() == [-12.5, 0]


def test_the_configuration_names_it_and_only_then_it_is_loaded() -> None:
    file = make_config(
        {"voice": {"scorers": {"lexicon": {"wanted": ["mind you"], "distinctions": [["tide", "current"]]}}}}
    )
    assert load_scorers(file.config.voice.scorers) == (Lexicon(("mind you",), (), (("tide", "current"),)),)
    assert load_scorers(make_config({}).config.voice.scorers) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wanted": ["!"]}, "voice.scorers.lexicon.wanted: Value error, '!' has no word"),
        ({"wanted": ["mind you, yes"]}, "spans clauses"),
        ({"want": []}, "voice.scorers.lexicon.want"),
        ({"distinctions": [["tide"]]}, "is not a pair"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match="voice.scorers.lexicon") as caught:
        load_scorers({"lexicon": settings})
    assert message in str(caught.value)


def test_a_scorer_that_is_not_installed() -> None:
    with pytest.raises(
        ScorerError, match=r"scorer 'nonesuch' is not installed \(installed: .*lexicon.*take it out of voice.scorers"
    ):
        load_scorers({"nonesuch": {}})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "def mindprint_scorers(settings): 1 / 0",
            "mindprint_scorers raised ZeroDivisionError: .*out of voice.scorers",
        ),
        ("def mindprint_scorers(wanted): return []", "does not fit the hook contract: .*wanted"),
        ("def mindprint_scorer(settings): return []", "unknown hook 'mindprint_scorer'"),
        ("import nowhere_at_all", "failed to import: ModuleNotFoundError"),
        ("raise SystemExit(3)", "failed to import: SystemExit: 3"),
        ("", "does not implement mindprint_scorers"),
    ],
)
def test_a_broken_scorer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    metadata = tmp_path / "bad_scorer-0.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-scorer\nVersion: 0.3\n")
    module = f"bad_scorer_{abs(hash(words))}"
    (metadata / "entry_points.txt").write_text(f"[mindprint.scorers]\nbad = {module}\n")
    marked = f"from mindprint.hookspecs import hookimpl\n@hookimpl\n{code}\n" if code.startswith("def") else f"{code}\n"
    (tmp_path / f"{module}.py").write_text(marked)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MindprintError, match=rf"(?s)scorer 'bad' \(bad-scorer 0.3\).*{words}"):
        load_scorers({"bad": {}})
