"""The MLX backend of Mindprint: mlx-lm's classes on Metal, CUDA and CPU. Start at `plugin.py`.

Importing this package imports no framework. It only prepares the process for one: `blas.prepare()` must run before
anything imports mlx, and every module of this package is imported after this one.
"""

from mindprint_mlx import blas

__version__ = "0.1.0"

blas.prepare()
