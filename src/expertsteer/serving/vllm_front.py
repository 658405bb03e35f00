"""Start vLLM's own server with the plugin's settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from expertsteer.errors import ParameterError
from expertsteer.models import ModelSource, locate_model
from expertsteer.serving.options import ServeOptions
from expertsteer.serving.shelf import Shelf, name_and_path
from expertsteer.vllm_plugin.loading import check_against_checkpoint

__all__ = ["serve_with_vllm"]

# vLLM reads the key here; other users of the machine can read a command line.
_API_KEY_VARIABLE = "VLLM_API_KEY"


def serve_with_vllm(options: ServeOptions) -> None:
    """Become ``vllm serve`` with the packs; return only where that cannot be started.

    Parameters
    ----------
    options : ServeOptions
        Those of the embedded server alone are ignored.

    Raises
    ------
    PackError
        If a pack cannot be read, or is for another model than the local one named.
    ModelError
        If there is no such model.
    ParameterError
        On settings of the model that vLLM makes itself.
    """
    model = options.model
    _refuse_transformers_settings(model)
    _refuse_own_options(options.engine_arguments)
    location = locate_model(model.name)
    shelf = Shelf.load(options.packs)
    if Path(location).is_dir():
        # The engine checks as well; here the reason is one line, and at once.
        check_against_checkpoint(shelf, location, model.name, force=options.force)
    packs = {name: str(path.resolve()) for name, path in map(name_and_path, options.packs)}
    settings = {"expertsteer": {"packs": packs, "force": options.force}}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", location),
        *options.engine_arguments,
        *("--host", options.host, "--port", str(options.port)),
        *("--served-model-name", options.model_name),
        *("--dtype", str(model.dtype).removeprefix("torch.")),
        *("--additional-config", json.dumps(settings)),
    ]
    if model.revision:
        command += ["--revision", model.revision]
    if model.trust_remote_code:
        command.append("--trust-remote-code")
    environment = dict(os.environ)
    if options.api_key:
        environment[_API_KEY_VARIABLE] = options.api_key
    sys.stdout.flush()
    # The server takes this process's place: signals reach it, and its status is ours.
    os.execve(sys.executable, command, environment)


def _refuse_own_options(arguments: Sequence[str]) -> None:
    # The packs are in the additional configuration; the others decide who can reach the server.
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name == "--additional-config":
            raise ParameterError(
                f"Got {argument} behind --, but expected other options there: the packs go to "
                "vLLM in it. Leave it out."
            )
        if name in ("--host", "--port", "--api-key", "--served-model-name", "--uds"):
            raise ParameterError(
                f"Got {argument} behind --, but expected it before: --host, --port, --api-key and "
                "--served-model-name are options of expertsteer serve, and --uds is none."
            )


def _refuse_transformers_settings(model: ModelSource) -> None:
    for name in ("device", "device_map", "attn_implementation"):
        value = getattr(model, name)
        if value is not None:
            raise ParameterError(
                f"Got {name}={value!r} with vLLM, which chooses by itself. Leave it out, or give "
                "vLLM's own options behind --."
            )
