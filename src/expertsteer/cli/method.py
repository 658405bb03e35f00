"""The method's settings as command-line options."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertsteer.errors import ParameterError

if TYPE_CHECKING:
    from expertsteer.alignment import Aligner
    from expertsteer.pipeline import ExpertSteer

_METHOD = "Method"


class AlignerName(str, Enum):
    """Alignments by name, see `expertsteer.alignment.ALIGNERS`."""

    aligned = "aligned"
    reconstruction = "reconstruction"
    ridge = "ridge"
    procrustes = "procrustes"
    cca = "cca"


class EstimatorName(str, Enum):
    """Estimators of mutual information by name."""

    gaussian = "gaussian"
    ksg = "ksg"
    kernel = "kernel"


class StrategyName(str, Enum):
    """Ways to choose layer pairs by name."""

    validated = "validated"
    lowest_mi = "lowest_mi"
    highest_mi = "highest_mi"
    same_depth = "same_depth"
    explicit = "explicit"


class DirectionName(str, Enum):
    """Direction finders by name, see `expertsteer.directions.DIRECTIONS`."""

    rfm = "rfm"
    mean_difference = "mean_difference"
    pca = "pca"
    probe = "probe"


class PositionName(str, Enum):
    """Token positions states are read from."""

    last = "last"
    answer_mean = "answer_mean"
    prompt_last = "prompt_last"


AlignerChoice = Annotated[
    AlignerName,
    typer.Option(
        help="Step 1. reconstruction is the paper's auto-encoder; aligned adds paired states.",
        rich_help_panel=_METHOD,
    ),
]
AlignerOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--aligner-option",
        help="NAME=VALUE for the alignment, such as weight=3 or solver=gradient. Repeatable.",
        rich_help_panel=_METHOD,
    ),
]
EstimatorChoice = Annotated[
    EstimatorName,
    typer.Option(help="Step 2: estimator of mutual information.", rich_help_panel=_METHOD),
]
Strategy = Annotated[
    StrategyName,
    typer.Option(
        help="Step 2: how layer pairs are chosen. lowest_mi is the paper's.",
        rich_help_panel=_METHOD,
    ),
]
NumberOfPairs = Annotated[
    int, typer.Option(help="Step 2: how many layer pairs.", min=1, rich_help_panel=_METHOD)
]
LayerPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pair",
        help="EXPERT:TARGET layers, such as 18:9, with --strategy explicit. Repeatable.",
        rich_help_panel=_METHOD,
    ),
]
DirectionChoice = Annotated[
    DirectionName,
    typer.Option(help="Step 3: how directions are found.", rich_help_panel=_METHOD),
]
DirectionOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--direction-option",
        help="NAME=VALUE for the direction finder, such as n_iterations=8. Repeatable.",
        rich_help_panel=_METHOD,
    ),
]
Bandwidths = Annotated[
    list[float] | None,
    typer.Option(
        "--bandwidth",
        help="Step 3: RFM bandwidth to try; the best by validation AUC is kept. Repeatable.",
        rich_help_panel=_METHOD,
    ),
]
TokenPosition = Annotated[
    PositionName,
    typer.Option(
        "--position", help="Token whose state is read from each text.", rich_help_panel=_METHOD
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        help="Step 4: strength the pack proposes for each layer, relative to the mean residual "
        "norm. Default: 0.1, shared by the layers.",
        rich_help_panel=_METHOD,
    ),
]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="The paper's auto-encoder, RFM and choice of layers; of the options here only "
        "--n-pairs, --strength, --position and --seed are used.",
        rich_help_panel=_METHOD,
    ),
]


def build_method(
    *,
    paper: bool,
    aligner: AlignerName,
    aligner_options: list[str] | None,
    estimator: EstimatorName,
    strategy: StrategyName,
    n_pairs: int,
    pairs: list[str] | None,
    direction: DirectionName,
    direction_options: list[str] | None,
    bandwidths: list[float] | None,
    strength: float | None,
    position: PositionName,
    chat_template: bool,
    keep_encoders: bool,
    seed: int,
) -> ExpertSteer:
    """Return the method that a command's options describe."""
    from expertsteer.directions import BANDWIDTHS, DIRECTIONS
    from expertsteer.pipeline import ExpertSteer

    common: dict[str, Any] = {
        "strength": strength,
        "position": position.value,
        "chat_template": chat_template,
        "keep_encoders": keep_encoders,
    }
    if paper:
        return replace(ExpertSteer.paper(n_pairs=n_pairs, seed=seed), **common)
    return ExpertSteer(
        aligner=build_aligner(aligner, aligner_options, seed),
        estimator=estimator.value,
        strategy=strategy.value,
        n_pairs=n_pairs,
        pairs=parse_pairs(pairs),
        direction=_build(DIRECTIONS[direction.value], direction_options),
        bandwidths=tuple(bandwidths or BANDWIDTHS),
        **common,
    )


def build_aligner(name: AlignerName, options: list[str] | None, seed: int) -> Aligner:
    """Return the alignment of this name with these options."""
    from expertsteer.alignment import ALIGNERS

    kind = ALIGNERS[name.value]
    seeded = {"random_state": seed} if "random_state" in kind().get_params() else {}
    return _build(kind, options, **seeded)


def parse_pairs(pairs: list[str] | None) -> tuple[tuple[int, int], ...] | None:
    """Return layer pairs written as EXPERT:TARGET.

    Raises
    ------
    ParameterError
        On anything else.
    """
    if not pairs:
        return None
    parsed = []
    for pair in pairs:
        parts = pair.split(":")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise ParameterError(f"Got --pair {pair}, but expected EXPERT:TARGET, such as 18:9.")
        parsed.append((int(parts[0]), int(parts[1])))
    return tuple(parsed)


def _build(kind: type[Any], options: list[str] | None, **values: Any) -> Any:
    known = kind().get_params()
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or name not in known:
            raise ParameterError(
                f"Got the option {option!r}, but {kind.__name__} takes NAME=VALUE with "
                f"{', '.join(known) or 'no options'}."
            )
        try:
            values[name] = _parse(value, known[name])
        except (ValueError, KeyError) as error:
            raise ParameterError(
                f"Got the option {option!r}, but expected a value like that of "
                f"{name}={known[name]!r}."
            ) from error
    made = kind(**values)
    made._check_parameters()  # now, not after minutes of collecting states
    return made


def _parse(text: str, default: object) -> object:
    """Read an option's value as the type of its default; None stands for an unset number."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()]
    if default is None and text.lower() == "none":
        return None
    whole = isinstance(default, int) or (default is None and text.isdigit())
    return int(text) if whole else float(text)
