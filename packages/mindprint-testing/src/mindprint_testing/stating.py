"""The backend's account of itself, and the cost of importing it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mindprint.contract import CAPABILITIES
from mindprint.errors import BackendError
from mindprint.plugins.entries import BACKENDS
from mindprint.plugins.loading import find_plugin
from mindprint_testing.bench import Bench
from mindprint_testing.claims import Claims

# Core's own modules are imported first, so that only the plugin's imports are counted.
PROBE = """
import json, sys
import mindprint.plugins.backend
before = set(sys.modules)
__import__(sys.argv[1])
print(json.dumps(sorted(set(sys.modules) - before)))
"""


class Stating(Claims):
    """`mindprint_backend_info` and the plugin's module."""

    def test_devices_are_stated(self, bench: Bench) -> None:
        """Every device says either why it cannot be used or with which dtypes it can, float32 among them.

        If it fails: `mindprint plugins --check` and `backend.device` show users something untrue. Look at the
        `DeviceInfo`s that `mindprint_backend_info` makes.
        """
        assert bench.backend.info.devices, "no device is stated"
        device = bench.backend.device(bench.device)
        assert "float32" in device.dtypes
        for each in bench.backend.info.devices:
            assert each.default_dtype in each.dtypes, each
            assert each.reason is None or each.reason.strip(), f"{each.name} cannot be used, and does not say why"

    def test_auto_can_choose_a_device(self, bench: Bench) -> None:
        """If any device is usable, `device: auto` finds one; an accelerator that `auto` may choose comes first.

        If it fails: users of `backend: auto` get an error where the backend works, or train on the CPU next to an idle
        accelerator. Look at `accelerator`, `auto` and the order of the `DeviceInfo`s.
        """
        usable = [device for device in bench.backend.info.devices if device.usable and device.auto]
        if not usable:
            pytest.skip("every device here must be named")
        chosen = bench.backend.device("auto")
        assert chosen == usable[0]
        assert chosen.accelerator or not any(device.accelerator for device in usable), "an accelerator comes later"

    def test_asking_twice_gives_one_answer(self, bench: Bench) -> None:
        """The backend gives the same account of itself before and after training, or before and after an evaluation.

        If it fails: `mindprint_backend_info` changes something, or reads something that training changes; resume
        compares `libraries` and would warn for nothing. Look at it.
        """
        # The hook itself, because `Backend` asks once and keeps the answer.
        before = bench.backend._hook.mindprint_backend_info()
        if self.training:
            bench.sft_step(bench.ready(), bench.token_batch())
        else:
            bench.backend.log_probs(bench.ready(), bench.token_batch())
        assert bench.backend._hook.mindprint_backend_info() == before

    def test_capabilities_are_those_claimed_here(self, bench: Bench) -> None:
        """The capabilities that the backend offers to users are those that its test module claims, and so are tested.

        If it fails: a capability is offered untested, or claimed here and not offered. Look at `capabilities` of
        `BackendInfo` and of the test class: both name the optional parts in `mindprint.contract.CAPABILITIES`.
        """
        assert bench.backend.info.capabilities == self.capabilities
        assert self.capabilities <= CAPABILITIES, "unknown capabilities"
        assert bench.backend.info.training == self.training, "`training` of BackendInfo and of the test class differ"

    def test_a_backend_that_does_not_train_says_so(self, bench: Bench) -> None:
        """Where a backend states that it does not train, core refuses a step in one line, before any hook is called.

        If it fails: users start a run that cannot train. Look at `training` of `BackendInfo`.
        """
        if self.training:
            return
        with pytest.raises(BackendError, match="does not train"):
            bench.sft_step(bench.load(), bench.token_batch())

    def test_importing_the_plugin_imports_no_framework(self, bench: Bench) -> None:
        """The plugin's module imports none of the libraries that it states.

        If it fails: `mindprint plugins --check`, auto-selection and every other backend's users wait for, or fail
        with, this framework. Look at the imports at the top of the plugin's module, and move them into the hooks.
        """
        module = find_plugin(BACKENDS, self.backend_name).module
        # In another process: here the framework is imported already.
        command = [sys.executable, "-c", PROBE, module]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stderr
        # Distributions are written with hyphens, modules with underscores.
        named = {name.replace("-", "_") for name in bench.backend.info.libraries}
        assert named & set(json.loads(done.stdout)) == set()

    @pytest.mark.parametrize("capability", sorted(CAPABILITIES))
    def test_capability(self, capability: str) -> None:
        """Every optional part of the contract is listed: claimed, or skipped under its name."""
        self.needs(capability)
