"""Measurements on one GPU next to other trainers: the work, the calls of worker processes, and the sections."""
