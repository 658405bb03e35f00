"""One generation at a time, in the order requests came; each can be cut at any moment."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from expertsteer.errors import ExpertSteerError
from expertsteer.generation import continue_prompts
from expertsteer.models import LanguageModel
from expertsteer.serving.protocol import ChosenToken
from expertsteer.steering import Steering

__all__ = ["Finish", "Job", "JobQueue", "Piece", "QueueFullError", "StoppedError"]

# Clients such as openai's take no longer wait from a server than this, in seconds.
_LONGEST_WAIT = 60


class QueueFullError(ExpertSteerError):
    """As many requests wait as may."""


class StoppedError(ExpertSteerError):
    """The server is being stopped."""


class _Cut(Exception):  # noqa: N818 - a signal from within a forward pass, no error
    """Ends the running generation."""


@dataclass(frozen=True)
class Piece:
    """Text that follows what came before it.

    Attributes
    ----------
    index : int
        Of the prompt.
    text : str
    tokens : tuple of ChosenToken or None
        None where no log-probabilities were asked for.
    """

    index: int
    text: str
    tokens: tuple[ChosenToken, ...] | None


@dataclass(frozen=True)
class Finish:
    """The end of one prompt's continuation.

    Attributes
    ----------
    index : int
        Of the prompt.
    text : str
        All of the continuation.
    reason : {"stop", "length"}
        Whether the model or a stop string ended it, or the number of tokens.
    n_tokens : int
        Generated, with the one that ends a text.
    """

    index: int
    text: str
    reason: str
    n_tokens: int


@dataclass(eq=False)
class Job:
    """One request's generation.

    Attributes
    ----------
    prompts : sequence of sequence of int
        Token ids, continued one after the other.
    max_new_tokens : int
        Of each.
    seed : int
        Of sampling.
    emit : callable
        Given each `Piece` and `Finish`, then None; or the error that ended the job. Called
        from another thread.
    options : dict
        Passed to the model's ``generate``.
    steerings : sequence of Steering
    stop : tuple of str
        Texts that end a continuation and are not part of it.
    n_logprobs : int or None
        Alternatives told a token; None: no log-probabilities.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    seed: int
    emit: Callable[[Piece | Finish | BaseException | None], None]
    options: dict[str, Any] = field(default_factory=dict)
    steerings: Sequence[Steering] = ()
    stop: tuple[str, ...] = ()
    n_logprobs: int | None = None

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


