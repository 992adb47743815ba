"""The configuration: YAML for people, checked by pydantic, with one line for every mistake.

Unknown keys are refused with the nearest known name, numbers written `3e-4` are numbers, and `key=value` overrides go
through the same checks as the file. Paths are relative to the file that names them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mindprint.contract import AdamW, QuantizeMethod, Sampling
from mindprint.errors import ConfigError
from mindprint.input_files import read_text, resolve_path
from mindprint.losses import PreferenceLoss, PreferenceLossName, default_sft_weight, takes_label_smoothing
from mindprint.yaml_files import parse_yaml, parse_yaml_value

FILE_NAME = "mindprint.yaml"

Positive = Annotated[int, Field(gt=0)]
Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear", "cosine"]
STAGE_LENGTHS = ("epochs_per_topic", "steps_per_topic")
"""The two settings for the length of a stage. A stage has at most one of them."""

Level = Literal["topic", "chapter", "unit", "final"]
"""The part of a run that an evaluation covers."""


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, no changes afterwards."""

    # YAML has typed the values already. Strict types refuse `r: "8"` and `r: true` instead of guessing a number.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model: a hub id, a folder, or `builtin:tiny`."""

    name: str = Field("builtin:tiny", description="Hub id, folder (relative to this file), or `builtin:tiny`.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    quantize: QuantizeMethod | None = Field(
        None, description="Pack a full-precision base's linear layers at loading: `nf4`, `4bit` or `8bit`."
    )


def _count_or_auto(value: object) -> object:
    """Refuse a wrong count in one line. Tried as types one by one, each of them would complain."""
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"is auto or a whole number from 1, found {value!r}")
    return value


def _flag_or_auto(value: object) -> object:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"is auto, true or false, found {value!r}")
    return value


CountOrAuto = Annotated[int | Auto, BeforeValidator(_count_or_auto)]
FlagOrAuto = Annotated[bool | Auto, BeforeValidator(_flag_or_auto)]


