"""The split: what it depends on, what never crosses it, and what is said about it."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from mindprint.config import DataConfig, make_config
from mindprint.data.quizzes import Quizzes, read_quizzes
from mindprint.data.rows import Message, Origin, PreferenceRow, Rows, SftRow
from mindprint.data.split import Split, nearly_trained, prompt_hash, read_split, split_rows, spoken
from mindprint.errors import DataError
from mindprint.text.near_duplicates import near_duplicate_groups, normalised

AT = Origin("x", 1)
SUBJECTS = ["ferry", "harbour", "garden", "kettle", "winter", "letters", "chapel", "market", "orchard", "lantern"]
VERBS = ["mend", "paint", "sell", "forget", "praise", "borrow", "measure", "bury", "polish", "inherit", "guard", "name"]
PROMPTS = [f"How did you {verb} the {subject} {number}?" for verb in VERBS for subject in SUBJECTS for number in (3, 5)]


def sft(prompt: str, topic: str = "a") -> SftRow:
    return SftRow(topic, prompt, "aye", AT)


def pair(prompt: str, topic: str = "a") -> PreferenceRow:
    return PreferenceRow(topic, prompt, "aye", "yes", AT)


def split(rows: Rows, fraction: float = 0.2, held_out: tuple[str, ...] = ()) -> Split:
    return split_rows(rows, Quizzes(held_out=held_out), DataConfig(heldout_fraction=fraction))


def trained(found: Split) -> set[str]:
    return {spoken(row.prompt or "") for row in (*found.train.sft, *found.train.preferences)}


def held(found: Split) -> set[str]:
    return {spoken(row.prompt or "") for row in (*found.held_out.texts, *found.held_out.pairs)}


def everywhere(prompts: list[str]) -> Rows:
    """Every prompt in three topics, as SFT row and as pair."""
    return Rows(
        tuple(sft(prompt, topic) for topic in "abc" for prompt in prompts),
        tuple(pair(prompt, topic) for topic in "abc" for prompt in prompts),
        (),
    )


def test_about_the_fraction_is_held_out_and_a_greater_one_holds_out_more() -> None:
    """Of 240 different prompts at 0.2, 48 with a standard deviation of 6.2."""
    assert len(set(near_duplicate_groups(PROMPTS).tolist())) == 240
    at = [held(split(everywhere(PROMPTS), fraction)) for fraction in (0.0, 0.1, 0.2, 0.5)]
    assert at[0] < at[1] < at[2] < at[3] and not at[0]
    assert len(at[2]) == pytest.approx(48, abs=3 * 6.2)


def test_the_rule_is_what_the_manifest_says() -> None:
    """Second half of the 16-byte digest, as a share of 2^64, below the fraction."""
    found = held(split(everywhere(PROMPTS)))
    for prompt in PROMPTS:
        digest = hashlib.blake2b(normalised(prompt).encode(), digest_size=16).digest()
        assert (int.from_bytes(digest[8:], "big") / 2**64 < 0.2) is (prompt in found)


def test_no_prompt_crosses() -> None:
    found = split(everywhere(PROMPTS))
    assert not trained(found) & held(found)
    assert trained(found) | held(found) == set(PROMPTS)
    written = split(everywhere([prompt.upper().replace(" ", "  ") for prompt in PROMPTS]))
    assert {normalised(prompt) for prompt in held(written)} == {normalised(prompt) for prompt in held(found)}


@pytest.mark.parametrize("seed", range(5))
def test_stable_when_rows_are_added_or_moved(seed: int) -> None:
    rng = random.Random(seed)
    some = rng.sample(PROMPTS, 150)
    rest = [prompt for prompt in PROMPTS if prompt not in some]
    before, after = split(everywhere(some)), split(everywhere(rng.sample(some + rest, 240)))
    assert held(before) == held(after) & set(some)


def near_copies(prompt: str) -> list[str]:
    return [prompt, prompt.removesuffix("?") + " then?", prompt.removesuffix("?") + " now?", "So, " + prompt]


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_never_cross(seed: int) -> None:
    copies = [copy for prompt in random.Random(seed).sample(PROMPTS, 60) for copy in near_copies(prompt)]
    found = split(everywhere(copies))
    for prompt in PROMPTS:
        group = {copy for copy in near_copies(prompt) if copy in copies}
        assert not group or group <= trained(found) or group <= held(found)
    facts = found.facts
    assert facts.groups > 50 and facts.groups_moved > 10
    # A group of four is held out as often as one prompt: 60 at 0.2 are 12 with a standard deviation of 3.1.
    assert len(held(found)) / 4 == pytest.approx(12, abs=3 * 3.1)


def test_few_groups_move_when_a_near_duplicate_is_added() -> None:
    """A fourth copy decides for one group in four, and then otherwise in 2 · 0.2 · 0.8 of them: 8 %."""
    three = [copy for prompt in PROMPTS for copy in near_copies(prompt)[:3]]
    four = [copy for prompt in PROMPTS for copy in near_copies(prompt)]
    before, after = held(split(everywhere(three))), held(split(everywhere(four)))
    moved = sum((prompt in before) != (prompt in after) for prompt in PROMPTS)
    assert 0 < moved / len(PROMPTS) < 0.16


def test_explicit_held_out_rows_and_quizzes_win_over_training_rows() -> None:
    rows = Rows(
        (sft("Is there tea?"), sft("Is there any tea at four o'clock?"), sft("Who rang?")),
        (pair("is there TEA"), pair("Where is the boat?"), pair("What did the harbour master say?")),
        (pair("Is there tea?"),),
    )
    found = split(rows, 0.0, held_out=("What did the harbour master say then?",))
    assert [row.prompt for row in found.train.sft] == ["Is there any tea at four o'clock?", "Who rang?"]
    assert [row.prompt for row in found.train.preferences] == ["Where is the boat?"]
    assert found.held_out.pairs == rows.heldout
    (note,) = found.notes
    assert note.startswith("3 rows are left out of training: the prompt appears, exactly or nearly, in held-out rows")
    assert found.facts.topics["a"].sft.removed == 1 and found.facts.topics["a"].preferences.removed == 2


def test_topics_with_held_out_pairs_are_not_split_but_share_their_prompts() -> None:
    rows = everywhere(PROMPTS)
    with_pairs = Rows(
        rows.sft, rows.preferences, tuple(pair(f"unlike anything else {topic}", topic) for topic in "abc")
    )
    assert split(with_pairs).facts.topics["a"].sft.train == 240
    one = Rows(rows.sft, rows.preferences, (pair("unlike anything else", "a"),))
    assert held(split(one)) == held(split(rows)) | {"unlike anything else"}
    alone = Rows(tuple(sft(prompt) for prompt in PROMPTS), (), (pair("unlike anything else"),))
    assert len(split(alone).train.sft) == 240


def test_a_topic_keeps_something_to_train_on() -> None:
    rows = Rows((sft(PROMPTS[0]),), (pair(PROMPTS[0]), pair(PROMPTS[1])), ())
    found = split(rows, 0.999999)
    assert trained(found) == {PROMPTS[0]} and held(found) == {PROMPTS[1]}
    assert found.facts.kept == 1
    with pytest.raises(DataError, match="topic 'a': every prompt of its SFT rows appears in held-out rows or a quiz"):
        split(rows, 0.1, held_out=(PROMPTS[0],))


def test_too_little_says_so() -> None:
    found = split(Rows(tuple(sft(prompt) for prompt in ("a", "b", "c")), (), ()), 0.0)
    assert found.nothing_held_out() == (
        "no held-out rows: 3 prompts at 0 hold out none; raise data.heldout_fraction or add heldout.jsonl"
    )
    assert split(everywhere(PROMPTS)).nothing_held_out("b") is None
    assert "0 prompts" in (split(everywhere(PROMPTS)).nothing_held_out("unknown") or "")


def test_a_conversation_goes_with_each_of_its_questions() -> None:
    """Both of its answers are trained, so a pair about either question is on its side."""
    turns = [
        ("user", "Is there tea?"),
        ("assistant", "At four."),
        ("user", "And what of the cake?"),
        ("assistant", "No."),
    ]
    messages = tuple(Message(role, text) for role, text in turns)  # type: ignore[arg-type]
    whole = SftRow("a", None, messages, AT)
    follow_up = PreferenceRow("a", (Message("system", "Be Nan."), *messages[:3]), "No.", "Yes.", AT)
    for held_out in ("Is there tea?", follow_up.prompt):
        rows = Rows((whole, sft("Who rang?")), (pair("Who rang?"),), (PreferenceRow("a", held_out, "No.", "Yes.", AT),))
        assert split(rows, 0.0).facts.topics["a"].sft.removed == 1
    only_first = DataConfig(heldout_fraction=0.0, train_on="last")
    rows = Rows((whole, sft("Who rang?")), (), (pair("Is there tea?"),))
    assert split_rows(rows, Quizzes(), only_first).facts.topics["a"].sft.removed == 0


def test_raw_text_is_split_by_itself() -> None:
    texts = [SftRow("a", None, prompt, AT) for prompt in PROMPTS]
    raw = DataConfig(heldout_fraction=0.2, format="raw")
    found = split_rows(Rows(tuple(texts), (), ()), Quizzes(), raw)
    assert {row.completion for row in found.held_out.texts} == held(split(everywhere(PROMPTS)))


def test_what_was_nearly_trained_is_known() -> None:
    rows = [pair("is there tea"), pair("How deep is the well?"), pair("Who rang the bell at noon today?")]
    train = Rows((sft("Is there tea?"),), (pair("Who rang the bell at noon, today then?"),), ())
    assert np.array_equal(nearly_trained(rows, train, DataConfig()), [True, False, True])


def test_facts_for_the_manifest() -> None:
    found = split(everywhere(PROMPTS))
    stated = found.facts.stated()
    count = len(held(found))
    assert stated["prompts"] == {"trained": 240 - count, "held_out": count}
    assert stated["fraction"] == 0.2
    assert stated["topics"]["b"] == {  # type: ignore[index]
        "sft": {"train": 240 - count, "held_out": count, "removed": 0},
        "preferences": {"train": 240 - count, "held_out": count, "removed": 0},
        "explicit": 0,
        "questions": 0,
        "prompts": 240,
    }
    assert set(found.facts.held_out) == {prompt_hash(prompt) for prompt in held(found)}
    assert json.dumps(stated) == json.dumps(split(everywhere(PROMPTS[::-1])).facts.stated())
    assert stated["digests"] != split(everywhere(PROMPTS[1:])).facts.stated()["digests"]


def quiz(folder: Path, content: object, topic: str = "unit-01/tea") -> Path:
    path = folder / "data" / topic / "quiz.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read(folder: Path) -> Quizzes:
    return read_quizzes(make_config({}, folder))


GOOD = {"question": "When is tea?", "reference_answers": ["At four."], "key_concepts": ["four|4"]}


def test_quizzes_of_topics(tmp_path: Path) -> None:
    quiz(tmp_path, [GOOD, {**GOOD, "topic": "cake"}])
    quiz(tmp_path, [{"question": "Who?", "reference_answers": ["She."]}], ".")
    found = read(tmp_path)
    assert [(question.topic, question.key_concepts) for question in found.questions] == [
        ("main", ()),
        ("unit-01/tea", ("four|4",)),
        ("cake", ("four|4",)),
    ]
    assert str(found.questions[1].origin).endswith("data/unit-01/tea/quiz.json: question 1")
    assert found.held_out == ("Who?", "When is tea?", "When is tea?") and not found.problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "line 1: not valid JSON"),
        (b'["\xe4"]', "is not UTF-8 (byte 3): save the file as UTF-8"),
        ([], "must be a list of questions [{...}, ...], found an empty list"),
        ({}, "must be a list of questions"),
        ([GOOD, "x"], "question 2: must be an object with `question` and `reference_answers`, found text"),
        ([{"answers": ["x"]}], "question 1: unknown field 'answers'; known are question, reference_answers"),
        ([{"question": " "}], "question 1: `question` is empty"),
        ([{**GOOD, "reference_answers": "At four."}], "question 1: `reference_answers` must be a list of texts"),
        ([{**GOOD, "reference_answers": [4]}], "question 1: `reference_answers[0]` must be text, found a number"),
        ([{**GOOD, "key_concepts": ["four", "|"]}], "question 1: `key_concepts[1]` has no word in it: '|'"),
    ],
)
def test_what_is_unreadable_is_named_and_the_rest_is_read(content: object, message: str, tmp_path: Path) -> None:
    quiz(tmp_path, content, "bad")
    quiz(tmp_path, [GOOD])
    found = read(tmp_path)
    (problem,) = found.unreadable
    assert message in problem and "data/bad/quiz.json: " in problem
    assert [question.topic for question in found.questions][-1] == "unit-01/tea"


def test_a_question_without_references_is_held_out_and_named(tmp_path: Path) -> None:
    quiz(tmp_path, [{**GOOD, "question": "Who rang?", "reference_answers": []}, GOOD])
    found = read(tmp_path)
    assert found.held_out == ("When is tea?", "Who rang?") and len(found.questions) == 1
    (problem,) = found.without_references
    assert problem.endswith("quiz.json: question 1: has no `reference_answers`: write at least one")


def test_read_split_holds_quizzes_out(tmp_path: Path) -> None:
    quiz(tmp_path, [GOOD])
    rows = [{"prompt": prompt, "completion": "aye"} for prompt in ("when is TEA?", "Who rang?")]
    (tmp_path / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_split(make_config({"dpo": {"enabled": False}}, tmp_path))
    assert [row.prompt for row in found.train.sft] == ["Who rang?"]
    assert found.held_out.questions[0].question == "When is tea?"


def test_the_quiz_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    quiz(tmp_path, page.partition("<!-- quiz -->\n```json\n")[2].partition("```")[0].encode())
    assert [len(question.key_concepts) for question in read(tmp_path).questions] == [1, 2]
