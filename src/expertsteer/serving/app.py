"""The embedded server's routes: the OpenAI API on one transformers model."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from expertsteer.errors import DataError, ExpertSteerError, ModelError
from expertsteer.generation import require_room, sampling_options
from expertsteer.models import LanguageModel
from expertsteer.serving.jobs import Finish, Job, JobQueue, Piece, QueueFullError, StoppedError
from expertsteer.serving.options import ServeOptions
from expertsteer.serving.protocol import (
    Answers,
    ApiError,
    ChatAnswers,
    ChatRequest,
    ChosenToken,
    CompletionAnswers,
    CompletionRequest,
    read_body,
    usage_of,
)
from expertsteer.serving.request import read_steering
from expertsteer.serving.shelf import Shelf
from expertsteer.steering import Steering

__all__ = ["create_app"]

_T = TypeVar("_T")
_log = logging.getLogger("uvicorn.error")
# A body this many times too long is still read (and thrown away), so that its client gets
# to read the answer; of a longer one the connection breaks.
_READ_AND_THROW_AWAY = 20


def create_app(
    model: LanguageModel, shelf: Shelf, queue: JobQueue, options: ServeOptions
) -> ASGIApp:
    """Return the ASGI application of the embedded server.

    Parameters
    ----------
    model : LanguageModel
        The target.
    shelf : Shelf
        Packs that requests may name.
    queue : JobQueue
        Of that model.
    options : ServeOptions
    """
    routes = _Routes(model, shelf, queue, options)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.models),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.complete, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: lambda _, error: _error_response(error),
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )
    return _Guard(app, options)


class _Guard:
    """Lets in who may come in.

    With an API key, whoever shows it. Without one the server listens on this machine
    alone, and the name it is called by must be this machine's: a web page whose name is
    made to point here could otherwise talk with it from the user's browser.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self.app = app
        self.key = options.api_key
        self.names = {"localhost", options.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            error = None
            if self.key is None:
                error = self._foreign_name(headers.get(b"host", b"").decode("latin-1"))
            elif scope["path"] != "/health":
                error = self._wrong_key(headers.get(b"authorization", b""))
            if error is not None:
                await _error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _wrong_key(self, given: bytes) -> ApiError | None:
        scheme, _, key = given.partition(b" ")
        expected = str(self.key).encode()
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), expected):
            return None
        return ApiError(
            401,
            "Got no API key or a wrong one, but expected this server's own: "
            "Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _foreign_name(self, host: str) -> ApiError | None:
        name = host.partition("]")[0].lstrip("[") if "[" in host else host.partition(":")[0]
        if not host or name.lower() in self.names:
            return None
        try:
            if ipaddress.ip_address(name).is_loopback:
                return None
        except ValueError:
            pass
        return ApiError(
            403,
            f"Got a request for the host {name[:100]!r}, but expected one for this machine: a "
            "server without an API key answers as localhost alone.",
            code="foreign_host",
        )


class _Routes:
    """The application's functions, one a route."""

    def __init__(
        self, model: LanguageModel, shelf: Shelf, queue: JobQueue, options: ServeOptions
    ) -> None:
        self.model = model
        self.shelf = shelf
        self.queue = queue
        self.options = options
        self.created = int(time.time())
        # Tokenizers of some families are not made for several threads.
        self.preparing = asyncio.Lock()

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", **self.queue.counts})

    async def models(self, request: Request) -> Response:
        entry = {
            "id": self.options.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "expertsteer",
            "max_model_len": self.model.context_length,
            "packs": [
                {"name": name, "strength": pack.strength, "layers": list(pack.layers)}
                for name, pack in self.shelf.packs.items()
            ],
        }
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [entry]})
        self._require_model(name)
        return JSONResponse(entry)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, ChatAnswers)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, CompletionAnswers)

    async def _answer(self, request: Request, kind: Any, answers_kind: type[Answers]) -> Response:
        wanted = read_body(kind, await self._body(request))
        self._require_model(wanted.model)
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        async with self.preparing:
            job = await asyncio.to_thread(self._job, wanted, asyncio.get_running_loop(), inbox)
        try:
            self.queue.submit(job)
        except (QueueFullError, StoppedError) as error:
            raise self._as_api_error(error) from error
        answers = answers_kind(self.options.model_name)
        if wanted.stream:
            events = self._events(job, inbox, answers, wanted.includes_usage)
            return _EventStream(events, self.queue, job)
        try:
            return await _until_disconnect(request.receive, self._whole(job, inbox, answers))
        except _GoneError:
            return Response()  # which nobody reads
        finally:
            self.queue.cancel(job)

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise ApiError(415, "Got another content type, but expected application/json.")
        limit = self.options.max_request_bytes
        body = bytearray()
        length = 0
        async for chunk in request.stream():
            length += len(chunk)
            if length <= limit:
                body += chunk
            elif length > _READ_AND_THROW_AWAY * limit:
                break
        if length > limit:
            raise ApiError(
                413,
                f"Got a body of more than {limit} bytes, the most this server reads. Send less.",
                code="request_too_large",
            )
        return bytes(body)

    def _require_model(self, name: str) -> None:
        if name != self.options.model_name:
            raise ApiError(
                404,
                f"Got the model {name[:100]!r}, but expected {self.options.model_name!r}, the one "
                "this server runs.",
                param="model",
                code="model_not_found",
            )

    # From request to job -------------------------------------------------------------

    def _job(
        self,
        wanted: ChatRequest | CompletionRequest,
        loop: asyncio.AbstractEventLoop,
        inbox: asyncio.Queue[Any],
    ) -> Job:
        steerings = self._steerings(wanted.steering)
        is_chat = isinstance(wanted, ChatRequest)
        prompts = [self._chat_ids(wanted)] if is_chat else self._prompt_ids(wanted)
        param = "messages" if is_chat else "prompt"
        if not prompts or not all(prompts):
            raise ApiError(400, "Got a prompt without tokens, but expected some.", param=param)
        longest = max(map(len, prompts))
        limit = self.options.max_tokens_limit
        asked = wanted.asked_tokens
        if asked is None:
            asked = max(self.model.context_length - longest, 1)
            asked = asked if limit is None else min(asked, limit)
        elif limit is not None and asked > limit:
            raise ApiError(
                400,
                f"Got max_tokens={asked}, but this server generates at most {limit} a request.",
                param="max_tokens",
            )
        try:
            require_room(self.model, longest, asked)
        except DataError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error
        # Sampled by default, as the API is.
        temperature = 1.0 if wanted.temperature is None else wanted.temperature
        sampling = sampling_options(temperature, wanted.top_p)
        return Job(
            prompts=prompts,
            max_new_tokens=asked,
            # torch takes no seed below zero beside those above.
            seed=secrets.randbits(63) if wanted.seed is None else wanted.seed % 2**63,
            emit=lambda event: _emit(loop, inbox, event),
            options=sampling | {"repetition_penalty": wanted.repetition_penalty or 1.0},
            steerings=steerings,
            stop=wanted.stop_strings,
            n_logprobs=wanted.n_logprobs,
        )

    def _steerings(self, sent: Any) -> list[Steering]:
        try:
            vectors = self.shelf.vectors(read_steering(sent))
            return [
                Steering(self.model.model, by_layer, positions)
                for positions, by_layer in vectors.items()
            ]
        except ExpertSteerError as error:
            raise ApiError(400, str(error), param="steering") from error

    def _chat_ids(self, wanted: ChatRequest) -> list[int]:
        turns = [message.turn() for message in wanted.messages]
        try:
            prompt = self.model.chat_prompt(turns)
        except (ModelError, TemplateError) as error:
            # Templates refuse what their model was not trained on, such as a system turn.
            reason = " ".join(str(error).split())
            raise ApiError(
                400, f"Cannot make a prompt of these messages: {reason}", param="messages"
            ) from error
        return self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def _prompt_ids(self, wanted: CompletionRequest) -> list[list[int]]:
        vocabulary = self.model.model.config.get_text_config().vocab_size
        prompts = []
        for prompt in wanted.prompts():
            if isinstance(prompt, str):
                prompts.append(self.model.tokenizer(prompt)["input_ids"])
                continue
            for token in prompt:
                if not 0 <= token < vocabulary:
                    raise ApiError(
                        400,
                        f"Got the token id {token}, but expected 0 to {vocabulary - 1}.",
                        param="prompt",
                    )
            prompts.append(prompt)
        return prompts

    # From job to answer --------------------------------------------------------------

    async def _whole(self, job: Job, inbox: asyncio.Queue[Any], answers: Answers) -> Response:
        tokens: list[list[ChosenToken]] = [[] for _ in job.prompts]
        ends: list[Finish] = []
        while (event := await inbox.get()) is not None:
            if isinstance(event, BaseException):
                raise self._as_api_error(event) from event
            if isinstance(event, Finish):
                ends.append(event)
            else:
                tokens[event.index] += event.tokens or ()
        choices = [
            answers.choice(
                end.index,
                end.text,
                end.reason,
                None if job.n_logprobs is None else tokens[end.index],
                streamed=False,
            )
            for end in ends
        ]
        usage = usage_of(job.n_prompt_tokens, sum(end.n_tokens for end in ends))
        return JSONResponse(answers.envelope(choices, usage, streamed=False))

    async def _events(
        self, job: Job, inbox: asyncio.Queue[Any], answers: Answers, with_usage: bool
    ) -> AsyncIterator[str]:
        def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
            return _event(answers.envelope(choices, usage, streamed=True))

        for index in range(len(job.prompts)):
            for choice in answers.first_pieces(index):
                yield event([choice])
        n_generated = 0
        sent = [0] * len(job.prompts)
        while (found := await inbox.get()) is not None:
            if isinstance(found, BaseException):
                yield _event(self._as_api_error(found).body)
                return
            if isinstance(found, Piece):
                piece = (found.index, found.text, None, found.tokens)
                yield event([answers.choice(*piece, streamed=True, offset=sent[found.index])])
                sent[found.index] += len(found.text)
            else:
                n_generated += found.n_tokens
                yield event([answers.choice(found.index, "", found.reason, None, streamed=True)])
        if with_usage:
            yield event([], usage_of(job.n_prompt_tokens, n_generated))
        yield "data: [DONE]\n\n"

    def _as_api_error(self, error: BaseException) -> ApiError:
        if isinstance(error, QueueFullError):
            return ApiError(
                429,
                str(error),
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                headers={"Retry-After": str(self.queue.seconds_until_free)},
            )
        if isinstance(error, StoppedError):
            return ApiError(503, str(error), code="stopped", kind="server_error")
        _log.error("A generation failed.", exc_info=error)
        return ApiError(
            500, "The generation failed; the server's log has more.", kind="server_error"
        )


class _EventStream(StreamingResponse):
    """A stream of server-sent events that ends its job when the client goes away."""

    def __init__(self, events: AsyncIterator[str], queue: JobQueue, job: Job) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.queue = queue
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _until_disconnect(receive, self.stream_response(send))
        except _GoneError:
            pass
        finally:
            self.queue.cancel(self.job)


class _GoneError(Exception):
    """The client went away before its answer was ready."""


async def _until_disconnect(receive: Receive, work: Awaitable[_T]) -> _T:
    """Do some work while the client is there."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _GoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _emit(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any], event: Any) -> None:
    try:
        loop.call_soon_threadsafe(inbox.put_nowait, event)
    except RuntimeError:
        # The loop has closed: the server is stopping and nobody listens any more.
        if not loop.is_closed():
            raise


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


# Errors ------------------------------------------------------------------------------


def _error_response(error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


def _http_error(request: Request, error: Any) -> Response:
    message = f"Got {request.method} {request.url.path}: {error.detail.lower()}."
    return _error_response(ApiError(error.status_code, message, headers=error.headers))


def _internal_error(request: Request, error: Exception) -> Response:
    message = "The server failed on this request; its log has more."
    return _error_response(ApiError(500, message, kind="server_error"))