class BackendConfig(Section):
    """The place where training runs. Changing `type` is all that a move to another framework needs."""

    type: str = Field("auto", description="`auto`, `torch`, `mlx`, or any installed backend; `pytorch` means `torch`.")
    device: str = Field("auto", description="`auto`, or a device of the backend: `cpu`, `cuda`, `mps`, `metal`.")
    devices: list[str] | None = Field(
        None,
        description="Devices among which one process divides the base's decoder layers, so that a larger base fits: "
        "PyTorch, such as `[cuda:0, cuda:1]`. In place of `device`.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the base's weights; the adapter is float32 always."
    )
    gradient_checkpointing: FlagOrAuto = Field(
        False,
        description="Compute activations again instead of keeping them: less memory, more time, same numbers. `auto`: "
        "only if the run does not fit otherwise.",
    )
    shard: bool = Field(
        False,
        description="Divide the base's decoder layers among the ranks, so that a larger base fits: PyTorch, under "
        "`mindprint launch` or `torchrun`.",
    )
    memory_limit: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GiB that a run may need, for `auto` and for `mindprint plan`. Default: all that is free."
    )

    @model_validator(mode="after")
    def _one_way_of_dividing(self) -> BackendConfig:
        if self.devices is not None and len(self.devices) < 2:
            raise ValueError(f"has devices {self.devices}, which takes two or more: write one as device")
        if self.devices and self.device != "auto":
            raise ValueError(f"has device {self.device!r} and devices: remove one of them")
        if self.devices and self.shard:
            raise ValueError(
                "has devices, which divides the base in one process, and shard, which needs several: remove one of them"
            )
        return self

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again, once `auto` is decided."""
        assert isinstance(self.gradient_checkpointing, bool), "auto is decided when a run is prepared"
        return self.gradient_checkpointing


class DataConfig(Section):
    """The rows that the model learns from, and how they are read."""

    path: str | None = Field("data", description="Folder with the files below under their default names.")
    sft: str | list[str] | None = Field(
        None, description="SFT rows: files, or a dataset on the hub. Default: `sft.jsonl` in `path`."
    )
    preferences: str | list[str] | None = Field(
        None, description="Preference pairs: likewise. Default: `preferences.jsonl` in `path`."
    )
    heldout: str | list[str] | None = Field(
        None, description="Pairs never trained on, for `mindprint eval`. Default: `heldout.jsonl` in `path`, if there."
    )
    heldout_fraction: Fraction = Field(
        0.1,
        description="Share of the prompts that is never trained on, drawn by a hash of each, in topics that "
        "`heldout` has no pairs of; 0 holds out none.",
    )
    curriculum: str | None = Field(
        None, description="File with titles and order of units, chapters, topics. Default: `curriculum.yaml` in `path`."
    )
    rows_digest: str | None = Field(
        None,
        description="Written by a run whose rows came from memory (`train(..., rows=rows)`): their digest. Not for you "
        "to set.",
    )
    format: Literal["chat", "raw"] = Field(
        "chat", description="`chat` uses the tokenizer's template; `raw` is plain text and end-of-sequence."
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="Which assistant turns of a conversation are trained: `all`, or only the `last`."
    )
    topic: str | None = Field(
        None, description="Column whose values are the topics. Default: `topic`; rows without one belong to `main`."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="Variables for the chat template (`enable_thinking: false`), the same in training, evaluation and "
        "generation. A row can have its own in a field of this name.",
    )
    max_length: Positive = Field(1024, description="Longest sequence in tokens. Longer ones are cut at their end.")
    length_window: Positive = Field(
        1,
        description="Micro-batches within which rows of like length go together, which saves padding; 1: rows meet at "
        "random, as in TRL.",
    )


class AdapterConfig(Section):
    """The LoRA adapter (Hu et al. 2021)."""

    r: Positive = Field(8, description="Rank.")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="The change is scaled by alpha / r.")
    dropout: Fraction = Field(0.0, description="Dropout before A, in SFT only.")
    target_modules: str | list[str] = Field(
        "all-linear", description="`all-linear`, or a list of module names or their endings (`q_proj`)."
    )
    target_parameters: list[str] = Field(
        [],
        description="Stacks of experts to adapt as well: `[experts]` for all of them, or endings of their parameters' "
        "names (`experts.down_proj`). They need a dropout of 0.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).")
    start_from: str | None = Field(
        None,
        description="Folder of an adapter of PEFT's, mlx-lm's or Mindprint's to continue from. Its rank, alpha and "
        "modules must be those given here.",
    )

    @model_validator(mode="after")
    def _no_dropout_on_experts(self) -> AdapterConfig:
        # PEFT adds the change to the parameter before its product with any input, so that no input can be dropped.
        if self.target_parameters and self.dropout:
            raise ValueError("target_parameters needs dropout: 0, because PEFT has no dropout on parameters")
        return self


SHORT_FORMS = {"backend": "type", "model": "name", "data": "path"}
"""Sections that can be written as one text, and the setting that it means: `backend: mlx`, `model: my-base`."""


def _backend(value: object) -> object:
    """Expand `backend: mlx` and `backend: null` to a section."""
    if value is None:
        return {}
    return {"type": value} if isinstance(value, str) else value


def _model(value: object) -> object:
    """Expand `model: my-base` to a section."""
    return {"name": value} if isinstance(value, str) else value


def _data(value: object) -> object:
    """Expand `data: my-rows` to a section."""
    return {"path": value} if isinstance(value, str) else value


def _gate(value: object) -> object:
    """Refuse a wrong gate in one line. Tried as types one by one, each of them would complain."""
    if isinstance(value, str) and value not in ("always", "never"):
        raise ValueError(f"is always, never, or a number, found {value!r}")
    return value


class StageConfig(Section):
    """The settings that all stages share: length, learning rate, batches and optimizer."""

    enabled: bool = Field(True, description="Whether the stage runs.")
    epochs_per_topic: Positive | None = Field(
        None, description="Passes over a topic's rows, or give `steps_per_topic`."
    )
    steps_per_topic: Positive | None = Field(None, description="Optimizer steps on each topic; or `epochs_per_topic`.")
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: CountOrAuto = Field(
        4,
        description="Rows (or pairs) in a micro-batch. `auto`: as many as fit into memory, with as many micro-batches "
        "as the same step then needs.",
    )
    gradient_accumulation: Positive = Field(1, description="Micro-batches in an optimizer step.")
    schedule: Schedule = Field("constant", description="Learning rate over a stage: `constant`, `linear` or `cosine`.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps over which the learning rate rises from 0.")
    weight_decay: NonNegative = Field(0.0, description="AdamW's decoupled weight decay.")
    # A list and not a tuple: YAML has no tuples, and strict types convert nothing.
    betas: list[Fraction] = Field([0.9, 0.999], min_length=2, max_length=2, description="AdamW's betas.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Clip gradients to this global norm; null leaves them alone."
    )
    # In a stage, null means the run's backend. `_backend` alone would make a section of defaults from it.
    backend: Annotated[BackendConfig | None, BeforeValidator(lambda v: None if v is None else _backend(v))] = Field(
        None, description="A backend for this stage alone."
    )

    @model_validator(mode="after")
    def _one_length(self) -> StageConfig:
        if self.epochs_per_topic is not None and self.steps_per_topic is not None:
            raise ValueError("give epochs_per_topic or steps_per_topic, not both")
        return self

    @property
    def rows_at_once(self) -> int:
        """The rows (or pairs) of a micro-batch, once `auto` is decided."""
        assert isinstance(self.batch_size, int), "auto is decided when a run is prepared"
        return self.batch_size

    @property
    def optimizer(self) -> AdamW:
        return AdamW((self.betas[0], self.betas[1]), self.eps, self.weight_decay)


class SftConfig(StageConfig):
    """Supervised fine-tuning. Default length: three epochs."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="AdamW's learning rate at its highest.")


