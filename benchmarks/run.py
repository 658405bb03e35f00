"""Run all benchmarks that have no results yet, one after the other.

Each is a process of its own, so that none inherits another's memory or threads. Options are
those of every benchmark, such as ``--quick``, ``--rounds``, ``--threads`` and ``--again``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# The quick ones first; the page shows them in its own order.
NAMES = (
    "bound",
    "start_up",
    "recursive_feature_machine",
    "whole_fit",
    "generation",
    "half_precision",
    "multiple_choice",
    "collecting_memory",
    "mutual_information",
    "alignment",
    "collecting",
)


def main() -> None:
    failed = []
    for name in NAMES:
        command = [sys.executable, FOLDER / f"{name}.py", *sys.argv[1:]]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; the others have their results.")


if __name__ == "__main__":
    main()
