"""Time until the command line has answered: ``--help``, and ``inspect`` of a pack."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import OURS, Case, Goal, main

from expertsteer import SteeringPack
from expertsteer.models import ModelDescription

PYTHON = "python alone"


def pack_file() -> Path:
    model = ModelDescription("a model", None, "llama", 32, 4096, 128_000, "0" * 16)
    pack = SteeringPack({15: torch.ones(4096) / 64}, {15: 10.0}, model)
    with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as file:
        return pack.save(file.name)


# What an installation compiled stays compiled, whatever the one who measures has set.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def run(*arguments: str | Path) -> None:
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)


def prepare(command: str) -> Mapping[str, Callable[[], Any]]:
    arguments: list[str | Path] = ["-m", "expertsteer", command]
    if command == "inspect":
        arguments.append(pack_file())
    return {OURS: partial(run, *arguments), PYTHON: partial(run, "-c", "pass")}


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            name=command,
            title=f"`expertsteer {command}`",
            sizes={},
            prepare=partial(prepare, command),
            goals=(Goal(f"seconds {OURS}", at_most=0.5),),
            helpers=(PYTHON,),
            rounds=21,
            memory=False,
        )
        for command in ("--help", "inspect")
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
