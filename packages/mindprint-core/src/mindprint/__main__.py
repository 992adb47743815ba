"""`python -m mindprint` is `mindprint`."""

import sys

from mindprint.cli import main

sys.exit(main())
