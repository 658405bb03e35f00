"""A general plugin of vLLM: packs loaded at start, chosen request by request.

`register` is what vLLM calls, in every one of its processes. What happens where:

* `configuring` reads the settings in the process that makes the engine's configuration,
  checks the packs against the model, and names the worker class;
* `admission` checks each request's steering where prompts are processed, and puts what
  the other processes need into the request;
* `prefix_caching` keeps blocks of differently steered tokens apart, in the engine core;
* `workers` and `coefficients` add the vectors in the processes that hold the model.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make this process's vLLM take packs; harmless when called again."""
    from expertsteer.vllm_plugin.configuring import wrap_configuring
    from expertsteer.vllm_plugin.prefix_caching import wrap_block_keys
    from expertsteer.vllm_plugin.versions import is_supported

    wrap_configuring()
    # Where the version is not supported, the configuration refuses packs.
    if is_supported():
        wrap_block_keys()
