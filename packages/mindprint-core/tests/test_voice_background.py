"""A background of people: read from text files, refused where it would mislead, and used for the scale."""

from pathlib import Path

import pytest
from voice_samples import writer

from mindprint.config import ConfigFile, make_config
from mindprint.errors import DataError
from mindprint.voice.assessment import HeldOutAnswers, assess
from mindprint.voice.background import LEAST_WORDS, read_background
from mindprint.voice.scoring import VoiceReference, VoiceScore

WORDS = 60
OWN = writer(1, 60, WORDS)
BASE = writer(2, 60, WORDS)
PEOPLE = tuple(text for number in (3, 4) for text in writer(number, 60, WORDS))


def config(folder: Path, *names: str) -> ConfigFile:
    return make_config({"voice": {"background": list(names)}}, folder)


def written(folder: Path, name: str, texts: list[str]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def test_files_and_folders_are_read_once_and_in_order(tmp_path: Path) -> None:
    written(tmp_path, "people/b.txt", writer(3, 50, WORDS))
    written(tmp_path, "people/a/a.md", writer(4, 50, WORDS))
    written(tmp_path, "people/.hidden/c.txt", OWN)
    written(tmp_path, "people/notes.json", OWN)
    texts = read_background(config(tmp_path, "people", "people/b.txt"), OWN)
    assert [text.split("\n\n")[0] for text in texts] == [writer(4, 50, WORDS)[0], writer(3, 50, WORDS)[0]]
    assert read_background(config(tmp_path), OWN) == ()


def test_the_persons_text_in_it_is_refused_even_retyped_and_inside_a_book(tmp_path: Path) -> None:
    pages = [*PEOPLE, OWN[3].replace(" ", "\n").upper()]
    written(tmp_path, "book.txt", pages)
    with pytest.raises(DataError, match=r"book.txt: has \d+ runs of 8 words that are also in your training text"):
        read_background(config(tmp_path, "book.txt"), OWN)


def test_a_quotation_of_the_person_is_no_reason_to_refuse(tmp_path: Path) -> None:
    written(tmp_path, "book.txt", [*PEOPLE, " ".join(OWN[3].split()[:20])])
    assert len(read_background(config(tmp_path, "book.txt"), OWN)) == 1


def test_what_cannot_be_a_background_says_why(tmp_path: Path) -> None:
    written(tmp_path, "short.txt", ["fifty words"] * 25)
    written(tmp_path, "empty/readme.rst", ["x"])
    written(tmp_path, "book.epub", ["x"])
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name, problem in {
        "short.txt": rf"voice.background has 50 words in 1 files: at least {LEAST_WORDS:,} are needed, better 20,000",
        "empty": "empty: has no text files",
        "missing": "missing: no such file or folder",
        "book.epub": "book.epub: is not a text file: save it as .txt or .md",
        "latin.txt": "latin.txt: is not UTF-8 text",
    }.items():
        with pytest.raises(DataError, match=problem):
            read_background(config(tmp_path, name), OWN)


def answers(tuned: list[str]) -> HeldOutAnswers:
    topics, prompts = ("a",) * 20, tuple(f"prompt {index}" for index in range(20))
    return HeldOutAnswers(topics, prompts, tuple(OWN[40:]), tuple(BASE[40:]), tuple(tuned))


@pytest.mark.parametrize("rejected", [tuple(BASE[:40]), ()], ids=["pairs", "texts alone"])
def test_other_people_are_on_the_scale_and_score_less_than_the_person(rejected: tuple[str, ...]) -> None:
    reference = VoiceReference(tuple(OWN[:40]), rejected, people=PEOPLE)
    found = assess(reference, answers(writer(5, 20, WORDS))).overall
    assert isinstance(found.people, VoiceScore) and isinstance(found.tuned, VoiceScore)
    assert found.people.value < 0.35 and found.people.texts > 20
    # Somebody who is in nothing is not the person either.
    assert found.tuned.value < 0.6
    assert assess(VoiceReference(tuple(OWN[:40]), tuple(BASE[:40])), answers(OWN[40:])).overall.people is None
