"""AdamW, clipping and the loss scale of float16: everything between gradients and the next adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mindprint.contract import Update
from mindprint.loss_scale import next_loss_scale


@dataclass(frozen=True)
class Applied:
    """The outcome of `Optimizer.step`: the global gradient norm before clipping, and whether the update was skipped."""

    grad_norm: float
    skipped: bool


class Optimizer:
    """`torch.optim.AdamW` over the adapter's factors, all in float32, with one step count for all of them.

    `loss_scale` is None unless losses are to be scaled before their backward pass (float16). Core's rule changes it.
    """

    def __init__(self, parameters: Sequence[Tensor], *, loss_scale: float | None = None) -> None:
        self.parameters = list(parameters)
        self.loss_scale = loss_scale
        self.steps = 0
        self._adamw = torch.optim.AdamW(self.parameters, lr=0.0, fused=_can_fuse(self.parameters))

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to differentiate."""
        return loss if self.loss_scale is None else loss * self.loss_scale

    def step(self, update: Update) -> Applied:
        """Clip the accumulated gradients, apply one update, and clear them."""
        gradients = self._take_gradients()
        norm = _total_norm(gradients)
        # Only scaled gradients are expected to overflow. Without a scale, core sees the norm and stops the run.
        skipped = self.loss_scale is not None and not torch.isfinite(norm).item()
        if not skipped:
            if update.max_grad_norm is not None:
                clip_grads_with_norm_(self.parameters, update.max_grad_norm, norm)
            self._apply(update)
        if self.loss_scale is not None:
            self.loss_scale = next_loss_scale(self.loss_scale, self.steps, skipped=skipped)
        self._adamw.zero_grad(set_to_none=True)
        # Read last: reading waits for the device, which then has the whole update to do meanwhile.
        return Applied(float(norm), skipped)

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Return first and second moment of a parameter, in its shape. There are none before the first update."""
        state = self._adamw.state[parameter]
        return state["exp_avg"], state["exp_avg_sq"]

    def restore(self, moments: Sequence[tuple[Tensor, Tensor]], steps: int) -> None:
        """Continue from moments, one pair a parameter in the order of `parameters`, or from scratch without any."""
        self._adamw.state.clear()
        self._adamw.zero_grad(set_to_none=True)
        self.steps = steps if moments else 0
        for parameter, (first, second) in zip(self.parameters, moments, strict=False):
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(self.steps), dtype=torch.float32, device=self._step_device(parameter)),
                "exp_avg": first.to(parameter.device, copy=True),
                "exp_avg_sq": second.to(parameter.device, copy=True),
            }

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all factors, as they were added up."""
        for parameter in self.parameters:
            # A factor that took no part has gradient 0, as in a functional framework: torch's AdamW would skip it, and
            # its moments would not decay.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _take_gradients(self) -> list[Tensor]:
        """Return all gradients, unscaled."""
        gradients = self.gradients()
        if self.loss_scale is not None:
            for gradient in gradients:
                gradient.div_(self.loss_scale)
        return gradients

    def _apply(self, update: Update) -> None:
        # Core's schedule and settings come with every update; torch keeps them in its groups.
        for group in self._adamw.param_groups:
            group["lr"] = update.learning_rate
            group["betas"] = update.optimizer.betas
            group["eps"] = update.optimizer.eps
            group["weight_decay"] = update.optimizer.weight_decay
        self._adamw.step()
        self.steps += 1

    def _step_device(self, parameter: Tensor) -> torch.device:
        # torch keeps the step count on the CPU, except for its fused kernel.
        return parameter.device if self._adamw.defaults["fused"] else torch.device("cpu")


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together, on the device of the first one."""
    first = gradients[0].device
    if all(gradient.device == first for gradient in gradients):
        return get_total_norm(gradients, error_if_nonfinite=False)
    # torch would add the devices' norms in any order. In the order of the factors, the sum is that of one device.
    norms = torch.stack([torch.linalg.vector_norm(gradient).to(first) for gradient in gradients])
    total: Tensor = torch.linalg.vector_norm(norms)
    return total


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    return all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
