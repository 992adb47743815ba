"""Reports of a run's folder: the right figures in the right places, whatever is missing, hostile or not a number."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from run_samples import (
    BEES,
    FERRY,
    HARBOUR,
    HOSTILE,
    MEASURED,
    evaluations,
    steps,
    write_lines,
    write_sample_run,
)

from mindprint.cli import main
from mindprint.errors import RunError
from mindprint.reports import read_run, write_reports
from mindprint.reports.advice import advice
from mindprint.reports.content import contents
from mindprint.reports.curves import MOST_POINTS, boundaries, curves, smoothed, thinned
from mindprint.reports.document import Document, DotChart, LineChart, Paragraph, Table
from mindprint.reports.markdown import as_markdown
from mindprint.reports.page import as_page
from mindprint.reports.svg import ticks
from mindprint.runs.records import EvaluationRecord, Figures, Interval, as_line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_sample_run(tmp_path / "run-001")


def rows(document: Document, section: str, table: int = 0) -> dict[str, tuple[str, ...]]:
    """A table's rows by their first cell."""
    blocks = next(one.blocks for one in document.sections if one.title == section)
    tables = [block for block in blocks if isinstance(block, Table)]
    return {row[0]: row[1:] for row in tables[table].rows}


def with_final(run: Path, figures: Figures) -> Document:
    """The report of a run whose final evaluation found `figures`."""
    write_lines(run / "evaluations.jsonl", [as_line(EvaluationRecord("final", "", 240, figures=figures))])
    return contents(read_run(run))


def test_a_topic_stands_as_the_attempt_that_was_kept(run: Path) -> None:
    """The harbour's first attempt ended at step 60 in a collapse, was rolled back and tried again."""
    record = read_run(run)
    assert record.topics == (HARBOUR, FERRY, BEES)
    kept = record.trained(HARBOUR)
    assert kept is not None and (kept.step, kept.attempt, kept.figures.voice) == (120, 2, Interval(0.83, 0.71, 0.95))
    assert [one.step for one in record.evaluations or () if record.undone(one)] == [40, 60]
    assert [record.outcome(topic) for topic in record.topics] == ["passed", "failed", "not evaluated"]
    assert sum(step.undone for step in record.steps) == 60


def test_files_that_a_run_lacks_are_none_and_the_report_says_so(tmp_path: Path) -> None:
    record = read_run(write_sample_run(tmp_path / "old", evaluated=False))
    assert (record.evaluations, record.decisions, record.answers) == (None, None, None)
    text = as_markdown(contents(record))
    assert "The voice could not be evaluated: there was no evaluation." in text
    assert "the run has no evaluations.jsonl" in text
    assert "no answers.jsonl" in text
    assert "3 could not be evaluated" in text
    assert not re.search(r"\b0\.00\b", text)


def test_a_line_that_was_cut_off_ends_its_file_and_is_named(run: Path) -> None:
    whole = (run / "evaluations.jsonl").read_text(encoding="utf-8")
    (run / "evaluations.jsonl").write_text(whole[: len(whole) - 40], encoding="utf-8")
    record = read_run(run)
    assert len(record.evaluations or ()) == len(evaluations()) - 1
    assert record.broken == (
        "evaluations.jsonl, line 8: is not as this version writes it; this line and all after it are left out",
    )
    assert "evaluations.jsonl, line 8" in as_markdown(contents(record))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a run"), ("{", "cannot be read"), ("[]", "must hold a JSON object, found list")],
)
def test_what_is_no_run_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_the_first_paragraph_says_what_came_out(run: Path) -> None:
    paragraph = next(block for block in contents(read_run(run)).sections[0].blocks if isinstance(block, Paragraph))
    for words in (
        "from 0.01 (-0.12 to 0.14) before training to 0.83 (0.71 to 0.95) after it: it rose, and more than by chance",
        "612 words of answers to 16 held-out prompts",
        "1 passed; 1 failed (Ferry",
        "1 could not be evaluated (unit-02/chapter-01/bees)",
        "Flagged: Ferry & <script>alert(1)</script>: recites training text: 40% of the answers.",
    ):
        assert words in paragraph.text


