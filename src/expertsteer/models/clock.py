"""How much work a model has done."""

from __future__ import annotations

import time

import torch

from expertsteer.models.loading import LanguageModel

__all__ = ["seconds_of_work"]


def seconds_of_work(model: LanguageModel) -> float:
    """Return seconds, of which differences count.

    Parameters
    ----------
    model : LanguageModel

    Returns
    -------
    float
        Processor time on a CPU, where other programs take their share; elsewhere the wall
        clock's, once the device has done what it was given.
    """
    if model.device.type == "cpu":
        return time.process_time()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
