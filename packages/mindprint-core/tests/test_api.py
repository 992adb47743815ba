"""The Python API on the toy backend: what is returned, what it prints, and what a notebook shows."""

from __future__ import annotations

import json
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import datasets
import pytest

import mindprint
from mindprint.api.loss_curve import loss_curve_svg
from mindprint.api.progress import NotebookBar
from mindprint.api.results import GenerateResult, Result, Source
from mindprint.cli import main
from mindprint.data.memory import records_digest
from mindprint.errors import ConfigError, DataError, MissingLibraryError, RunError

PAIRS = [{"prompt": f"{n}?", "chosen": f"aye, {n}", "rejected": "yes"} for n in range(6)]
ROWS: list[dict[str, Any]] = [{"prompt": f"sea {n}?", "completion": "aye " * (n + 1)} for n in range(6)] + PAIRS
COLUMNS = ("prompt", "completion", "chosen", "rejected")


@pytest.fixture
def config(toy: str, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The values of a configuration without any data, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": {"name": str(toy_model)},
        "backend": toy,
        "adapter": {"r": 2},
        "data": {"heldout_fraction": 0.3},
        "sft": {"steps_per_topic": 3, "batch_size": 2, "learning_rate": 1e-2},
        "dpo": {"steps_per_topic": 2, "batch_size": 2, "learning_rate": 1e-2},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"levels": []},
        "curriculum": {"roll_back": False},
    }


@pytest.fixture
def result(config: dict[str, Any]) -> mindprint.TrainResult:
    return mindprint.train(config, rows=ROWS)


def test_every_public_name_is_listed_and_there() -> None:
    names = {"train", "evaluate", "generate", "verify", "merge", "convert", "compare", "open_adapter", "load_config"}
    assert names < set(dir(mindprint)) == set(mindprint.__all__)
    assert all(getattr(mindprint, name) is not None for name in dir(mindprint))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = mindprint.trian
    assert [name for name in dir(mindprint.api) if not hasattr(mindprint.api, name)] == []


def test_train_returns_the_loss_curve(result: mindprint.TrainResult) -> None:
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [(step.stage, step.step, step.loss) for step in result.steps] == [
        (line["stage"], line["step"], line["loss"]) for line in lines
    ]
    assert [step.stage for step in result.steps] == ["sft"] * 3 + ["dpo"] * 2
    assert result.steps[3].loss == pytest.approx(0.693147, abs=1e-6)
    frame = result.to_pandas()
    assert frame["loss"].tolist() == [step.loss for step in result.steps]
    with pytest.raises(FrozenInstanceError):
        result.run = Path()  # type: ignore[misc]


def test_rolled_back_steps_are_left_out(result: mindprint.TrainResult) -> None:
    metrics = result.run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line | {"rolled_back": line["step"] <= 2}) + "\n" for line in lines))
    assert [step.step for step in result.steps] == [3, 4, 5]


def test_to_pandas_without_pandas_names_the_remedy(
    result: mindprint.TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingLibraryError, match="pip install pandas"):
        result.to_pandas()


def test_results_print_as_the_commands_print(result: mindprint.TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(result.run)
    assert str(result).splitlines()[0].split() == ["topic", "stage", "backend", "steps", "loss", "seconds"]
    assert str(result).splitlines()[-1] == f"adapter: {result.adapter.relative_to(Path.cwd())}"
    for command, made in {
        ("verify", run): mindprint.verify(run),
        ("generate", run, "--prompt", "sea?"): mindprint.generate(run, "sea?"),
        ("compare", "--runs", run, run): mindprint.compare(runs=[run, run]),
    }.items():
        main(list(command))
        assert capsys.readouterr().out.rstrip() == str(made).rstrip()
        main([*command, "--json"])
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(made.to_dict()))


def test_generate_answers_with_both_models(result: mindprint.TrainResult) -> None:
    made = mindprint.generate(result.run, ["sea 1?", "sea 2?"], max_new_tokens=3)
    with mindprint.open_adapter(result.run) as opened:
        settings = opened.config.generation.model_copy(update={"max_new_tokens": 3})
        assert tuple(one.tuned for one in made.answers) == opened.answer(["sea 1?", "sea 2?"], settings)
        assert tuple(one.base for one in made.answers) == opened.answer(["sea 1?", "sea 2?"], settings, adapter=False)
        assert "toy, cpu, float32" in repr(opened)
    assert mindprint.generate(result.run, "sea?", only="base").answers[0].tuned is None
    for nothing in ([], [" "], ""):
        with pytest.raises(DataError, match="prompts: "):
            mindprint.generate(result.run, nothing)


