"""Fine-tuning: the price of the alternative to steering, and the making of experts."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from expertsteer.data import LabelledExamples, render
from expertsteer.errors import DataError, ExpertSteerError, ModelError, ParameterError
from expertsteer.evaluation.scoring import head_sees
from expertsteer.files import is_finished, replacing_folder, write_text
from expertsteer.models import LanguageModel
from expertsteer.models.batches import padded, token_batches
from expertsteer.models.fingerprint import ModelDescription, explain_mismatch
from expertsteer.provenance import describe_machine, package_versions
from expertsteer.states.positions import TokenSpan, locate_tokens

__all__ = [
    "ADAPTER_RECORD",
    "DEFAULT_EPOCHS",
    "Training",
    "adapted",
    "fine_tune",
    "import_peft",
    "train_on_answers",
]

DEFAULT_EPOCHS = 3
# The file beside an adapter that tells how it was made.
ADAPTER_RECORD = "fine_tuning.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WARM_UP = 0.1
_LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes
    ----------
    n_trained_parameters : int
        Numbers that were trained.
    n_texts, n_validation_texts : int
    seconds : float
        From the first validation to the last.
    tokens_per_second : float
        Tokens read while training, prompts counted, over the time of that alone.
    train_loss : tuple of float
        Mean over the epoch's predicted tokens, in nats, by epoch.
    validation_loss : tuple of float
        Before training and after each epoch; empty without validation texts.
    best_epoch : int
        From 1; the one whose weights were kept, of lowest validation loss; the last
        without validation texts.
    """

    n_trained_parameters: int
    n_texts: int
    n_validation_texts: int
    seconds: float
    tokens_per_second: float
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    best_epoch: int


