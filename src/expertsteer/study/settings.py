"""What a study consists of, read from YAML; a typing error names its field."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from expertsteer.alignment import ALIGNERS
from expertsteer.data.formats import KINDS
from expertsteer.directions import DIRECTIONS
from expertsteer.errors import ParameterError
from expertsteer.files import read_yaml
from expertsteer.methods import METHODS
from expertsteer.models import ModelSource
from expertsteer.pipeline import ExpertSteer

__all__ = [
    "ArmSettings",
    "BenchmarkSettings",
    "ModelSettings",
    "PlainSource",
    "StudySettings",
    "load_study",
]

# Arms that are no vectors: the target as it is, told what to do, or fine-tuned.
_OTHER_ARMS = ("none", "prompt", "lora")
# Methods whose vectors need an expert.
_OF_AN_EXPERT = ("expertsteer_paper", "expertsteer", "transferred")
# What pydantic calls a bound, and how a reader is told of it.
_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "of at least",
    "less_than": "below",
    "less_than_equal": "of at most",
}
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _one_of(known: tuple[str | None, ...]) -> Any:
    def check(value: Any) -> Any:
        if value not in known:
            raise ValueError(f"expected one of {', '.join(name for name in known if name)}")
        return value

    return BeforeValidator(check)


class ModelSettings(_Settings):
    """A model of the study.

    Attributes
    ----------
    model : str
        As in `ModelSource`.
    name : str
        What tables call it; default: the last part of ``model``.
    dtype, device, device_map, revision
        As in `ModelSource`.
    """

    model: str
    name: str = ""
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.name:
            name = Path(self.model).name
            object.__setattr__(self, "name", name.removesuffix(".gguf"))
        return self

    def identity(self) -> list[Any]:
        """Return what tells the model from others: its name, revision and, on disk, weights."""
        path = Path(self.model).expanduser()
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        known = [_ends_of(file) for file in files if file.is_file()]
        return [self.model, self.revision, known]

    @property
    def source(self) -> ModelSource:
        """Where the model comes from and how it is loaded."""
        return ModelSource(
            self.model,
            dtype=self.dtype,
            device=self.device,
            device_map=self.device_map,
            revision=self.revision,
        )


_METRICS = ("acc", "acc_norm", "log_odds", "exact_match", "preference", "judged")


class BenchmarkSettings(_Settings):
    """A data set of the study.

    Attributes
    ----------
    name : str
    data : str
        File, hub data set or the name of a known benchmark; default: ``name``.
    domain : str
        Its group in tables.
    kind, columns, positive, negative
        As in `load_examples`.
    metric : str, optional
        What the table shows; default: acc_norm for multiple choice, exact_match for open
        answers, preference for labelled texts, judged where there is a judge.
    instruction : str
        What the method "prompt" puts before every question.
    words : str, optional
        A file of neutral prompts and telling words (`EffectWords`), or "shipped"; the effect
        is then the change of the words' log-odds. Every second prompt is for validation, the
        others for test.
    judge : str, optional
        With ``words``: what scores the continuations of the test prompts, see `load_judge`.
        Strengths still come from the words.
    open : bool
        Whether test questions are answered in words; vectors and strengths still come
        from right and wrong answers.
    n_shots, max_new_tokens : int
        For open answers; the second for judged continuations too.
    n_train, n_validation, n_test : int, optional
        In place of the study's.
    """

    name: str
    data: str = ""
    domain: str = "general"
    kind: Annotated[str, _one_of(("auto", *KINDS))] = "auto"
    columns: dict[str, str] = {}
    positive: str | None = None
    negative: str | None = None
    metric: Annotated[str | None, _one_of((None, *_METRICS))] = None
    instruction: str = ""
    words: str | None = None
    judge: str | None = None
    open: bool = False
    n_shots: int = 0
    max_new_tokens: int = 128
    n_train: Annotated[int | None, Field(ge=8)] = None
    n_validation: Annotated[int | None, Field(ge=4)] = None
    n_test: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _judged_after_prompts(self) -> Self:
        if self.judge is not None and self.words is None:
            raise ValueError("expected words with judge: their prompts are what is continued")
        return self


class PlainSource(NamedTuple):
    """What beginnings of plain text come from.

    Attributes
    ----------
    file : str or None
        None: the study's ``plain_text``.
    n_sentences : int or None
        How many sentences of it; None: all.
    """

    file: str | None
    n_sentences: int | None


# Fields that a method has a use of, besides its name.
_DRAWN = {"n_train", "label_noise"}
_STEERED = _DRAWN | {"n_pairs", "layer_depth", "position", "positions", "strength_shares"}
_FOUND = {"direction_options"}
_PAIRED = {"expert", "strategy", "pairs", "estimator", "aligner_options"}


def _fields_of(method: str) -> set[str]:
    if method in ("none", "prompt"):
        return set()
    if method == "lora":
        return _DRAWN
    if method not in _OF_AN_EXPERT:
        return _STEERED | (_FOUND if method in ("rfm", "shuffled") else set())
    if method == "expertsteer_paper":
        return _STEERED | _PAIRED
    free = {"aligner", "direction", "plain_text", "n_beginnings", "n_sentences"} | _FOUND
    return _STEERED | _PAIRED | free | ({"alignment_text"} if method == "expertsteer" else set())


class ArmSettings(_Settings):
    """A row of the tables: a method, and where it differs from its defaults.

    Attributes
    ----------
    method : str
        A key of `METHODS`, or "none", "prompt", "lora".
    name : str
        What tables call it; default: ``method``.
    expert : str, optional
        Only this expert, by name; "target" is the target itself. Default: every expert of
        the study.
    aligner : str, optional
        Default: "ridge" for "transferred", as in `fit_alignment`, otherwise "aligned".
    aligner_options, estimator, direction, direction_options, position
        As in `ExpertSteer`.
    strategy : str
        "shared": the target layers that are chosen once for all arms, each with the expert
        layer of the most information; any other as in `ExpertSteer`.
    n_pairs : int
    layer_depth : float, optional
        With "shared", the target layer of this relative depth in place of the chosen one.
    pairs : list of (int, int), optional
    alignment_text : {"examples", "plain", "both"}
        What alignments are fitted on: the labelled texts, the study's plain text, or
        both. "transferred" always takes plain text.
    plain_text : str, optional
        File that alignments on plain text read in place of the study's.
    n_beginnings : int, optional
        How many beginnings of plain text; default: the study's.
    n_sentences : int, optional
        How many sentences they come from; default: as many as there are.
    n_train : int, optional
        Only the first of the train questions.
    label_noise : float
        Share of the train questions with a wrong label.
    positions : str, optional
        Which tokens are steered; default: the study's.
    strength_shares : list of float, optional
        In place of the study's.
    """

    method: Annotated[str, _one_of((*_OTHER_ARMS, *METHODS))]
    name: str = ""
    expert: str | None = None
    aligner: Annotated[str | None, _one_of((None, *ALIGNERS))] = None
    aligner_options: dict[str, Any] = {}
    estimator: Annotated[str, _one_of(("gaussian", "ksg", "kernel"))] = "gaussian"
    strategy: Annotated[
        str,
        _one_of(("shared", "validated", "lowest_mi", "highest_mi", "same_depth", "explicit")),
    ] = "shared"
    n_pairs: Annotated[int, Field(ge=1)] = 1
    layer_depth: _Fraction | None = None
    pairs: tuple[tuple[int, int], ...] | None = None
    direction: Annotated[str, _one_of(tuple(DIRECTIONS))] = "rfm"
    direction_options: dict[str, Any] = {}
    position: Annotated[str, _one_of(("last", "answer_mean", "prompt_last"))] = "last"
    alignment_text: Literal["examples", "plain", "both"] = "examples"
    plain_text: str | None = None
    n_beginnings: Annotated[int | None, Field(ge=20)] = None
    n_sentences: Annotated[int | None, Field(ge=1)] = None
    n_train: Annotated[int | None, Field(ge=4)] = None
    label_noise: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    positions: Annotated[
        str | None,
        _one_of((None, "all", "prompt", "generated", "last")),
    ] = None
    strength_shares: _Shares | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.name:
            object.__setattr__(self, "name", self.method)
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        unused = sorted(changed - {"method", "name"} - _fields_of(self.method))
        if unused:
            raise ValueError(f"got {unused[0]}, which the method {self.method!r} has no use of")
        if (self.strategy == "explicit") != (self.pairs is not None):
            raise ValueError("expected pairs with strategy: explicit, and only there")
        if self.layer_depth is not None and (self.strategy != "shared" or self.n_pairs > 1):
            raise ValueError("expected layer_depth with strategy: shared and one pair only")
        if self.strategy == "validated" and (self.uses_plain_text or self.n_train is not None):
            raise ValueError(
                "expected strategy: validated with an alignment on all of the examples only"
            )
        return self

    @property
    def aligner_name(self) -> str:
        """The alignment that is used."""
        return self.aligner or ("ridge" if self.method == "transferred" else "aligned")

    @property
    def needs_expert(self) -> bool:
        """Whether there is one of this arm for every expert."""
        return self.method in _OF_AN_EXPERT

    @property
    def is_vector(self) -> bool:
        """Whether the arm steers by vectors."""
        return self.method in METHODS

    @property
    def uses_rfm(self) -> bool:
        """Whether the arm's vectors come from recursive feature machines of its settings."""
        return "direction_options" in _fields_of(self.method) and self.direction == "rfm"

    @property
    def uses_strength(self) -> bool:
        """Whether the arm steers."""
        return "strength_shares" in _fields_of(self.method)

    @property
    def uses_plain_text(self) -> bool:
        """Whether an alignment of the arm reads plain text."""
        return self.needs_expert and (
            self.method == "transferred" or self.alignment_text != "examples"
        )

    @property
    def plain_source(self) -> PlainSource:
        """Where beginnings of plain text for the arm come from."""
        return PlainSource(self.plain_text, self.n_sentences)

    def steer(self, seed: int = 0) -> ExpertSteer:
        """Return the method's settings, save for layers that a study chooses otherwise.

        Raises
        ------
        ParameterError
            On an option that the alignment or the direction finder does not have.
        """
        aligner = self._aligner(seed)
        direction = _made(DIRECTIONS[self.direction], self.direction_options)
        if self.method == "expertsteer_paper":
            direction = ExpertSteer.paper().direction
        return ExpertSteer(
            aligner=aligner,
            estimator=self.estimator,
            n_pairs=self.n_pairs,
            direction=direction,
            position=self.position,
        )

    def _aligner(self, seed: int) -> Any:
        if self.method != "expertsteer_paper":
            return _made(ALIGNERS[self.aligner_name], self.aligner_options)
        paper = ExpertSteer.paper(seed=seed).aligner
        return _made(type(paper), paper.get_params() | self.aligner_options)


