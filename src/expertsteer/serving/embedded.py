"""The embedded server: one transformers model, one generation at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from expertsteer.errors import ParameterError
from expertsteer.models import load_model
from expertsteer.serving.app import create_app
from expertsteer.serving.jobs import JobQueue
from expertsteer.serving.options import ServeOptions
from expertsteer.serving.shelf import Shelf

__all__ = ["serve_with_transformers"]

# Seconds that cut requests have for telling their clients.
_LAST_WORDS = 5


def serve_with_transformers(
    options: ServeOptions, on_ready: Callable[[str, Shelf], None] = lambda address, shelf: None
) -> None:
    """Serve a target until Ctrl-C or SIGTERM.

    Parameters
    ----------
    options : ServeOptions
    on_ready : callable, optional
        Called with the server's address and its packs once the model is loaded.

    Raises
    ------
    ParameterError
        If the port is in use.
    PackError
        If a pack cannot be read or is for another model.
    ModelError
        If the model cannot be loaded.
    """
    # What fails in a moment fails before a model is loaded.
    shelf = Shelf.load(options.packs)
    with contextlib.closing(_listen(options.host, options.port)) as sock:
        model = load_model(options.model)
        shelf.check_target(model, force=options.force)
        queue = JobQueue(model, options.max_queue)
        config = uvicorn.Config(
            create_app(model, shelf, queue, options),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(options.shutdown_timeout) + _LAST_WORDS,
        )
        server = _Server(config, queue, options.shutdown_timeout)
        with _stopped_by_signals(server):
            on_ready(_address(sock), shelf)
            server.run(sockets=[sock])
        queue.cut()
        queue.join(_LAST_WORDS)


class _Server(uvicorn.Server):
    """Refuses what waits when it is stopped, and cuts what still runs after a while."""

    def __init__(self, config: uvicorn.Config, queue: JobQueue, timeout: float) -> None:
        super().__init__(config)
        self.queue = queue
        self.timeout = timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.stop()
        timer = asyncio.get_running_loop().call_later(self.timeout, self.queue.cut)
        await super().shutdown(sockets)
        timer.cancel()


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Have signals stop a server, and not this process."""

    # Uvicorn handles them while it runs, and hands them to these once it has shut down.
    def stop(*_: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens already: clients that come while the model loads wait."""
    kind = socket.SOCK_STREAM
    family, _, _, _, address = socket.getaddrinfo(
        host or None, port, type=kind, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind)
    try:
        if os.name == "posix":  # elsewhere it lets two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise ParameterError(
            f"Cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}. Name "
            "another --port or --host, or stop what listens there."
        ) from error
    return sock


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