def fine_tune(
    model: LanguageModel,
    examples: LabelledExamples,
    *,
    output: str | Path,
    rank: int = 8,
    n_epochs: int = DEFAULT_EPOCHS,
    learning_rate: float = 5e-4,
    batch_tokens: int = 512,
    seed: int = 0,
    chat_template: bool = False,
    progress: bool = True,
) -> Path:
    """Train a low-rank adapter (LoRA) on the examples labelled +1.

    Parameters
    ----------
    model : LanguageModel
        The base model. It is read only, and the same bit for bit afterwards.
    examples : LabelledExamples
        Positive rows of the train split are learned, those of the validation split, if
        any, choose the epoch. See `train_on_answers`.
    output : str or Path
        The adapter's folder, in the format of the package peft, with `ADAPTER_RECORD`
        beside the weights: settings, losses, seconds, trained parameters. It appears
        whole or not at all.
    rank : int, default=8
        Of the change of every linear layer but the output head; scaled by two.
    n_epochs, learning_rate, batch_tokens, seed, chat_template
        As in `train_on_answers`. The seed also draws the adapter's first values.
    progress : bool, default=True

    Returns
    -------
    Path
        ``output``. An adapter of the same settings, data and model that is there
        already is left as it is.

    Raises
    ------
    ExpertSteerError
        If the package peft is missing, or ``output`` is a file or holds something else.
    DataError, ParameterError
        As `train_on_answers` does.

    References
    ----------
    Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).
    """
    peft = import_peft()
    _require_whole("rank", rank)
    recipe: dict[str, Any] = {
        "n_epochs": n_epochs,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "chat_template": chat_template,
    }
    _check_recipe(n_epochs, learning_rate, batch_tokens)
    _refuse_adapted(model)
    learned, validation = _to_learn(examples)
    settings = {
        "model": model.description.to_dict(),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "train": learned.fingerprint,
        "validation": validation.fingerprint if validation else None,
        "rank": rank,
        **recipe,
    }
    if is_finished(output, ADAPTER_RECORD, settings):
        return Path(output)
    trained = replace(model, model=_with_own_modules(model.model))
    with replacing_folder(output) as scratch:
        with _seeded(seed), _quiet_peft():
            wrapped = peft.get_peft_model(
                trained.model,
                peft.LoraConfig(
                    r=rank,
                    lora_alpha=2 * rank,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
        training = train_on_answers(trained, examples, progress=progress, **recipe)
        # Otherwise the folder of this machine that the model was loaded from.
        wrapped.peft_config["default"].base_model_name_or_path = model.name
        # "auto" would ask the hub for the base model's configuration.
        wrapped.save_pretrained(str(scratch), save_embedding_layers=False)
        record = {
            "settings": settings,
            "data": examples.summary(),
            "training": asdict(training),
            "versions": package_versions() | {"peft": version("peft")},
            "machine": describe_machine(),
        }
        write_text(scratch / ADAPTER_RECORD, json.dumps(record, indent=2) + "\n")
    return Path(output)


@contextmanager
def adapted(model: LanguageModel, folder: str | Path) -> Iterator[LanguageModel]:
    """Run a model with an adapter inside a ``with`` block.

    Parameters
    ----------
    model : LanguageModel
        Generate with it, score it or steer it inside the block, with packs made for the
        model without the adapter. After the block it is as it was: the same modules and
        parameters, which take gradients where they did.
    folder : str or Path
        Of `fine_tune`, or any adapter of the package peft in safetensors.

    Yields
    ------
    LanguageModel
        ``model`` itself.

    Raises
    ------
    ModelError
        If the folder is no such adapter or does not fit the model, or the model runs with
        an adapter already.
    ExpertSteerError
        If the package peft is missing.
    """
    peft = import_peft()
    folder = Path(folder)
    for name in _ADAPTER_FILES:  # peft would go and look for them on the hub
        if not (folder / name).is_file():
            raise ModelError(
                f"Got the adapter {folder}, but it holds no {name}. Name a folder that fine_tune "
                "or peft's save_pretrained wrote."
            )
    _refuse_adapted(model)
    _check_made_for(model.description, folder)  # kept by the model: packs fit by it
    with _restored(model.model):
        try:
            with _seeded(0), _quiet_peft():
                peft.PeftModel.from_pretrained(model.model, str(folder))
        except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:500]
            raise ModelError(
                f"Got the adapter {folder}, but it cannot be put on {model.name}: {reason}"
            ) from error
        yield model


def train_on_answers(
    model: LanguageModel,
    examples: LabelledExamples,
    *,
    n_epochs: int = DEFAULT_EPOCHS,
    learning_rate: float = 5e-4,
    batch_tokens: int = 512,
    seed: int = 0,
    chat_template: bool = False,
    progress: bool = True,
) -> Training:
    """Train a model in place to give the answers labelled +1.

    The loss is the cross-entropy of the answers' tokens given the prompt and the tokens
    before; a text without a prompt is all answer. AdamW without weight decay, a warm-up
    over the first tenth of the steps, then a cosine down to zero; gradients longer than 1
    are shortened to it.

    Parameters
    ----------
    model : LanguageModel
        Parameters that require a gradient are trained.
    examples : LabelledExamples
        Positive rows of the train split are learned. After each epoch the positive rows
        of the validation split are scored, and the weights of the best epoch are kept;
        without such rows, those of the last.
    n_epochs : int, default=3
    learning_rate : float, default=5e-4
        The highest. All parameters of a model want about a tenth of what an adapter does.
    batch_tokens : int, default=512
        Most tokens of a step, padding included.
    seed : int, default=0
        Of the order of the batches and of dropout. The global random state stays as it is.
    chat_template : bool, default=False
        See `render`.
    progress : bool, default=True

    Returns
    -------
    Training

    Raises
    ------
    DataError
        If no row of the train split is positive, or a text has no token to predict.
    ParameterError
        On unusable settings, if nothing is to be trained, or if the loss diverges.
    """
    _check_recipe(n_epochs, learning_rate, batch_tokens)
    learned, validation = _to_learn(examples)
    texts = _Texts(model, learned, chat_template, batch_tokens, seed)
    held_out = _Texts(model, validation, chat_template, batch_tokens, seed) if validation else None
    network = model.model
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise ParameterError("Got a model none of whose parameters require a gradient. Set some.")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    n_steps = n_epochs * len(texts.batches)
    warm_up = math.ceil(_WARM_UP * n_steps)
    schedule = get_scheduler("cosine", optimizer, warm_up, n_steps)

    was_training = network.training
    losses: list[float] = []
    validation_losses: list[float] = []
    best_epoch, best = n_epochs, None
    begun, spent = time.perf_counter(), 0.0
    bar = tqdm(
        total=n_epochs * texts.n_tokens,
        desc=f"fine-tuning {Path(model.name).name}",
        unit="tok",
        unit_scale=True,
        delay=1,
        disable=not progress,
    )
    try:
        with bar, _seeded(seed):
            if held_out is not None:
                validation_losses.append(held_out.mean_loss(model))
            for epoch in range(1, n_epochs + 1):
                network.train()
                total, since = 0.0, time.perf_counter()
                for place in torch.randperm(len(texts.batches)).tolist():
                    batch = texts.batches[place]
                    loss, n_predicted = _summed_loss(model, batch)
                    optimizer.zero_grad()
                    (loss / n_predicted).backward()
                    nn.utils.clip_grad_norm_(parameters, _LONGEST_GRADIENT)
                    optimizer.step()
                    schedule.step()
                    total += loss.item()
                    bar.update(sum(len(span.ids) for span in batch))
                spent += time.perf_counter() - since
                losses.append(total / texts.n_predicted)
                shown = {"loss": losses[-1]}
                if held_out is not None:
                    validation_losses.append(held_out.mean_loss(model))
                    shown["validation"] = validation_losses[-1]
                if not all(map(math.isfinite, shown.values())):
                    raise ParameterError(
                        f"Got a loss of {list(shown.values())[-1]} in epoch {epoch}, but expected "
                        f"a finite one. Lower learning_rate={learning_rate:g}."
                    )
                bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
                if validation_losses and validation_losses[-1] == min(validation_losses[1:]):
                    best_epoch = epoch
                    best = [p.detach().clone() for p in parameters] if epoch < n_epochs else None
        if best is not None:
            with torch.no_grad():
                for parameter, value in zip(parameters, best, strict=True):
                    parameter.copy_(value)
    finally:
        optimizer.zero_grad()
        network.train(was_training)
    return Training(
        n_trained_parameters=sum(p.numel() for p in parameters),
        n_texts=len(learned),
        n_validation_texts=len(validation) if validation else 0,
        seconds=round(time.perf_counter() - begun, 2),
        tokens_per_second=round(n_epochs * texts.n_tokens / spent, 1),
        train_loss=tuple(losses),
        validation_loss=tuple(validation_losses),
        best_epoch=best_epoch,
    )


class _Texts:
    """Tokenised texts in batches of similar length."""

    def __init__(
        self,
        model: LanguageModel,
        examples: LabelledExamples,
        chat_template: bool,
        batch_tokens: int,
        seed: int,
    ) -> None:
        rendered = render(examples, model.tokenizer, chat_template)
        spans, n_cut = locate_tokens(model, rendered, "answer_mean")
        if n_cut:
            warnings.warn(
                f"{n_cut} of {len(spans)} texts are longer than the {model.context_length} tokens "
                f"of {model.name}; their beginnings were cut.",
                stacklevel=3,
            )
        predicted = [len(_predicted(span)) for span in spans]
        if not all(predicted):
            text = rendered[predicted.index(0)].text
            raise DataError(
                f"Got the text {text[:40]!r} of one token, but expected two or more: the first has "
                "nothing before it. Remove the row."
            )
        # Texts of equal length meet by chance, not by their order in the file.
        order = torch.randperm(len(spans), generator=torch.Generator().manual_seed(seed)).tolist()
        spans = [spans[place] for place in order]
        lengths = [len(span.ids) for span in spans]
        heads = [predicted[place] for place in order]
        self.batches = [
            [spans[place] for place in places]
            for places in token_batches(
                lengths, batch_tokens, head_positions=heads, mix_lengths=True
            )
        ]
        self.n_tokens, self.n_predicted = sum(lengths), sum(heads)

    @torch.no_grad()
    def mean_loss(self, model: LanguageModel) -> float:
        """Return the mean loss a predicted token, in nats."""
        model.model.eval()
        total = sum(_summed_loss(model, batch)[0].item() for batch in self.batches)
        return total / self.n_predicted


def _predicted(span: TokenSpan) -> range:
    """Return the places of the tokens that are to be predicted."""
    return range(max(span.start, 1), span.end)


def _summed_loss(model: LanguageModel, batch: Sequence[TokenSpan]) -> tuple[torch.Tensor, int]:
    """Return the summed loss of a batch's answers, in nats, and over how many tokens."""
    # What follows a text's last token is never seen by it, so padding needs no mask.
    ids, _ = padded(model, [span.ids for span in batch], "right")
    places = [(row, place) for row, span in enumerate(batch) for place in _predicted(span)]
    rows, columns = torch.tensor(places, device=ids.device).T
    with head_sees(model, rows, columns - 1):
        logits = model.model(input_ids=ids, use_cache=False).logits[0]
    wanted = ids[rows, columns].to(logits.device)
    return functional.cross_entropy(logits.float(), wanted, reduction="sum"), len(places)


def _to_learn(examples: LabelledExamples) -> tuple[LabelledExamples, LabelledExamples | None]:
    """Return the positive rows of the train and, if it has any, the validation split."""
    found = []
    for name in ("train", "validation"):
        rows = [
            row
            for row, (split, label) in enumerate(zip(examples.splits, examples.labels, strict=True))
            if split == name and label > 0
        ]
        found.append(examples.subset(rows) if rows else None)
    learned, validation = found
    if learned is None:
        raise DataError(
            f"Got no positive rows in the train split of {examples.source}, which holds "
            f"{examples.describe_splits()}, but expected some to learn from. Add rows."
        )
    return learned, validation


def _check_recipe(n_epochs: int, learning_rate: float, batch_tokens: int) -> None:
    _require_whole("n_epochs", n_epochs)
    _require_whole("batch_tokens", batch_tokens)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ParameterError(
            f"Got learning_rate={learning_rate}, but expected a positive finite number."
        )


def _require_whole(name: str, value: int) -> None:
    if value < 1:
        raise ParameterError(f"Got {name}={value}, but expected a whole number from 1 up.")


def import_peft() -> Any:
    """Return the package peft, or raise ExpertSteerError that says how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ExpertSteerError(
            f"Adapters need the package peft ({error}). Install it with: "
            'pip install "expertsteer[lora]"'
        ) from error
    return peft


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence what peft and transformers say of each other and a user cannot change."""
    with warnings.catch_warnings():
        for message in (
            "`is_gradient_checkpointing` is deprecated",
            "fan_in_fan_out is set to False",  # and then set right
            r"The following (rank|alpha)_pattern keys",  # of layers that a small model lacks
        ):
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and put its random state back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _refuse_adapted(model: LanguageModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.model.modules()):
        raise ModelError(f"Got {model.name} with an adapter, but expected it without one.")


def _check_made_for(found: ModelDescription, folder: Path) -> None:
    record = folder / ADAPTER_RECORD
    if not record.exists():  # made by others, who do not say
        return
    try:
        made_for = ModelDescription(**json.loads(record.read_text("utf-8"))["settings"]["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"Got {record}, but it is damaged ({error}). Train it again.") from error
    difference = explain_mismatch(made_for, found)
    if difference:
        raise ModelError(
            f"Got the model {found.name!r}, but the adapter {folder} is for {made_for.name!r}: "
            f"{difference}. Train one for this model."
        )


def _with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of new modules over the same weights, which it must not write to."""
    shared = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, cast(dict[int, Any], shared))


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Put a model's modules and what they are made of back where they were."""
    modules = [
        (module, dict(module._modules), module.training, set(vars(module)))
        for module in model.modules()
    ]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, children, training, attributes in modules:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
            for name in set(vars(module)) - attributes:
                delattr(module, name)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