class JobQueue:
    """Runs jobs one after the other in a thread of its own.

    Parameters
    ----------
    model : LanguageModel
        Belongs to the queue from now on.
    max_waiting : int
        Jobs that wait while one runs.
    """

    def __init__(self, model: LanguageModel, max_waiting: int) -> None:
        self.model = model
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._reason_to_cut: BaseException | None = None
        self._stopping = False
        self._seconds_a_job = 1.0
        for block in model.blocks:
            # Between two blocks, not two tokens: a long prompt is one pass of many seconds.
            block.register_forward_pre_hook(self._before_block)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """Jobs that run and that wait."""
        with self._changed:
            return {"running": int(self._running is not None), "waiting": len(self._waiting)}

    @property
    def seconds_until_free(self) -> int:
        """About how long it takes until all that wait now are done, at least 1."""
        jobs = sum(self.counts.values())
        return min(max(math.ceil(jobs * self._seconds_a_job), 1), _LONGEST_WAIT)

    def submit(self, job: Job) -> None:
        """Have a job run when its turn comes.

        Raises
        ------
        QueueFullError, StoppedError
        """
        with self._changed:
            if self._stopping:
                raise StoppedError("The server is being stopped.")
            if len(self._waiting) + int(self._running is not None) > self.max_waiting:
                raise QueueFullError(
                    f"Got a request while {len(self._waiting)} wait, the most this server lets "
                    "wait. Try again later."
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job whose client is gone, and free its place; harmless when it is done."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job is self._running and self._reason_to_cut is None:
                self._reason_to_cut = StoppedError("The client is gone.")

    def stop(self) -> None:
        """Take no more jobs and refuse those that wait; the running one goes on."""
        with self._changed:
            self._stopping = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in refused:
            job.emit(StoppedError("The server is being stopped."))

    def cut(self) -> None:
        """End the running job."""
        with self._changed:
            if self._running is not None:
                self._reason_to_cut = StoppedError("The server is being stopped.")

    def join(self, timeout: float) -> bool:
        """Wait after `stop` for the running job to end; return whether it did."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _before_block(self, *_: Any) -> None:
        if self._reason_to_cut is not None:
            raise _Cut

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            begun = time.monotonic()
            outcome: BaseException | None = None
            try:
                self._run(job)
            except _Cut:
                pass
            except Exception as error:  # whatever it is, the next job must run
                outcome = error
            with self._changed:
                outcome = self._reason_to_cut or outcome
                self._reason_to_cut = self._running = None
            if outcome is None:
                self._seconds_a_job += 0.2 * (time.monotonic() - begun - self._seconds_a_job)
            job.emit(outcome)

    def _run(self, job: Job) -> None:
        with ExitStack() as stack:
            for steering in job.steerings:
                stack.enter_context(steering)
            for index, prompt in enumerate(job.prompts):
                follower = _Follower(self.model, job, index)
                text = continue_prompts(
                    self.model,
                    [prompt],
                    job.max_new_tokens,
                    seed=job.seed,
                    stopping_criteria=StoppingCriteriaList([follower]),
                    logits_processor=LogitsProcessorList([follower.recorder]),
                    **job.options,
                )[0]
                job.emit(follower.finish(text))


class _Recorder(LogitsProcessor):
    """Keeps what the model thinks of the next token, before temperature and nucleus."""

    scores: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores
        return scores


class _Follower(StoppingCriteria):
    """Sends a continuation on while it grows, and ends it at a stop string."""

    def __init__(self, model: LanguageModel, job: Job, index: int) -> None:
        self.tokenizer = model.tokenizer
        self.job = job
        self.index = index
        self.recorder = _Recorder()
        self.n_sent = 0
        self.stopped = False
        self.ids: list[int] = []
        self.tokens: list[ChosenToken] = []
        self.ends = model.end_token_ids

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return whether to stop, shape (1,)."""
        self.ids.append(int(input_ids[0, -1]))
        if self.job.n_logprobs is not None:
            self.tokens.append(self._chosen(self.ids[-1], self.job.n_logprobs))
        text = self._before_stop(str(self.tokenizer.decode(self.ids, skip_special_tokens=True)))
        if not self.stopped:
            self._send(text[: len(text) - _held_back(text, self.job.stop)])
        return torch.full((1,), self.stopped, device=input_ids.device)

    def finish(self, text: str) -> Finish:
        """Send what is left of the whole text, and return how it ended."""
        text = self._before_stop(text)
        self._send(text, last=True)
        ended = self.stopped or self.ids[-1] in self.ends
        return Finish(self.index, text, "stop" if ended else "length", len(self.ids))

    def _before_stop(self, text: str) -> str:
        # What was sent holds no stop string, nor the beginning of one.
        places = [place for s in self.job.stop if (place := text.find(s, self.n_sent)) >= 0]
        self.stopped = self.stopped or bool(places)
        return text[: min(places)] if places else text

    def _send(self, text: str, last: bool = False) -> None:
        if len(text) > self.n_sent or (last and self.tokens):
            told = tuple(self.tokens) if self.job.n_logprobs is not None else None
            self.job.emit(Piece(self.index, text[self.n_sent :], told))
            self.n_sent = max(len(text), self.n_sent)
            self.tokens = []

    def _chosen(self, token: int, n: int) -> ChosenToken:
        logprobs = self.recorder.scores[0].float().log_softmax(-1)
        values, places = logprobs.topk(min(n, len(logprobs)))
        likeliest = zip(places.tolist(), values.tolist(), strict=True)
        return ChosenToken(
            self._text_of(token),
            float(logprobs[token]),
            tuple((self._text_of(place), value) for place, value in likeliest),
        )

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end may still become something else."""
    # Bytes of a character whose others are yet to come decode to this one.
    held = len(text) - len(text.rstrip("\ufffd"))
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), held, -1):
            if text.endswith(string[:length]):
                held = length
                break
    return held
