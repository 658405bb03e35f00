"""States with the shape and the spectrum of a language model's."""

from __future__ import annotations

import torch

_LATENT = 256


def layered_states(n: int, n_layers: int, d: int, seed: int) -> torch.Tensor:
    """Return float32 states (n, n_layers, d) that share their latent factors with any others.

    256 factors of falling variance, the same for every seed, mixed anew in every layer, and a
    tenth of noise: two such models have something in common, as two that read one text do.
    """
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    falling = torch.arange(1, _LATENT + 1) ** -0.5
    latent = torch.randn(n, _LATENT, generator=shared) * falling
    states = torch.empty(n, n_layers, d)
    for layer in range(n_layers):
        mixing = torch.randn(_LATENT, d, generator=own)
        states[:, layer] = latent @ mixing + 0.1 * torch.randn(n, d, generator=own)
    return states
