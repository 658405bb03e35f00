"""Check the steering of a request, and say it in the engine's terms."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from expertsteer.errors import ParameterError
from expertsteer.serving.request import SteeringRequest, read_steering
from expertsteer.serving.shelf import Shelf
from expertsteer.vllm_plugin.loading import load_shelf
from expertsteer.vllm_plugin.settings import KEY, PluginSettings, settings_of
from expertsteer.vllm_plugin.wrapping import wrap_once

__all__ = ["FIELD", "STAGES", "Admission", "wrap_input_processor"]

# What a client sends, in the body of a request or in `SamplingParams.extra_args`.
FIELD = "steering"
# A token is of the prompt, the prompt's last, or generated; which of these are steered.
STAGES = {"all": (0, 1, 2), "prompt": (0, 1), "last": (1, 2), "generated": (2,)}


class Admission:
    """Checks requests against the packs of one engine.

    Parameters
    ----------
    settings : PluginSettings or None
        Those of the configured engine; None: it holds no packs.
    """

    def __init__(self, settings: PluginSettings | None) -> None:
        self.shelf = load_shelf(settings) if settings else Shelf({})
        self.digests = dict(settings.digests) if settings else {}
        self._admit = functools.lru_cache(maxsize=1024)(self._admit_read)

    def admit(self, steering: Any) -> dict[str, Any] | None:
        """Return what the engine needs to know of a request's steering.

        Parameters
        ----------
        steering : JSON types
            See `read_steering`.

        Returns
        -------
        dict or None
            ``strengths``: of each pack that steers, by stage (the prompt up to its last
            token, that token, generated ones). ``keys``: per stage, a text that differs
            between different steerings, empty where unsteered. None: unsteered.

        Raises
        ------
        ParameterError
            On what `read_steering` or `Shelf.vectors` refuse.
        """
        requests = read_steering(steering)
        return self._admit(requests) if requests else None

    def _admit_read(self, requests: tuple[SteeringRequest, ...]) -> dict[str, Any]:
        self.shelf.vectors(requests)
        strengths: dict[str, list[float]] = {}
        for request in requests:
            pack = self.shelf.find(request.pack)
            strength = pack.strength if request.strength is None else request.strength
            by_stage = strengths.setdefault(request.pack, [0.0, 0.0, 0.0])
            for stage in STAGES[request.positions]:
                by_stage[stage] += strength
        return {
            "strengths": strengths,
            "keys": [
                self._key({name: s[stage] for name, s in strengths.items()}) for stage in range(3)
            ],
        }

    def _key(self, strengths: Mapping[str, float]) -> str:
        steering = sorted((self.digests[name], s) for name, s in strengths.items() if s)
        if not steering:
            return ""
        return hashlib.sha256(json.dumps(steering).encode()).hexdigest()


def wrap_input_processor() -> None:
    """Make every request pass admission on its way into the engine."""
    from vllm.v1.engine.input_processor import InputProcessor

    wrap_once(InputProcessor, "process_inputs", _admitting)


def _admitting(original: Any) -> Any:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        extra = dict((params and params.extra_args) or {})
        # Nobody but admission says what the engine does.
        forged = extra.pop(KEY, None)
        steering = extra.get(FIELD)
        if steering is None and forged is None:
            return request
        admitted = _admission_of(self).admit(steering)
        if admitted is not None:
            if request.resumable:
                raise ParameterError(
                    "Got steering in a request whose prompt may go on growing, but expected a "
                    "whole prompt. Send the prompt at once, or leave steering out."
                )
            extra[KEY] = admitted
        # The parameters may be shared with other requests of the caller.
        request.sampling_params = params.clone()
        request.sampling_params.extra_args = extra
        return request

    return process_inputs


def _admission_of(processor: Any) -> Admission:
    """Return the admission of the engine that an input processor feeds."""
    admission = vars(processor).get("expertsteer_admission")
    if admission is None:
        admission = Admission(settings_of(processor.vllm_config.additional_config))
        processor.expertsteer_admission = admission
    return admission
