"""Leaves the tests to the session that names a folder of authors."""

from __future__ import annotations

import os

if "MINDPRINT_AUTHORS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]  # `nox -s voice -- FOLDER`
