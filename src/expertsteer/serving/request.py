"""What a client says of steering: one pack or several, each with strength and positions."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertsteer.errors import ParameterError

__all__ = ["SteeringRequest", "explain_invalid", "read_steering"]

# How much of what a client sent goes back in a message.
_LONGEST_QUOTE = 100
# How pydantic names the alternatives of a field in an error's place.
_UNION_MEMBER = re.compile(r"str|list\[.*\]")


class SteeringRequest(BaseModel):
    """One pack that steers one request.

    Attributes
    ----------
    pack : str
        The name the server holds it by.
    strength : float or None
        Relative to the mean residual norm, finite and not zero; None: the pack's own.
    positions : {"all", "prompt", "generated", "last"}, default="all"
        Which tokens are steered, see `Steering`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    pack: str = Field(min_length=1)
    strength: float | None = None
    positions: Literal["all", "prompt", "generated", "last"] = "all"


def read_steering(value: Any) -> tuple[SteeringRequest, ...]:
    """Read what a client sent under ``steering``.

    Parameters
    ----------
    value : JSON types
        An object with the fields of `SteeringRequest`, a list of them (added to each
        other), or None.

    Returns
    -------
    tuple of SteeringRequest
        Empty: unsteered.

    Raises
    ------
    ParameterError
        One line that names the field, what it was and what was expected.
    """
    if value is None:
        return ()
    if not isinstance(value, dict | list):
        raise ParameterError(
            f"Got steering={_quote(value)}, but expected an object such as "
            '{"pack": "happy", "strength": 0.1}, a list of them, or null.'
        )
    several = isinstance(value, list)
    requests = []
    for place, entry in enumerate(value if several else [value]):
        where = f"steering[{place}]" if several else "steering"
        try:
            request = SteeringRequest.model_validate(entry)
        except ValidationError as error:
            raise ParameterError(explain_invalid(error, SteeringRequest, where)) from None
        if request.strength == 0:
            raise ParameterError(
                f"Got {where}.strength=0, but expected another number. To generate unsteered, "
                "leave steering out."
            )
        requests.append(request)
    return tuple(requests)


def explain_invalid(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """Return the first thing that is wrong with what a client sent, as one line.

    Parameters
    ----------
    error : ValidationError
    model : type of BaseModel
        What was validated; names the known fields.
    where : str, default=""
        Path of the validated object in the whole of what was sent.

    Returns
    -------
    str
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = where
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not _UNION_MEMBER.fullmatch(part):
            place += f".{part}" if place else part
    if first["type"] == "extra_forbidden":
        at_the_top = len(first["loc"]) == 1
        fields = f", but expected some of {', '.join(model.model_fields)}" if at_the_top else ""
        return f"Got the unknown field {place}{fields}."
    if first["type"] == "missing":
        return f"Got no {place}, but expected one."
    if first["type"] == "json_invalid":
        return f"Got {first['msg'][0].lower()}{first['msg'][1:]}."
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should ")
    given = f"{place}={_quote(first['input'])}" if place else _quote(first["input"])
    return f"Got {given}, but it should {reason}."


def _quote(value: Any) -> str:
    """Return a value as it may stand in a message: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
