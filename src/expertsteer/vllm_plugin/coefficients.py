"""Which pack steers which token of a pass, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from expertsteer.vllm_plugin.settings import KEY

__all__ = ["Coefficients"]


class Coefficients:
    """The coefficients that the model's layers read, kept true to each pass's batch.

    A token's stage comes from its index in its request: that stays the same whether the
    prompt is read in chunks, partly found in the cache, or read again after preemption.

    Parameters
    ----------
    names : sequence of str
        Of the packs, in the order of the vectors' rows.
    max_tokens : int
        The most tokens of a pass.
    device : torch.device
        The model's.

    Attributes
    ----------
    tensor : Tensor of shape (max_tokens, packs)
        float32. Its place in memory never changes.
    """

    def __init__(self, names: Sequence[str], max_tokens: int, device: torch.device) -> None:
        self.names = tuple(names)
        self.tensor = torch.zeros(max_tokens, len(self.names), device=device)
        # By request: strength of each pack at each of the three stages.
        self._strengths: dict[str, np.ndarray] = {}
        self._filled = 0

    def prepare(self, runner: Any, new_requests: Iterable[Any], n_scheduled: np.ndarray) -> None:
        """Fill in the coefficients of the pass that is about to run.

        Parameters
        ----------
        runner : GPUModelRunner
            With the batch of the pass in place.
        new_requests : iterable of NewRequestData
            Those in their first pass.
        n_scheduled : array of int, shape (requests,)
            Tokens of the pass by request, in the batch's order.
        """
        for request in new_requests:
            params = request.sampling_params
            admitted = params.extra_args.get(KEY) if params and params.extra_args else None
            if admitted is not None:
                self._strengths[request.req_id] = self._by_stage(admitted["strengths"])
        if not self._strengths and not self._filled:
            return
        # Preempted requests stay among the runner's, finished ones do not.
        self._strengths = {
            name: strengths
            for name, strengths in self._strengths.items()
            if name in runner.requests
        }
        batch = runner.input_batch
        ends = np.cumsum(n_scheduled)
        n_tokens = int(ends[-1])
        rows = np.zeros((max(n_tokens, self._filled), len(self.names)), dtype=np.float32)
        for name, strengths in self._strengths.items():
            place = batch.req_id_to_index.get(name)
            if place is None:
                continue  # preempted
            end, count = int(ends[place]), int(n_scheduled[place])
            index = batch.num_computed_tokens_cpu[place] + np.arange(count)
            generated_from = batch.num_prompt_tokens[place]
            stage = (index >= generated_from - 1).astype(int) + (index >= generated_from)
            rows[end - count : end] = strengths[stage]
        self.tensor[: len(rows)].copy_(torch.from_numpy(rows))
        self._filled = n_tokens if self._strengths else 0

    def _by_stage(self, strengths: dict[str, list[float]]) -> np.ndarray:
        return np.array(
            [strengths.get(name, (0.0, 0.0, 0.0)) for name in self.names], dtype=np.float32
        ).T
