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
from expertsteer.models.batches import padded
from expertsteer.pack import SteeringPack

__all__ = [
    "Generation",
    "continue_prompts",
    "generate_side_by_side",
    "require_room",
    "sampling_options",
]


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
    # A chat template has written the special tokens.
    encoded = model.tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]
    continued: dict[float, list[str]] = {}
    bar = tqdm([0.0, *strengths], desc="generating", delay=1, disable=not progress)
    for strength in bar:
        with ExitStack() as stack:
            for pack in packs if strength else ():
                stack.enter_context(pack.apply(model, strength, positions, force=force))
            continued[strength] = continue_prompts(
                model, encoded, max_new_tokens, seed=seed, **options
            )
    return [
        Generation(prompt, {strength: texts[row] for strength, texts in continued.items()})
        for row, prompt in enumerate(prompts)
    ]


def sampling_options(temperature: float, top_p: float | None = None) -> dict[str, Any]:
    """Return what ``generate`` takes for a temperature; 0 is greedy.

    Parameters
    ----------
    temperature : float
    top_p : float, optional
        Nucleus of the sampling, from all tokens; default: what the model's own
        generation settings say of nucleus and most tokens.

    Raises
    ------
    ParameterError
        If the temperature is negative or not finite, or the nucleus outside (0, 1].
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ParameterError(
            f"Got temperature={temperature}, but expected a finite number from 0 up."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ParameterError(f"Got top_p={top_p}, but expected a number above 0, at most 1.")
    if temperature == 0:
        return {"do_sample": False}
    nucleus = {} if top_p is None else {"top_p": top_p, "top_k": 0}
    return {"do_sample": True, "temperature": temperature} | nucleus


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
def continue_prompts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Continue tokenised prompts in one batch.

    Parameters
    ----------
    model : LanguageModel
        Steered or not.
    prompts : sequence of sequence of int
        Token ids, at least one each.
    max_new_tokens : int
    seed : int, default=0
        Of sampling.
    **options
        Passed to the model's ``generate``.

    Returns
    -------
    list of str
        What follows each prompt, without special tokens.

    Raises
    ------
    DataError
        If a prompt and its continuation do not fit into the model's context.
    """
    require_room(model, max(map(len, prompts)), max_new_tokens)
    # New tokens must follow the prompt directly, whatever side the tokenizer pads.
    ids, mask = padded(model, prompts, "left")
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options
    )
    return model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
