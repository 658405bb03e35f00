"""Read the residual stream of every wanted block in one pass over the texts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tqdm.auto import tqdm

from expertsteer.data import RenderedText
from expertsteer.errors import DataError, ExpertSteerError, ParameterError
from expertsteer.locks import locked
from expertsteer.models import LanguageModel, check_layers
from expertsteer.models.cache import require_disk
from expertsteer.processes import is_main_process, n_processes, process_name, share
from expertsteer.states.positions import TokenSpan, locate_tokens
from expertsteer.states.reading import Batch, BlockReader, plan_batches, prompt_groups
from expertsteer.states.saved import SAVED_VERSION, SavedStates, ShardWriter
from expertsteer.states.states import States, StatesDescription

__all__ = ["collect_states", "corpus_fingerprint", "save_states", "states_key"]


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
        A folder where the states are kept, as in `save_states`.
    progress : bool, default=True
        Show a progress bar when it takes over a second.

    Returns
    -------
    States
        ``values`` of shape (n, layers, width): the blocks' outputs on the residual
        stream, before any final norm, in the model's float type ("answer_mean":
        float32). With ``save_to`` they are read when they are first looked at. Of a model on
        one GPU, layers are handed out there, see `States.layer`.

    Raises
    ------
    DataError
        If there is no text, or a state is not finite.
    ParameterError
        If several processes work on it and there is no ``save_to``.
    ExpertSteerError
        If memory or disk will not hold the states.
    StatesError
        If ``save_to`` holds states of something else.
    """
    plan = _plan(model, texts, layers, position, batch_tokens)
    shape, dtype = plan.shape, plan.dtype
    _require_memory(shape, dtype)
    if save_to is not None:
        _save(model, plan, save_to, progress)
        return SavedStates(save_to, plan.description, model.algebra_device)
    if n_processes() > 1:
        raise ParameterError(
            f"Got {n_processes()} processes and no folder for their states, but expected one that "
            "all of them can write. Name one (save_to, --output or --cache-dir), or start one "
            "process."
        )
    values = torch.empty(shape, dtype=dtype)
    for rows, states in _read(model, plan, plan.batches, progress):
        values[rows] = states
    return States(values, plan.description, model.algebra_device)


