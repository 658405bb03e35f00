"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertsteer.cli.config import read_config
from expertsteer.errors import ParameterError

if TYPE_CHECKING:
    from expertsteer.alignment import Alignment
    from expertsteer.data import LabelledExamples
    from expertsteer.models import ModelSource
    from expertsteer.pipeline import ModelOrStates

_MODELS = "Models"
_DATA = "Data"
_GENERATIONS = "Generations"

_MODEL_HELP = (
    "a hub id (owner/name), a local folder, a .gguf file, or an embedded name "
    "(smollm2-135m-instruct, gemma-3-270m)."
)

_TARGET = typer.Option(
    "--target", "-t", help=f"The model to steer: {_MODEL_HELP}", rich_help_panel=_MODELS
)
_EXPERT = typer.Option(
    "--expert",
    "-e",
    help=f"The model the vectors come from: {_MODEL_HELP}",
    rich_help_panel=_MODELS,
)
TargetModel = Annotated[str, _TARGET]
OptionalTarget = Annotated[str | None, _TARGET]
ExpertModel = Annotated[str, _EXPERT]
OptionalExpert = Annotated[str | None, _EXPERT]


class DtypeName(str, Enum):
    """Float types a model can be loaded in."""

    auto = "auto"
    fastest = "fastest"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KindName(str, Enum):
    """Kinds of rows, those of `expertsteer.data.KINDS`."""

    auto = "auto"
    multiple_choice = "multiple_choice"
    prompt_answer = "prompt_answer"
    pairs = "pairs"
    labelled = "labelled"
    statement = "statement"
    open_answer = "open_answer"
    true_false = "true_false"


class Positions(str, Enum):
    """Tokens that are steered."""

    all = "all"
    prompt = "prompt"
    generated = "generated"
    last = "last"


Dtype = Annotated[
    DtypeName,
    typer.Option(
        help="Float type of the models; auto is the checkpoint's, fastest is bfloat16 where the "
        "device has instructions for it and float32 elsewhere.",
        rich_help_panel=_MODELS,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device of the models, such as cuda:0.", rich_help_panel=_MODELS)
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread a model over devices: auto, balanced or sequential.",
        rich_help_panel=_MODELS,
    ),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(help="Attention kernel: eager, sdpa, flash_attention_2.", rich_help_panel=_MODELS),
]
TargetRevision = Annotated[
    str | None, typer.Option(help="Hub revision of the target.", rich_help_panel=_MODELS)
]
Revision = Annotated[
    str | None, typer.Option(help="Hub revision of the model.", rich_help_panel=_MODELS)
]
ExpertRevision = Annotated[
    str | None, typer.Option(help="Hub revision of the expert.", rich_help_panel=_MODELS)
]
_LABELLED = typer.Option(
    "--data",
    "-d",
    help="Labelled texts: a .jsonl, .json, .csv or .parquet file, a benchmark such as arc_easy, or "
    "a hub data set. Columns text and label; positive and negative; question and answer, with or "
    "without choices; prompt, answer and label; or prompt and matches.",
    rich_help_panel=_DATA,
)
DataFile = Annotated[str, _LABELLED]
OptionalDataFile = Annotated[str | None, _LABELLED]
NumberOfBeginnings = Annotated[
    int,
    typer.Option(
        help="Sentence beginnings drawn from the plain text.", min=20, rich_help_panel=_DATA
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Most rows to use, drawn at random.", min=1, rich_help_panel=_DATA),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Plain text to fit the alignment on, or rows with a text; no labels needed. "
        "Sentences are cut at random words.",
        rich_help_panel=_DATA,
    ),
]
DamageTextFile = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Plain text that damage is measured on, or rows with a text: whole sentences of "
        "more than 5 words, one half of them for `calibrate` and the other for `evaluate`. "
        "Default: one that comes along.",
        rich_help_panel=_DATA,
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="FIELD=COLUMN where the file names its columns otherwise, such as label=emotion. "
        "Repeatable.",
        rich_help_panel=_DATA,
    ),
]
Kind = Annotated[
    KindName,
    typer.Option(help="What a row is; auto goes by the columns.", rich_help_panel=_DATA),
]
RoleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--role",
        help="ROLE=SPLIT where another split of the file serves as train, validation or test, such "
        "as test=validation_matched. Repeatable.",
        rich_help_panel=_DATA,
    ),
]
PositiveLabel = Annotated[
    str | None,
    typer.Option("--positive", help="Label value that counts as +1.", rich_help_panel=_DATA),
]
NegativeLabel = Annotated[
    str | None,
    typer.Option(
        "--negative",
        help="Label value that counts as -1; default: every other one.",
        rich_help_panel=_DATA,
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="Neutral prompts to continue in place of --data: one a line, or the "
        "generation_prompts (else prompts) of a file of effect words (.json, .yaml).",
        rich_help_panel=_GENERATIONS,
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="What scores continuations: vader (sentiment), or labelled texts, other than the "
        "pack's, to train a classifier on. Repeatable.",
        rich_help_panel=_GENERATIONS,
    ),
]
JudgeEncoder = Annotated[
    str | None,
    typer.Option(
        help="Sentence encoder of a trained judge: a folder or hub id; default: all-minilm-l6-v2.",
        rich_help_panel=_GENERATIONS,
    ),
]
FluencyModel = Annotated[
    str | None,
    typer.Option(
        help="A third model that measures the perplexity of continuations; default: left out.",
        rich_help_panel=_GENERATIONS,
    ),
]
NumberOfSamples = Annotated[
    int,
    typer.Option(
        "--n-samples", min=1, help="Continuations a prompt.", rich_help_panel=_GENERATIONS
    ),
]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, help="Of continuations; 0 is greedy.", rich_help_panel=_GENERATIONS),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Nucleus of the sampling.", rich_help_panel=_GENERATIONS),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template", help="Put texts into each model's chat template.", rich_help_panel=_DATA
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with any of these options; the command line wins. Every run writes one "
        "beside its output.",
        is_eager=True,
        callback=read_config,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with a model. Only for models you trust.",
        rich_help_panel=_MODELS,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where collected states are kept; default: the user's cache folder."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not keep collected states.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on standard output.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Accept another model of the same depth and width."),
]
PackFiles = Annotated[
    list[Path],
    typer.Option("--pack", "-p", help="Steering pack; several are added. Repeatable."),
]
SteeredPositions = Annotated[
    Positions,
    typer.Option(
        "--positions",
        help="Tokens that are steered: all, the prompt's, the generated ones, or the newest.",
    ),
]


