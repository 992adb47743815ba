"""Check a backend's account of itself, before anything is decided by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from mindprint.contract import BackendInfo, DeviceInfo, Dtype
from mindprint.errors import ContractError
from mindprint.plugins.entries import Plugin, described


def check_info(plugin: Plugin, info: BackendInfo) -> None:
    """Check that every field of the answer to `mindprint_backend_info` has the type that the contract states.

    Raises:
        ContractError: A field has another type. The message names it and its value.
    """
    # Dataclasses check no types, so a wrong one would surface far from here, as an AttributeError of core.
    _check(plugin, "name", info.name, isinstance(info.name, str), "text")
    _check(plugin, "devices", info.devices, isinstance(info.devices, tuple | list), "a tuple of DeviceInfo")
    for index, device in enumerate(info.devices):
        _check_device(plugin, f"devices[{index}]", device)
    capabilities = info.capabilities
    # A text is a sequence of texts too: "sampling" in place of {"sampling"} must not pass as eight capabilities.
    are_names = isinstance(capabilities, frozenset | set) and _are_text(list(capabilities))
    _check(plugin, "capabilities", capabilities, are_names, "a frozenset of text")
    libraries = info.libraries
    are_versions = isinstance(libraries, Mapping) and _are_text([*libraries, *libraries.values()])
    _check(plugin, "libraries", libraries, are_versions, "a mapping of text to text")
    _check(plugin, "training", info.training, isinstance(info.training, bool), "True or False")
    _check(plugin, "world", info.world, _is_world(info.world), "a rank, and the number of ranks above it")
    _check(plugin, "notes", info.notes, isinstance(info.notes, tuple | list) and _are_text(info.notes), "texts")


def _check_device(plugin: Plugin, field: str, device: object) -> None:
    _check(plugin, field, device, isinstance(device, DeviceInfo), "a DeviceInfo")
    assert isinstance(device, DeviceInfo)
    reason, dtypes = device.reason, device.dtypes
    _check(plugin, f"{field}.name", device.name, isinstance(device.name, str), "text")
    _check(plugin, f"{field}.reason", reason, reason is None or isinstance(reason, str), "text, or None")
    _check(plugin, f"{field}.detail", device.detail, isinstance(device.detail, str), "text")
    are_dtypes = isinstance(dtypes, tuple | list) and all(dtype in get_args(Dtype) for dtype in dtypes)
    _check(plugin, f"{field}.dtypes", dtypes, are_dtypes, f"a tuple of {', '.join(get_args(Dtype))}")
    default = device.default_dtype
    _check(plugin, f"{field}.default_dtype", default, default in dtypes, "one of its dtypes")
    for name in ("accelerator", "auto"):
        value = getattr(device, name)
        _check(plugin, f"{field}.{name}", value, isinstance(value, bool), "True or False")


def _is_world(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(number) is int for number in value):
        return False
    rank, size = value
    return bool(0 <= rank < size)


def _are_text(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _check(plugin: Plugin, field: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ContractError(
            f"{described(plugin)}: mindprint_backend_info states {field} = {value!r}, "
            f"the contract asks for {expected}; upgrade it (pip install --upgrade {plugin.distribution})"
        )
