"""Several devices of one process: which settings are refused, and what a placement says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from mindprint.config import BackendConfig
from mindprint.errors import BackendError
from mindprint.models import engine
from mindprint.models.engine import Placements
from mindprint.plugins.backend import Backend, load_backend
from mindprint.plugins.ranks import Ranks


@pytest.fixture
def dividing(toy: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The toy backend, which says that it can."""
    backend = load_backend(toy)
    backend.info = replace(backend.info, capabilities=backend.info.capabilities | {"devices"})
    monkeypatch.setattr(engine, "load_backend", lambda *_: backend)
    return backend


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"devices": ["cuda:0"]}, r"has devices \['cuda:0'\], which takes two or more: write one as device"),
        ({"devices": []}, r"which takes two or more"),
        ({"devices": ["cpu", "cpu"], "device": "cpu"}, "has device 'cpu' and devices: remove one of them"),
        ({"devices": ["cpu", "cpu"], "shard": True}, "has devices, which divides the base in one process, and shard"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        BackendConfig(**settings)


def test_a_placement_names_its_devices(toy: str, dividing: Backend) -> None:
    section = BackendConfig(type=toy, devices=["cpu:0", "cpu:1"])
    for placement in (Placements().resolve(section), Placements().resolve_training(section)):
        assert (placement.device, placement.devices) == ("cpu", ("cpu:0", "cpu:1"))
        assert str(placement) == "toy on cpu:0 and cpu:1, float32"


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu:0", "gpu:0"], r"names several kinds of devices \(cpu, gpu\): name one kind"),
        (["cpu:0", "cpu:one"], "names 'cpu:one': write a device and its number, such as cpu:0"),
        (["cpu:0", "cpu:"], "names 'cpu:': write a device and its number"),
        (["gpu:0", "gpu:1"], "knows no device 'gpu'"),
    ],
)
def test_devices_that_are_no_devices_are_refused(
    devices: list[str], expected: str, toy: str, dividing: Backend
) -> None:
    with pytest.raises(BackendError, match=expected):
        Placements().resolve(BackendConfig(type=toy, devices=devices))


def test_a_backend_that_does_not_divide_a_base_is_refused(toy: str) -> None:
    with pytest.raises(BackendError, match=r"'toy' does not divide a base among devices .*: set backend.device"):
        Placements().resolve(BackendConfig(type=toy, devices=["cpu", "cpu"]))


def test_several_processes_do_not_divide_a_base_among_devices(
    toy: str, dividing: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    dividing.ranks = Ranks(0, 2)
    monkeypatch.setattr(engine, "launched", lambda: ((0, 2), "torchrun"))
    with pytest.raises(BackendError, match=r"backend.devices is for one process, and 2 were started: .*backend.shard"):
        Placements().resolve_training(BackendConfig(type=toy, devices=["cpu", "cpu"]))
