"""The class that a backend's test module subclasses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mindprint.plugins.backend import load_backend
from mindprint_testing.bench import Bench
from mindprint_testing.experts import Experts
from mindprint_testing.forward import Forward
from mindprint_testing.generation import Generation
from mindprint_testing.injection import Injection
from mindprint_testing.loading import Loading
from mindprint_testing.optimizer import Optimizer
from mindprint_testing.optional import Optional
from mindprint_testing.override import conformance_tests, refuse_quiet_overrides
from mindprint_testing.preference import Preference
from mindprint_testing.quantized import Quantized
from mindprint_testing.ranks import Several
from mindprint_testing.state import State
from mindprint_testing.stating import Stating
from mindprint_testing.tiny import write_tiny_model
from mindprint_testing.training import Sft

OF_TRAINING = frozenset(suite.__name__ for suite in (Sft, Optimizer, Preference, State))
"""The parts of the suite that a backend without training skips."""


class BackendConformance(
    Stating,
    Loading,
    Injection,
    Forward,
    Sft,
    Optimizer,
    Preference,
    State,
    Generation,
    Optional,
    Quantized,
    Experts,
    Several,
):
    """Every test of the contract. Subclass it in a test module, name the backend, and state its capabilities.

    `backend_name` is its entry point's name. `capabilities` are the optional parts that it claims, none unless
    stated: `mindprint_testing.claims.NEEDS` says what each of them needs. `training = False` skips the tests that
    train, for a backend that only evaluates and answers. `device` is the device on which it is tested. A backend that
    cannot compute the default model, a tiny Llama, overrides the fixture `model_folder`. An inherited test that is
    overridden fails unless its replacement is marked with `@departs`.
    """

    __conformance_tests__: ClassVar[dict[str, Callable[..., None]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_quiet_overrides(BackendConformance, cls)

    @pytest.fixture(autouse=True)
    def _trains(self, request: pytest.FixtureRequest) -> None:
        """Skip the tests of steps and states for a backend that does not train."""
        if request.function.__qualname__.partition(".")[0] in OF_TRAINING:
            self.needs_training()

    @pytest.fixture
    def model_folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return the folder of the base for the tests: float32, one safetensors file, an untied head."""
        folder = tmp_path_factory.getbasetemp() / "mindprint-tiny"
        return folder if folder.exists() else write_tiny_model(folder)

    @pytest.fixture
    def bench(self, model_folder: Path) -> Bench:
        """Return the backend on its model."""
        return Bench(load_backend(self.backend_name), model_folder, self.device)


# After the class is made, and not in its body: the tests are inherited, and a body sees no inherited names.
BackendConformance.__conformance_tests__ = conformance_tests(BackendConformance)
