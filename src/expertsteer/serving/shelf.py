"""The packs that a server holds, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from expertsteer.errors import PackError, ParameterError
from expertsteer.pack import SteeringPack
from expertsteer.serving.request import SteeringRequest

__all__ = ["Shelf", "name_and_path"]


class Shelf:
    """Packs by the name that clients call them.

    Parameters
    ----------
    packs : mapping of str to SteeringPack
    """

    def __init__(self, packs: Mapping[str, SteeringPack]) -> None:
        self.packs = dict(packs)

    @classmethod
    def load(
        cls, arguments: Sequence[str | Path], target: Any = None, *, force: bool = False
    ) -> Self:
        """Load packs from the command line's arguments.

        Parameters
        ----------
        arguments : sequence of str or Path
            ``NAME=PATH``, or ``PATH``, whose file name without its ending is the name.
        target : PreTrainedModel, LanguageModel or ModelDescription, optional
            The served model; packs for another one are refused.
        force : bool, default=False
            See `SteeringPack.check_target`.

        Returns
        -------
        Shelf

        Raises
        ------
        PackError
            If a pack cannot be read, or is for another model.
        ParameterError
            On a name that occurs twice, or an empty one.
        """
        packs: dict[str, SteeringPack] = {}
        for argument in arguments:
            name, path = name_and_path(argument)
            if name in packs:
                raise ParameterError(
                    f"Got two packs of the name {name!r}, but expected each once. Give one "
                    "another name: NAME=PATH."
                )
            packs[name] = SteeringPack.load(path)
        shelf = cls(packs)
        if target is not None:
            shelf.check_target(target, force=force)
        return shelf

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the packs, in the order they were given."""
        return tuple(self.packs)

    def check_target(self, target: Any, *, force: bool = False) -> None:
        """Raise unless every pack is for one model.

        Parameters
        ----------
        target : PreTrainedModel, LanguageModel or ModelDescription
        force : bool, default=False
            See `SteeringPack.check_target`.

        Raises
        ------
        PackError
            Naming the pack and what differs.
        """
        for name, pack in self.packs.items():
            try:
                pack.check_target(target, force=force)
            except PackError as error:
                raise PackError(f"Cannot serve the pack {name!r}: {error}") from error

    def find(self, name: str) -> SteeringPack:
        """Return a pack by its name.

        Raises
        ------
        ParameterError
            Listing the names there are.
        """
        try:
            return self.packs[name]
        except KeyError:
            known = ", ".join(self.packs) or "none"
            raise ParameterError(
                f"Got the pack {name[:100]!r}, but expected one that this server holds: {known}."
            ) from None

    def vectors(self, requests: Iterable[SteeringRequest]) -> dict[str, dict[int, torch.Tensor]]:
        """Return what one generation's requests add up to.

        Parameters
        ----------
        requests : iterable of SteeringRequest

        Returns
        -------
        dict of str to dict of int to Tensor of shape (width,)
            By positions, then by 0-based layer: what is added to the residual stream behind
            that block, float32.

        Raises
        ------
        ParameterError
            On an unknown pack, a pack of strength 0 without another one, or a sum that is
            not finite.
        """
        totals: dict[str, dict[int, torch.Tensor]] = {}
        for request in requests:
            total = totals.setdefault(request.positions, {})
            scaled = self.find(request.pack).scaled_vectors(request.strength)
            for layer, vector in scaled.items():
                total[layer] = total[layer] + vector if layer in total else vector
                if not bool(torch.isfinite(total[layer]).all()):
                    raise ParameterError(
                        f"Got strength={request.strength:g} for the pack {request.pack!r}, but "
                        "expected one whose vectors stay finite in float32."
                    )
        return totals


def name_and_path(argument: str | Path) -> tuple[str, Path]:
    """Read an argument that names a pack.

    Parameters
    ----------
    argument : str or Path
        See `Shelf.load`.

    Returns
    -------
    str, Path
        The name that clients call it, and its file.

    Raises
    ------
    ParameterError
        If either is empty.
    """
    name, equals, path = str(argument).partition("=")
    # A path may hold "=" behind a folder; a name has no "/".
    if equals and "/" not in name and not isinstance(argument, Path):
        if not name or not path:
            raise ParameterError(f"Got --pack {argument}, but expected NAME=PATH or PATH.")
        return name, Path(path)
    return Path(argument).stem, Path(argument)
