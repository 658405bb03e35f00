"""Generate with a target, unsteered and steered, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from expertsteer.errors import DataError, ParameterError
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack

__all__ = ["Generation", "generate_side_by_side", "require_room", "sampling_options"]


@dataclass(frozen=True)
class Generation:
    """One prompt and its continuations.

    Attributes
    ----------
    prompt : str
    continuations : dict of float to str
        By strength; 0 is unsteered.
    """

    prompt: str
    continuations: dict[float, str]


def generate_side_by_side(
    model: LanguageModel,
    packs: Sequence[SteeringPack],
    prompts: Sequence[str],
    strengths: Sequence[float],
    *,
    positions: str = "all",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    chat_template: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> list[Generation]:
    """Continue prompts unsteered and at several strengths.

    Parameters
    ----------
    model : LanguageModel
        The target.
    packs : sequence of SteeringPack
        Added to each other, all at the same strength.
    prompts : sequence of str
    strengths : sequence of float
        Relative to the mean residual norm; unsteered comes first by itself.
    positions : {"all", "prompt", "generated", "last"}, default="all"
    max_new_tokens : int, default=40
    temperature : float, default=0.0
        0 is greedy.
    repetition_penalty : float, default=1.0
        As in transformers.
    chat_template : bool, default=False
        Put each prompt into the model's chat template.
    seed : int, default=0
        Of sampling; the same for every strength.
    force : bool, default=False
        See `SteeringPack.check_target`.
    progress : bool, default=True

    Returns
    -------
    list of Generation
        One a prompt.

    Raises
    ------
    DataError
        If there is no prompt, an empty one, or one that the context cannot take.
    ParameterError
        On a temperature or repetition penalty out of range.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise DataError("Got no prompt or an empty one, but expected some text in each.")
    options = sampling_options(temperature)
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ParameterError(
            f"Got repetition_penalty={repetition_penalty}, but expected a positive finite number."
        )
    options["repetition_penalty"] = repetition_penalty
    texts = [
        model.chat_prompt([{"role": "user", "content": prompt}]) if chat_template else prompt
        for prompt in prompts
    ]
    continued: dict[float, list[str]] = {}
    bar = tqdm([0.0, *strengths], desc="generating", delay=1, disable=not progress)
    for strength in bar:
        with ExitStack() as stack:
            for pack in packs if strength else ():
                stack.enter_context(pack.apply(model, strength, positions, force=force))
            continued[strength] = _continue(
                model, texts, max_new_tokens, options, chat_template, seed
            )
    return [
        Generation(prompt, {strength: texts[row] for strength, texts in continued.items()})
        for row, prompt in enumerate(prompts)
    ]


def sampling_options(temperature: float) -> dict[str, Any]:
    """Return what ``generate`` takes for a temperature; 0 is greedy.

    Raises
    ------
    ParameterError
        If it is negative or not finite.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ParameterError(
            f"Got temperature={temperature}, but expected a finite number from 0 up."
        )
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature}


def require_room(model: LanguageModel, n_tokens: int, max_new_tokens: int) -> None:
    """Raise unless a prompt and its continuation fit into the model's context.

    Raises
    ------
    DataError
        Saying how long both are.
    """
    if n_tokens + max_new_tokens > model.context_length:
        raise DataError(
            f"Got {n_tokens} tokens of text and max_new_tokens={max_new_tokens}, but the context "
            f"of {model.name} holds {model.context_length}. Shorten one of them."
        )


@torch.inference_mode()
def _continue(
    model: LanguageModel,
    texts: Sequence[str],
    max_new_tokens: int,
    options: dict[str, Any],
    has_special_tokens: bool,
    seed: int,
) -> list[str]:
    torch.manual_seed(seed)
    inputs = model.tokenizer(
        list(texts),
        return_tensors="pt",
        padding=True,
        # New tokens must follow the prompt directly, whatever side the tokenizer pads.
        padding_side="left",
        add_special_tokens=not has_special_tokens,
        return_token_type_ids=False,
    ).to(model.device)
    require_room(model, inputs["input_ids"].shape[1], max_new_tokens)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    new = output[:, inputs["input_ids"].shape[1] :]
    return model.tokenizer.batch_decode(new, skip_special_tokens=True)
