"""The worker of the GPU platform, steering."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from expertsteer.vllm_plugin.workers.steering import SteersItsModel

__all__ = ["SteeringWorker"]


class SteeringWorker(SteersItsModel, Worker):
    """vLLM's worker, whose model takes the packs of the configuration."""
