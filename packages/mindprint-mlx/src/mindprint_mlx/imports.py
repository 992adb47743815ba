"""Single modules of mlx-lm, imported without the rest of it.

`import mlx_lm` runs its command-line machinery: transformers' tokenizers (which import torch wherever it is installed),
`resource.setrlimit`, datasets. Only `mlx_lm.models.*` and `mlx_lm.tuner.lora` are wanted here.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from mindprint.errors import BackendError

PACKAGES = ("mlx_lm", "mlx_lm.tuner")
"""Packages whose `__init__` must not run."""


def mlx_lm_module(name: str) -> ModuleType:
    """Return the module `mlx_lm.<name>`, imported alone.

    Raises:
        ModuleNotFoundError: If mlx-lm has no module of that name.
        ImportError: If the module ends the process instead of being imported, with the reason that it prints.
    """
    qualified = f"mlx_lm.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    # mlx-lm's OLMo calls `sys.exit` where the package `ai2-olmo` is missing, and prints the reason first. No module may
    # end a run: its reason becomes an error.
    printed = io.StringIO()
    try:
        with _bare_packages(), redirect_stdout(printed):
            return importlib.import_module(qualified)
    except SystemExit as error:
        reason = printed.getvalue().strip() or f"it exits with {error.code!r}"
        raise ImportError(f"{qualified} cannot be imported: {reason}") from error


@contextmanager
def _bare_packages() -> Iterator[None]:
    """Replace mlx-lm's packages by empty modules with their real paths, while a module in them is imported."""
    # They are removed afterwards, so that somebody else's `import mlx_lm` runs in full. The modules imported meanwhile
    # stay in `sys.modules`, so that classes are the same for both.
    absent = [name for name in PACKAGES if name not in sys.modules]
    try:
        for name in absent:
            sys.modules[name] = _bare_package(name)
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


def _bare_package(name: str) -> ModuleType:
    spec = find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise BackendError('mlx-lm is not installed; pip install "mindprint-core[mlx]"')
    bare = ModuleSpec(name, None, is_package=True)
    bare.submodule_search_locations = list(spec.submodule_search_locations)
    return module_from_spec(bare)