def _check_output(path: Path | None) -> Path | None:
    """Refuse what cannot be written before the work begins, not after it."""
    if path is not None:
        from expertsteer.files import require_writable

        require_writable(path)
    return path


def _check_tensor_file(path: Path) -> Path:
    from expertsteer.tensor_file import tensor_file_path

    _check_output(path)
    _check_output(tensor_file_path(path))
    return path


def _check_rows(path: Path | None) -> Path | None:
    if path is not None and path.suffix == ".yaml":
        raise ParameterError(
            f"Got --output {path}, but expected another name: its configuration goes there. "
            "The rows are JSON; name a .json file."
        )
    return _check_output(path)


def _check_folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ParameterError(f"Got --output {path}, which is a file, but expected a folder.")
    _check_output(path / "states.json")
    return path


def _check_picture(path: Path | None) -> Path | None:
    if path is not None:
        from expertsteer.plots import picture_kind

        picture_kind(path)
    return _check_output(path)


OutputFile = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="The file to write (.safetensors).", callback=_check_tensor_file
    ),
]
OptionalOutputFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write the rows as JSON.", callback=_check_rows),
]
OutputFolder = Annotated[
    Path, typer.Option("--output", "-o", help="The folder to write.", callback=_check_folder)
]
PlotFile = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Write a picture of the mutual information table (.png, .svg).",
        callback=_check_picture,
    ),
]
RowsPlotFile = Annotated[
    Path | None,
    typer.Option(
        "--plot", help="Also draw the rows (.png, .svg or .pdf).", callback=_check_picture
    ),
]


@dataclass(frozen=True)
class Loading:
    """How a command's models are loaded."""

    dtype: DtypeName
    device: str | None
    device_map: str | None
    attn_implementation: str | None
    trust_remote_code: bool

    def source(self, name: str, revision: str | None = None) -> ModelSource:
        """Return where a model of this name comes from."""
        from expertsteer.models import ModelSource

        return ModelSource(
            name,
            dtype=self.dtype.value,
            device=self.device,
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
            revision=revision,
            trust_remote_code=self.trust_remote_code,
        )

    def model_or_states(
        self,
        role: str,
        name: str | None,
        revision: str | None,
        states: Path | None,
        alignment: Alignment | None = None,
    ) -> ModelOrStates:
        """Return the model or the saved states that play a role.

        Raises
        ------
        ParameterError
            Unless exactly one of them is named; a target that an alignment stands for
            needs neither.
        """
        from expertsteer.states import States

        if name is None and states is None and alignment is not None:
            return alignment.target.name
        if (name is None) == (states is None):
            raise ParameterError(
                f"Got both or neither of --{role} and --{role}-states, but expected one of them."
            )
        return States.load(states) if states else self.source(str(name), revision)


def named_values(option: str, values: list[str] | None, example: str) -> dict[str, str]:
    """Return NAME=VALUE options as a mapping.

    Raises
    ------
    ParameterError
        On a value without "=" or a name that occurs twice.
    """
    named: dict[str, str] = {}
    for value in values or []:
        name, equals, meant = value.partition("=")
        if not equals or not name or not meant:
            raise ParameterError(f"Got {option} {value}, but expected {example}.")
        if name in named:
            raise ParameterError(f"Got {option} {name}=... twice, but expected it once.")
        named[name] = meant
    return named


def column_names(columns: list[str] | None) -> dict[str, str]:
    """Return FIELD=COLUMN options as a mapping."""
    return named_values("--column", columns, "FIELD=COLUMN, such as label=emotion")


def role_names(roles: list[str] | None) -> dict[str, str]:
    """Return ROLE=SPLIT options as a mapping."""
    return named_values("--role", roles, "ROLE=SPLIT, such as test=validation_matched")


def load_data(
    source: str,
    *,
    kind: KindName,
    columns: list[str] | None,
    roles: list[str] | None,
    positive: str | None,
    negative: str | None,
    limit: int | None,
    seed: int,
) -> LabelledExamples:
    """Return the labelled texts that a command's options describe."""
    from expertsteer.data import load_examples

    return load_examples(
        source,
        kind=kind.value,
        columns=column_names(columns),
        roles=role_names(roles),
        positive=positive,
        negative=negative,
        limit=limit,
        seed=seed,
    )


def beginnings(text: Path | None, n: int, seed: int) -> list[str]:
    """Return beginnings of the sentences of a plain text, or of the one that comes along."""
    from expertsteer.data import load_plain_text, sentence_beginnings

    return sentence_beginnings(load_plain_text(text), n, seed=seed)


def cache_folder(cache_dir: Path | None, no_cache: bool) -> Path | None:
    """Return where states are kept, or None."""
    from expertsteer.models.cache import cache_root

    return None if no_cache else cache_dir or cache_root() / "states"