def test_evaluate_verify_merge_and_convert(result: mindprint.TrainResult) -> None:
    evaluated = mindprint.evaluate(result.run, rows=ROWS)
    assert evaluated.pairs is not None and evaluated.pairs.overall.pairs == 2
    assert evaluated.cautions()[0].startswith("only 2 held-out pairs, so that one of them moves an accuracy by 50%")
    assert mindprint.evaluate(result.run, rows=ROWS, answers=False).voice is None

    verified = mindprint.verify(result.run)
    assert verified.ok and verified.findings == () and verified.codes == frozenset()
    merged = mindprint.merge(result.run, "merged")
    assert merged.verification is not None and merged.verification.ok
    assert str(merged) == f"merged: 2 weights of {merged.base} changed, everything else is as it was\n" + str(
        merged.verification
    )
    assert mindprint.merge(result.run, "again", verify=False).verification is None
    converted = mindprint.convert(result.run, "converted", to="mlx-lm")
    assert str(converted) == "converted: 2 modules, in the format of mlx-lm"


def test_what_a_notebook_shows_is_escaped_and_runs_nothing(result: mindprint.TrainResult) -> None:
    hostile = "<script>alert(1)</script>"
    answered = mindprint.generate(result.run, hostile)
    source = Source(hostile, hostile, hostile, hostile, hostile)
    stages = tuple(replace(stage, topic=hostile) for stage in result.stages)
    verified = mindprint.verify(result.run)
    shown: list[Result] = [
        replace(result, stages=stages),
        GenerateResult(answered.answers, source),
        replace(verified, report=replace(verified.report, subject=hostile)),
        mindprint.evaluate(result.run, rows=[row | {"topic": hostile} for row in ROWS]),
        mindprint.compare(runs=[result.run, result.run]),
    ]
    for one in shown:
        html = one._repr_html_()
        assert "<table" in html
        assert "<script" not in html
    assert "&lt;script&gt;" in shown[0]._repr_html_()
    assert "<svg" in shown[0]._repr_html_() and "stroke" in shown[0]._repr_html_()
    assert "&lt;" not in mindprint.load_config(result.run / "config.yaml")._repr_html_()


def test_a_curve_of_one_step_or_none_is_no_picture(result: mindprint.TrainResult) -> None:
    assert loss_curve_svg(result.steps[:1]) == ""
    assert loss_curve_svg([replace(step, loss=float("nan")) for step in result.steps]) == ""
    assert loss_curve_svg(result.steps).count("<path") == 2


def test_observers_receive_every_event(config: dict[str, Any]) -> None:
    class Watching:
        def __init__(self) -> None:
            self.seen: list[mindprint.Event] = []

        def on_event(self, event: mindprint.Event) -> None:
            self.seen.append(event)

    watching, heard = Watching(), []
    assert isinstance(watching, mindprint.Observer)
    mindprint.train(config, rows=ROWS, on_event=heard.append, observers=[watching])
    assert watching.seen == heard
    assert [type(event).__name__ for event in heard].count("StepDone") == 5


