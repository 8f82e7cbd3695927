"""The fixtures of test_saeft.py, for the tests of the experiments too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_saeft import as_it_was, lm, no_home, seed  # noqa: F401
