"""Mindprint: teach a language model one person's voice, with the same numbers on every backend.

    import mindprint

    result = mindprint.train("my-voice")
    print(mindprint.generate(result.run, "Is the tide in?"))

The names below are the public interface. Each is imported when it is first used, so that `import mindprint` is quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mindprint._version import __version__

if find_spec("fcntl") is None:
    # Here and in words: otherwise the first import of a module with locks would fail with the module's name alone.
    raise ImportError(
        "Mindprint runs on Linux and macOS. Windows lacks the file locks (fcntl) that protect its runs: use WSL, "
        "https://learn.microsoft.com/windows/wsl/install"
    )

# The module of each public name, which `__getattr__` imports when the name is first used (PEP 562).
_EXPORTS = {
    "AdapterState": "contract",
    "Answer": "runs.opened",
    "AnsweredPrompt": "api",
    "Backend": "plugins.backend",
    "CheckpointWritten": "events",
    "CompareResult": "api",
    "Config": "config",
    "ConfigFile": "config",
    "ConvertResult": "api",
    "DataConfig": "config",
    "Decided": "events",
    "EvaluateResult": "api",
    "Evaluated": "events",
    "Evaluating": "events",
    "Event": "events",
    "GenerateResult": "api",
    "LoraConfig": "contract",
    "MergeResult": "api",
    "MindprintError": "errors",
    "ModelConfig": "config",
    "ModelSpec": "contract",
    "NotVerifiedError": "api",
    "Notice": "events",
    "Observer": "events",
    "OpenedAdapter": "runs.opened",
    "Origin": "data.row_files",
    "PlanResult": "api",
    "PreferenceLoss": "losses",
    "PreferenceRow": "data.rows",
    "PrepareResult": "api",
    "RunFinished": "events",
    "RunResult": "runs.results",
    "RunStarted": "events",
    "Sampling": "contract",
    "SftRow": "data.rows",
    "StageFinished": "events",
    "StageResult": "runs.results",
    "StageStarted": "events",
    "StepDone": "events",
    "TokenBatch": "contract",
    "TrainResult": "api",
    "TrainingState": "contract",
    "Update": "contract",
    "Verdict": "runs.results",
    "VerifyResult": "api",
    "compare": "api",
    "convert": "api",
    "evaluate": "api",
    "generate": "api",
    "hookimpl": "hookspecs",
    "initial_adapter": "adapter.initial",
    "load_backend": "plugins.backend",
    "load_config": "api",
    "load_tokenizer": "data.tokenizer",
    "merge": "api",
    "open_adapter": "api",
    "plan": "api",
    "prepare": "api",
    "render_preferences": "data.render",
    "render_prompt": "data.render",
    "render_sft": "data.render",
    "resolve_model": "models.folder",
    "resolve_targets": "adapter.targets",
    "sft_batch": "data.collate",
    "train": "api",
    "verify": "api",
    "write_adapter": "adapter.peft_format",
}

# Written out, although the keys above are the same names: type checkers and linters read only a literal list.
__all__ = [
    "AdapterState",
    "Answer",
    "AnsweredPrompt",
    "Backend",
    "CheckpointWritten",
    "CompareResult",
    "Config",
    "ConfigFile",
    "ConvertResult",
    "DataConfig",
    "Decided",
    "EvaluateResult",
    "Evaluated",
    "Evaluating",
    "Event",
    "GenerateResult",
    "LoraConfig",
    "MergeResult",
    "MindprintError",
    "ModelConfig",
    "ModelSpec",
    "NotVerifiedError",
    "Notice",
    "Observer",
    "OpenedAdapter",
    "Origin",
    "PlanResult",
    "PreferenceLoss",
    "PreferenceRow",
    "PrepareResult",
    "RunFinished",
    "RunResult",
    "RunStarted",
    "Sampling",
    "SftRow",
    "StageFinished",
    "StageResult",
    "StageStarted",
    "StepDone",
    "TokenBatch",
    "TrainResult",
    "TrainingState",
    "Update",
    "Verdict",
    "VerifyResult",
    "__version__",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "hookimpl",
    "initial_adapter",
    "load_backend",
    "load_config",
    "load_tokenizer",
    "merge",
    "open_adapter",
    "plan",
    "prepare",
    "render_preferences",
    "render_prompt",
    "render_sft",
    "resolve_model",
    "resolve_targets",
    "sft_batch",
    "train",
    "verify",
    "write_adapter",
]

# Type checkers and editors do not run `__getattr__`. These imports give them the types, and are never executed.
if TYPE_CHECKING:
    from mindprint.adapter.initial import initial_adapter
    from mindprint.adapter.peft_format import write_adapter
    from mindprint.adapter.targets import resolve_targets
    from mindprint.api import (
        AnsweredPrompt,
        CompareResult,
        ConvertResult,
        EvaluateResult,
        GenerateResult,
        MergeResult,
        NotVerifiedError,
        PlanResult,
        PrepareResult,
        TrainResult,
        VerifyResult,
        compare,
        convert,
        evaluate,
        generate,
        load_config,
        merge,
        open_adapter,
        plan,
        prepare,
        train,
        verify,
    )
    from mindprint.config import Config, ConfigFile, DataConfig, ModelConfig
    from mindprint.contract import AdapterState, LoraConfig, ModelSpec, Sampling, TokenBatch, TrainingState, Update
    from mindprint.data.collate import sft_batch
    from mindprint.data.render import render_preferences, render_prompt, render_sft
    from mindprint.data.row_files import Origin
    from mindprint.data.rows import PreferenceRow, SftRow
    from mindprint.data.tokenizer import load_tokenizer
    from mindprint.errors import MindprintError
    from mindprint.events import (
        CheckpointWritten,
        Decided,
        Evaluated,
        Evaluating,
        Event,
        Notice,
        Observer,
        RunFinished,
        RunStarted,
        StageFinished,
        StageStarted,
        StepDone,
    )
    from mindprint.hookspecs import hookimpl
    from mindprint.losses import PreferenceLoss
    from mindprint.models.folder import resolve_model
    from mindprint.plugins.backend import Backend, load_backend
    from mindprint.runs.opened import Answer, OpenedAdapter
    from mindprint.runs.results import RunResult, StageResult, Verdict


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        # `hasattr` and `from mindprint import NAME` expect this error for a name that does not exist.
        raise AttributeError(f"module 'mindprint' has no attribute {name!r}")
    # A module that is loaded already comes from `sys.modules`, so that later uses cost only a look-up.
    return getattr(import_module(f"mindprint.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    # No lazy name is in the module's namespace, so `dir()` and tab completion would not show any.
    return sorted(__all__)
