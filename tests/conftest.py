"""Shared set-up of all tests."""

from __future__ import annotations

import sys
from pathlib import Path

# Test files are imported on their own (importlib mode); this lets them share helpers.py.
sys.path.insert(0, str(Path(__file__).parent))
