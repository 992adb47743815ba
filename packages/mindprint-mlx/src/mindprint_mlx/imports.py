"""Importing single modules of mlx-lm without the rest of it.

`import mlx_lm` runs its command-line machinery: transformers' tokenizers (which import torch wherever it is installed),
`resource.setrlimit`, datasets. Only `mlx_lm.models.*` and `mlx_lm.tuner.lora` are wanted here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from mindprint.errors import BackendError

PACKAGES = ("mlx_lm", "mlx_lm.tuner")
"""Packages whose `__init__` is not to run."""


def mlx_lm_module(name: str) -> ModuleType:
    """The module `mlx_lm.<name>`, imported alone. Raises `ModuleNotFoundError` if mlx-lm has none of that name."""
    qualified = f"mlx_lm.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    with _bare_packages():
        return importlib.import_module(qualified)


@contextmanager
def _bare_packages() -> Iterator[None]:
    """Stand in for mlx-lm's packages, as empty modules with their real paths, while something under them is imported.

    They are taken away again, so that somebody else's `import mlx_lm` runs it in full; what was imported meanwhile
    stays in `sys.modules`, and so classes are the same for both.
    """
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
