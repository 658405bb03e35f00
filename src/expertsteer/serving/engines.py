"""Which engine runs the model of a server."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from expertsteer.errors import ParameterError
from expertsteer.serving.options import ServeOptions
from expertsteer.serving.shelf import Shelf

__all__ = ["ENGINES", "choose_engine", "serve"]

ENGINES = ("auto", "vllm", "transformers")


def choose_engine(name: str) -> str:
    """Return the engine to serve with.

    Parameters
    ----------
    name : {"auto", "vllm", "transformers"}
        "auto" is vLLM where it is installed.

    Raises
    ------
    ParameterError
        If the packages of the engine are missing, or it is unknown.
    """
    if name not in ENGINES:
        raise ParameterError(f"Got engine={name!r}, but expected one of {', '.join(ENGINES)}.")
    if name == "auto":
        name = "vllm" if _is_installed("vllm") else "transformers"
    needed, extra = (
        (("vllm",), "vllm") if name == "vllm" else (("starlette", "uvicorn", "jinja2"), "serve")
    )
    for package in needed:
        if not _is_installed(package):
            raise ParameterError(
                f"Got the engine {name}, but expected its package {package} to be installed. "
                f'Install it with: pip install "expertsteer[{extra}]"'
            )
    return name


def serve(
    options: ServeOptions,
    engine: str = "auto",
    on_ready: Callable[[str, Shelf], None] = lambda address, shelf: None,
) -> None:
    """Serve a target and its packs by the OpenAI API until Ctrl-C or SIGTERM.

    Parameters
    ----------
    options : ServeOptions
    engine : {"auto", "vllm", "transformers"}, default="auto"
        See `choose_engine`.
    on_ready : callable, optional
        Called with the embedded server's address and its packs once it answers; vLLM has
        messages of its own.

    Raises
    ------
    ParameterError
        On a missing package, a port in use, or arguments for vLLM without it.
    PackError
        If a pack cannot be read or is for another model.
    ModelError
        If the model cannot be loaded.
    """
    if choose_engine(engine) == "vllm":
        # Which engine there is shows only now.
        front = importlib.import_module("expertsteer.serving.vllm_front")
        front.serve_with_vllm(options)
        return
    if options.engine_arguments:
        raise ParameterError(
            f"Got {' '.join(options.engine_arguments)} behind the options, which are for vLLM "
            "alone. Leave them out, or name --engine vllm."
        )
    from expertsteer.serving.embedded import serve_with_transformers

    serve_with_transformers(options, on_ready)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