def save_states(
    model: LanguageModel,
    texts: Sequence[RenderedText | str],
    folder: Path,
    *,
    layers: Iterable[int] | None = None,
    position: str = "last",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> StatesDescription:
    """Collect states into a folder and nowhere else: memory does not grow with the texts.

    Started by ``torchrun`` or ``accelerate launch``, every process reads its share of the
    batches, which are the same for any number of processes, and writes shards of its own.

    Parameters
    ----------
    folder : Path
        Made if missing; with several processes, one that all of them can write. An
        interrupted collection continues there, a finished one is only checked, and while
        another run collects there, this one waits.
    model, texts, layers, position, batch_tokens, progress
        As in `collect_states`.

    Returns
    -------
    StatesDescription
        Of the states, which `States.load` reads.

    Raises
    ------
    DataError, ExpertSteerError, StatesError
        As in `collect_states`.
    """
    plan = _plan(model, texts, layers, position, batch_tokens)
    _save(model, plan, folder, progress)
    return plan.description


@dataclass(frozen=True)
class _Plan:
    """What is to be read, in batches that no interruption and no number of processes changes."""

    description: StatesDescription
    dtype: torch.dtype
    rows_of: dict[TokenSpan, list[int]]
    batches: list[Batch]

    @property
    def shape(self) -> tuple[int, int, int]:
        about = self.description
        return about.n_texts, len(about.layers), about.model.width

    def rows(self, batch: Batch) -> list[int]:
        """Return the rows of the texts of a batch, those of equal texts one after the other."""
        return [row for span in batch.spans for row in self.rows_of[span]]


def _plan(
    model: LanguageModel,
    texts: Sequence[RenderedText | str],
    layers: Iterable[int] | None,
    position: str,
    batch_tokens: int,
) -> _Plan:
    if not texts:
        raise DataError("Got no texts to collect states from, but expected at least one.")
    rendered = [RenderedText(t, 0, False) if isinstance(t, str) else t for t in texts]
    chosen = check_layers(layers, len(model.blocks), model.name)
    spans, n_cut = locate_tokens(model, rendered, position)
    if n_cut:
        warnings.warn(
            f"{n_cut} of {len(texts)} texts are longer than the {model.context_length} tokens of "
            f"{model.name}; their beginnings were cut.",
            stacklevel=3,
        )
    dtype = torch.float32 if position == "answer_mean" else model.model.dtype
    description = StatesDescription(
        model=model.description,
        texts=_read_fingerprint(rendered, spans),
        corpus=corpus_fingerprint(rendered),
        n_texts=len(spans),
        layers=chosen,
        position=position,
        dtype=str(dtype).removeprefix("torch."),
    )
    rows_of: dict[TokenSpan, list[int]] = {}
    for row, span in enumerate(spans):
        rows_of.setdefault(span, []).append(row)
    groups = prompt_groups(model, rendered, spans)
    return _Plan(description, dtype, rows_of, plan_batches(list(rows_of), groups, batch_tokens))


def _save(model: LanguageModel, plan: _Plan, folder: Path, progress: bool) -> None:
    require_disk(folder, 0, "states")
    with locked(folder, "states"), ShardWriter(folder, plan.description) as shards:
        left = [batch for batch in plan.batches if not shards.rows.issuperset(plan.rows(batch))]
        for rows, states in _read(model, plan, share(left), progress):
            # Other batches than those of the earlier run may be there in part.
            new = [place for place, row in enumerate(rows) if row not in shards.rows]
            shards.add([rows[place] for place in new], states[new])
        shards.finish()


def _read(
    model: LanguageModel, plan: _Plan, batches: list[Batch], progress: bool
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Read batches; yield rows and their states, (len(rows), layers, width) on the CPU."""
    if not batches:
        return
    layers = plan.description.layers
    name = Path(model.name).name
    bar = tqdm(
        total=sum(batch.n_tokens for batch in batches),
        desc=f"states of {name}{f' ({process_name()})' if n_processes() > 1 else ''}",
        unit="tok",
        unit_scale=True,
        delay=1,
        disable=not (progress and is_main_process()),
    )
    with bar, BlockReader(model, layers) as reader:
        for batch, read in reader.read(batches):
            states = read.to(plan.dtype)
            # Before they are saved: a later run would take them for good ones.
            _require_finite(states, layers, model.name)
            copies = [place for place, s in enumerate(batch.spans) for _ in plan.rows_of[s]]
            yield plan.rows(batch), states[copies]
            bar.update(batch.n_tokens)


def states_key(model: LanguageModel, texts: Sequence[RenderedText], position: str) -> str:
    """Return a folder name for the states of these texts, for a cache of many."""
    spans, _ = locate_tokens(model, texts, position)
    # Caches of releases that write another version stand beside this one's.
    identity = json.dumps(
        [
            *(SAVED_VERSION, model.description.to_dict(), str(model.model.dtype), position),
            [_read_fingerprint(texts, spans), [text.content for text in texts]],
        ]
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def corpus_fingerprint(texts: Sequence[RenderedText]) -> str:
    """Return a fingerprint of texts before any chat template; 16 hexadecimal digits."""
    return _fingerprint(text.text if text.content is None else text.content for text in texts)


def _read_fingerprint(texts: Sequence[RenderedText], spans: Sequence[TokenSpan]) -> str:
    """Return a fingerprint of texts and of the tokens they are to a model."""
    digest = hashlib.sha256()
    for text, span in zip(texts, spans, strict=True):
        digest.update(f"{text.answer_start}:{text.text}\0".encode())
        # Another tokenizer, or another setting of it, makes other states of the same texts.
        digest.update(bytes(span.ids))
    return digest.hexdigest()[:16]


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