# Settings of an arm that a picture can have as its x axis; of shares of the strength, the damage
# that they do.
_SWEPT = ("n_train", "label_noise", "n_pairs", "n_beginnings", "layer_depth", "strength_shares")


class StudySettings(_Settings):
    """Targets x experts x benchmarks x methods x seeds.

    Attributes
    ----------
    name : str
    targets, experts : list of ModelSettings
    benchmarks : list of BenchmarkSettings
    methods : list of ArmSettings
    seeds : list of int
        Of what is drawn at random: questions, vectors, noise.
    n_train, n_validation : int
        Questions (or texts) vectors and strengths come from. Where the train split is too
        small, the validation split's others fill it up.
    n_test : int, optional
        Default: the whole test split.
    budget : float
        Most damage on plain text; every vector gets the strongest steering within it, and
        shares of that.
    damage : {"perplexity", "divergence"}
    strength_shares : list of float
        Shares of the strongest steering that the validation split decides between.
    layer_depths : list of float
        Relative depths of the target layers that are tried.
    plain_text : str, optional
        File that damage budgets and alignments read; default: the one that comes along.
    plain_text_test : str, optional
        File that reported damage is measured on; default: the other end of ``plain_text``.
    n_plain : int
        Sentences of each.
    n_beginnings : int
        Beginnings of sentences that alignments on plain text are fitted on.
    positions : str
    instructions : dict of str to str
        By domain, for benchmarks without one of their own.
    sweep : str, optional
        A field of the methods whose values are the x axis of a picture; of
        ``strength_shares``, one a method, the damage that they do.
    reference : str, optional
        A method that tables compare all others with, item by item.
    """

    name: str
    targets: Annotated[tuple[ModelSettings, ...], Field(min_length=1)]
    experts: tuple[ModelSettings, ...] = ()
    benchmarks: Annotated[tuple[BenchmarkSettings, ...], Field(min_length=1)]
    methods: Annotated[tuple[ArmSettings, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    n_train: Annotated[int, Field(ge=8)] = 100
    n_validation: Annotated[int, Field(ge=4)] = 50
    n_test: Annotated[int | None, Field(ge=1)] = None
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.1
    damage: Literal["perplexity", "divergence"] = "perplexity"
    strength_shares: _Shares = (0.5, 1.0)
    layer_depths: Annotated[tuple[_Fraction, ...], Field(min_length=1)] = (0.4, 0.55, 0.7, 0.85)
    plain_text: str | None = None
    plain_text_test: str | None = None
    n_plain: Annotated[int, Field(ge=4)] = 100
    n_beginnings: Annotated[int, Field(ge=20)] = 1500
    positions: Annotated[str, _one_of(("all", "prompt", "generated", "last"))] = "all"
    instructions: dict[str, str] = {}
    sweep: Annotated[
        str | None,
        _one_of((None, *_SWEPT)),
    ] = None
    reference: str | None = None

    @model_validator(mode="after")
    def _fitting_together(self) -> Self:
        for field in ("targets", "experts", "benchmarks", "methods"):
            names = [entry.name for entry in getattr(self, field)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{field}: got {twice[0]!r} twice; give one another name")
        names = [arm.name for arm in self.methods]
        if self.reference not in {None, *names}:
            raise ValueError(
                f"reference: got {self.reference!r}, but expected one of {', '.join(names)}"
            )
        if self.sweep == "strength_shares":
            for arm in self.methods:
                if arm.uses_strength and len(arm.strength_shares or self.strength_shares) > 1:
                    raise ValueError(
                        f"sweep: got strength_shares with several shares for {arm.name!r}; "
                        "give every method one"
                    )
        known = {model.name: model for model in self.experts}
        for model in self.targets:
            if known.get(model.name, model) != model:
                raise ValueError(f"targets and experts: got {model.name!r} with two settings")
        for arm in self.methods:
            if arm.expert is not None and arm.expert not in {"target", *known}:
                raise ValueError(
                    f"methods: got expert {arm.expert!r} of {arm.name!r}, but expected target"
                    f"{''.join(f', {name}' for name in known)}"
                )
            if arm.needs_expert and not self.experts and arm.expert != "target":
                raise ValueError(f"experts: got none, but the method {arm.name!r} needs one")
            if arm.strategy == "shared" and arm.n_pairs > len(self.layer_depths):
                raise ValueError(
                    f"methods: got n_pairs={arm.n_pairs} of {arm.name!r}, but only "
                    f"{len(self.layer_depths)} layer_depths to choose from"
                )
            if arm.n_train is not None and arm.n_train > self.n_train:
                raise ValueError(
                    f"methods: got n_train={arm.n_train} of {arm.name!r}, but the study draws "
                    f"{self.n_train}"
                )
            if arm.method == "prompt":
                for benchmark in self.benchmarks:
                    if not self.instruction(benchmark):
                        raise ValueError(
                            f"instructions: got none for the domain {benchmark.domain!r} of "
                            f"{benchmark.name!r}, but the method {arm.name!r} needs one"
                        )
        if self.damage == "perplexity" and self.budget <= 1:
            raise ValueError(f"budget: got {self.budget}, but expected more than 1")
        return self

    @property
    def undamaged(self) -> float:
        """The damage of no steering: a perplexity ratio of 1, or no divergence."""
        return 1.0 if self.damage == "perplexity" else 0.0

    def instruction(self, benchmark: BenchmarkSettings) -> str:
        """Return what the method "prompt" puts before a benchmark's questions."""
        return benchmark.instruction or self.instructions.get(benchmark.domain, "")


def _ends_of(file: Path, size: int = 1 << 20) -> list[Any]:
    """Return a file's size and a hash of its first and last megabyte: reading all takes long."""
    length = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(size))
        opened.seek(max(length - size, 0))
        digest.update(opened.read(size))
    return [length, digest.hexdigest()[:16]]


def _made(kind: type[Any], options: dict[str, Any]) -> Any:
    known = kind().get_params()
    for name in options:
        if name not in known:
            raise ParameterError(
                f"Got the option {name!r}, but expected of {kind.__name__} "
                f"{', '.join(known) or 'no options'}."
            )
    made = kind(**options)
    made._check_parameters()
    return made


def load_study(path: str | Path) -> StudySettings:
    """Read a study's settings.

    Parameters
    ----------
    path : str or Path
        A YAML file.

    Returns
    -------
    StudySettings

    Raises
    ------
    ParameterError
        Naming the field, what it got and what was expected.
    """
    path = Path(path)
    values = read_yaml(path, "study", "fields")
    try:
        settings = StudySettings.model_validate({"name": path.stem} | values)
        for arm in settings.methods:
            arm.steer()
    except ValidationError as error:
        raise ParameterError(f"{path}: {_explain(error)}") from error
    except (ParameterError, TypeError) as error:
        raise ParameterError(f"{path}: {error}") from error
    return settings


def _explain(error: ValidationError) -> str:
    """Return the first thing that is wrong, with its field and the allowed values."""
    models = {
        "targets": ModelSettings,
        "experts": ModelSettings,
        "benchmarks": BenchmarkSettings,
        "methods": ArmSettings,
    }
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model = models.get(str(first["loc"][0]), StudySettings)
        fields = ", ".join((model if len(first["loc"]) > 1 else StudySettings).model_fields)
        return f"got the unknown field {place}, but expected some of {fields}."
    reason = first["msg"].removeprefix("Value error, ")
    if not place or (first["type"] == "value_error" and len(first["loc"]) == 0):
        return f"{reason}."
    if first["type"] == "missing":
        return f"got no {place}, but expected one."
    # pydantic says "Input should be", our own checks say "expected".
    expected = reason.removeprefix("Input should be ").removeprefix("expected ")
    if first["type"] in _BOUNDS:
        expected = f"a number {_BOUNDS[first['type']]} {next(iter(first.get('ctx', {}).values()))}"
    if first["type"] == "too_short":
        expected = "at least one of them"
    if expected == reason:
        return f"got {place}={first['input']!r}: {reason[0].lower()}{reason[1:]}."
    return f"got {place}={first['input']!r}, but expected {expected}. Change the field."
