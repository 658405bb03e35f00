"""expertsteer evaluate."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from expertsteer.cli import options
from expertsteer.cli.config import set_options, write_config
from expertsteer.cli.show import answer, evaluation_tables, print_json, say
from expertsteer.errors import ParameterError
from expertsteer.processes import is_main_process

__all__ = ["evaluate"]


class SplitName(str, Enum):
    """Splits that can be evaluated."""

    test = "test"
    validation = "validation"
    train = "train"


_GENERATIONS = ("--prompts",)
_ROWS = ("--data", "--prompts")
# Options that not every source has a use for, and the sources that have.
_SERVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("kind", "columns", "roles", "max_new_tokens", "seed"), _ROWS),
    **dict.fromkeys(("split", "letters"), ("--data",)),
    "n_shots": ("--data", "--lm-eval"),
    "include_path": ("--lm-eval",),
    **dict.fromkeys(("judges", "judge_encoder", "fluency_model"), _GENERATIONS),
    **dict.fromkeys(("n_samples", "temperature", "top_p"), _GENERATIONS),
    **dict.fromkeys(("positive", "negative"), _GENERATIONS),
}


def _refuse_others(source: str, context: typer.Context) -> None:
    """Raise for options that are set and mean nothing beside a source."""
    for name, sources in _SERVES.items():
        for option in set_options(context, (name,) if source not in sources else ()):
            raise ParameterError(
                f"Got {option} with {source}, but expected it with {' or '.join(sources)} alone. "
                "Leave it out."
            )


def evaluate(
    context: typer.Context,
    target: options.TargetModel,
    data: options.OptionalDataFile = None,
    prompts: options.PromptFile = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval",
            metavar="TASK",
            help="In place of --data: a task, a group or a pattern of the lm-evaluation-harness. "
            "Repeatable.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="With --lm-eval: a folder of task files of your own."),
    ] = None,
    output: options.OutputFolder = Path("evaluation"),
    pack: Annotated[
        Path | None, typer.Option("--pack", "-p", help="A pack; default: the target as it is.")
    ] = None,
    strengths: Annotated[
        list[float] | None,
        typer.Option("--strength", "-s", help="Repeatable; default: the pack's own."),
    ] = None,
    positions: options.SteeredPositions = options.Positions.all,
    split: Annotated[
        SplitName, typer.Option(help="Figures come from test, choices from validation.")
    ] = SplitName.test,
    letters: Annotated[
        bool, typer.Option("--letters", help="Also ask for the letter of the answer.")
    ] = False,
    n_shots: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Solved questions before each one, for open answers (default: 0) and --lm-eval "
            "(default: the task's own).",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length; default: 256 for open answers, 40 for continuations of --prompts."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Open answers or continuations at once.")
    ] = 8,
    judges: options.Judges = None,
    judge_encoder: options.JudgeEncoder = None,
    fluency_model: options.FluencyModel = None,
    n_samples: options.NumberOfSamples = 1,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    text: options.DamageTextFile = None,
    n_plain: Annotated[
        int,
        typer.Option(
            min=0,
            help="Plain texts for perplexity and divergence, none that `calibrate` reads; 0 "
            "leaves them out.",
        ),
    ] = 100,
    kind: options.Kind = options.KindName.auto,
    columns: options.ColumnOption = None,
    positive: options.PositiveLabel = None,
    negative: options.NegativeLabel = None,
    roles: options.RoleOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most questions: of --data, drawn at random; of each task of --lm-eval, the "
            "first ones.",
        ),
    ] = None,
    chat_template: options.ChatTemplate = False,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    target_revision: options.TargetRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Evaluate a target on questions or generations, unsteered and steered, and the damage.

    Example: expertsteer evaluate -t gemma-3-270m -d arc_easy -p science.safetensors
    -s 0.05 -s 0.1 -o arc

    Multiple choice and yes/no questions are scored by log-likelihood as lm-eval does; questions
    without choices are answered by greedy generation and matched as numbers or text. With --prompts
    texts are continued and scored by judges that know nothing of the pack, with --lm-eval the
    harness itself asks the questions of its tasks. The folder gets a row an item;
    the same command continues an interrupted run.
    """
    from expertsteer.data import load_plain_text, split_sentences
    from expertsteer.evaluation import evaluate as evaluate_target
    from expertsteer.evaluation import evaluate_harness_tasks, load_generations, load_task
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack

    asked = {"--data": data, "--prompts": prompts, "--lm-eval": lm_eval}
    named_sources = [name for name, value in asked.items() if value]
    if len(named_sources) != 1:
        raise ParameterError(
            f"Got {' and '.join(named_sources) or 'none'} of --data, --prompts and --lm-eval, but "
            "expected one of them."
        )
    _refuse_others(named_sources[0], context)
    if pack is None:
        for option in set_options(context, ("strengths", "positions", "force")):
            raise ParameterError(f"Got {option} without a pack, but expected one to steer with.")
    known = SteeringPack.load(pack) if pack else None
    wanted = [known.resolve_strength(value) for value in strengths or [None]] if known else []
    named, serving = options.column_names(columns), options.role_names(roles)
    # Not what `calibrate` sets strengths by.
    plain = split_sentences(load_plain_text(text), n_plain)[1] if n_plain else []
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    model = load_model(loading.source(target, target_revision))
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "chat_template": chat_template,
        "limit": limit,
    }
    steered: dict[str, Any] = {
        "pack": known,
        "strengths": wanted,
        "positions": positions.value,
        "plain_text": plain,
        "force": force,
    }
    if lm_eval:
        result = evaluate_harness_tasks(
            model,
            lm_eval,
            output,
            n_shots=n_shots,
            include_path=include_path,
            **common,
            **steered,
        )
    else:
        common |= {"kind": kind.value, "columns": named, "roles": serving, "seed": seed}
        if max_new_tokens:
            common["max_new_tokens"] = max_new_tokens
        if prompts:
            task = load_generations(
                prompts,
                model,
                judges=judges or (),
                positive=positive,
                negative=negative,
                encoder=judge_encoder,
                fluency=loading.source(fluency_model) if fluency_model else None,
                n_samples=n_samples,
                temperature=temperature,
                top_p=top_p,
                **common,
            )
        else:
            task = load_task(
                str(data),
                model,
                split=split.value,
                letters=letters,
                n_shots=n_shots or 0,
                **common,
            )
        result = evaluate_target(model, task, output, **steered)
    if not is_main_process():
        return
    write_config(context, output / "evaluate")
    if as_json:
        print_json(result.to_dict())
    else:
        answer.print(evaluation_tables(result))
        say(f"rows and summary: {output}")
