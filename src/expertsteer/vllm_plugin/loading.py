"""The packs of a configured engine, loaded once in every process that needs them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from expertsteer.errors import ModelError, PackError
from expertsteer.models.checkpoint import describe_checkpoint
from expertsteer.pack import SteeringPack
from expertsteer.serving.shelf import Shelf
from expertsteer.vllm_plugin.settings import PluginSettings

__all__ = ["check_against_checkpoint", "digests_of", "load_shelf"]


def load_shelf(settings: PluginSettings) -> Shelf:
    """Return the packs that the settings name.

    Parameters
    ----------
    settings : PluginSettings
        Where they hold digests, the files must be those that were digested.

    Returns
    -------
    Shelf

    Raises
    ------
    PackError
        If a pack cannot be read, or has changed since the engine was configured.
    """
    shelf = _load(tuple(settings.packs.items()), tuple(settings.digests.items()))
    for name, digest in settings.digests.items():
        if _digest(shelf.packs[name]) != digest:
            raise PackError(
                f"Got {settings.packs[name]}, but it is another file than when the engine was "
                "configured. Start the server again."
            )
    return shelf


@functools.lru_cache(maxsize=8)
def _load(paths: tuple[tuple[str, str], ...], digests: tuple[tuple[str, str], ...]) -> Shelf:
    return Shelf({name: SteeringPack.load(path) for name, path in paths})


def check_against_checkpoint(
    shelf: Shelf, folder: str | Path, name: str, *, force: bool = False
) -> None:
    """Raise unless every pack is for the model that a checkpoint holds.

    Parameters
    ----------
    shelf : Shelf
    folder : str or Path
        See `describe_checkpoint`.
    name : str
        What the user calls the model.
    force : bool, default=False
        Leave the comparison to the engine, which compares depth and width.

    Raises
    ------
    PackError
        Naming the pack and what differs, or why it cannot be compared.
    """
    if force:
        return
    try:
        description = describe_checkpoint(folder, name)
    except ModelError as error:
        raise PackError(
            f"Cannot tell whether the packs are for {name!r}: {error} If they are, set "
            '"force": true beside "packs" (--force).'
        ) from error
    shelf.check_target(description)


def digests_of(packs: Mapping[str, SteeringPack]) -> dict[str, str]:
    """Return a digest of what each pack adds to the residual stream at strength 1.

    Parameters
    ----------
    packs : mapping of str to SteeringPack

    Returns
    -------
    dict of str to str
        64 hexadecimal digits by name.
    """
    return {name: _digest(pack) for name, pack in packs.items()}


def _digest(pack: SteeringPack) -> str:
    digest = hashlib.sha256()
    for layer, vector in sorted(pack.scaled_vectors(1.0).items()):
        digest.update(f"{layer}:".encode())
        digest.update(vector.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