class DpoConfig(StageConfig):
    """Preference optimization. Default length: a hundred steps."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-6, description="AdamW's learning rate at its highest.")
    batch_size: CountOrAuto = Field(2, description="Pairs in a micro-batch, or `auto`.")
    pairs: Literal["data", "on_policy"] = Field(
        "data",
        description="Rejected answers: `data` takes those of the rows; `on_policy` has the model in training answer "
        "their prompts as the stage begins, greedily.",
    )
    iterations: Positive = Field(
        1, description="How often the stage is taken, each time with new answers; needs `pairs: on_policy`."
    )
    loss: PreferenceLossName = Field("sigmoid", description="The preference loss; names as in TRL.")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="Strength of the preference loss.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Assumed share of flipped labels, for `sigmoid` and `robust`."
    )
    sft_weight: NonNegative | None = Field(
        None, description="Weight of the chosen answers' SFT loss, which is added. Default: 1 for `orpo`, else 0."
    )
    gamma: NonNegative = Field(0.5, description="SimPO's target margin.")
    share_prompts: bool = Field(
        True,
        description="Read a prompt once for both of its completions, where the model can; the numbers are the same.",
    )

    @model_validator(mode="after")
    def _smoothing_has_meaning(self) -> DpoConfig:
        if self.label_smoothing and not takes_label_smoothing(self.loss):
            names = " and ".join(name for name in get_args(PreferenceLossName) if takes_label_smoothing(name))
            raise ValueError(f"label_smoothing has no meaning for the loss {self.loss!r}, only for {names}")
        return self

    @model_validator(mode="after")
    def _iterations_have_new_answers(self) -> DpoConfig:
        if self.iterations > 1 and self.pairs != "on_policy":
            raise ValueError("iterations needs pairs: on_policy, because pairs from data stay the same")
        return self

    def preference_loss(self) -> PreferenceLoss:
        weight = default_sft_weight(self.loss) if self.sft_weight is None else self.sft_weight
        return PreferenceLoss(self.loss, self.beta, self.label_smoothing, weight, self.gamma)


class CheckpointConfig(Section):
    """The checkpoints that are written, in addition to one at the start of each stage."""

    every: Positive = Field(50, description="Optimizer steps between checkpoints.")
    keep: Positive = Field(
        2, description="How many of the newest are kept, with the starts of the stages and topics that they are in."
    )


class GenerationConfig(Section):
    """The way in which `generate` lets the model answer. `voice` says how an evaluation does."""

    max_new_tokens: Positive | None = Field(
        None,
        description="Longest answer in tokens. Default: 128, and in an evaluation as long as 95 % of your own answers.",
    )
    temperature: NonNegative = Field(0.0, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling.")
    top_k: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of the likeliest tokens that may be drawn. 0 is all."
    )
    min_p: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Least probability of a token that may be drawn, relative to the likeliest."
    )
    repetition_penalty: Annotated[float, Field(ge=1, le=10)] = Field(
        1.0, description="Makes tokens of the prompt and of the answer so far less likely, also at temperature 0."
    )

    def changed(self, **given: float | None) -> GenerationConfig:
        """Return these settings with those that are given. None is not given: 0 is a valid temperature."""
        return self.model_copy(update={name: value for name, value in given.items() if value is not None})

    @property
    def longest(self) -> int:
        """Return the longest answer outside evaluations."""
        return self.max_new_tokens or 128

    def sampling(self, stop_token_ids: tuple[int, ...], seed: int = 0) -> Sampling:
        """Return how answers are generated: these settings, with a model's stop tokens."""
        return Sampling(
            self.longest,
            stop_token_ids,
            self.temperature,
            self.top_p,
            seed,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
        )


