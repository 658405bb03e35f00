"""An alignment of two models as a thing of its own: fitted once, used for every vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from typing_extensions import Self

from expertsteer.affine import Affine, encoder_tensors, encoders_from
from expertsteer.alignment.base import Aligner
from expertsteer.arrays import Array, like
from expertsteer.errors import DataError, PackError, ParameterError
from expertsteer.layer_pair import LayerPair
from expertsteer.models import ModelDescription, explain_mismatch
from expertsteer.pack import SteeringPack
from expertsteer.pairing import mutual_information_table
from expertsteer.provenance import describe_settings, package_versions
from expertsteer.states import States
from expertsteer.tensor_file import (
    ALIGNMENT_KIND,
    complete_description,
    load_tensor_file,
    save_tensor_file,
)

__all__ = ["Alignment", "check_paired", "information_between"]

_DO_WITHOUT = "To do without, name the target_layers (--target-layer). "


@dataclass(frozen=True)
class Alignment:
    """Encoders from an expert's layers to a target's, fitted on paired states.

    It needs no labels, and whatever vector anyone has for the expert can be carried
    into the target with it.

    Attributes
    ----------
    encoders : dict of (int, int) to Affine
        By (expert layer, target layer), from the one's width to the other's.
    pairs : tuple of LayerPair
        The same layers with their measurements.
    mean_residual_norms : dict of int to float
        Of the target's layers, on the texts the alignment was fitted on.
    expert, target : ModelDescription
        The two models.
    mutual_information : Tensor of shape (n_expert_layers, n_target_layers)
        In nats, over the layers whose states were given.
    provenance : dict
        Settings, data, versions: JSON types.
    """

    encoders: dict[tuple[int, int], Affine]
    pairs: tuple[LayerPair, ...]
    mean_residual_norms: dict[int, float]
    expert: ModelDescription
    target: ModelDescription
    mutual_information: torch.Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        expert_states: States,
        target_states: States,
        pairs: Iterable[tuple[int, int]],
        aligner: Aligner,
        *,
        table: torch.Tensor | None = None,
        progress: bool = True,
    ) -> Self:
        """Fit one encoder a pair of layers.

        Parameters
        ----------
        expert_states, target_states : States
            Of the same texts, read at the same position.
        pairs : iterable of (int, int)
            0-based expert and target layers.
        aligner : Aligner
            Which alignment; a fresh copy is fitted for every pair.
        table : Tensor of shape (n_expert_layers, n_target_layers), optional
            Mutual information of all pairs; default: computed with the Gaussian estimator.
        progress : bool, default=True
            Show a progress bar when it takes over a second.

        Returns
        -------
        Alignment

        Raises
        ------
        DataError
            If the states are not of the same texts, or not of all layers, which the table
            of mutual information is made of.
        """
        check_paired(expert_states, target_states)
        for states in (expert_states, target_states):
            states.require_all_layers()
        if table is None:
            table = information_between(expert_states, target_states)
        encoders = {}
        measured = []
        for i, j in tqdm(list(pairs), desc="alignment", delay=1, disable=not progress):
            fitted = aligner.unfitted().fit(expert_states.layer(i), target_states.layer(j))
            encoders[i, j] = fitted.encoder_.to("cpu")
            information = float(table[i, j])
            measured.append(LayerPair(i, j, information, fitted.r2_, fitted.reconstruction_error_))
        targets = {pair.target_layer for pair in measured}
        return cls(
            encoders=encoders,
            pairs=tuple(measured),
            mean_residual_norms={j: target_states.mean_residual_norm(j) for j in targets},
            expert=expert_states.description.model,
            target=target_states.description.model,
            mutual_information=table.float(),
            provenance={
                "aligner": describe_settings(aligner),
                "texts": target_states.description.texts,
                "n_texts": target_states.description.n_texts,
                "position": target_states.description.position,
                "versions": package_versions(),
            },
        )

    def encode(self, expert_layer: int, target_layer: int, states: Array) -> Array:
        """Carry states of an expert layer into a target layer: (n, d_expert) to (n, d_target)."""
        encoder = self._encoder(expert_layer, target_layer)
        return like(encoder(torch.as_tensor(states)), states)

    def encode_direction(
        self, expert_layer: int, target_layer: int, direction: Array
    ) -> torch.Tensor:
        """Carry a direction of an expert layer into a target layer, as a unit vector."""
        encoder = self._encoder(expert_layer, target_layer)
        vector = torch.as_tensor(direction).float()
        if tuple(vector.shape) != (self.expert.width,):
            raise DataError(
                f"Got a vector of shape {tuple(vector.shape)}, but expected "
                f"({self.expert.width},), the width of {self.expert.name!r}."
            )
        if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            raise DataError("Got a vector that is zero or not finite, but expected a direction.")
        carried = encoder.linear(vector)
        return carried / carried.norm()

    def transfer(
        self,
        vector: SteeringPack | Array,
        *,
        expert_layer: int | None = None,
        target_layers: Sequence[int] | None = None,
        force: bool = False,
    ) -> SteeringPack:
        """Carry a steering vector of the expert into the target, without any example.

        Parameters
        ----------
        vector : SteeringPack or array of shape (d_expert,)
            A pack made for the expert, or a plain vector.
        expert_layer : int, optional
            The expert's block a plain vector belongs to; required for one, and only
            allowed there.
        target_layers : sequence of int, optional
            Where to steer; default: every target layer this alignment pairs with the
            expert layers, each of which then needs one.
        force : bool, default=False
            Accept a pack made for another model of the expert's depth and width.

        Returns
        -------
        SteeringPack
            For the target.

        Raises
        ------
        PackError
            If the pack is not for this alignment's expert.
        ParameterError
            If the alignment has no encoder for a layer, or two expert layers would steer the
            same target layer.
        """
        if isinstance(vector, SteeringPack):
            if expert_layer is not None:
                raise ParameterError(
                    f"Got expert_layer={expert_layer} with a pack, which names its own layers."
                )
            difference = explain_mismatch(self.expert, vector.target, shape_only=force)
            if difference:
                raise PackError(
                    f"Got a pack for {vector.target.name!r}, but this alignment starts from "
                    f"{self.expert.name!r}: {difference}."
                )
            sources = dict(vector.vectors)
            provenance: dict[str, Any] = {"transferred": vector.provenance}
            strength = vector.strength
        else:
            if expert_layer is None:
                raise ParameterError(
                    "Got a plain vector without expert_layer, but expected the block of "
                    f"{self.expert.name!r} it belongs to."
                )
            sources = {expert_layer: torch.as_tensor(vector).float()}
            provenance = {"transferred": "a plain vector"}
            strength = None
        chosen = [pair for pair in self.pairs if pair.expert_layer in sources]
        if target_layers is not None:
            chosen = [pair for pair in chosen if pair.target_layer in target_layers]
        self._require_layers(chosen, sources, target_layers)
        vectors: dict[int, torch.Tensor] = {}
        for pair in chosen:
            if pair.target_layer in vectors:
                raise ParameterError(
                    f"Got two expert layers for target layer {pair.target_layer}. "
                    "Restrict the pack or name target_layers."
                )
            source = sources[pair.expert_layer]
            carried = self.encode_direction(pair.expert_layer, pair.target_layer, source)
            # The layers of a pack keep their lengths; a plain vector's is in no known unit.
            length = float(source.norm()) if isinstance(vector, SteeringPack) else 1.0
            vectors[pair.target_layer] = length * carried
        pack = SteeringPack(
            vectors=vectors,
            mean_residual_norms={j: self.mean_residual_norms[j] for j in vectors},
            target=self.target,
            expert=self.expert,
            pairs=tuple(chosen),
            provenance=provenance | {"alignment": self.provenance, "versions": package_versions()},
        )
        if strength is None:
            return pack.at_default_strength()
        return dataclasses.replace(pack, strength=strength)

    def _require_layers(
        self,
        chosen: Sequence[LayerPair],
        sources: Mapping[int, torch.Tensor],
        target_layers: Sequence[int] | None,
    ) -> None:
        """Raise where a layer of the vector, or one to steer, would be left out unsaid."""
        if target_layers is None:
            left_out = sorted(set(sources) - {pair.expert_layer for pair in chosen})
        else:
            left_out = sorted(set(target_layers) - {pair.target_layer for pair in chosen})
        if left_out or not chosen:
            known = ", ".join(f"{p.expert_layer}->{p.target_layer}" for p in self.pairs)
            steered = f" and target_layers={list(target_layers)}" if target_layers else ""
            raise ParameterError(
                f"Got a vector for expert layers {sorted(sources)}{steered}, but this alignment "
                f"pairs only {known}, which leaves out {left_out}. "
                f"{_DO_WITHOUT if chosen and target_layers is None else ''}"
                "Fit an alignment with the layers you need."
            )

    def summary(self) -> dict[str, Any]:
        """Return all but the encoders as plain JSON types."""
        return {
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "mean_residual_norms": {str(j): n for j, n in self.mean_residual_norms.items()},
            "expert": self.expert.to_dict(),
            "target": self.target.to_dict(),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> Path:
        """Write the alignment as one safetensors file, whole or not at all."""
        tensors = {"mutual_information": self.mutual_information, **encoder_tensors(self.encoders)}
        return save_tensor_file(path, ALIGNMENT_KIND, tensors, self.summary())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an alignment.

        Raises
        ------
        PackError
            If the file is missing, damaged, altered or no alignment.
        """
        tensors, fields = load_tensor_file(path, ALIGNMENT_KIND)
        with complete_description(path):
            return cls(
                encoders=encoders_from(tensors),
                pairs=tuple(LayerPair(**pair) for pair in fields["pairs"]),
                mean_residual_norms={
                    int(j): norm for j, norm in fields["mean_residual_norms"].items()
                },
                expert=ModelDescription(**fields["expert"]),
                target=ModelDescription(**fields["target"]),
                mutual_information=tensors["mutual_information"],
                provenance=fields["provenance"],
            )

    def _encoder(self, expert_layer: int, target_layer: int) -> Affine:
        try:
            return self.encoders[expert_layer, target_layer]
        except KeyError:
            known = ", ".join(f"{i}->{j}" for i, j in self.encoders)
            raise ParameterError(
                f"Got layers {expert_layer}->{target_layer}, but this alignment pairs {known}."
            ) from None


def information_between(
    expert_states: States, target_states: States, estimator: str = "gaussian"
) -> torch.Tensor:
    """Return the mutual information of all pairs of layers, see `mutual_information_table`."""
    table = mutual_information_table(
        expert_states.values, target_states.values, estimator, device=expert_states.device
    )
    return torch.as_tensor(table)


def check_paired(expert_states: States, target_states: States) -> None:
    """Raise unless two models' states belong to the same texts, row by row.

    Raises
    ------
    DataError
        Saying what differs.
    """
    expert, target = expert_states.description, target_states.description
    if len(expert_states.values) != len(target_states.values) or expert.corpus != target.corpus:
        raise DataError(
            f"Got expert states of {expert.n_texts} texts ({expert.corpus}) and target states of "
            f"{target.n_texts} ({target.corpus}), but expected the same texts. Collect both from "
            "one file with the same settings."
        )