@pytest.mark.parametrize(
    ("voice", "said"),
    [
        (Interval(0.1, -0.1, 0.3), "the intervals overlap, so no change is shown"),
        (Interval(-0.6, -0.8, -0.4), "it fell below the base model's"),
    ],
)
def test_a_change_within_the_intervals_is_no_change(run: Path, voice: Interval, said: str) -> None:
    text = as_markdown(with_final(run, replace(MEASURED, voice=voice)))
    assert said in text
    assert "That the voice changed at all" in text


def test_what_could_not_be_evaluated_is_never_a_number(run: Path) -> None:
    """Neither in the table, where every figure of the bees is words, nor in the chart, which has no dot for them."""
    document = contents(read_run(run))
    assert rows(document, "Voice by topic")[BEES] == (
        "could not be evaluated", "could not be evaluated", "–", "38", "not evaluated",
        "38 words of answers, and a score needs 100",
    )  # fmt: skip
    (chart,) = (block for section in document.sections for block in section.blocks if isinstance(block, DotChart))
    dots = dict(chart.rows)[BEES]
    assert [(dot.interval, dot.reason) for dot in dots] == [
        (None, "could not be evaluated: 38 words of answers, and a score needs 100")
    ]
    nothing = Figures(unmeasured={"voice": "all answers are empty"})
    final = with_final(run, nothing)
    text = as_markdown(final)
    assert "The voice could not be evaluated: all answers are empty." in text
    assert not re.search(r"\| 0(\.00|%)? \|", as_markdown(replace(final, sections=final.sections[3:9])))


def test_forgetting_shows_then_and_now(run: Path) -> None:
    document = contents(read_run(run))
    assert rows(document, "Forgetting")["unit The water"] == (
        "The harbour", "0.90 (0.85 to 0.95)", "0.50 (0.40 to 0.60)", "5.8 → 7.9",
    )  # fmt: skip
    assert "forgotten since it was trained: The harbour" in as_markdown(document)


def test_decisions_are_told_with_what_they_undid_and_changed(run: Path) -> None:
    table = next(one for one in contents(read_run(run)).sections if one.title == "Decisions").blocks[0]
    assert isinstance(table, Table)
    assert table.rows[1][2:] == (
        "DPO",
        "1",
        "roll back",
        "62% of the answers are one repeated token; steps 41 to 60 undone",
    )
    assert table.rows[2][4:] == ("retry", "voice -0.40 is below 0.50; steps 1 to 60 undone; next: learning_rate × 0.5")


def test_advice_follows_the_symptoms(run: Path) -> None:
    found = {one.symptom: one.remedy for one in advice(read_run(run))}
    collapse = "the answers collapsed in DPO of The harbour: 62% of the answers are one repeated token"
    assert found[collapse].startswith("lower dpo.learning_rate (it was 5e-06; try 2.5e-06)")
    lacking = found[f"{BEES} could not be evaluated: 38 words of answers, and a score needs 100"]
    assert "hold out prompts for at least 62 more words" in lacking
    assert found["1 step had no finite loss"].startswith("compute in float32")


@pytest.mark.parametrize(
    ("changes", "symptom", "remedy"),
    [
        ({"voice": Interval(0.2, 0.1, 0.3), "copy_rate": 0.5}, "the voice is low", "fewer epochs, or more text"),
        ({"voice": Interval(0.1, 0.0, 0.2)}, "is not above the base model's by more than chance", "raise adapter.r"),
        ({"flagged": ("recites training text: 60%",)}, "recites training text", "fewer epochs"),
        ({"stopped": 0.2}, "only 20% of the answers end by themselves", "generation.max_new_tokens"),
        (
            {"loops": 0.25, "base_loops": 0.5},
            "25% of the answers of mindprint generate are loops (of the base model's 50%)",
            "set generation.repetition_penalty=1.1",
        ),
        ({"length": 3.0}, "3.00 times as long", "as long as the answers that you want"),
        ({"reward_accuracy": 0.3}, "is only 30%", "not swapped"),
        ({"perplexity": 21.0}, "perplexity 18.4 → 21.0", "fewer epochs"),
        ({"concept_coverage": 0.2, "base_concept_coverage": 0.6}, "60% → 20%", "state these facts"),
    ],
)
def test_each_symptom_has_its_advice(run: Path, changes: dict[str, object], symptom: str, remedy: str) -> None:
    sound = {one.symptom for one in advice(replace(read_run(run), evaluations=(final(MEASURED),)))}
    assert not any(symptom in one for one in sound)
    record = replace(read_run(run), evaluations=(final(replace(MEASURED, **changes)),))  # type: ignore[arg-type]
    assert [remedy in one.remedy for one in advice(record) if symptom in one.symptom] == [True]


