"""Devices `cpu:0`, `cpu:1` and so on that exist in name alone, and refuse what two real devices would refuse.

A tensor on one of them holds its values in the CPU's memory and says that it is on that device. An operation whose
tensors are on different devices raises, as on GPUs, where only copies, indices and single numbers may come from another
one. So a test sees that each tensor is moved where it has to be, and that the numbers stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten: Any = torch.ops.aten

MIXED = {aten.copy_.default, aten._to_copy.default}
"""Operations between devices."""

INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations that take indices from the CPU."""


class MixedDevicesError(RuntimeError):
    """Tensors on different devices met in one operation."""


class PretendTensor(Tensor):
    """A tensor on a pretended device: `values` are its values, a tensor on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Self:
        # Libraries make a parameter again from another one, by its class.
        device, values = (values.device, values.values) if isinstance(values, PretendTensor) else (device, values)
        tensor: Self = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Within this context, this thread can make tensors on pretended devices, and move them there."""
    with _Constants(), _Operations():
        yield


class _Constants(TorchFunctionMode):
    """`torch.tensor`, whose device the operations below do not see."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function is torch.tensor else None
        output = function(*args, **kwargs)
        return output if device is None else output.to(device)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operation returns, on the device of its arguments or the one that it asks for."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    device = met_device(function, tensors)
    asked = kwargs.get("device")
    if asked is not None:
        device = torch.device(asked)
        # The CPU's own tensors have no index.
        kwargs = {**kwargs, "device": torch.device("cpu") if device.type == "cpu" else device}
    given = {id(each.values): each for each in tensors if isinstance(each, PretendTensor)}
    plain_args, plain_kwargs = tree_map_only(PretendTensor, lambda each: each.values, (args, kwargs))
    output = function(*plain_args, **plain_kwargs)
    if device is None or device.type != "cpu" or device.index is None:
        return output

    def placed(values: Tensor) -> Tensor:
        # An operation in place returns the tensor that it was given.
        return given[id(values)] if id(values) in given else PretendTensor(values, device)

    return tree_map_only(Tensor, placed, output)


def met_device(function: Any, tensors: list[Tensor]) -> torch.device | None:
    """Return the device of an operation's tensors. None: they are on none that is pretended.

    Raises:
        MixedDevicesError: They are on different ones.
    """
    if not tensors:
        return None
    counted = tensors[:1] if function in MIXED else tensors
    if function in INDEXED:
        counted = [tensors[0], *(each for each in tensors[1:] if isinstance(each, PretendTensor))]
    # A single number may be anywhere on the CPU.
    devices = {each.device for each in counted if isinstance(each, PretendTensor) or each.ndim}
    if len(devices) > 1:
        raise MixedDevicesError(f"{function} got tensors on {', '.join(sorted(map(str, devices)))}")
    return next(iter(devices)) if devices else counted[0].device
