"""expertsteer evaluate."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from expertsteer.cli import options
from expertsteer.cli.config import write_config
from expertsteer.cli.show import answer, evaluation_tables, print_json, say

__all__ = ["evaluate"]


class SplitName(str, Enum):
    """Splits that can be evaluated."""

    test = "test"
    validation = "validation"
    train = "train"


# What a task of the harness decides for itself.
_OF_DATA = {
    "kind": options.KindName.auto,
    "roles": [],
    "split": SplitName.test,
    "letters": False,
    "max_new_tokens": 256,
    "columns": [],
    "seed": 0,
}


def evaluate(
    context: typer.Context,
    target: options.TargetModel,
    data: options.OptionalDataFile = None,
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of open answers.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Open answers at once.")] = 8,
    text: options.TextFile = None,
    n_plain: Annotated[
        int,
        typer.Option(min=0, help="Plain texts for perplexity and divergence; 0 leaves them out."),
    ] = 100,
    kind: options.Kind = options.KindName.auto,
    columns: options.ColumnOption = None,
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
    """Evaluate a target on questions, unsteered and steered, and the damage to plain text.

    Example: expertsteer evaluate -t gemma-3-270m -d arc_easy -p science.safetensors
    -s 0.05 -s 0.1 -o arc

    Multiple choice and yes/no questions are scored by log-likelihood as lm-eval does; questions
    without choices are answered by greedy generation and matched as numbers or text. With
    --lm-eval the harness itself asks the questions of its tasks. The folder gets a row an item;
    the same command continues an interrupted run.
    """
    from expertsteer.data import load_plain_text
    from expertsteer.errors import ParameterError
    from expertsteer.evaluation import evaluate as evaluate_target
    from expertsteer.evaluation import evaluate_harness_tasks, load_task
    from expertsteer.models import load_model
    from expertsteer.pack import SteeringPack
    from expertsteer.steering import check_strength

    if (data is None) == (not lm_eval):
        raise ParameterError("Got both or neither of --data and --lm-eval, but expected one.")
    if lm_eval:
        for name, default in _OF_DATA.items():
            if (context.params[name] or default) != default:
                option = {"columns": "column", "roles": "role"}.get(name, name.replace("_", "-"))
                raise ParameterError(
                    f"Got --{option} with --lm-eval, but expected it with --data alone: a task "
                    "of the harness decides that itself. Leave it out."
                )
    elif include_path is not None:
        raise ParameterError(
            f"Got --include-path {include_path} without --lm-eval, but expected them together."
        )
    wanted = [check_strength(value) for value in strengths or []]
    if wanted and pack is None:
        raise ParameterError("Got --strength without a pack, but expected one to steer with.")
    known = SteeringPack.load(pack) if pack else None
    named, serving = options.column_names(columns), options.role_names(roles)
    plain = load_plain_text(text)[:n_plain] if n_plain else []
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    model = load_model(loading.source(target, target_revision))
    if lm_eval:
        result = evaluate_harness_tasks(
            model,
            lm_eval,
            output,
            pack=known,
            strengths=wanted,
            positions=positions.value,
            n_shots=n_shots,
            limit=limit,
            chat_template=chat_template,
            include_path=include_path,
            batch_size=batch_size,
            plain_text=plain,
            force=force,
        )
    else:
        task = load_task(
            str(data),
            model,
            kind=kind.value,
            split=split.value,
            columns=named,
            roles=serving,
            letters=letters,
            n_shots=n_shots or 0,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat_template=chat_template,
            limit=limit,
            seed=seed,
        )
        result = evaluate_target(
            model,
            task,
            output,
            pack=known,
            strengths=wanted,
            positions=positions.value,
            plain_text=plain,
            force=force,
        )
    write_config(context, output / "evaluate")
    if as_json:
        print_json(result.to_dict())
    else:
        answer.print(evaluation_tables(result))
        say(f"rows and summary: {output}")
