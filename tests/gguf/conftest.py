"""Makes llama_cpp.py importable, and leaves the tests to the session that has a llama.cpp."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if "LLAMA_CPP_SOURCE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]  # only `nox -s gguf` has llama.cpp to compare with
