"""The one check that this room's settings share."""

from __future__ import annotations

from numbers import Integral

from expertsteer.errors import ParameterError

__all__ = ["check_integer"]


def check_integer(name: str, value: object, most: int | None = None, hint: str = "") -> int:
    """Return ``value`` as an int if it is an integer of at least 1.

    Parameters
    ----------
    name : str
        What the value is called in the error message.
    value : object
        Any integer type; booleans do not count.
    most : int, optional
        Largest value allowed.
    hint : str, default=""
        Why ``most``, or what to do next; a phrase that ends the message.

    Returns
    -------
    int
        The value.

    Raises
    ------
    ParameterError
        If it is anything else.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= 1 and (most is None or number <= most):
            return number
    expected = "a positive integer" if most is None else f"an integer from 1 to {most}"
    raise ParameterError(f"Got {name}={value!r}, but expected {expected}{hint}.")
