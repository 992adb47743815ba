"""The version of core, where a module below the package's own `__init__` can import it."""

__version__ = "0.1.0"
