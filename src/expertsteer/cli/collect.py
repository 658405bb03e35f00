"""expertsteer collect."""

from typing import Annotated

import typer

from expertsteer.cli import method, options
from expertsteer.cli.config import write_config
from expertsteer.cli.show import print_json, say
from expertsteer.processes import is_main_process

__all__ = ["collect"]


def collect(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="The model to read.")],
    output: options.OutputFolder,
    data: options.OptionalDataFile = None,
    text: options.TextFile = None,
    n_beginnings: options.NumberOfBeginnings = 1500,
    kind: options.Kind = options.KindName.auto,
    columns: options.ColumnOption = None,
    roles: options.RoleOption = None,
    positive: options.PositiveLabel = None,
    negative: options.NegativeLabel = None,
    limit: options.Limit = None,
    chat_template: options.ChatTemplate = False,
    position: method.TokenPosition = method.PositionName.last,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch.", min=1)] = 2048,
    dtype: options.Dtype = options.DtypeName.auto,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    attn_implementation: options.AttnImplementation = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    config: options.ConfigFile = None,
) -> None:
    """Collect a model's states on a file, so that fit can run again in seconds.

    Example: expertsteer collect -m gemma-3-270m -d sentiment.jsonl -o states/gemma

    Of a labelled file, the train and validation splits are read. An interrupted collection
    continues when the same command is run again.
    """
    from expertsteer.errors import ParameterError
    from expertsteer.models import load_model
    from expertsteer.pipeline import render_corpus
    from expertsteer.states import save_states

    if (data is None) == (text is None):
        raise ParameterError("Got both or neither of --data and --text, but expected one of them.")
    corpus = (
        options.beginnings(text, n_beginnings, seed)
        if data is None
        else options.load_data(
            data,
            kind=kind,
            columns=columns,
            roles=roles,
            positive=positive,
            negative=negative,
            limit=limit,
            seed=seed,
        ).for_fitting()
    )
    loading = options.Loading(dtype, device, device_map, attn_implementation, trust_remote_code)
    loaded = load_model(loading.source(model, revision))
    found = save_states(
        loaded,
        render_corpus(corpus, loaded, chat_template),
        output,
        position=position.value,
        batch_tokens=batch_tokens,
    )
    if not is_main_process():
        return
    write_config(context, output / "collect")
    if as_json:
        print_json(found.to_dict() | {"path": str(output)})
    else:
        shape = f"{found.n_texts} texts x {len(found.layers)} layers x {found.model.width}"
        say(f"states of {shape} written to {output}")
