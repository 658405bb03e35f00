"""What a server is started with."""

from __future__ import annotations

import ipaddress
import math
import socket
from dataclasses import dataclass

from expertsteer.errors import ParameterError
from expertsteer.models import ModelSource

__all__ = ["API_KEY_VARIABLE", "ServeOptions", "is_loopback"]

API_KEY_VARIABLE = "EXPERTSTEER_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with, whatever engine runs the model.

    Attributes
    ----------
    model : ModelSource
        The target.
    packs : tuple of str
        ``NAME=PATH`` or ``PATH``, see `Shelf.load`.
    force : bool
        See `SteeringPack.check_target`.
    host : str
        Address or name to listen on.
    port : int
        0: any free one.
    api_key : str or None
        What clients send as bearer token; None only on loopback addresses.
    served_model_name : str or None
        What clients call the model; None: the target's name.
    max_queue : int
        Requests that wait while one runs (embedded server).
    max_tokens_limit : int or None
        Most tokens a request may ask for; None: what the context holds (embedded server).
    max_request_bytes : int
        Longest body of a request (embedded server).
    shutdown_timeout : float
        Seconds that a running request has left when the server is stopped (embedded
        server).
    engine_arguments : tuple of str
        Handed on to ``vllm serve`` as they are.
    """

    model: ModelSource
    packs: tuple[str, ...]
    force: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_queue: int = 64
    max_tokens_limit: int | None = None
    max_request_bytes: int = 1_000_000
    shutdown_timeout: float = 10.0
    engine_arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shutdown_timeout) and self.shutdown_timeout >= 0):
            raise ParameterError(
                f"Got shutdown_timeout={self.shutdown_timeout:g}, but expected a finite number of "
                "seconds, 0 or more."
            )
        if self.api_key is not None and not self.api_key.strip():
            raise ParameterError("Got an empty API key, but expected some characters, or none.")
        if self.api_key is None and not is_loopback(self.host):
            raise ParameterError(
                f"Got host={self.host!r} without an API key, but expected one where others can "
                f"connect. Set {API_KEY_VARIABLE} or --api-key, or listen on 127.0.0.1."
            )

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model.name


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can connect to an address.

    Parameters
    ----------
    host : str
        An address or a name; empty: every address.

    Raises
    ------
    ParameterError
        On a name that cannot be resolved.
    """
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ParameterError(
            f"Got host={host!r}, but expected an address of this machine such as 127.0.0.1 "
            f"({error})."
        ) from error
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
