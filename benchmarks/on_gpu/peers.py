"""TRL as a contestant, alone and with Liger's kernels: its trainers, as their users run them, on the rows of `work.py`.

They get token ids, so that nobody's tokenizer is measured, and the adapter that we start from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from on_gpu import work
from on_gpu.clock import peak_gib, spread, start_peak, wait_for

# ruff: noqa: PLC0415  the process that orders the measurements imports no framework


@dataclass
class Peer:
    """A base as transformers loads it. Trainers put a new adapter around it, which is taken off again."""

    network: Any
    folder: Path
    device: str
    dtype: str
    liger: bool = False


def open_peer(folder: Path, device: str, dtype: str, *, liger: bool = False, four_bits: bool = False) -> Peer:
    """Load the base, in NF4 with double quantization if `four_bits`, as QLoRA does."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if liger and device != "cuda":
        raise RuntimeError("Liger's kernels need Triton and a GPU")
    nf4: dict[str, Any] = {}
    if four_bits:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        nf4 = {"quantization_config": settings}
    # By its index: accelerate trains a quantized model only on the device that it was loaded to, and compares indices.
    place: Any = 0 if device == "cuda" else device
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map={"": place}, local_files_only=True, **nf4
    )
    return Peer(network, folder, device, dtype, liger)


def train(
    peer: Peer,
    stage: str,
    batches: Sequence[Sequence[work.Row]],
    learning_rate: float,
    *,
    checkpointing: bool = False,
    precompute: bool = False,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Train on one batch a step. Return losses and seconds, from the end of a step to the end of the next.

    `adapter` is a folder with initial factors. With it, every loss is logged. Without it, factors are PEFT's own, and
    the trainer logs as seldom as it can, the first step's loss alone.
    """
    import peft
    import torch
    from transformers import PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    marks = _marking_callback(peer.device)
    trainer_class, config_class = (DPOTrainer, DPOConfig) if stage == "dpo" else (SFTTrainer, SFTConfig)
    dataset = _dataset(stage, batches)
    in_order = type(
        "InOrder",
        (trainer_class,),
        {
            # TRL shuffles its rows. In order, everybody trains on the same ones at the same step.
            "_get_train_sampler": lambda *_: torch.utils.data.SequentialSampler(dataset),
            "_prepare_dataset": lambda _, prepared, *__, **___: prepared,
        },
    )
    extra = {"precompute_ref_log_probs": precompute, "beta": work.BETA} if stage == "dpo" else {}
    with tempfile.TemporaryDirectory() as output:
        arguments = config_class(
            output_dir=output, max_steps=len(batches), per_device_train_batch_size=len(batches[0]),
            learning_rate=learning_rate, lr_scheduler_type="constant", optim="adamw_torch", max_length=None,
            use_cpu=peer.device == "cpu", bf16=peer.dtype == "bfloat16", gradient_checkpointing=checkpointing,
            dataloader_pin_memory=peer.device != "cpu", logging_steps=1 if adapter else 1000, logging_first_step=True,
            report_to=[], save_strategy="no", disable_tqdm=True, use_liger_kernel=peer.liger, **extra,
        )  # fmt: skip
        trainer: Any = in_order(
            peer.network,
            args=arguments,
            train_dataset=dataset,
            processing_class=PreTrainedTokenizerFast.from_pretrained(peer.folder),
            peft_config=peft.LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, target_modules=list(work.TARGETS)),
            callbacks=[marks],
        )
        try:
            if adapter is not None:
                _write_factors(trainer.model, adapter)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        finally:
            _take_off(peer, trainer.model)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    seconds = [end - start for start, end in zip(marks.times, marks.times[1:], strict=False)]
    return {
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "step_seconds": seconds,
    }


def measure_cell(peer: Peer, cell: dict[str, Any]) -> dict[str, Any]:
    """Measure steps on rows of one length (`on_gpu.calls.cell_batches`)."""
    from on_gpu.calls import cell_batches

    start_peak(peer.device)
    taken = train(
        peer,
        cell["stage"],
        cell_batches(cell),
        1e-4,
        checkpointing=cell["checkpointing"],
        precompute=cell.get("precompute", False),
    )
    return {
        **spread(taken["step_seconds"][cell["warm_up"] :]),
        "gib": peak_gib(peer.device),
        "loss": taken["losses"][0],
    }


def _marking_callback(device: str) -> Any:
    """Return a callback that notes when training starts and when each step has ended."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.times:
                self._mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._mark()

        def _mark(self) -> None:
            wait_for(device)
            self.times.append(perf_counter())

    return Marks()


def _dataset(stage: str, batches: Sequence[Sequence[work.Row]]) -> Any:
    """Return the rows in the columns that TRL's collators read."""
    import datasets

    rows = [row for batch in batches for row in batch]
    if stage == "dpo":
        columns = {
            "prompt_ids": [row.prompt for row in rows],
            "chosen_ids": [row.chosen for row in rows],
            "rejected_ids": [row.rejected for row in rows],
        }
    else:
        columns = {
            "input_ids": [[*row.prompt, *row.chosen] for row in rows],
            "labels": [[*([-100] * len(row.prompt)), *row.chosen] for row in rows],
        }
    return datasets.Dataset.from_dict(columns)


def _write_factors(model: Any, adapter: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    if result.unexpected_keys:
        raise RuntimeError(f"PEFT does not know {result.unexpected_keys[0]}")


def _take_off(peer: Peer, model: Any) -> None:
    """Give the base back without adapter, checkpointing and TRL's own forward pass."""
    model.unload()
    peer.network.gradient_checkpointing_disable()
    vars(peer.network).pop("forward", None)
    peer.network.zero_grad(set_to_none=True)
