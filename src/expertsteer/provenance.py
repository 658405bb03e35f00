"""What an artifact remembers of how it was made."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from expertsteer.estimator import Estimator

__all__ = ["describe_machine", "describe_settings", "machine_line", "package_versions"]


def describe_settings(estimator: Estimator) -> dict[str, Any]:
    """Return an estimator's class and parameters as JSON types."""
    return {"name": type(estimator).__name__} | estimator.get_params(deep=False)


def package_versions() -> dict[str, str]:
    """Return the versions that decide what numbers come out."""
    names = ("expertsteer", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def describe_machine() -> dict[str, Any]:
    """Return what a time or a figure was measured on."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(psutil.Process().cpu_affinity() or ()) if psutil.LINUX else psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "accelerators": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "system": platform.system(),
    }


def machine_line(machine: dict[str, Any], versions: dict[str, str]) -> str:
    """Return what `describe_machine` and `package_versions` returned as a reader sees it."""
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {', '.join(machine['accelerators']) or 'no accelerator'}, "
        f"{machine['system']}; {used}"
    )


def _processor() -> str:
    """Return the processor's name; Python itself knows it on few systems."""
    known = Path("/proc/cpuinfo")
    if known.exists():
        for line in known.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
