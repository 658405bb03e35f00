"""The ``steering`` field in the bodies of the OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

from expertsteer.errors import ParameterError
from expertsteer.vllm_plugin.admission import FIELD, Admission
from expertsteer.vllm_plugin.wrapping import wrap_once

__all__ = ["wrap_requests"]

# Of the engine that this process serves; the server makes one.
_served: dict[str, Admission] = {}


def wrap_requests(admission: Admission) -> None:
    """Let chat, completion and response requests carry ``steering``.

    The server keeps fields that it does not know with the request, but leaves them out
    of the sampling parameters. Checked here, before the first byte of an answer, a bad
    field is answered with status 400 in streams as well.

    Parameters
    ----------
    admission : Admission
        Of the engine that the server serves.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    _served["admission"] = admission
    for kind in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap_once(kind, "to_sampling_params", _carrying)
    for kind in (ChatCompletionRequest, CompletionRequest):
        wrap_once(kind, "to_beam_search_params", _refusing)


def _carrying(original: Any) -> Any:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        steering = (self.model_extra or {}).get(FIELD)
        if steering is not None:
            _served["admission"].admit(steering)
            params.extra_args = {**(params.extra_args or {}), FIELD: steering}
        return params

    return to_sampling_params


def _refusing(original: Any) -> Any:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.model_extra or {}).get(FIELD) is not None:
            raise ParameterError(
                "Got steering with use_beam_search=true, but expected either. Leave one out."
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params
