"""YAML configurations: read before the options, written beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from expertsteer.errors import ParameterError
from expertsteer.files import read_yaml, write_text

__all__ = [
    "config_path",
    "read_config",
    "refuse_overwriting",
    "saved_with_config",
    "set_options",
    "write_config",
]

# How a run reads, shows or names things, not what it computes.
_NOT_SETTINGS = {"config", "as_json"}
_OUTPUTS = {"output", "plot"}
_FILE_SUFFIXES = (".safetensors", ".json")


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


def config_path(output: Path) -> Path:
    """Return where the configuration of a run that writes ``output`` goes.

    The ending of a file gives way to ``.yaml``; a point in a name, as in ``happy-0.1``, stays.
    """
    if output.suffix in _FILE_SUFFIXES:
        return output.with_suffix(".yaml")
    return output.with_name(output.name + ".yaml")


def saved_with_config(output: Path) -> tuple[Path, Path]:
    """Return the files of a pack or an alignment: itself and its configuration."""
    from expertsteer.tensor_file import tensor_file_path

    path = tensor_file_path(output)
    return path, config_path(path)


def refuse_overwriting(context: typer.Context, *written: Path) -> None:
    """Raise where a command would write over a file that it was given to read.

    A configuration that alone says what the run is may be the one beside the output.

    Parameters
    ----------
    context : typer.Context
    *written : Path
        The files it writes.

    Raises
    ------
    ParameterError
        Naming the file and the option.
    """
    places = {path.resolve() for path in written}
    for name, value in context.params.items():
        if name in _OUTPUTS or (name == "config" and not _said_on_command_line(context)):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | Path) and Path(each).resolve() in places and _is_there(each):
                raise ParameterError(
                    f"Got an output that would replace {each}, which is read as the {name}, but "
                    "expected another place. Choose another --output."
                )


def set_options(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Return which options have another value than their default, as a user writes them.

    Parameters
    ----------
    context : typer.Context
    names : sequence of str
        Of the command's parameters.
    """
    declared: dict[str, Any] = {p.name: p for p in context.command.params if p.name}
    return [
        declared[name].opts[0]
        for name in names
        if (context.params[name] or declared[name].default) != declared[name].default
    ]


def _said_on_command_line(context: typer.Context) -> bool:
    return any(
        getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        for name in context.params
        if name not in _NOT_SETTINGS
    )


def _is_there(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long, or no path at all
        return False


def write_config(context: typer.Context, output: Path) -> Path:
    """Write the options a run used beside its output, as `config_path` names it.

    Returns
    -------
    Path
        The file written; ``--config`` reads it.
    """
    import yaml

    path = config_path(output)
    given = context.params.get("config")
    is_beside = given is not None and Path(given).resolve() == path.resolve()
    if is_beside and not _said_on_command_line(context):
        return path  # in its author's words
    values = {
        name: _plain(value)
        for name, value in context.params.items()
        if name not in _NOT_SETTINGS and value is not None
    }
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
