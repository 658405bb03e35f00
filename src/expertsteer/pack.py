"""The artifact: steering vectors, what they were made from, and how to use them."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from expertsteer.affine import Affine, encoder_tensors, encoders_from
from expertsteer.errors import PackError, ParameterError
from expertsteer.layer_pair import LayerPair
from expertsteer.models import (
    LanguageModel,
    ModelDescription,
    check_layers,
    describe_model,
    explain_mismatch,
    unwrap,
)
from expertsteer.steering import Steering, check_strength
from expertsteer.tensor_file import (
    PACK_KIND,
    complete_description,
    load_tensor_file,
    save_tensor_file,
)

__all__ = ["DEFAULT_STRENGTH", "SteeringPack"]

# Relative to the mean residual norm, for one layer; several share it.
DEFAULT_STRENGTH = 0.1
_HUB_FILE = "steering_pack.safetensors"


@dataclass(frozen=True)
class SteeringPack:
    """Steering vectors for one target model.

    Attributes
    ----------
    vectors : dict of int to Tensor of shape (width,)
        Unit vectors by 0-based target layer, float32. (Sums and multiples of packs need
        not be unit vectors.)
    mean_residual_norms : dict of int to float
        Mean norm of the target's states at each layer; what a relative strength is
        relative to.
    target : ModelDescription
        The model the vectors fit.
    expert : ModelDescription or None
        The model they come from; None for vectors of the target itself.
    pairs : tuple of LayerPair
        Layers and their measurements.
    strength : float
        Used where no other is given.
    encoders : dict of (int, int) to Affine
        By (expert layer, target layer), where kept.
    provenance : dict
        Settings, data, seeds, versions: JSON types.
    """

    vectors: dict[int, torch.Tensor]
    mean_residual_norms: dict[int, float]
    target: ModelDescription
    expert: ModelDescription | None = None
    pairs: tuple[LayerPair, ...] = ()
    strength: float = DEFAULT_STRENGTH
    encoders: dict[tuple[int, int], Affine] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_layers(self.vectors, self.target.n_layers, self.target.name)
        if set(self.mean_residual_norms) != set(self.vectors):
            raise PackError("Got mean residual norms of other layers than the vectors.")
        for layer, vector in self.vectors.items():
            if tuple(vector.shape) != (self.target.width,):
                raise PackError(
                    f"Got a vector of shape {tuple(vector.shape)} for layer {layer}, but expected "
                    f"({self.target.width},)."
                )
            if not bool(torch.isfinite(vector).all()):
                raise PackError(f"Got a vector with NaN or infinity for layer {layer}.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Target layers, ascending."""
        return tuple(sorted(self.vectors))

    def at_default_strength(self) -> Self:
        """Return a pack that proposes the default strength, in equal shares for its layers.

        Notes
        -----
        Source: this project. Three layers at a third of the strength do about the damage of
        one layer.
        """
        share = round(DEFAULT_STRENGTH / len(self.vectors), 3)
        return dataclasses.replace(self, strength=share)

    def summary(self) -> dict[str, Any]:
        """Return all but the vectors as plain JSON types."""
        return {
            "layers": list(self.layers),
            "mean_residual_norms": {str(j): self.mean_residual_norms[j] for j in self.layers},
            "target": self.target.to_dict(),
            "expert": self.expert.to_dict() if self.expert else None,
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "strength": self.strength,
            "encoders": [list(pair) for pair in self.encoders],
            "provenance": self.provenance,
        }

    # Use -----------------------------------------------------------------------------

    def apply(
        self,
        model: Any,
        strength: float | None = None,
        positions: str = "all",
        *,
        relative: bool = True,
        force: bool = False,
    ) -> Steering:
        """Return a context manager under which a model runs steered.

        Parameters
        ----------
        model : PreTrainedModel or LanguageModel
            The target.
        strength : float, optional
            Length of what is added at each layer; default: the pack's own. Negative
            steers away from the behaviour.
        positions : {"all", "prompt", "generated", "last"}, default="all"
            Which tokens are steered, see `Steering`.
        relative : bool, default=True
            Whether strength is in units of the layer's mean residual norm, or absolute.
        force : bool, default=False
            Accept another model of the same depth and width, such as a fine-tune.

        Returns
        -------
        Steering
            Usable with ``with``, or by its ``attach`` and ``detach``.

        Raises
        ------
        PackError
            If the pack was made for another model.
        ParameterError
            On a strength that is zero or not finite, or unknown positions.

        Examples
        --------
        ``with pack.apply(model, strength=0.1): model.generate(...)``
        """
        self.check_target(model, force=force)
        inner = model.model if isinstance(model, LanguageModel) else model
        return Steering(inner, self.scaled_vectors(strength, relative=relative), positions)

    def resolve_strength(self, strength: float | None = None) -> float:
        """Return a strength to steer with, by default the pack's own.

        Raises
        ------
        ParameterError
            On a strength that is zero or not finite, and where none is named for a pack that
            calibration has given strength 0.
        """
        if strength is None and self.strength == 0:
            raise ParameterError(
                "Got a pack of strength 0: calibration found nothing that beats the unsteered "
                "model. Name a strength to steer all the same."
            )
        return check_strength(self.strength if strength is None else strength)

    def scaled_vectors(
        self, strength: float | None = None, *, relative: bool = True
    ) -> dict[int, torch.Tensor]:
        """Return what steering adds to the residual stream, by 0-based layer.

        Parameters
        ----------
        strength, relative
            As in `apply`.

        Returns
        -------
        dict of int to Tensor of shape (width,)
            The vectors times the strength, and times the mean residual norm where the
            strength is relative; float32.

        Raises
        ------
        ParameterError
            On a strength that is zero or not finite.
        """
        value = self.resolve_strength(strength)
        scale = self.mean_residual_norms if relative else dict.fromkeys(self.vectors, 1.0)
        return {layer: v * (value * scale[layer]) for layer, v in self.vectors.items()}

    def check_target(self, model: Any, *, force: bool = False) -> None:
        """Raise unless a model is the one this pack was made for.

        Parameters
        ----------
        model : PreTrainedModel, LanguageModel or ModelDescription
        force : bool, default=False
            Compare depth and width only.

        Raises
        ------
        PackError
            Saying what differs.
        """
        if isinstance(model, ModelDescription):
            found = model
        elif isinstance(model, LanguageModel):
            found = model.description
        else:
            found = describe_model(unwrap(model))
        difference = explain_mismatch(self.target, found, shape_only=force)
        if difference:
            shape_differs = explain_mismatch(self.target, found, shape_only=True)
            advice = (
                "A pack fits only models of its own depth and width."
                if shape_differs
                else "If it is a fine-tune of the same shape, pass force=True (--force)."
            )
            raise PackError(
                f"Got the model {found.name!r}, but this pack is for {self.target.name!r}: "
                f"{difference}. {advice}"
            )

    # Composition ---------------------------------------------------------------------

    def scale(self, factor: float) -> Self:
        """Return a pack whose vectors are ``factor`` times as long."""
        if not math.isfinite(factor):
            raise ParameterError(f"Got factor={factor}, but expected a finite number.")
        return dataclasses.replace(
            self, vectors={layer: factor * v for layer, v in self.vectors.items()}
        )

    def __mul__(self, factor: float) -> Self:
        return self.scale(factor)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self.scale(-1.0)

    def __add__(self, other: SteeringPack) -> SteeringPack:
        """Return a pack that adds what both add at their own strengths, at every layer of either.

        Its strength is the first one's, and another strength scales both in proportion.

        Raises
        ------
        PackError
            If the packs are for different models.
        ParameterError
            If one of them has strength 0.
        """
        difference = explain_mismatch(self.target, other.target)
        if difference:
            raise PackError(
                f"Got packs for {self.target.name!r} and {other.target.name!r}, but only packs for "
                f"one model add up: {difference}."
            )
        own = self.resolve_strength()
        norms = other.mean_residual_norms | self.mean_residual_norms
        vectors = {}
        for layer in sorted(norms):
            # Lengths are relative to each pack's own norm and strength; bring both to the sum's.
            vectors[layer] = torch.zeros(self.target.width)
            for pack in (self, other):
                if layer in pack.vectors:
                    share = pack.mean_residual_norms[layer] / norms[layer]
                    share *= pack.resolve_strength() / own
                    vectors[layer] = vectors[layer] + share * pack.vectors[layer]
        return dataclasses.replace(
            self,
            vectors=vectors,
            mean_residual_norms=norms,
            expert=self.expert if self.expert == other.expert else None,
            pairs=self.pairs + other.pairs,
            encoders={},
            provenance={"sum_of": [self.provenance, other.provenance]},
        )

    def __sub__(self, other: SteeringPack) -> SteeringPack:
        return self + (-other)

    def restrict(self, layers: Iterable[int]) -> Self:
        """Return a pack with only some of its layers."""
        wanted = list(layers)
        missing = sorted(set(wanted) - set(self.vectors))
        if missing or not wanted:
            raise ParameterError(
                f"Got layers {wanted}, but this pack steers the layers "
                f"{', '.join(map(str, self.layers))}."
            )
        return dataclasses.replace(
            self,
            vectors={layer: self.vectors[layer] for layer in sorted(wanted)},
            mean_residual_norms={layer: self.mean_residual_norms[layer] for layer in wanted},
            pairs=tuple(pair for pair in self.pairs if pair.target_layer in wanted),
            encoders={pair: e for pair, e in self.encoders.items() if pair[1] in wanted},
        )

    # Files ---------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the pack as one safetensors file, whole or not at all.

        Parameters
        ----------
        path : str or Path
            ``.safetensors`` is appended where missing.

        Returns
        -------
        Path
            The file written.
        """
        tensors = {
            "vectors": torch.stack([self.vectors[layer].float() for layer in self.layers]),
            **encoder_tensors(self.encoders),
        }
        return save_tensor_file(path, PACK_KIND, tensors, self.summary())

    @classmethod
    def load(cls, path: str | Path, model: Any = None, *, force: bool = False) -> Self:
        """Read a pack, and check it against a model where one is given.

        Parameters
        ----------
        path : str or Path
        model : PreTrainedModel or LanguageModel, optional
        force : bool, default=False
            See `check_target`.

        Returns
        -------
        SteeringPack

        Raises
        ------
        PackError
            If the file is missing, damaged, altered, no pack, or for another model.
        """
        tensors, fields = load_tensor_file(path, PACK_KIND)
        with complete_description(path):
            layers = fields["layers"]
            pack = cls(
                vectors=dict(zip(layers, tensors.pop("vectors"), strict=True)),
                mean_residual_norms={
                    int(layer): norm for layer, norm in fields["mean_residual_norms"].items()
                },
                target=ModelDescription(**fields["target"]),
                expert=ModelDescription(**fields["expert"]) if fields["expert"] else None,
                pairs=tuple(LayerPair(**pair) for pair in fields["pairs"]),
                strength=fields["strength"],
                encoders=encoders_from(tensors),
                provenance=fields["provenance"],
            )
        if model is not None:
            pack.check_target(model, force=force)
        return pack

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluations: Sequence[str | Path] = (),
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload steering pack",
    ) -> str:
        """Upload the pack and a card to the Hugging Face hub.

        Parameters
        ----------
        repo_id : str
            "owner/name"; made if missing.
        evaluations : sequence of str or Path
            Folders that ``expertsteer evaluate`` has written for this pack; their tables
            go on the card.
        private, token, commit_message
            Passed to huggingface_hub.

        Returns
        -------
        str
            Address of the commit.

        Raises
        ------
        PackError
            If an evaluation is unreadable or of another pack, before anything is uploaded.
        """
        from huggingface_hub import HfApi

        from expertsteer.card import pack_card, read_evaluation

        card = pack_card(self, repo_id, [read_evaluation(folder, self) for folder in evaluations])
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / _HUB_FILE)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message
            )
        return str(commit.commit_url)

    @classmethod
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Download a pack from the Hugging Face hub.

        Parameters
        ----------
        repo_id : str
            "owner/name".
        revision : str, optional
            Branch, tag or commit; name a commit to be sure of what you get. The commit it
            stood for is kept in the pack's provenance, under "hub".
        token : str, optional

        Returns
        -------
        SteeringPack

        Raises
        ------
        PackError
            If it cannot be had.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            path = hf_hub_download(repo_id, _HUB_FILE, revision=revision, token=token)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())
            raise PackError(f"Cannot get a steering pack from {repo_id!r}: {reason}") from error
        # The hub's cache keeps every file in a folder named after its commit, and finds it
        # again without the network.
        commit = Path(path).parent.name
        pack = cls.load(path)
        source = {"repo_id": repo_id, "revision": revision, "commit": commit}
        return dataclasses.replace(pack, provenance=pack.provenance | {"hub": source})
