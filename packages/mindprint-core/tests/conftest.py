"""What core's tests share lies beside them: `small_tokenizers`, `toy_base`, and the fixtures of `toy_fixtures`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toy_fixtures import toy, toy_model, toy_site

__all__ = ["toy", "toy_model", "toy_site"]
