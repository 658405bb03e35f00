"""YAML configurations: read before the options, written beside the output."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from expertsteer.errors import ParameterError
from expertsteer.files import read_yaml, write_text

__all__ = ["read_config", "write_config"]

# How a run reads, shows or names things, not what it computes.
_NOT_SETTINGS = {"config", "as_json"}


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of a command's options.

    Raises
    ------
    ParameterError
        If the file is missing, no YAML mapping, or names an unknown option.
    """
    if path is None:
        return None
    values = read_yaml(path, "configuration", "option names")
    parameters = {p.name: p for p in context.command.params if p.name}
    known = parameters.keys() - _NOT_SETTINGS - {"help"}
    command = values.pop("command", context.info_name)
    if command != context.info_name:
        raise ParameterError(
            f"Got {path}, a configuration of {command!r}, but expected one of "
            f"{context.info_name!r}."
        )
    for key, value in values.items():
        if key not in known:
            raise ParameterError(
                f"Got {path} with the unknown option {key!r}, but expected some of "
                f"{', '.join(sorted(known))}."
            )
        parameter: Any = parameters[key]
        repeatable = getattr(parameter, "multiple", False) or parameter.nargs == -1
        if isinstance(value, dict) or (isinstance(value, list) and not repeatable):
            raise ParameterError(f"Got {path} with {key}={value!r}, but expected one value.")
        if repeatable and value is not None and not isinstance(value, list):
            values[key] = [value]
    context.default_map = values
    return path


def write_config(context: typer.Context, output: Path) -> Path:
    """Write the options a run used beside its output, as ``OUTPUT.yaml``.

    Returns
    -------
    Path
        The file written; ``--config`` reads it.
    """
    import yaml

    values = {
        name: _plain(value)
        for name, value in context.params.items()
        if name not in _NOT_SETTINGS and value is not None
    }
    path = output.with_suffix(".yaml")
    write_text(path, yaml.safe_dump({"command": context.info_name} | values, sort_keys=False))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