class FingerprintConfig(Section):
    """The probe on which `RUN/adapter/fingerprint.json` is measured."""

    probe: Literal["synthetic", "heldout"] = Field(
        "synthetic",
        description="`synthetic`: tokens drawn from the vocabulary; `heldout`: your own held-out rows, readable in it.",
    )


class Thresholds(Section):
    """Thresholds that an evaluation must reach to pass. Without any it is measured, and neither passes nor fails."""

    voice: Annotated[float, Field(ge=-1, le=2)] | None = Field(
        None, description="At least this voice: 0 is the base model, 1 the person."
    )
    reward_accuracy: Share | None = Field(
        None,
        description="At least this share of held-out pairs in which training raised the chosen answer more "
        "than the rejected one.",
    )
    concept_coverage: Share | None = Field(None, description="At least this share of a quiz's key concepts.")
    copy_rate: Share | None = Field(None, description="At most this share of words copied from the training text.")
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="At most this perplexity of held-out text, over the base model's."
    )

    @property
    def any_set(self) -> bool:
        return any(value is not None for value in self.model_dump().values())


class EvaluationConfig(Section):
    """The times at which a run evaluates itself on held-out text, and the thresholds that it must reach."""

    levels: list[Level] | None = Field(
        None,
        description="When, and at no other time: after each `topic`, `chapter`, `unit`, and at the end (`final`). "
        "`[]` turns evaluation off. Default: at the end, and at each level that has thresholds.",
    )
    prompts_per_topic: Positive = Field(
        8, description="Held-out prompts of each topic that are answered, at most. Held-out pairs are all read."
    )
    topic: Thresholds = Field(Thresholds(), description="Thresholds for each topic.")
    chapter: Thresholds = Field(Thresholds(), description="Thresholds for each chapter.")
    unit: Thresholds = Field(Thresholds(), description="Thresholds for each unit.")
    final: Thresholds = Field(Thresholds(), description="Thresholds for the whole run.")

    def thresholds(self, level: Level) -> Thresholds:
        found: Thresholds = getattr(self, level)
        return found

    def happens(self, level: Level) -> bool:
        """Return whether a level is evaluated: as `levels` says, or by default."""
        if self.levels is not None:
            return level in self.levels
        return level == "final" or self.thresholds(level).any_set

    @property
    def after_stages(self) -> bool:
        """Return whether stages may be evaluated: by default they are where a gate or a roll-back needs it."""
        return self.levels is None or "topic" in self.levels


class CurriculumConfig(Section):
    """Consequences of evaluations, topic by topic. By default there are none."""

    topics: list[str] | None = Field(None, description="Train only these topics, or those of these chapters or units.")
    max_topics: Positive | None = Field(None, description="Train only the first N topics.")
    dpo: Annotated[Literal["always", "never"] | Annotated[float, Field(ge=-1, le=2)], BeforeValidator(_gate)] = Field(
        "always",
        description="Whether a topic's DPO follows its SFT: `always`, `never`, or a threshold: only if its voice is "
        "below it.",
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        0, description="How often a topic that failed its thresholds is trained again from its start."
    )
    retry_learning_rate: Annotated[float, Field(gt=0)] = Field(
        0.5, description="Learning rates of a retry, as a multiple of those of the attempt before."
    )
    roll_back: bool = Field(
        False, description="Undo a stage after which the model's answers have collapsed; otherwise it is a warning."
    )
    stop_after: Level | None = Field(
        None,
        description="End the run early, after the first failure at this level. Default: train the other topics.",
    )


