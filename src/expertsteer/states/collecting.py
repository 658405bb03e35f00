"""Read the residual stream of every wanted block in one pass over the texts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch
from tqdm.auto import tqdm

from expertsteer.data import RenderedText
from expertsteer.errors import DataError, ExpertSteerError
from expertsteer.models import LanguageModel, check_layers
from expertsteer.states.positions import TokenSpan, locate_tokens
from expertsteer.states.reading import BlockReader, prompt_groups
from expertsteer.states.saved import ShardedRows
from expertsteer.states.states import States, StatesDescription

__all__ = ["collect_states", "corpus_fingerprint", "states_key"]


def collect_states(
    model: LanguageModel,
    texts: Sequence[RenderedText | str],
    *,
    layers: Iterable[int] | None = None,
    position: str = "last",
    batch_tokens: int = 2048,
    save_to: Path | None = None,
    progress: bool = True,
) -> States:
    """Collect the states of a model at one position of every text.

    One forward pass over the texts serves all layers. It stops behind the last wanted
    block, so neither later blocks nor the output head are computed, and only the
    wanted positions leave it. Texts of similar length share a batch; a text that
    occurs twice is computed once, and so is a prompt that several answers share.

    Parameters
    ----------
    model : LanguageModel
        The model to read.
    texts : sequence of RenderedText or str
        The texts; a plain string is a text without a prompt.
    layers : iterable of int, optional
        0-based blocks; default: all.
    position : {"last", "answer_mean", "prompt_last"}, default="last"
        Where in each text to read, see `locate_tokens`.
    batch_tokens : int, default=2048
        Most tokens of a batch, padding included.
    save_to : Path, optional
        A folder where the states are kept. An interrupted collection continues there,
        and a finished one is only read.
    progress : bool, default=True
        Show a progress bar when it takes over a second.

    Returns
    -------
    States
        ``values`` of shape (n, layers, width): the blocks' outputs on the residual
        stream, before any final norm, in the model's float type ("answer_mean":
        float32).

    Raises
    ------
    DataError
        If there is no text, or a state is not finite.
    ExpertSteerError
        If memory or disk will not hold the states.
    StatesError
        If ``save_to`` holds states of something else.
    """
    if not texts:
        raise DataError("Got no texts to collect states from, but expected at least one.")
    rendered = [RenderedText(t, 0, False) if isinstance(t, str) else t for t in texts]
    chosen = check_layers(layers, len(model.blocks), model.name)
    spans, n_cut = locate_tokens(model, rendered, position)
    if n_cut:
        warnings.warn(
            f"{n_cut} of {len(texts)} texts are longer than the {model.context_length} tokens of "
            f"{model.name}; their beginnings were cut.",
            stacklevel=2,
        )
    dtype = torch.float32 if position == "answer_mean" else model.model.dtype
    description = StatesDescription(
        model=model.description,
        texts=_fingerprint(f"{text.answer_start}:{text.text}" for text in rendered),
        corpus=corpus_fingerprint(rendered),
        n_texts=len(spans),
        layers=chosen,
        position=position,
        dtype=str(dtype).removeprefix("torch."),
    )
    shape = (len(spans), len(chosen), model.description.width)
    _require_memory(shape, dtype)
    values = torch.empty(shape, dtype=dtype)

    rows_of: dict[TokenSpan, list[int]] = {}
    for row, span in enumerate(spans):
        rows_of.setdefault(span, []).append(row)
    saved = ShardedRows(save_to, description, values) if save_to else None
    done = saved.rows if saved else set()
    todo = [span for span, rows in rows_of.items() if not done.issuperset(rows)]

    bar = tqdm(
        total=sum(len(span.ids) for span in todo),
        desc=f"states of {Path(model.name).name}",
        unit="tok",
        unit_scale=True,
        delay=1,
        disable=not progress,
    )
    groups = prompt_groups(model, rendered, spans, set(todo))
    with bar, saved or contextlib.nullcontext(), BlockReader(model, chosen) as reader:
        for states, batch in reader.read(todo, groups, batch_tokens) if todo else ():
            states = states.to("cpu", dtype)
            # Before they are saved: a later run would take them for good ones.
            _require_finite(states, chosen, model.name)
            for span, state in zip(batch, states, strict=True):
                values[rows_of[span]] = state
            if saved:
                saved.add([row for span in batch for row in rows_of[span]])
            bar.update(sum(len(span.ids) for span in batch))
    return States(values, description)


def states_key(model: LanguageModel, texts: Sequence[RenderedText], position: str) -> str:
    """Return a folder name for the states of these texts, for a cache of many."""
    identity = json.dumps(
        [model.description.to_dict(), str(model.model.dtype), position, [list(t) for t in texts]]
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def corpus_fingerprint(texts: Sequence[RenderedText]) -> str:
    """Return a fingerprint of texts before any chat template; 16 hexadecimal digits."""
    return _fingerprint(text.text if text.content is None else text.content for text in texts)


def _fingerprint(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\0".encode())
    return digest.hexdigest()[:16]


def _require_memory(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    wanted = shape[0] * shape[1] * shape[2] * dtype.itemsize
    available = psutil.virtual_memory().available
    if wanted > available:
        raise ExpertSteerError(
            f"Got {available / 1e9:.1f} GB of free memory, but expected {wanted / 1e9:.1f} GB for "
            f"the states of {shape[0]} texts at {shape[1]} layers of width {shape[2]}. "
            "Name fewer layers or texts."
        )


def _require_finite(states: torch.Tensor, layers: tuple[int, ...], name: str) -> None:
    finite = torch.isfinite(states).all(dim=2).all(dim=0)
    if not bool(finite.all()):
        bad = [layer for layer, good in zip(layers, finite.tolist(), strict=True) if not good]
        raise DataError(
            f"Got NaN or infinite states from {name} at layer {bad[0]}"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}, but expected finite ones. "
            "Load the model in float32 or bfloat16."
        )
