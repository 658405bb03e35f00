"""Which tokens are steered, with and without a key-value cache."""

from __future__ import annotations

import weakref
from typing import Any

import torch

__all__ = ["STEERED_POSITIONS", "PositionTracker"]

STEERED_POSITIONS = ("all", "prompt", "generated", "last")


class PositionTracker:
    """Follows the forward passes of a model and says which tokens are the prompt's.

    A forward pass with a cache sees only the new tokens, one without sees everything
    again; a draft model's guesses come several at a time and some are taken back. What
    stays the same is a token's index in its sequence, so masks compare that index with
    the length of the prompt. `generate` announces the prompt; without it, a pass that
    starts from an empty cache is a prompt, and what a filled cache continues with is
    generated.

    Attributes
    ----------
    index : Tensor of shape (tokens,) or None
        Index in the padded sequence of every token of the running pass.
    prompt_length : int or Tensor
        Length of the padded prompt.
    attention_mask : Tensor of shape (batch, length) or None
        Of the running pass, where it is the usual two-dimensional one.
    """

    def __init__(self) -> None:
        self.index: torch.Tensor | None = None
        self.prompt_length: Any = None
        self.attention_mask: torch.Tensor | None = None
        self.generations = 0
        # Outside of generate, a cache is what tells one sequence from another.
        self._prompt_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # How many tokens went into caches that do not count them.
        self._tokens_in: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def begin_generation(self, prompt_length: int) -> None:
        """Note that `generate` runs on a prompt of this padded length."""
        # A model that drafts for itself runs generate within generate; the prompt stays
        # that of the outer call.
        if self.generations == 0:
            self.prompt_length = prompt_length
        self.generations += 1

    def end_generation(self) -> None:
        """Note that `generate` returned."""
        self.generations -= 1
        if self.generations == 0:
            self.prompt_length = None

    def begin_pass(
        self,
        n_tokens: int,
        cache: Any,
        attention_mask: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        """Note that a forward pass begins.

        Parameters
        ----------
        n_tokens : int
            Tokens the pass reads.
        cache : Cache or None
            Keys and values of the tokens before them.
        attention_mask : Tensor or None
            As given to the model.
        device : torch.device
            Where the masks are made.
        """
        past = self._length_of(cache, n_tokens)
        # A static cache counts in a tensor that grows while the pass runs: add it now.
        self.index = torch.arange(n_tokens, device=device) + past
        two_dimensional = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        self.attention_mask = attention_mask if two_dimensional else None
        if self.generations:
            return
        if int(past) == 0:
            self.prompt_length = n_tokens
        else:
            # A cache filled before steering began, or by the model itself: a prompt.
            self.prompt_length = self._prompt_of.get(cache, int(past))
        if cache is not None:
            self._prompt_of[cache] = self.prompt_length

    def _length_of(self, cache: Any, n_tokens: int) -> Any:
        """Return how many tokens a cache holds before this pass adds its own."""
        if cache is None:
            return 0
        try:
            return cache.get_seq_length()
        except (AttributeError, ValueError):
            pass
        # A recurrent state has no length, so count. One that was filled out of sight
        # counts as one token: what matters is that it is not empty.
        past = self._tokens_in.get(cache)
        if past is None:
            past = int(cache.has_previous_state())
        self._tokens_in[cache] = past + n_tokens
        return past

    def mask(self, positions: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return which of the running pass's tokens are steered.

        Parameters
        ----------
        positions : {"prompt", "generated", "last"}
            "last" is the newest token of each sequence: the prompt's last real token,
            then every generated one.
        hidden : Tensor of shape (batch, tokens, width)
            The states about to be steered.

        Returns
        -------
        Tensor of shape (tokens,) or (batch, tokens)
            Boolean.
        """
        assert self.index is not None
        index = self.index.to(hidden.device)
        if positions == "prompt":
            return index < self.prompt_length
        if positions == "generated":
            return index >= self.prompt_length
        last = self.prompt_length - 1
        if self.attention_mask is None or self.attention_mask.shape[1] < self.prompt_length:
            # Without padding, or a prompt that comes in chunks.
            return index >= last
        # Right padding: the prompt's last real token comes before its last position.
        mask = self.attention_mask.to(hidden.device)
        places = torch.arange(mask.shape[1], device=hidden.device)
        real = mask.bool() & (places < self.prompt_length)
        last = torch.where(real, places, -1).amax(dim=1, keepdim=True)
        return (index == last) | (index >= self.prompt_length)
