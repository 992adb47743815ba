"""The MLX backend of Mindprint.

Importing this package imports no framework; it only prepares the process for one: `blas.prepare()` must run before
anything imports mlx, and every module of this package is imported after this one.
"""

from mindprint_mlx import blas

__version__ = "0.1.0"

blas.prepare()
