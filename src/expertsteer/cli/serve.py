"""expertsteer serve."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.show import say

if TYPE_CHECKING:
    from expertsteer.serving.shelf import Shelf

__all__ = ["serve"]

_SERVER = "Server"
_EMBEDDED = "Embedded server"


class EngineName(str, Enum):
    """Engines that run the model."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="The model to serve: a hub id (owner/name), a local folder, a .gguf file, or an "
            "embedded name (smollm2-135m-instruct, gemma-3-270m)."
        ),
    ],
    packs: Annotated[
        list[str],
        typer.Option(
            "--pack",
            "-p",
            help="Steering pack that clients may choose: NAME=PATH, or PATH, whose file name is "
            "then the name. Repeatable.",
        ),
    ],
    engine_arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --: handed on to vllm serve as they are."),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="auto is vLLM where it is installed.", rich_help_panel=_SERVER),
    ] = EngineName.auto,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="0 is any free one.", rich_help_panel=_SERVER),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="EXPERTSTEER_API_KEY",
            show_envvar=True,
            help="What clients must send; required where others can connect. Other users of this "
            "machine can read a command line, but not EXPERTSTEER_API_KEY.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="What clients call the model; default: the target.", rich_help_panel=_SERVER
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Requests that wait while one runs; default: 64.",
            rich_help_panel=_EMBEDDED,
        ),
    ] = None,
    max_tokens_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens a request may ask for; default: what the context holds.",
            rich_help_panel=_EMBEDDED,
        ),
    ] = None,
    max_request_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest body of a request; default: 1000000.", rich_help_panel=_EMBEDDED
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds that a running request has left when the server is stopped; default: 10.",
            rich_help_panel=_EMBEDDED,
        ),
    ] = None,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    config: options.ConfigFile = None,
) -> None:
    """Serve a model by the OpenAI API; every request chooses the packs that steer it.

    Clients send {"steering": {"pack": "happy", "strength": 0.1, "positions": "generated"}}
    beside the usual fields, or a list of such objects, which add up.

    Example: expertsteer serve gemma-3-270m --pack happy.safetensors --port 8000
    """
    from expertsteer.errors import ParameterError
    from expertsteer.serving.engines import choose_engine
    from expertsteer.serving.engines import serve as serve_target
    from expertsteer.serving.options import ServeOptions

    chosen = choose_engine(engine.value)
    limits = {
        "max_queue": max_queue,
        "max_tokens_limit": max_tokens_limit,
        "max_request_bytes": max_request_bytes,
        "shutdown_timeout": shutdown_timeout,
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    if limits and chosen == "vllm":
        names = ", ".join(f"--{name.replace('_', '-')}" for name in limits)
        raise ParameterError(
            f"Got {names} with vLLM, which has options of its own. Give those behind --, or name "
            "--engine transformers."
        )
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    wanted = ServeOptions(
        loading.source(target, target_revision),
        tuple(packs),
        force=force,
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=served_model_name,
        engine_arguments=tuple(engine_arguments or ()),
        **limits,
    )

    def announce(address: str, shelf: "Shelf") -> None:
        say(f"{wanted.model_name} answers at {address}, with the packs {', '.join(shelf.names)}")

    serve_target(wanted, chosen, announce)
    say("server stopped")
