"""What a user tells the plugin: which packs, by what name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertsteer.errors import ParameterError
from expertsteer.serving.request import explain_invalid

__all__ = ["ENVIRONMENT_VARIABLE", "KEY", "PluginSettings", "read_settings", "settings_of"]

# Under this key of vLLM's additional configuration, and of a request's extra arguments.
KEY = "expertsteer"
ENVIRONMENT_VARIABLE = "EXPERTSTEER_PACKS"


class PluginSettings(BaseModel):
    """The plugin's part of vLLM's additional configuration.

    Attributes
    ----------
    packs : dict of str to str
        Path of each pack by the name that requests call it.
    force : bool, default=False
        Accept packs made for another model of the same depth and width.
    digests : dict of str to str
        Of each pack's vectors, filled in when the engine is configured, so that every
        process can tell that it read the same files.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    packs: dict[str, str] = Field(min_length=1)
    force: bool = False
    digests: dict[str, str] = {}


def read_settings(
    additional_config: Any, environment: Mapping[str, str] = os.environ
) -> PluginSettings | None:
    """Read the settings of an engine that is about to be configured.

    Parameters
    ----------
    additional_config : Any
        vLLM's, where the key ``expertsteer`` is the plugin's.
    environment : mapping of str to str, default=os.environ
        Where ``EXPERTSTEER_PACKS`` may hold ``NAME=PATH,NAME=PATH``.

    Returns
    -------
    PluginSettings or None
        None: no packs.

    Raises
    ------
    ParameterError
        If they cannot be read, or are given in both places.
    """
    settings = settings_of(additional_config)
    variable = environment.get(ENVIRONMENT_VARIABLE, "")
    if not variable:
        return settings
    if settings is not None:
        raise ParameterError(
            f"Got packs in both {ENVIRONMENT_VARIABLE} and the additional configuration, but "
            "expected them in one place. Remove either."
        )
    packs: dict[str, str] = {}
    for entry in variable.split(","):
        name, _, path = entry.strip().partition("=")
        if not name or not path or name in packs:
            raise ParameterError(
                f"Got {ENVIRONMENT_VARIABLE}={variable!r}, but expected NAME=PATH,NAME=PATH with "
                "each name once."
            )
        packs[name] = path
    return PluginSettings(packs=packs)


def settings_of(additional_config: Any) -> PluginSettings | None:
    """Read the settings of a configured engine.

    Parameters
    ----------
    additional_config : Any
        vLLM's.

    Returns
    -------
    PluginSettings or None
        None: no packs.

    Raises
    ------
    ParameterError
        If they cannot be read.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    try:
        return PluginSettings.model_validate(additional_config[KEY])
    except ValidationError as error:
        raise ParameterError(
            f"{explain_invalid(error, PluginSettings, KEY)} Write for example "
            '--additional-config \'{"expertsteer": {"packs": {"happy": "happy.safetensors"}}}\'.'
        ) from None
