"""The loop, its stages, and what keeps a run honest."""