class VoiceConfig(Section):
    """The people that the voice is told from, how answers are drawn for it, and the scorers that `eval` uses."""

    background: list[str] = Field(
        [],
        description="Text files (`.txt`, `.md`) or folders of them: prose of other people, never trained. "
        "Without it the voice is only the distance from the base model.",
    )
    temperature: NonNegative = Field(0.8, description="Temperature of answers to held-out prompts. 0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="Nucleus sampling of these answers.")
    answers_per_prompt: Annotated[int, Field(ge=1, le=16)] = Field(
        2, description="Answers to each held-out prompt. More are drawn where a fit needs more words."
    )
    scorers: dict[str, dict[str, Any]] = Field(
        {}, description="Scorer plugins by name, each with its settings: `lexicon`, or any installed one."
    )


class Config(Section):
    """A whole run."""

    model: Annotated[ModelConfig, BeforeValidator(_model)] = ModelConfig()
    backend: Annotated[BackendConfig, BeforeValidator(_backend)] = BackendConfig()
    data: Annotated[DataConfig, BeforeValidator(_data)] = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    sft: SftConfig = SftConfig()
    dpo: DpoConfig = DpoConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    generation: GenerationConfig = GenerationConfig()
    fingerprint: FingerprintConfig = FingerprintConfig()
    trackers: Annotated[
        list[str], Field(description="Plugins that watch the run: `tensorboard`, `wandb` (offline).")
    ] = []
    voice: VoiceConfig = VoiceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    seed: Annotated[int, Field(ge=0, description="Order, initial adapter and dropout follow from it.")] = 0

    @model_validator(mode="after")
    def _trains_something(self) -> Config:
        if not (self.sft.enabled or self.dpo.enabled):
            raise ValueError("sft.enabled and dpo.enabled are both false: there is nothing to train")
        return self

    @model_validator(mode="after")
    def _retries_on_failure(self) -> Config:
        if self.curriculum.retries and not self.evaluation.topic.any_set:
            raise ValueError(
                "curriculum.retries needs a threshold to fail: set one under evaluation.topic, such as voice"
            )
        level = self.curriculum.stop_after
        if level is not None and not self.evaluation.thresholds(level).any_set:
            raise ValueError(f"curriculum.stop_after is {level}: set a threshold to fail under evaluation.{level}")
        return self


@dataclass(frozen=True)
class ConfigFile:
    """A configuration and the folder that its relative paths start from.

    `records` are training rows from memory, which take the place of the files that `data` names.
    """

    config: Config
    folder: Path
    source: str = "configuration"
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict, repr=False)
    records: tuple[Mapping[str, Any], ...] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    """Settings that were given by an old name, each with the name that they have now."""

    def __str__(self) -> str:
        return dump_config(self.config)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.source)}</p><pre>{escape(str(self))}</pre>"

    def resolve(self, path: str) -> Path:
        """Return a path of the configuration as an absolute path."""
        try:
            return resolve_path(self.folder, path)
        except ValueError as error:
            raise ConfigError(f"{self.source}: {error}") from error


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ConfigFile:
    """Read `path` (a YAML file, or a folder with `mindprint.yaml`) and apply `key=value` overrides.

    Raises `ConfigError` in one line with the file, the line, the key, the mistake and the nearest known name.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if file.suffix.lower() == ".gguf":
        raise ConfigError(f"{file}: is a GGUF file, which llama.cpp runs; name a project, or a YAML file of settings")
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration; {_project_with(path)} makes one") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error
    # Text that is not UTF-8, or a NUL character in the path.
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    values, lines = parse_yaml(text, str(file))
    values, notes = _with_present_names(values, overrides, str(file))
    config = _validate(_overridden(values, overrides), str(file), lines, overrides)
    return ConfigFile(config, file.parent.resolve(), str(file), lines, notes=notes)


def _project_with(path: str | os.PathLike[str]) -> str:
    """Return the command that makes a project, with the model that was named where a project was expected."""
    is_model = (Path(path) / "config.json").is_file()
    return f"`mindprint init FOLDER{f' --model {path}' if is_model else ''}`"


def make_config(values: Mapping[str, Any], folder: Path | None = None, overrides: Sequence[str] = ()) -> ConfigFile:
    """Check a configuration that is given as values rather than as a file."""
    values, notes = _with_present_names(values, overrides, "configuration")
    config = _validate(_overridden(values, overrides), "configuration", {}, overrides)
    return ConfigFile(config, (folder or Path.cwd()).resolve(), notes=notes)


def merged(base: ConfigFile, values: Mapping[str, Any]) -> ConfigFile:
    """Return the same configuration with `values` merged into it, section by section."""
    result = _drop_replaced_lengths(_merge(base.config.model_dump(exclude_unset=True), values), values)
    return ConfigFile(_validate(result, base.source, {}), base.folder, base.source, records=base.records)


def dump_config(config: Config) -> str:
    """Write YAML with every value, defaults included. `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_settings(first: Config, second: Config, sections: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the settings whose values differ, of these sections or of all, with both values."""
    one, other = (_flat_settings(config.model_dump(mode="json"), "") for config in (first, second))
    names = [name for name in one | other if not sections or name.partition(".")[0] in sections]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def _flat_settings(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


OLD_NAMES: Mapping[tuple[str, ...], str] = {
    ("evaluation", level, "preference_accuracy"): "reward_accuracy" for level in ("topic", "chapter", "unit", "final")
}
"""Settings by the path that older versions knew them under, and the last part of their present path."""


def _present_path(path: tuple[str, ...]) -> tuple[str, ...]:
    return (*path[:-1], OLD_NAMES[path]) if path in OLD_NAMES else path


def _with_present_names(
    values: Mapping[str, Any], overrides: Sequence[str], source: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return settings under their present names, and a note about each that was given by an old one.

    Overrides are only noted here: `_overridden` reads them by either name.
    """
    notes = []
    given = {tuple(text.partition("=")[0].strip().split(".")) for text in overrides}
    result = dict(values)
    for old in OLD_NAMES:
        new = _present_path(old)
        renaming = f"{'.'.join(old)} is now {'.'.join(new)}; the old name is still read"
        section = _value_at(result, old[:-1])
        if isinstance(section, Mapping) and old[-1] in section:
            if new[-1] in section:
                raise ConfigError(f"{source}: {renaming}, but both are given: remove one of them")
            renamed = {OLD_NAMES[old] if key == old[-1] else key: value for key, value in section.items()}
            result = _with_value(result, old[:-1], renamed)
            notes.append(f"{source}: {renaming}")
        if old in given:
            notes.append(f"override: {renaming}")
    return result, tuple(notes)


def _value_at(values: Mapping[str, Any], path: Sequence[str]) -> object:
    value: object = values
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    result = dict(values)
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: expected key=value, such as backend.type=mlx")
        try:
            parsed = parse_yaml_value(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r}: the value is not valid YAML") from error
        path = _present_path(tuple(key.strip().split(".")))
        # `changes` holds the overrides alone, because `_drop_replaced_lengths` must tell them from the file's values.
        result, changes = _with_value(result, path, parsed), _with_value(changes, path, parsed)
    return _drop_replaced_lengths(result, changes)


def _drop_replaced_lengths(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the length of a stage that a change replaces.

    A stage has one length, in epochs or in steps. Who changes one means it instead of the other, which the file has.
    Changes that give both are left as they are, for the checks to refuse.
    """
    result = dict(values)
    for stage in ("sft", "dpo"):
        section, change = result.get(stage), changes.get(stage)
        if isinstance(section, Mapping) and isinstance(change, Mapping):
            given = [name for name in STAGE_LENGTHS if change.get(name) is not None]
            if len(given) == 1:
                replaced = set(STAGE_LENGTHS) - set(given)
                result[stage] = {name: value for name, value in section.items() if name not in replaced}
    return result


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = _merge(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return result


def _with_value(values: Mapping[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    # A file with `backend: mlx` and an override `backend.device=cpu`: the short form must become a section here, or the
    # override would replace it.
    if isinstance(inner, str) and head in SHORT_FORMS:
        inner = {SHORT_FORMS[head]: inner}
    return {**values, head: _with_value(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _validate(
    values: Mapping[str, Any], source: str, lines: Mapping[tuple[str, ...], int], overrides: Sequence[str] = ()
) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, source, lines, overrides)) from error


def _first_problem(
    error: ValidationError, source: str, lines: Mapping[tuple[str, ...], int], overrides: Sequence[str]
) -> str:
    problems = error.errors(include_url=False)
    # One mistake at a time: an error in one place often causes the others.
    problem = problems[0]
    # A union (`str | list[str]`) reports its branches as parts of the location: keep the keys that a person wrote.
    path = tuple(
        str(part)
        for part in problem["loc"]
        if not str(part).startswith(("list[", "constrained", "str", "literal[", "float"))
    )
    # The longest part of the path that the file has. A setting that is missing has no line, but its section has one.
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    where = f"{source}: line {line}" if line else source
    # A setting of the command line is not in the file: a line of the file would send the reader to the wrong place.
    if override := _override_of(path, overrides):
        where = f"override {override!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {'.'.join(path) or 'configuration'}: {_explained(dict(problem), path)}{more}"


def _override_of(path: Sequence[str], overrides: Sequence[str]) -> str | None:
    """Return the override that a problem at `path` is about: the last one of this setting, its section or a part."""
    for text in reversed(overrides):
        key = _present_path(tuple(text.partition("=")[0].strip().split(".")))
        shared = min(len(key), len(path))
        if shared and key[:shared] == tuple(path[:shared]) and len(path) >= len(key) - 1:
            return text
    return None


ALIASES = {
    "lr": "learning_rate",
    "epochs": "epochs_per_topic",
    "num_train_epochs": "epochs_per_topic",
    "steps": "steps_per_topic",
    "max_steps": "steps_per_topic",
    "iters": "steps_per_topic",
    "bs": "batch_size",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "max_seq_length": "max_length",
    "grad_accum": "gradient_accumulation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_tokens": "max_new_tokens",
    "name_or_path": "name",
}
"""Names that other trainers use, and the name of the same setting here."""


def setting_names() -> list[str]:
    """Return the names of all settings as the command line takes them: `sft.learning_rate`."""
    return list(_names_within(Config, ""))


def _names_within(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field_info in section.model_fields.items():
        inner = _section_of(field_info.annotation)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _names_within(inner, f"{prefix}{name}.")


def nearest_settings(name: str) -> list[str]:
    """Return the settings that a name without its section, or with a wrong one, may mean. Sections come in order."""
    wanted = name.rpartition(".")[2]
    wanted = ALIASES.get(wanted, wanted)
    last = {full: full.rpartition(".")[2] for full in setting_names()}
    # A stage's own backend and the thresholds of four levels would repeat what a shorter name says.
    nearest = difflib.get_close_matches(wanted, set(last.values()), n=1, cutoff=0.7)
    return [full for full, part in last.items() if part in nearest and full.count(".") < 2][:2]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds. One that can be null is a union, and the class is among its arguments."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _explained(problem: dict[str, Any], path: tuple[str, ...]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key; {_hint(path)}"
    # The message of pydantic begins with "Value error, ". The exception of our own validator has it without.
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{message}, found {problem['input']!r}"


def _hint(path: tuple[str, ...]) -> str:
    """Return the setting that an unknown one most likely means: in its section, else in another, else all that are."""
    known, name = _known_keys(path[:-1]), path[-1]
    if ALIASES.get(name) in known:
        return f"did you mean {ALIASES[name]!r}?"
    if nearest := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {nearest[0]!r}?"
    if elsewhere := nearest_settings(name):
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(known)}"


def _known_keys(path: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Config
    for name in path:
        inner = _section_of(section.model_fields[name].annotation)
        assert inner is not None, "only a section has keys"
        section = inner
    return list(section.model_fields)
