"""Base models: their folders, their tensors on disk, and the one model in memory."""

from mindprint.models.folder import ModelFolder

__all__ = ["ModelFolder"]