def final(figures: Figures) -> EvaluationRecord:
    return EvaluationRecord("final", "", 240, figures=figures)


def test_strokes_follow_the_stages_and_mark_what_was_undone(run: Path) -> None:
    record = read_run(run)
    lines = curves(record, "sft", lambda step: step.loss, "SFT loss", "first")
    assert [(line.tone, line.points[0][0], len(line.points)) for line in lines] == [
        ("faint", 41, 39), ("faint", 81, 40), ("faint", 121, 40),
        ("undone", 1, 40), ("first", 41, 39), ("first", 81, 40), ("first", 121, 40),
    ]  # fmt: skip
    assert boundaries(record, "sft") == (40.5, 80.5, 120.5)


def test_26_each_stage_has_its_own_axis_and_a_smoothed_line(run: Path) -> None:
    """Line 26: no stage leaves a gap in the chart of the other, and the line is the running mean of faint values."""
    charts = {
        block.title: block
        for section in contents(read_run(run)).sections
        for block in section.blocks
        if isinstance(block, LineChart)
    }
    assert (charts["SFT loss"].span, charts["DPO loss"].span) == ((1, 160), (1, 80))
    assert charts["SFT loss"].x_label == "SFT step"
    assert {line.label for line in charts["SFT loss"].lines} == {"each step", "SFT loss", "SFT loss, rolled back"}


def test_26_smoothing_is_a_running_mean_that_shrinks_at_both_ends() -> None:
    """Means by hand: of 1 value at the ends, of 3 inside. A straight line stays where it is."""
    points = [(float(x), y) for x, y in enumerate([3.0, 0.0, 3.0, 6.0, 0.0])]
    assert smoothed(points) == [(0.0, 3.0), (1.0, 2.0), (2.0, 3.0), (3.0, 3.0), (4.0, 0.0)]
    straight = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in smoothed(straight)] == pytest.approx([y for _, y in straight])


def test_26_figures_come_first_and_no_column_has_the_name_of_another(run: Path) -> None:
    document = contents(read_run(run))
    first = document.sections[0].blocks[0]
    assert isinstance(first, Table)
    assert first.rows[0][1:] == ("0.01 (-0.12 to 0.14)", "0.83 (0.71 to 0.95)")
    assert ("reward accuracy on 16 held-out pairs", "–", "94%") in first.rows
    tables = [block for section in document.sections for block in section.blocks if isinstance(block, Table)]
    for table in tables:
        assert len(set(table.header)) == len(table.header) and all(table.header), table.caption


def test_26_an_answer_that_was_cut_is_marked(run: Path) -> None:
    file = run / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    write_lines(file, [{**line, "cut": ["tuned"] if place == 0 else []} for place, line in enumerate(lines)])
    markdown, page = write_reports(run)
    for text in (markdown.read_text(), page.read_text()):
        assert text.count("tuned model, cut at its limit of tokens") == 1
        assert "base model, cut" not in text


def test_thinning_keeps_the_extremes_and_the_ends() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = thinned(points, 1000)
    assert len(kept) <= 1002
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {points[54_321], points[77_777]} <= set(kept)
    assert kept == sorted(kept) and set(kept) <= set(points)


