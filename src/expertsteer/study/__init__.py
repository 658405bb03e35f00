"""A study: targets x experts x benchmarks x methods x seeds, with honest tables."""

from expertsteer.study.cell import Cell, cells_of
from expertsteer.study.report import write_report
from expertsteer.study.run import run_study
from expertsteer.study.settings import (
    ArmSettings,
    BenchmarkSettings,
    ModelSettings,
    StudySettings,
    load_study,
)

__all__ = [
    "ArmSettings",
    "BenchmarkSettings",
    "Cell",
    "ModelSettings",
    "StudySettings",
    "cells_of",
    "load_study",
    "run_study",
    "write_report",
]
