"""Token ids as padded batches, and where their tokens stand."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from expertsteer.models.loading import LanguageModel

__all__ = ["padded", "position_ids"]


def padded(
    model: LanguageModel, ids: Sequence[Sequence[int]], side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and their mask, both (batch, tokens), on the model's device."""
    longest = max(len(row) for row in ids)
    batch = torch.full((len(ids), longest), model.pad_token_id)
    mask = torch.zeros_like(batch)
    for place, row in enumerate(ids):
        real = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        batch[place, real] = torch.tensor(row)
        mask[place, real] = 1
    return batch.to(model.device), mask.to(model.device)


def position_ids(
    model: LanguageModel, mask: torch.Tensor, newest: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the position ids of the newest tokens where the model takes any."""
    if "position_ids" not in inspect.signature(model.model.forward).parameters:
        return {}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"position_ids": positions if newest is None else positions[:, -newest:]}
