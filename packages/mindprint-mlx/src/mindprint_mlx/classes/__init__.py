"""Model classes for families whose class in mlx-lm cannot be used.

Each module has `ModelArgs` and `Model`, as mlx-lm's modules.
"""
