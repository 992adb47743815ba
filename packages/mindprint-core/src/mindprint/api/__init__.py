"""Mindprint from Python, one function per command. Each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Importing the API must stay fast, so each name is loaded from its module on first use.
_EXPORTS = {
    "AnsweredPrompt": "results",
    "CompareResult": "comparison_tables",
    "ConvertResult": "results",
    "EvaluateResult": "evaluation_tables",
    "GenerateResult": "results",
    "MergeResult": "results",
    "NotVerifiedError": "adapters",
    "PlanResult": "planning",
    "PrepareResult": "preparation",
    "TrainResult": "results",
    "VerifyResult": "results",
    "compare": "comparison",
    "convert": "adapters",
    "evaluate": "evaluation",
    "generate": "generation",
    "load_config": "training",
    "merge": "adapters",
    "open_adapter": "generation",
    "plan": "planning",
    "prepare": "preparation",
    "train": "training",
    "verify": "adapters",
}

__all__ = [
    "AnsweredPrompt",
    "CompareResult",
    "ConvertResult",
    "EvaluateResult",
    "GenerateResult",
    "MergeResult",
    "NotVerifiedError",
    "PlanResult",
    "PrepareResult",
    "TrainResult",
    "VerifyResult",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "load_config",
    "merge",
    "open_adapter",
    "plan",
    "prepare",
    "train",
    "verify",
]

# Type checkers and editors do not follow `__getattr__`. They read these imports, which never run.
if TYPE_CHECKING:
    from mindprint.api.adapters import NotVerifiedError, convert, merge, verify
    from mindprint.api.comparison import compare
    from mindprint.api.comparison_tables import CompareResult
    from mindprint.api.evaluation import evaluate
    from mindprint.api.evaluation_tables import EvaluateResult
    from mindprint.api.generation import generate, open_adapter
    from mindprint.api.planning import PlanResult, plan
    from mindprint.api.preparation import PrepareResult, prepare
    from mindprint.api.results import (
        AnsweredPrompt,
        ConvertResult,
        GenerateResult,
        MergeResult,
        TrainResult,
        VerifyResult,
    )
    from mindprint.api.training import load_config, train


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mindprint.api' has no attribute {name!r}")
    return getattr(import_module(f"mindprint.api.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
