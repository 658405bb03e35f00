"""A conversation with a steered model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from expertsteer.errors import ParameterError
from expertsteer.generation import require_room, sampling_options
from expertsteer.models import LanguageModel
from expertsteer.pack import SteeringPack
from expertsteer.steering import check_strength

__all__ = ["Conversation"]


class _Abandoned(StoppingCriteria):
    """Ends a generation that nobody listens to any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any
    ) -> torch.BoolTensor:
        ended = torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
        return cast(torch.BoolTensor, ended)


class Conversation:
    """Turns of a chat, or of a text that is continued where the model has no template.

    Parameters
    ----------
    model : LanguageModel
        The target.
    packs : sequence of SteeringPack
        Added to each other, all at the same strength.
    strength : float
        Relative to the mean residual norm.
    positions : {"all", "prompt", "generated", "last"}, default="all"
    max_new_tokens : int, default=200
    temperature : float, default=0.7
        0 is greedy.
    seed : int, default=0
    force : bool, default=False
        See `SteeringPack.check_target`.
    """

    def __init__(
        self,
        model: LanguageModel,
        packs: Sequence[SteeringPack],
        *,
        strength: float,
        positions: str = "all",
        max_new_tokens: int = 200,
        temperature: float = 0.7,
        seed: int = 0,
        force: bool = False,
    ) -> None:
        self.model = model
        self.packs = packs
        self.positions = positions
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling_options(temperature)
        self.force = force
        self.steered = True
        self.turns: list[dict[str, str]] = []
        self.strength = check_strength(strength)
        for pack in packs:
            pack.check_target(model, force=force)
        torch.manual_seed(seed)

    def set_strength(self, value: str | float) -> None:
        """Change the strength.

        Raises
        ------
        ParameterError
            If it is no number, zero or not finite.
        """
        try:
            number = float(value)
        except ValueError as error:
            raise ParameterError(
                f"Got strength={value!r}, but expected a number such as 0.1."
            ) from error
        self.strength = check_strength(number)

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns = []

    def reply(self, text: str) -> Iterator[str]:
        """Yield the model's answer piece by piece, and remember the turn.

        Parameters
        ----------
        text : str
            What the user says.

        Yields
        ------
        str

        Raises
        ------
        DataError
            If the conversation has outgrown the context; the turn is then forgotten.
        """
        tokenizer = self.model.tokenizer
        turns = [*self.turns, {"role": "user", "content": text}]
        templated = tokenizer.chat_template is not None
        prompt = (
            self.model.chat_prompt(turns)
            if templated
            else "".join(turn["content"] for turn in turns)
        )
        inputs = tokenizer(
            prompt,
            return_tensors="pt",
            add_special_tokens=not templated,
            return_token_type_ids=False,
        ).to(self.model.device)
        require_room(self.model, inputs["input_ids"].shape[1], self.max_new_tokens)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        abandoned = _Abandoned()
        worker = threading.Thread(
            target=self._generate, args=(inputs, streamer, abandoned, failure), daemon=True
        )
        worker.start()
        said = ""
        try:
            for piece in streamer:
                said += piece
                yield piece
        finally:
            # Nobody may listen to the end; the model is not to go on, steered, behind it.
            abandoned.event.set()
            worker.join()
        if failure:
            raise failure[0]
        self.turns = [*turns, {"role": "assistant", "content": said}]

    def _generate(
        self,
        inputs: Any,
        streamer: TextIteratorStreamer,
        abandoned: _Abandoned,
        failure: list[BaseException],
    ) -> None:
        try:
            with ExitStack() as stack:
                for pack in self.packs if self.steered else ():
                    steering = pack.apply(
                        self.model, self.strength, self.positions, force=self.force
                    )
                    stack.enter_context(steering)
                self.model.generate(
                    **inputs,
                    max_new_tokens=self.max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([abandoned]),
                    **self.sampling,
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()
