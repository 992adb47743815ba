"""MLX's matrix products: the library on Linux CPUs, and the precision on accelerators.

The Linux CPU wheel of MLX is linked against the reference BLAS, plain loops that use a small part of the machine. If a
faster library is loaded first, with its symbols global, the dynamic linker binds that one. So this runs before the
first import of mlx, and imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TF32 = "MLX_ENABLE_TF32"
"""MLX's switch for reduced-precision float32 products on GPUs. MLX reads it once, and its default is on."""

INSTALL = "install OpenBLAS (Debian: libopenblas0-pthread) or MKL (pip install mkl)"


@dataclass(frozen=True)
class Blas:
    """The library of matrix products: its name with version and threads, and a note for the user if it is slow.

    `library` is set for OpenBLAS, whose number of threads can be changed while it runs.
    """

    name: str
    note: str | None = None
    library: ctypes.CDLL | None = field(default=None, repr=False, compare=False)

    @property
    def threads(self) -> int:
        """The number of threads that a product takes, where we can change it, else 1."""
        return int(self.library.openblas_get_num_threads()) if self.library else 1


@cache
def prepare() -> Blas:
    """Load a fast BLAS on Linux, once a process, and turn reduced-precision float32 off unless the user set it."""
    # Parity with PyTorch needs float32 to be float32.
    os.environ.setdefault(TF32, "0")
    if platform.system() != "Linux":
        return Blas("Accelerate" if platform.system() == "Darwin" else "unknown")
    # Symbols are bound when mlx is loaded: a library that comes later changes nothing.
    if "mlx.core" in sys.modules:
        return Blas("unknown", f"mlx was imported before mindprint_mlx, too early to give it a fast BLAS ({INSTALL})")
    return next(filter(None, (_load(library, describe) for library, describe in _candidates())), _REFERENCE)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Make products take `count` threads within this context, where we can change it. None changes nothing."""
    library = prepare().library
    if library is None or count is None:
        yield
        return
    before = library.openblas_get_num_threads()
    library.openblas_set_num_threads(count)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)


def precision_note() -> str | None:
    """Return a note for the user if float32 products are not float32: parity with other backends is then lost."""
    if os.environ.get(TF32, "0") == "0":
        return None
    return f"{TF32}={os.environ[TF32]}: float32 matrix products on a GPU may run in reduced precision"


_REFERENCE = Blas("reference BLAS", f"no fast BLAS was found, matrix products are many times slower: {INSTALL}")


def _load(library: str, describe: Callable[[ctypes.CDLL], str]) -> Blas | None:
    try:
        # Global, since the linker looks for MLX's symbols among global ones, in the order of loading.
        loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return Blas(describe(loaded), library=loaded if describe is _openblas else None)


def _candidates() -> tuple[tuple[str, Callable[[ctypes.CDLL], str]], ...]:
    # `pip install mkl` puts its libraries here, where the linker does not look.
    wheel = Path(sys.prefix) / "lib"
    mkl = [str(path) for path in sorted(wheel.glob("libmkl_rt.so.*"))]
    return (("libopenblas.so.0", _openblas), *((path, _mkl) for path in [*mkl, "libmkl_rt.so.2"]))


def _openblas(library: ctypes.CDLL) -> str:
    library.openblas_get_config.restype = ctypes.c_char_p
    version = library.openblas_get_config().decode().split()[1]
    return f"OpenBLAS {version}, {library.openblas_get_num_threads()} threads"


def _mkl(library: ctypes.CDLL) -> str:
    buffer = ctypes.create_string_buffer(200)
    library.mkl_get_version_string(buffer, len(buffer))
    version = next((word for word in buffer.value.decode().split() if word[:1].isdigit()), "")
    return f"MKL {version}, {library.mkl_get_max_threads()} threads"