def test_a_hundred_thousand_steps_make_a_small_page(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "long")
    template = [line for line in steps() if line["stage"] == "dpo"][-1]
    lines = [template | {"step": place, "loss": math.sin(place)} for place in range(1, 100_001)]
    write_lines(run / "metrics.jsonl", lines)
    _, page = write_reports(run)
    assert page.stat().st_size < 500_000
    drawn = re.findall(r'class="line first" d="([^"]+)"', page.read_text(encoding="utf-8"))
    assert MOST_POINTS * 0.9 < drawn[0].count("L") < MOST_POINTS * 1.1


def test_losses_that_are_no_numbers_are_left_out_and_counted(run: Path) -> None:
    lines = [line | {"loss": math.inf if line["step"] % 2 else math.nan} for line in steps()]
    write_lines(run / "metrics.jsonl", lines)
    _, page = write_reports(run)
    text = page.read_text(encoding="utf-8")
    assert "SFT loss: none of 160 steps had a finite loss." in text
    assert "240 steps had a loss that is not finite" in text
    assert not re.search(r'd="[^"]*(nan|inf)', text)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 12, [0, 5, 10]), (0.61, 0.7, [0.62, 0.64, 0.66, 0.68, 0.7]), (2, 2, [2])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text of each cell of interest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def test_what_users_wrote_is_never_markup(run: Path) -> None:
    """Prompts, answers and titles with tags in them stand in both files, escaped."""
    markdown, page = write_reports(run)
    tags = Tags(page.read_text(encoding="utf-8"))
    assert (tags.count("script"), tags.count("img")) == (0, 0)
    assert {attributes.get("class") for tag, attributes in tags.found if tag == "b"} == {"good", "bad", "unknown"}
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert "&lt;script&gt;document.title=&quot;owned&quot;" in page.read_text(encoding="utf-8")
    text = markdown.read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<(script|img|b)", text)
    assert "### \\<script\\>document.title" in text and HOSTILE not in text


def test_the_page_leads_nowhere(run: Path) -> None:
    """Every href and src is an anchor of the page itself or empty data, and the style sheet loads nothing."""
    page = write_reports(run)[1].read_text(encoding="utf-8")
    tags = Tags(page)
    targets = [value for _, attributes in tags.found for name, value in attributes.items() if name in ("href", "src")]
    anchors = {attributes.get("id") for tag, attributes in tags.found if tag == "section"}
    assert len(targets) == 13
    assert all(target == "data:," or (target or "").removeprefix("#") in anchors for target in targets)
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page


def test_every_chart_says_in_words_what_it_shows(run: Path) -> None:
    page = write_reports(run)[1].read_text(encoding="utf-8")
    charts = re.findall(r"<svg [^>]*role=\"img\"[^>]*><title>([^<]+)</title><desc>([^<]+)</desc>", page)
    assert len(charts) == page.count("<svg") == 7  # three of curves, and rows: two topics, all, other people
    assert ("The harbour", "base 0.01, from -0.12 to 0.14; tuned 0.83, from 0.71 to 0.95") in charts


def test_the_words_of_the_page_can_be_read_in_light_and_dark() -> None:
    """WCAG 2.2: a contrast of 4.5 for words, of 3 for what is drawn, on the page and on its cards."""
    style = files("mindprint.reports").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media (prefers", 1))
    for colours in (light, dark):
        for surface in ("page", "card"):
            for words in ("text", "quiet", "first", "good", "bad", "unknown"):
                assert contrast(colours[words], colours[surface]) >= 4.5, (words, surface)
            for drawn in ("first", "second", "third", "undone"):
                assert contrast(colours[drawn], colours[surface]) >= 3, (drawn, surface)


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two sRGB colours; black on white is 21."""
    lights = sorted(luminance(colour) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_is_wcags() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_the_same_run_gives_the_same_files(run: Path) -> None:
    first = [path.read_bytes() for path in write_reports(run)]
    assert [path.read_bytes() for path in write_reports(run)] == first
    assert as_page(contents(read_run(run))).encode() == first[1]


def test_the_command_writes_both_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"run": str(run), "markdown": str(run / "report.md"), "html": str(run / "report.html")}
    assert (run / "report.md").read_text(encoding="utf-8").startswith("# A voice for builtin:tiny\n")
