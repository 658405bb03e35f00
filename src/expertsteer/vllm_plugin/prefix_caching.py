"""Keep cached blocks of differently steered tokens apart.

vLLM finds the cached keys and values of a prefix by a chain of hashes, one a block, over
the tokens and over extra keys. What a token's states are depends on the steering of it
and of all before it, so each block's extra keys tell how its tokens are steered. A block
of unsteered tokens behind unsteered ones is the same for every request: prompts share it
where only generated tokens are steered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertsteer.vllm_plugin.settings import KEY
from expertsteer.vllm_plugin.wrapping import wrap_once

__all__ = ["steering_keys", "wrap_block_keys"]


def steering_keys(
    keys: Sequence[str], prompt_length: int, start: int, end: int
) -> list[tuple[str, str]]:
    """Return how the tokens of one block are steered.

    Parameters
    ----------
    keys : sequence of str
        Of the three stages, see `Admission.admit`.
    prompt_length : int
        Tokens of the prompt.
    start, end : int
        The block holds the tokens ``start <= index < end`` of the request.

    Returns
    -------
    list of (str, str)
        Empty where no token of the block is steered.
    """
    bounds = (0, prompt_length - 1, prompt_length, end)
    parts: list[tuple[int, int, str]] = []
    for stage, key in enumerate(keys):
        first, last = max(start, bounds[stage]), min(end, bounds[stage + 1])
        if not key or first >= last:
            continue
        if parts and parts[-1][1:] == (first, key):
            # Steered alike: where the prompt ends must not keep such blocks apart.
            first = parts.pop()[0]
        parts.append((first, last, key))
    if not parts:
        return []
    return [(KEY, ",".join(f"{a - start}-{b - start}:{key}" for a, b, key in parts))]


def wrap_block_keys() -> None:
    """Add the steering to the extra keys of every block."""
    from vllm.v1.core import kv_cache_utils

    # Called for every block, inside the function that other modules have imported.
    wrap_once(kv_cache_utils, "_gen_prompt_embeds_extra_hash_keys", _with_steering)


def _with_steering(original: Any) -> Any:
    def extra_keys(request: Any, start: int, end: int) -> list[tuple[str, Any]]:
        keys = original(request, start, end)
        params = request.sampling_params
        admitted = params.extra_args.get(KEY) if params and params.extra_args else None
        if admitted is None:
            return keys
        return keys + steering_keys(admitted["keys"], request.num_prompt_tokens, start, end)

    return extra_keys
