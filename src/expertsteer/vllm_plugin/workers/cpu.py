"""The worker of the CPU platform, steering."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from expertsteer.vllm_plugin.workers.steering import SteersItsModel

__all__ = ["SteeringWorker"]


class SteeringWorker(SteersItsModel, CPUWorker):
    """vLLM's worker, whose model takes the packs of the configuration."""
