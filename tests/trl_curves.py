"""The training curves of Mindprint and of TRL's real trainers, on the same rows in the same order.

Three things are given to TRL so that there is something to compare. Its arguments are written from our configuration,
its sampler walks core's `StageOrder`, and its PEFT model is loaded from the adapter file that core writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mindprint
from mindprint.adapter.initial import initial_adapter
from mindprint.adapter.targets import resolve_targets
from mindprint.config import AdapterConfig, ConfigFile, DpoConfig
from mindprint.contract import AdapterState, LoraConfig, ModelSpec
from mindprint.data.order import StageOrder
from mindprint.plugins.backend import load_backend
from mindprint.runs.folder import RunFolder
from mindprint.training.plan import StagePlan
from mindprint.training.prepare import Prepared


@dataclass(frozen=True)
class Curve:
    """One stage's training, step by step: each `[steps]`. `rewards` are chosen, rejected, margin, accuracy."""

    loss: np.ndarray
    learning_rate: np.ndarray
    grad_norm: np.ndarray
    rewards: dict[str, np.ndarray]


REWARDS = {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"}
"""Ours to TRL's: `reward_margin` of metrics.jsonl is `rewards/margins` of TRL's log."""


def our_curve(run: RunFolder, stage: str) -> Curve:
    """Return a stage's curve from the run's metrics."""
    lines = [line for line in run.read_steps() if line["stage"] == stage]
    return _curve(lines, {name: f"reward_{name}" for name in REWARDS})


def trl_curve(trainer: Any) -> Curve:
    """Return the curve that TRL's trainer logged."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return _curve(lines, {name: f"rewards/{theirs}" for name, theirs in REWARDS.items()})


def _curve(lines: Sequence[dict[str, Any]], rewards: dict[str, str]) -> Curve:
    def column(name: str) -> np.ndarray:
        return np.array([line[name] for line in lines])

    kept = {name: column(key) for name, key in rewards.items() if key in lines[0]}
    return Curve(column("loss"), column("learning_rate"), column("grad_norm"), kept)


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def stage_of(prepared: Prepared, stage: str) -> StagePlan:
    """Return the plan of the only stage of this kind."""
    (plan,) = (plan for plan in prepared.plans if plan.stage == stage)
    return plan


def train_ours(config: dict[str, Any], run: Path, backend: str) -> RunFolder:
    mindprint.train(config, run=run, backend=backend)
    return RunFolder(run)


class CoreOrder:
    """A sampler that walks core's order. `DataLoader` cuts it into micro-batches, the trainer into steps."""

    def __init__(self, order: StageOrder) -> None:
        self.order, self.epoch = order, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.rows

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.order.steps_per_epoch
        for step in range(first, first + self.order.steps_per_epoch):
            for rows in self.order.micro_batches(step):
                yield from rows


def in_core_order(trainer: type, order: StageOrder) -> Any:
    """Return the trainer's class with one method replaced, the one that makes its sampler of rows."""
    return type(f"Ordered{trainer.__name__}", (trainer,), {"_get_train_sampler": lambda *_: CoreOrder(order)})


def arguments(plan: StagePlan, max_length: int, folder: Path) -> dict[str, Any]:
    """Return the trainer's arguments for a stage. TRL would use bfloat16 and checkpointing if not asked."""
    chosen = plan.settings
    return {
        "output_dir": str(folder),
        "max_steps": plan.steps,
        "per_device_train_batch_size": chosen.batch_size,
        "gradient_accumulation_steps": chosen.gradient_accumulation,
        "learning_rate": chosen.learning_rate,
        "lr_scheduler_type": chosen.schedule,
        "warmup_steps": chosen.warmup_steps,
        "optim": "adamw_torch",
        "weight_decay": chosen.weight_decay,
        "adam_beta1": chosen.betas[0],
        "adam_beta2": chosen.betas[1],
        "adam_epsilon": chosen.eps,
        "max_grad_norm": chosen.max_grad_norm,
        "max_length": max_length,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_model(base: Path, adapter: Path) -> Any:
    """Return the base in float32 with an adapter from its file, trainable."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def trl_tokenizer(base: Path, template: str | None = None) -> Any:
    """Return the base's tokenizer, with another chat template if one is given."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def trl_dataset(records: Sequence[dict[str, Any]], *, raw: bool = False) -> Any:
    """Return rows for TRL. As in ours, a string is one message of the role that its field implies, or raw text."""
    import datasets

    datasets.disable_progress_bars()
    if raw:
        return datasets.Dataset.from_list(list(records))
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return datasets.Dataset.from_list(
        [
            {
                name: [{"role": roles[name], "content": value}] if isinstance(value, str) else value
                for name, value in record.items()
            }
            for record in records
        ]
    )


def trained(trainer: Any) -> Any:
    """Train without TRL's own printing, and return the trainer."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def trl_sft(
    prepared: Prepared,
    base: Path,
    adapter: Path,
    folder: Path,
    rows: Path,
    template: str | None = None,
    **changes: Any,
) -> Any:
    """Return TRL's trainer after its training, its rows checked to be ours: ids, and labels after its shift."""
    from trl import SFTConfig, SFTTrainer

    plan = stage_of(prepared, "sft")
    trainer = in_core_order(SFTTrainer, plan.order)(
        trl_model(base, adapter),
        SFTConfig(**arguments(plan, prepared.config.data.max_length, folder), **changes),
        train_dataset=trl_dataset(read(rows), raw=prepared.config.data.format == "raw"),
        processing_class=trl_tokenizer(base, template),
    )
    for example, row in zip(prepared.examples_of(plan), trainer.train_dataset, strict=True):
        assert example.tokens.tolist() == row["input_ids"]
        assert example.loss_mask[1:].tolist() == [label != -100 for label in row["labels"]][1:]
    return trained(trainer)


def trl_dpo(prepared: Prepared, base: Path, adapter: Path, folder: Path, rows: Path) -> Any:
    """Return TRL's trainer after its training. It gets no reference model, so it makes its own of the adapter."""
    from trl import DPOConfig, DPOTrainer

    plan = stage_of(prepared, "dpo")
    assert isinstance(plan.settings, DpoConfig)
    loss = plan.settings.preference_loss()
    weighted = {"loss_type": [loss.name, "sft"], "loss_weights": [1.0, loss.sft_weight]} if loss.sft_weight else {}
    constants = {"loss_type": [loss.name], "beta": loss.beta, "label_smoothing": loss.label_smoothing, **weighted}
    trainer = in_core_order(DPOTrainer, plan.order)(
        trl_model(base, adapter),
        args=DPOConfig(**arguments(plan, prepared.config.data.max_length, folder), **constants),
        train_dataset=trl_dataset(read(rows), raw=prepared.config.data.format == "raw"),
        processing_class=trl_tokenizer(base),
    )
    for example, row in zip(prepared.examples_of(plan), trainer.train_dataset, strict=True):
        assert example.prompt.tolist() == row["prompt_ids"]
        assert example.chosen.tolist() == row["chosen_ids"][: len(example.chosen)]
        assert example.rejected.tolist() == row["rejected_ids"][: len(example.rejected)]
    return trained(trainer)


def core_initial_adapter(file: ConfigFile, base: Path) -> AdapterState:
    """Return the adapter that core starts with."""
    backend = load_backend("torch")
    model = backend.load_model(ModelSpec(str(base), "cpu", "float32"))
    sites = backend.adapter_sites(model)
    backend.release(model)
    wanted: AdapterConfig = file.config.adapter
    lora = LoraConfig(wanted.r, wanted.alpha, resolve_targets(sites, wanted.target_modules))
    return initial_adapter(sites, lora, file.config.seed)
