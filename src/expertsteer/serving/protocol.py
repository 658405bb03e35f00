"""The part of the OpenAI API that the embedded server speaks: requests, answers, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from expertsteer.serving.request import explain_invalid

__all__ = [
    "ApiError",
    "ChatRequest",
    "ChosenToken",
    "CompletionRequest",
    "read_body",
    "usage_of",
]

# JSON has no infinity; what vLLM sends in its place.
_LEAST_LOGPROB = -9999.0


class ApiError(Exception):
    """What a client is told when a request cannot be answered.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
    param : str, optional
        Field at fault.
    code : str, optional
        Machine-readable reason.
    kind : str, default="invalid_request_error"
    headers : mapping of str to str, optional
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# Requests ----------------------------------------------------------------------------


def _only(*neutral: Any) -> AfterValidator:
    """Accept a field of the API where its value changes nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise PydanticCustomError(
                "unsupported", "Input should be left out: this server does not support it"
            )
        return value

    return AfterValidator(check)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    # Padding against eavesdroppers on encrypted streams; there is none here.
    include_obfuscation: bool | None = None


class _Request(BaseModel):
    """What chats and completions share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    steering: Any = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted where they say what happens anyway.
    n: Annotated[int | None, _only(1)] = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    logit_bias: Annotated[dict[str, Any] | None, _only({})] = None
    # Notes of the client to itself.
    user: Any = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end the answer and are not part of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(given)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: Annotated[Any, _only()] = None

    def turn(self) -> dict[str, str]:
        """Return the turn as chat templates know it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        # The API's newer word for the same thing; templates know the older one.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(_Request):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    metadata: Any = None
    store: Any = None

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens of the answer; None: as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives shown a token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """Body of ``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Annotated[bool | None, _only(False)] = None
    suffix: Annotated[str | None, _only("")] = None
    best_of: Annotated[int | None, _only(1)] = None

    @property
    def asked_tokens(self) -> int:
        """Most tokens of each answer; the API's own default is 16."""
        return self.max_tokens or 16

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives shown a token; None: no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one: text, or token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return given


_Body = TypeVar("_Body", bound=_Request)


def read_body(kind: type[_Body], body: bytes) -> _Body:
    """Return the request in a body.

    Raises
    ------
    ApiError
        Status 400, naming the field.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, explain_invalid(error, kind), param=param) from None
    if any(not text for text in request.stop_strings):
        raise ApiError(400, "Got an empty stop string, but expected some text.", param="stop")
    return request


# Answers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenToken:
    """A generated token and what else it might have been.

    Attributes
    ----------
    text : str
    logprob : float
        Natural logarithm of its probability before temperature and nucleus.
    alternatives : tuple of (str, float)
        The likeliest tokens, with their log-probabilities.
    """

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answers:
    """Writes the answers to one request, whole or in pieces.

    Parameters
    ----------
    model : str
        What the client calls the model.
    """

    prefix: str
    whole: str
    piece: str

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def envelope(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None, *, streamed: bool
    ) -> dict[str, Any]:
        """Return the body around some choices."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": self.piece if streamed else self.whole,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return body if usage is None else body | {"usage": usage}

    def first_pieces(self, index: int) -> list[dict[str, Any]]:
        """Return the choices that a stream begins with."""
        raise NotImplementedError

    def choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        tokens: Sequence[ChosenToken] | None,
        *,
        streamed: bool,
        offset: int = 0,
    ) -> dict[str, Any]:
        """Return a choice, or a piece of one that begins ``offset`` characters in."""
        raise NotImplementedError


class ChatAnswers(Answers):
    """Answers of ``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def first_pieces(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        tokens: Sequence[ChosenToken] | None,
        *,
        streamed: bool,
        offset: int = 0,
    ) -> dict[str, Any]:
        if streamed:
            content: dict[str, Any] = {"delta": {"content": text} if text else {}}
        else:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = None
        if tokens is not None:
            listed = [
                _with_bytes(token.text, token.logprob)
                | {"top_logprobs": [_with_bytes(*other) for other in token.alternatives]}
                for token in tokens
            ]
            logprobs = {"content": listed, "refusal": None}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionAnswers(Answers):
    """Answers of ``/v1/completions``."""

    prefix = "cmpl"
    whole = "text_completion"
    piece = "text_completion"

    def first_pieces(self, index: int) -> list[dict[str, Any]]:
        return []

    def choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        tokens: Sequence[ChosenToken] | None,
        *,
        streamed: bool,
        offset: int = 0,
    ) -> dict[str, Any]:
        logprobs = None
        if tokens is not None:
            offsets = [offset]
            for token in tokens:
                offsets.append(offsets[-1] + len(token.text))
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [_finite(token.logprob) for token in tokens],
                "top_logprobs": [
                    {text: _finite(value) for text, value in token.alternatives} for token in tokens
                ],
                "text_offset": offsets[:-1],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _with_bytes(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
