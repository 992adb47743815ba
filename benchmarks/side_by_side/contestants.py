"""The contestants: each function trains on the work, and waits for its turn before every step.

Peers run their own trainers as their users would, asked for the same numbers: float32, AdamW, no checkpointing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from side_by_side import work

Turn = Callable[[], AbstractContextManager[None]]
# ruff: noqa: PLC0415  a contestant imports its own framework and no other


def ours(
    backend_name: str,
    stage: str,
    folder: Path,
    shape: str,
    turn: Turn,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Train on one of our backends, through the hooks that a run calls, with the reference cached.

    The stage `reference` computes the reference of the pairs instead of taking the step on them.
    """
    backend, model = loaded(backend_name, folder, dtype)
    for step in steps_of(backend, model, stage, shape):
        with turn():
            step()


def steps_of(backend: Any, model: Any, stage: str, shape: str) -> Iterator[Callable[[], object]]:
    """Yield the steps on the work, collation included. References are computed before the first one."""
    from mindprint.contract import Update
    from mindprint.data.collate import preference_batch, sft_batch
    from mindprint.data.render import PreferenceExample, SftExample
    from mindprint.data.rows import Origin
    from mindprint.losses import PreferenceLoss
    from mindprint.models.likelihoods import sum_pairs

    origin = Origin("rows", 1)

    def ids(values: list[int]) -> np.ndarray:
        return np.array(values, np.int32)

    def pair(row: work.Row) -> PreferenceExample:
        return PreferenceExample("t", ids(row.prompt), ids(row.chosen), ids(row.rejected), origin)

    def single(row: work.Row) -> SftExample:
        mask = np.arange(len(row.prompt) + len(row.chosen)) >= len(row.prompt)
        return SftExample("t", ids([*row.prompt, *row.chosen]), mask, origin)

    def sft_step(rows: list[work.Row]) -> None:
        tokens = sft_batch([single(row) for row in rows], work.PAD)
        backend.sft_step(model, [tokens], Update(work.LEARNING_RATE, tokens.loss_tokens))

    def dpo_step(pairs: list[PreferenceExample], reference: Any) -> None:
        read = preference_batch(pairs, work.PAD, (reference.chosen, reference.rejected))
        update = Update(work.LEARNING_RATE, int(read.chosen_lengths.sum()), read.pairs)
        backend.dpo_step(model, [read], PreferenceLoss(beta=work.BETA), update)

    if stage == "sft":
        yield from (partial(sft_step, rows) for rows in batches(shape, stage))
        return
    steps = [[pair(row) for row in rows] for rows in batches(shape, stage)]
    if stage == "reference":
        yield from (partial(sum_pairs, backend, model, pairs, work.PAD) for pairs in steps)
        return
    references = [sum_pairs(backend, model, pairs, work.PAD) for pairs in steps]
    yield from (partial(dpo_step, pairs, reference) for pairs, reference in zip(steps, references, strict=True))


def loaded(backend_name: str, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> tuple[Any, Any]:
    """Return one of our backends, and the model on it with a new adapter on every linear layer."""
    from mindprint.adapter.initial import initial_adapter
    from mindprint.adapter.targets import resolve_targets
    from mindprint.contract import LoraConfig, ModelSpec
    from mindprint.plugins.backend import load_backend

    backend = load_backend(backend_name)
    if backend_name == "mlx":
        spec = ModelSpec(str(folder), os.environ.get(work.DEVICE, "cpu"), os.environ.get(work.DTYPE, dtype))
    else:
        spec = ModelSpec(str(folder), "cpu", dtype)
    model = backend.load_model(spec)
    sites = backend.adapter_sites(model)
    config = LoraConfig(work.RANK, work.ALPHA, resolve_targets(sites, "all-linear"))
    backend.inject_adapter(model, initial_adapter(sites, config, seed=0))
    return backend, model


def trl(stage: str, precompute: bool, folder: Path, shape: str, turn: Turn) -> None:
    """Train with TRL on the same rows in the same order."""
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.turn = turn()
            self.turn.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.turn.__exit__(None, None, None)

    size = work.PAIRS if stage == "dpo" else work.ROWS
    data = [row for batch in batches(shape, stage) for row in batch]
    names = ("chosen", "rejected") if stage == "dpo" else ("completion",)
    columns = {
        name: [" " + work.text(row.rejected if name == "rejected" else row.chosen) for row in data] for name in names
    }
    dataset = datasets.Dataset.from_dict({"prompt": [work.text(row.prompt) for row in data], **columns})
    trainer_class, config_class = (DPOTrainer, DPOConfig) if stage == "dpo" else (SFTTrainer, SFTConfig)
    # TRL shuffles its rows. In order, everybody trains on the same ones at the same step.
    in_order = type(
        "InOrder", (trainer_class,), {"_get_train_sampler": lambda *_: torch.utils.data.SequentialSampler(dataset)}
    )
    extra = {"precompute_ref_log_probs": precompute, "beta": work.BETA} if stage == "dpo" else {}
    with tempfile.TemporaryDirectory() as output:
        arguments = config_class(
            output_dir=output, max_steps=work.STEPS, per_device_train_batch_size=size, learning_rate=work.LEARNING_RATE,
            lr_scheduler_type="constant", optim="adamw_torch", max_length=1024, use_cpu=True, bf16=False,
            gradient_checkpointing=False, dataloader_pin_memory=False, logging_steps=1000, report_to=[],
            save_strategy="no", disable_tqdm=True, **extra,
        )  # fmt: skip
        trainer = in_order(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=arguments,
            train_dataset=dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            peft_config=peft.LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, target_modules=list(work.TARGETS)),
            callbacks=[TakeTurns()],
        )
        # A trainer that reads other tokens would be compared on other work.
        read = trainer.train_dataset[0]
        expected = {
            "prompt_ids": data[0].prompt, "chosen_ids": data[0].chosen, "rejected_ids": data[0].rejected,
            "input_ids": [*data[0].prompt, *data[0].chosen],
        }  # fmt: skip
        assert {name: ids for name, ids in expected.items() if name in read}.items() <= read.items()
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def mlx_lm(folder: Path, shape: str, turn: Turn) -> None:
    """Train with mlx-lm's SFT, which pads to a multiple of 32."""
    _take_fast_blas()
    from mlx_lm.tuner import trainer

    model = _mlx_model(folder)
    data = [([*row.prompt, *row.chosen], len(row.prompt)) for batch in batches(shape, "sft") for row in batch]

    def in_order(**options: Any) -> Iterator[Any]:
        for start in range(0, len(data), work.ROWS):
            # The trainer asks for a batch of the whole dataset: it gets the rows of this step alone.
            options |= {"dataset": data[start : start + work.ROWS], "loop": False}
            with turn():
                yield from trainer.iterate_batches(**options)

    with tempfile.TemporaryDirectory() as output:
        arguments = trainer.TrainingArgs(
            batch_size=work.ROWS, iters=work.STEPS, steps_per_report=1, max_seq_length=1024,
            adapter_file=str(Path(output) / "adapters.safetensors"),
        )  # fmt: skip
        trainer.train(model, _adamw(), data, args=arguments, iterate_batches=in_order)


