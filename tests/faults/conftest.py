"""Makes attacked.py and edits.py importable, and leaves the soak to the session that asks for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if "MINDPRINT_SOAK" not in os.environ:
    collect_ignore_glob = ["test_soak.py"]  # `nox -s soak` says how many commands it runs
