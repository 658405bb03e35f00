"""Which versions of vLLM the plugin knows."""

from __future__ import annotations

from expertsteer.errors import ParameterError

__all__ = ["check_version", "is_supported"]

# The plugin relies on internals of the engine that change between minor versions.
_SUPPORTED = ("0.32.",)


def is_supported() -> bool:
    """Return whether the installed vLLM is a version the plugin was tested with."""
    import vllm

    return vllm.__version__.startswith(_SUPPORTED)


def check_version() -> None:
    """Raise unless the installed vLLM is a version the plugin was tested with.

    Raises
    ------
    ParameterError
        Naming the version found and those expected.
    """
    import vllm

    if not is_supported():
        expected = " or ".join(f"{version}x" for version in _SUPPORTED)
        raise ParameterError(
            f"Got vLLM {vllm.__version__}, but expected {expected}. Install such a version, or "
            "serve without packs."
        )
