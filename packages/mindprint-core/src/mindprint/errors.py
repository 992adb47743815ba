"""Every error that Mindprint raises on purpose.

There is one root, so that a caller can catch them all. Each subclass is also the standard kind, so that code which
knows nothing of Mindprint handles it as it would any other. The command line prints the message alone and exits with
`exit_code`. A message therefore names the thing, its place, and the remedy.
"""

from __future__ import annotations


class MindprintError(Exception):
    """Root of all deliberate errors."""

    # As argparse exits for wrong usage: somebody can correct the request and try again.
    exit_code = 2


def first_line(error: object) -> str:
    """Return the first line of an error's text that says something, or the error's type if none does."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


class ConfigError(MindprintError, ValueError):
    """The configuration is wrong: an unknown key, a wrong type, values that contradict each other."""


class DataError(MindprintError, ValueError):
    """Training data is missing, unreadable or unusable. The message names file and line."""


class ModelError(MindprintError, ValueError):
    """A model folder is incomplete, or holds another model than it states."""


class AdapterError(MindprintError, ValueError):
    """An adapter is malformed, or does not fit the model or the operation."""


class TransposedError(AdapterError):
    """An adapter whose factors lie as `[in, r]` and `[r, out]` under names that mean `[r, in]` and `[out, r]`."""


class RunError(MindprintError, RuntimeError):
    """A run folder cannot be used: it already holds a run, cannot be written, or does not match its configuration."""


class CheckpointError(RunError):
    """A checkpoint cannot be resumed from: it is damaged, or of another base, dataset or configuration."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files have changed since they were written."""


class BackendError(MindprintError, RuntimeError):
    """The chosen backend is missing, broken, of another hook API, or cannot do the work that was asked of it."""


class RankError(BackendError):
    """Processes that train one adapter together differ, or one of them has ended.

    The message is empty where another rank prints the reason.
    """


class PluginError(MindprintError, RuntimeError):
    """A scorer, tracker or command could not be loaded (import error, wrong type, or a name that two claim)."""


class ContractError(BackendError, TypeError):
    """A backend's hook returned something that the contract does not allow. The message names hook and finding."""


class NotFiniteError(ContractError):
    """A model computed log-probs that are NaN or infinite: its weights or its adapter's are, or they overflow."""


class ScorerError(PluginError):
    """A scorer plugin that the configuration names is missing or broken."""


class MissingLibraryError(MindprintError, ImportError):
    """A library that only some calls need is not installed; the message names the command that installs it."""


class GuardError(MindprintError, RuntimeError):
    """Training was stopped because continuing would corrupt the result in silence."""

    # Not 2, because nothing was wrong with the request: it is the result that cannot be trusted.
    exit_code = 1


class Interrupted(MindprintError):  # noqa: N818 (not a failure)
    """The user stopped the run. A checkpoint was written, and the message says how to continue."""

    # 128 + 2, as a shell reports a program that SIGINT (signal 2) ended.
    exit_code = 130
