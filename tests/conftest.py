"""Shared set-up of all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Workers share the cores: a thread pool of its own in each makes them wait for each other
# (measured: ten times as slow). Read by torch and numpy when they are first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Test files are imported on their own (importlib mode); this lets them share helpers.py.
sys.path.insert(0, str(Path(__file__).parent))
