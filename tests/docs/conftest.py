"""Let the tests of this folder import the modules next to them, and those of tests/house."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "house")]
