"""Mindprint: teach a language model one person's voice, with the same numbers on every backend.

The names below are the public interface; each is imported when it is first used, so that `import mindprint` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mindprint._version import __version__

_EXPORTS = {
    "AdapterState": "contract",
    "Backend": "plugins.backend",
    "Config": "config",
    "LoraConfig": "contract",
    "MindprintError": "errors",
    "ModelSpec": "contract",
    "PreferenceLoss": "losses",
    "RunResult": "runs.results",
    "Sampling": "contract",
    "StageResult": "runs.results",
    "TokenBatch": "contract",
    "TrainingState": "contract",
    "Update": "contract",
    "hookimpl": "hookspecs",
    "load_backend": "plugins.backend",
    "load_config": "config",
    "train": "training.run",
}

__all__ = [
    "AdapterState",
    "Backend",
    "Config",
    "LoraConfig",
    "MindprintError",
    "ModelSpec",
    "PreferenceLoss",
    "RunResult",
    "Sampling",
    "StageResult",
    "TokenBatch",
    "TrainingState",
    "Update",
    "__version__",
    "hookimpl",
    "load_backend",
    "load_config",
    "train",
]

if TYPE_CHECKING:
    from mindprint.config import Config, load_config
    from mindprint.contract import (
        AdapterState,
        LoraConfig,
        ModelSpec,
        Sampling,
        TokenBatch,
        TrainingState,
        Update,
    )
    from mindprint.errors import MindprintError
    from mindprint.hookspecs import hookimpl
    from mindprint.losses import PreferenceLoss
    from mindprint.plugins.backend import Backend, load_backend
    from mindprint.runs.results import RunResult, StageResult
    from mindprint.training.run import train


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mindprint' has no attribute {name!r}")
    return getattr(import_module(f"mindprint.{_EXPORTS[name]}"), name)
