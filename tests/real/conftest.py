"""Leaves the tests to the sessions that make folders of pretrained models."""

from __future__ import annotations

import os

if "MINDPRINT_REAL_MODELS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]  # `nox -s pretrained` and `nox -s real`