def mlx_lm_lora(folder: Path, shape: str, turn: Turn) -> None:
    """Train with mlx-lm-lora's DPO, whose reference is a second model that runs at every step."""
    _take_fast_blas()
    import mlx.core as mx
    from mlx_lm_lora.trainer import dpo_trainer

    data = iter(batches(shape, "dpo"))
    own = dpo_trainer.iterate_dpo_batches

    def in_order(**options: Any) -> Iterator[Any]:
        rows = [
            {
                "chosen": [*row.prompt, *row.chosen],
                "rejected": [*row.prompt, *row.rejected],
                "chosen_prompt_length": len(row.prompt),
                "rejected_prompt_length": len(row.prompt),
            }
            for row in next(data)
        ]
        return own(**{**options, "dataset": rows})

    # The trainer asks for a limit that only Metal knows, and stops where there is none.
    facts = mx.device_info
    mx.device_info = lambda *device: {"max_recommended_working_set_size": 0, **facts(*device)}  # type: ignore[assignment]
    steps = Between(turn)
    dpo_trainer.iterate_dpo_batches = lambda **options: steps.before(in_order(**options))
    with tempfile.TemporaryDirectory() as output:
        arguments = dpo_trainer.DPOTrainingArgs(
            batch_size=work.PAIRS, iters=work.STEPS, steps_per_report=1, max_seq_length=1024, beta=work.BETA,
            adapter_file=str(Path(output) / "adapters.safetensors"),
        )  # fmt: skip
        dpo_trainer.train_dpo(_mlx_model(folder), _mlx_model(folder, adapter=False), _adamw(), [], args=arguments)


class Between:
    """The turns of a loop that only asks for its next batch: a step lasts from one question to the next."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._running: AbstractContextManager[None] | None = None

    def before(self, batch: Iterator[Any]) -> Iterator[Any]:
        if self._running is not None:
            self._running.__exit__(None, None, None)
        self._running = self._turn()
        self._running.__enter__()
        return batch


def _take_fast_blas() -> None:
    """Load a fast BLAS before MLX is imported."""
    # The peer then multiplies with the same library as we do: pip's MLX has the slow reference BLAS.
    import mindprint_mlx  # noqa: F401


def _mlx_model(folder: Path, *, adapter: bool = True) -> Any:
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from mindprint_mlx.blas import prepare

    prepare()
    mx.set_default_device(mx.cpu if os.environ.get(work.DEVICE, "cpu") == "cpu" else mx.gpu)
    model, _ = load_model(folder)
    model.set_dtype(getattr(mx, os.environ.get(work.DTYPE, "float32")))
    model.freeze()
    if adapter:
        keys = {f"{part}.{name}" for part in ("self_attn", "mlp") for name in work.TARGETS}
        options = {"rank": work.RANK, "scale": work.ALPHA / work.RANK, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(model, work.LAYERS, options)
    return model


def _adamw() -> Any:
    from mlx import optimizers

    return optimizers.AdamW(learning_rate=work.LEARNING_RATE, weight_decay=0.0)


def batches(shape: str, stage: str) -> list[list[work.Row]]:
    """Return the rows of each step."""
    size = work.ROWS if stage == "sft" else work.PAIRS
    data = work.rows(shape, size * work.STEPS)
    return [data[start : start + size] for start in range(0, len(data), size)]


CONTESTANTS: dict[str, Callable[[Path, str, Turn], None]] = {
    "mindprint-torch-dpo": partial(ours, "torch", "dpo"),
    "mindprint-torch-dpo-reference": partial(ours, "torch", "reference"),
    "mindprint-torch-dpo-bfloat16": partial(ours, "torch", "dpo", dtype="bfloat16"),
    "mindprint-torch-sft-bfloat16": partial(ours, "torch", "sft", dtype="bfloat16"),
    "mindprint-torch-sft": partial(ours, "torch", "sft"),
    "mindprint-mlx-dpo": partial(ours, "mlx", "dpo"),
    "mindprint-mlx-sft": partial(ours, "mlx", "sft"),
    "trl-dpo": partial(trl, "dpo", False),
    "trl-dpo-precomputed": partial(trl, "dpo", True),
    "trl-sft": partial(trl, "sft", False),
    "mlx-lm-sft": mlx_lm,
    "mlx-lm-lora-dpo": mlx_lm_lora,
}
