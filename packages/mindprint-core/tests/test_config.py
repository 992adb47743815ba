"""The configuration: what people write, what they meant, and one line for every mistake."""

from pathlib import Path

import pytest

from mindprint.config import Config, dump_config, load_config, make_config, merged
from mindprint.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mindprint.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")).config == Config()
    assert load_config(tmp_path).folder == tmp_path.resolve()


@pytest.mark.parametrize("number", ["3e-4", "0.0003", "3.0e-4", "3E-04", "+3e-4"])
def test_numbers_as_people_write_them(tmp_path: Path, number: str) -> None:
    assert load_config(write(tmp_path, f"sft: {{learning_rate: {number}}}")).config.sft.learning_rate == 3e-4


@pytest.mark.parametrize("text", ["backend: mlx", "backend: {type: mlx}", "backend: 'mlx'"])
def test_a_backend_is_one_word(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)).config.backend.type == "mlx"


@pytest.mark.parametrize("text", ["backend: null", "backend:", "", "backend: {}", "backend: auto"])
def test_no_backend_means_auto(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text)).config.backend.type == "auto"


def test_a_stage_may_name_its_own(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "sft: {backend: torch}\ndpo: {backend: {type: mlx, dtype: float32}}")).config
    assert config.sft.backend is not None and config.sft.backend.type == "torch"
    assert config.dpo.backend is not None and config.dpo.backend.dtype == "float32"


def test_overrides_win_and_reach_into_short_forms(tmp_path: Path) -> None:
    file = write(tmp_path, "backend: torch\nsft: {batch_size: 4}")
    config = load_config(file, ["backend.dtype=float32", "sft.batch_size=2", "dpo.loss=ipo", "seed=7"]).config
    assert (config.backend.type, config.backend.dtype) == ("torch", "float32")
    assert (config.sft.batch_size, config.dpo.loss, config.seed) == (2, "ipo", 7)


def test_merging_values_section_by_section(tmp_path: Path) -> None:
    base = load_config(write(tmp_path, "sft: {batch_size: 2, learning_rate: 1e-3}"))
    config = merged(base, {"backend": "mlx", "sft": {"batch_size": 8}}).config
    assert (config.backend.type, config.sft.batch_size, config.sft.learning_rate) == ("mlx", 8, 1e-3)


def test_a_dump_can_be_loaded_again(tmp_path: Path) -> None:
    config = make_config(
        {"sft": {"learning_rate": 1e-7, "backend": "torch"}, "adapter": {"target_modules": ["q"]}}
    ).config
    assert load_config(write(tmp_path, dump_config(config))).config == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sft:\n  lerning_rate: 1", "line 2: sft.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("stf: {}", "line 1: stf: unknown key; did you mean 'sft'?"),
        ("dpo: {backend: {typ: mlx}}", "dpo.backend.typ: unknown key; did you mean 'type'?"),
        ("sft: {zzzz: 1}", "sft.zzzz: unknown key; known here: enabled, epochs_per_topic"),
        ("sft:\n\n  learning_rate: fast", "line 3: sft.learning_rate: input should be a valid number, found 'fast'"),
        ("sft: {batch_size: 2.5}", "sft.batch_size: is auto or a whole number from 1, found 2.5"),
        ("sft: {batch_size: true}", "sft.batch_size: is auto or a whole number from 1, found True"),
        ("sft: {batch_size: 0}", "sft.batch_size: is auto or a whole number from 1, found 0"),
        ("sft: {learning_rate: -1}", "sft.learning_rate: input should be greater than 0"),
        ("sft: {learning_rate: .nan}", "sft.learning_rate: input should be a finite number"),
        ("adapter: {dropout: 1.0}", "adapter.dropout: input should be less than 1"),
        ("dpo: {loss: sigmod}", "dpo.loss: input should be 'sigmoid', 'hinge'"),
        ("dpo: {loss: hinge, label_smoothing: 0.1}", "dpo: label_smoothing has no meaning for the loss 'hinge'"),
        ("sft: {epochs_per_topic: 1, steps_per_topic: 1}", "sft: give epochs_per_topic or steps_per_topic, not both"),
        ("sft: {enabled: false}\ndpo: {enabled: false}", "there is nothing to train"),
        ("seed: 1\nseed: 2", "line 2: 'seed' is given twice"),
        ("sft: [", "line 1:"),
        ("- sft", "line 1: expected `key: value` lines, found list"),
        ("sft: 3", "line 1: sft: input should be"),
        ("data: {sft: 3}", "data.sft: input should be a valid string, found 3"),
        ("model: 7", "line 1: model: input should be"),
    ],
)
def test_a_mistake_gets_one_line_with_file_and_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    message = str(error.value)
    assert words in message
    assert message.startswith(str(tmp_path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.batch_sze=2", "sft.batch_sze: unknown key; did you mean 'batch_size'?"),
        ("nonsense", "expected key=value"),
        ("=3", "expected key=value"),
        ("sft.betas=[", "not valid YAML"),
    ],
)
def test_a_wrong_override(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, ""), [override])
    assert words in str(error.value)


BOTH_LENGTHS = "sft: {epochs_per_topic: 3}\ndpo: {steps_per_topic: 100}"


@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [
        ((), (3, None, None, 100)),
        (("sft.steps_per_topic=2", "dpo.steps_per_topic=2"), (None, 2, None, 2)),
        (("sft.epochs_per_topic=1", "dpo.epochs_per_topic=1"), (1, None, 1, None)),
        (("sft={steps_per_topic: 2}",), (None, 2, None, 100)),
        (("sft.steps_per_topic=null",), (3, None, None, 100)),
        (("sft.epochs_per_topic=null", "sft.steps_per_topic=2"), (None, 2, None, 100)),
        (("sft.steps_per_topic=2", "sft.learning_rate=1e-3"), (None, 2, None, 100)),
    ],
)
def test_an_override_of_a_stages_length_replaces_the_other_kind(
    tmp_path: Path, overrides: tuple[str, ...], lengths: tuple[int | None, ...]
) -> None:
    config = load_config(write(tmp_path, BOTH_LENGTHS), overrides).config
    stages = (config.sft, config.dpo)
    assert tuple(n for stage in stages for n in (stage.epochs_per_topic, stage.steps_per_topic)) == lengths


def test_a_stages_length_from_python_replaces_the_other_kind(tmp_path: Path) -> None:
    file = load_config(write(tmp_path, BOTH_LENGTHS))
    assert merged(file, {"sft": {"steps_per_topic": 2}}).config.sft.epochs_per_topic is None
    assert merged(file, {"sft": {"learning_rate": 1e-3}}).config.sft.epochs_per_topic == 3


def test_two_lengths_in_overrides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not both"):
        load_config(write(tmp_path, ""), ["sft.steps_per_topic=2", "sft.epochs_per_topic=2"])


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration; `mindprint init FOLDER` makes one"):
        load_config(tmp_path / "nowhere")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "mindprint.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
