"""States in memory: n texts x layers x width, and where they came from."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expertsteer.errors import DataError, StatesError
from expertsteer.models import ModelDescription, check_layers

__all__ = ["States", "StatesDescription"]


@dataclass(frozen=True)
class StatesDescription:
    """What states were collected from.

    Attributes
    ----------
    model : ModelDescription
        The model.
    texts : str
        Fingerprint of the texts and tokens that the model read, in order.
    corpus : str
        Fingerprint of the texts before any chat template: equal for two models that
        read the same texts.
    n_texts : int
        Number of texts.
    layers : tuple of int
        0-based blocks.
    position : str
        Token position.
    dtype : str
        Float type of the stored values.
    """

    model: ModelDescription
    texts: str
    corpus: str
    n_texts: int
    layers: tuple[int, ...]
    position: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain JSON types."""
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> StatesDescription:
        """Rebuild a description from `to_dict`."""
        return cls(
            **fields
            | {
                "model": ModelDescription(**fields["model"]),
                "layers": tuple(map(operator.index, fields["layers"])),
            }
        )


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class States:
    """States of one model at one position of n texts.

    Attributes
    ----------
    values : Tensor of shape (n, n_layers, width)
        Block outputs on the residual stream.
    description : StatesDescription
        Model, texts, layers and position.
    device : torch.device, default=CPU
        Where `layer` puts what is to be computed with; the values of all layers may be more
        than a GPU has room for.
    """

    values: torch.Tensor
    description: StatesDescription
    device: torch.device = _CPU

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based blocks, in the order of the second axis."""
        return self.description.layers

    def layer(self, layer: int) -> torch.Tensor:
        """Return the states of one block as float32, shape (n, width), on ``device``."""
        model = self.description.model
        check_layers([layer], model.n_layers, model.name)
        if layer not in self.layers:
            raise StatesError(
                f"Got layer {layer}, but these states hold the layers "
                f"{', '.join(map(str, self.layers))}. Collect the states of that layer too."
            )
        return self.values[:, self.layers.index(layer)].to(self.device, torch.float32)

    def require_all_layers(self) -> None:
        """Raise DataError unless these are the states of every layer of their model."""
        model = self.description.model
        if self.layers != tuple(range(model.n_layers)):
            raise DataError(
                f"Got states of {len(self.layers)} of the {model.n_layers} layers of "
                f"{model.name}, but expected all of them. Collect the others too."
            )

    def rows(self, index: torch.Tensor) -> States:
        """Return the states of some of the texts."""
        return States(self.values[index], self.description, self.device)

    def on(self, device: torch.device) -> States:
        """Return the same states with another ``device``."""
        return States(self.values, self.description, device)

    def summary(self) -> dict[str, Any]:
        """Return the description as plain JSON types."""
        return self.description.to_dict()

    def mean_residual_norm(self, layer: int) -> float:
        """Return the mean Euclidean norm of one block's states."""
        return float(self.layer(layer).norm(dim=1).mean())

    @classmethod
    def load(cls, folder: str | Path) -> States:
        """Load finished states from a folder that `collect_states` wrote.

        Raises
        ------
        StatesError
            If the folder holds no states, damaged ones, or an unfinished collection.
        """
        from expertsteer.states.saved import load_states

        return load_states(Path(folder))