def test_progress_is_for_those_who_ask_or_watch(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    mindprint.train(config, rows=ROWS)
    assert capsys.readouterr() == ("", "")
    mindprint.train(config, rows=ROWS, progress=True)
    assert "mindprint: main sft: 3 steps on toy\n" in capsys.readouterr().err


def test_progress_in_a_notebook() -> None:
    pictures: list[str] = []
    clock = iter(range(100))
    with NotebookBar(pictures.append, lambda: next(clock)) as show:
        show(mindprint.RunStarted("runs/run-001", 60))
        show(mindprint.Notice("<b> is no markup", warning=True))
        show(mindprint.StageStarted("sea/tides", "sft", "toy", 30))
        show(mindprint.StepDone("sea/tides", "sft", "toy", 15, 15, 2.5, 1e-3, 1.0, 100, 0.5))
    assert len(pictures) == 5
    assert "&lt;b&gt; is no markup" in pictures[-1] and "15/60" in pictures[-1] and "loss 2.5000" in pictures[-1]
    assert all(picture.startswith("<pre") for picture in pictures)


def test_rows_from_memory_train_what_files_train(config: dict[str, Any], result: mindprint.TrainResult) -> None:
    Path("data").mkdir()
    for name, rows in {"sft": ROWS[:6], "preferences": PAIRS}.items():
        Path("data", f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_files = mindprint.train(config)
    dataset = datasets.Dataset.from_list([dict.fromkeys(COLUMNS) | row for row in ROWS])
    from_dataset = mindprint.train(config, rows=dataset)
    weights = "adapter_model.safetensors"
    assert (result.adapter / weights).read_bytes() == (from_files.adapter / weights).read_bytes()
    assert (result.adapter / weights).read_bytes() == (from_dataset.adapter / weights).read_bytes()


def test_a_run_says_that_its_rows_came_from_memory(config: dict[str, Any], result: mindprint.TrainResult) -> None:
    digest = records_digest(ROWS)
    assert json.loads((result.run / "manifest.json").read_text())["rows_from_memory"] == digest
    assert mindprint.load_config(result.run / "config.yaml").config.data.rows_digest == digest
    assert records_digest([{**ROWS[0], "topic": None}]) == records_digest(ROWS[:1]) != records_digest(ROWS[1:2])
    with pytest.raises(DataError, match=f"was trained on rows from memory \\(digest {digest}\\)"):
        mindprint.evaluate(result.run)
    again = mindprint.train(result.run / "config.yaml", rows=ROWS, run="again")
    assert [step.loss for step in again.steps] == [step.loss for step in result.steps]


def test_a_run_of_rows_is_resumed_with_the_same_rows_alone(config: dict[str, Any]) -> None:
    def stop(event: mindprint.Event) -> None:
        if isinstance(event, mindprint.StepDone) and event.step == 4:
            raise KeyboardInterrupt

    config["checkpoints"] = {"every": 2}
    whole = mindprint.train(config, rows=ROWS, run="whole")
    with pytest.raises(KeyboardInterrupt):
        mindprint.train(config, rows=ROWS, on_event=stop)
    with pytest.raises(RunError, match=r"run-001: was trained on rows from memory .* resume=True, rows=rows"):
        mindprint.train(config, resume=True)
    with pytest.raises(RunError, match=r"not kept, and rows= are others \(digest \w+\): resume it"):
        mindprint.train(config, rows=ROWS[:-1], resume=True)
    assert main(["train", "runs/run-001", "--resume"]) == 2
    resumed = mindprint.train(config, rows=ROWS, resume=True)
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: is empty"),
        (ROWS[0], "found a mapping with 'prompt', 'completion'"),
        ([*ROWS[:3], "text"], r"rows\[3\]: must be a dict, found text"),
        ([*ROWS, {"prompt": "a?", "chosen": "b"}], r"rows\[12\]: `rejected` is missing, next to `prompt` and `chosen`"),
        ([*ROWS, {"prompt": "a?", "complection": "b"}], r"rows\[12\]: no field `completion`; is it 'complection'\?"),
        (ROWS[:6], r"rows: none is a preference pair .* set dpo.enabled=false"),
        (PAIRS, r"rows: none is to be imitated .* set sft.enabled=false"),
    ],
)
def test_rows_that_are_wrong_are_named(config: dict[str, Any], rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mindprint.train(config, rows=rows)
    assert not Path("runs").exists()


def test_a_data_frame_is_told_what_to_pass(config: dict[str, Any], result: mindprint.TrainResult) -> None:
    with pytest.raises(DataError, match=r'frame.to_dict\("records"\)'):
        mindprint.train(config, rows=result.to_pandas())


def test_a_configuration_in_any_form(config: dict[str, Any]) -> None:
    file = mindprint.load_config(config, ["seed=3"], sft={"learning_rate": 1e-4})
    assert (file.config.seed, file.config.sft.learning_rate, file.config.sft.batch_size) == (3, 1e-4, 2)
    assert "  learning_rate: 0.0001\n" in str(file)
    Path("mindprint.yaml").write_text(str(file))
    assert mindprint.load_config(".").config == file.config
    assert mindprint.load_config(file) is file


def test_compare_wants_one_thing() -> None:
    for wrong in ({}, {"backends": ["a", "b"]}, {"runs": ["a", "b"], "backends": ["a", "b"]}, {"runs": ["a"]}):
        with pytest.raises(ConfigError, match="compare: "):
            mindprint.compare(**wrong)


def test_importing_the_api_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, mindprint.api; dir(mindprint); print(sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"numpy", "pydantic", "rich", "torch", "pandas"} & set(eval(done.stdout))
