"""Base models: their folders, their tensors on disk, and the one model in memory."""
