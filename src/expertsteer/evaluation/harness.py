"""The lm-evaluation-harness's model "expertsteer": its tasks on a steered model.

The harness has no way of finding models of other packages by itself, so importing this
module registers the model, and `main` is the harness's own command line after that.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from expertsteer.errors import DataError, ExpertSteerError, ParameterError
from expertsteer.evaluation.scoring import (
    ContinuationScore,
    Request,
    continuation_log_likelihoods,
)
from expertsteer.models import LanguageModel, load_model, locate_model
from expertsteer.pack import SteeringPack

__all__ = ["SteeredHarnessModel", "main"]

_log = logging.getLogger(__name__)

# Prompts generated from at once where the user leaves it to us: the harness's own search
# fills the whole context window with trial batches, which takes very long on a CPU.
_AUTO_BATCH_SIZE = 16
# The harness's decorator hides the type of its class.
_HarnessModel: Any = HFLM


@register_model("expertsteer")
class SteeredHarnessModel(_HarnessModel):
    """A language model, steered by a pack or not, for the lm-evaluation-harness.

    Texts become tokens, prompts and chats exactly as with the harness's own model "hf", whose
    code does it. Log-likelihoods are computed differently: a context is read once for all its
    continuations, the output head sees only scored positions, and the softmax is always
    in float32. Steering sees a context as the prompt and a continuation as generated.

    Parameters
    ----------
    pretrained : str or LanguageModel
        As in `ModelSource`: a hub id, a folder, a ``.gguf`` file or an embedded name.
    pack : str, Path or SteeringPack, optional
        Default: unsteered.
    strength : float, optional
        Relative to the mean residual norm; default: the pack's own.
    positions : {"all", "prompt", "generated", "last"}, default="all"
    force : bool, default=False
        See `SteeringPack.apply`.
    dtype, device, device_map, revision, attn_implementation, trust_remote_code
        As in `ModelSource`. The harness asks for "cuda:0" by itself, so a device that is
        not there becomes the CPU, as with "hf"; device_map goes before device.
    batch_size : int or str, default=1
        Prompts to generate from at once; "auto" is 16.
    max_batch_size : int, optional
        Taken because the harness passes it, and not used.
    batch_tokens : int, default=2048
        Most tokens in a batch of log-likelihoods, padding counted.
    max_length, add_bos_token, prefix_token_id, think_end_token, enable_thinking, chat_template_args
        As for the harness's model "hf".

    Raises
    ------
    PackError
        If the pack is unreadable or was made for another model.
    ParameterError
        On steering options without a pack, or a wrong one.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        pack: str | Path | SteeringPack | None = None,
        strength: float | None = None,
        positions: str = "all",
        force: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        batch_tokens: int = 2048,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        if pack is None and (strength is not None or positions != "all" or force):
            raise ParameterError(
                "Got strength, positions or force without a pack, but expected them with one. "
                "Add pack=FILE, or leave them out."
            )
        if isinstance(pretrained, LanguageModel):
            self.language_model = pretrained
        else:
            self.language_model = load_model(
                str(pretrained),
                dtype=dtype,
                device=None if device_map is not None else _usable(device),
                device_map=device_map,
                # The harness reads an argument of digits only as a number.
                revision=None if revision is None else str(revision),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        if pack is not None and not isinstance(pack, SteeringPack):
            pack = SteeringPack.load(str(pack))
        self.steering: AbstractContextManager[Any] = nullcontext()
        if pack is not None:
            self.steering = pack.apply(self.language_model, strength, positions, force=force)
        with _quiet_about_a_loaded_model():
            super().__init__(
                pretrained=self.language_model.model,
                tokenizer=self.language_model.tokenizer,
                backend="causal",
                batch_size=_AUTO_BATCH_SIZE if str(batch_size).startswith("auto") else batch_size,
                max_length=max_length,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
                think_end_token=think_end_token,
                enable_thinking=enable_thinking,
                chat_template_args=chat_template_args,
            )
        self.batch_tokens = int(batch_tokens)
        self.pretrained = _origin(self.language_model)
        self.revision = self.language_model.revision or "main"
        self.truncated = 0
        self._cut: set[tuple[str, ...]] = set()
        self._steering_info: dict[str, Any] = {"steered": pack is not None}
        if pack is not None:
            self._steering_info |= {
                "steering_strength": pack.strength if strength is None else float(strength),
                "steering_positions": positions,
                "steering_layers": list(pack.layers),
            }

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results about the model."""
        return super().get_model_info() | self._steering_info

    def lost_beginning(self, arguments: Sequence[Any]) -> bool:
        """Return whether a request of these arguments was longer than the window."""
        return tuple(text for text in arguments if isinstance(text, str)) in self._cut

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's length."""
        owners, windows = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                owners.append(place)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (value, _) in zip(owners, answers, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts up to a stop string, greedily or sampling."""
        self.truncated = 0
        answers = super().generate_until(requests, disable_tqdm)
        self._report_truncation(len(requests))
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts into padded ids and their mask, and count what does not fit."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            is_cut = (mask.sum(1) > left_truncate_len).tolist()
            self.truncated += sum(is_cut)
            self._cut.update((text,) for text, cut in zip(strings, is_cut, strict=True) if cut)
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_call(self, *args: Any, **options: Any) -> torch.Tensor:
        with self.steering:
            return super()._model_call(*args, **options)

    def _model_generate(self, *args: Any, **options: Any) -> torch.Tensor:
        with self.steering:
            return super()._model_generate(*args, **options)

    def _loglikelihood_tokens(
        self,
        requests: Iterable[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_options: Any,  # batch sizes, which here are counted in tokens
    ) -> list[tuple[float, bool]]:
        asked = list(requests)
        # By context, then by continuation: the places of the requests for it.
        grouped: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        self.truncated = 0
        for place, (texts, context, continuation) in enumerate(asked):
            kept = self._fitted(context, continuation)
            if len(kept) < len(context):
                self.truncated += 1
                if texts is not None:
                    self._cut.add(tuple(texts))
            grouped.setdefault(kept, {}).setdefault(tuple(continuation), []).append(place)
        self._report_truncation(len(asked))

        answers: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        groups = list(grouped.items())

        def keep(places: list[int], scores: list[list[ContinuationScore]]) -> None:
            for place, found in zip(places, scores, strict=True):
                for rows, score in zip(groups[place][1].values(), found, strict=True):
                    for row in rows:
                        answers[row] = (score.log_likelihood, score.is_greedy)
                        texts = asked[row][0]
                        if texts is not None:  # a window of a longer text has none
                            self.cache_hook.add_partial("loglikelihood", texts, answers[row])

        with self.steering:
            continuation_log_likelihoods(
                self.language_model,
                [Request(context, tuple(continuations)) for context, continuations in groups],
                batch_tokens=self.batch_tokens,
                on_batch=keep,
                progress=not disable_tqdm,
            )
        return answers

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the newest tokens of a context that fit the window."""
        # The newest token is predicted and never read.
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation or room < 1:
            raise DataError(
                f"Got a context of {len(context)} tokens and a continuation of "
                f"{len(continuation)}, but expected at least one of each and at most "
                f"{self.max_length} to continue with."
            )
        return tuple(context[-room:])

    def _report_truncation(self, n_requests: int) -> None:
        if self.truncated:
            _log.warning(
                "%d of %d requests are longer than the model's window of %d tokens and lost "
                "their beginning.",
                self.truncated,
                n_requests,
                self.max_length,
            )


def main() -> None:
    """Run the harness's own command line, which then knows the model "expertsteer".

    An error of this package is printed as one line and exits with 1.
    """
    try:
        cli_evaluate()
    except ExpertSteerError as error:
        sys.exit(f"Error: {error}")


def _usable(device: str | None) -> str | None:
    """Return the device where there is one, else a GPU or None, the CPU."""
    has_gpu = torch.cuda.is_available()
    if device is None:
        return "cuda" if has_gpu else None
    if not device.startswith("cuda") or has_gpu:
        return device
    _log.info("There is no device %s; using the CPU.", device)
    return None


def _origin(model: LanguageModel) -> str:
    """Return a folder or hub id, so that no hub is asked for an embedded name."""
    try:
        return locate_model(model.name)
    except ExpertSteerError:  # built by hand, under any name
        return str(Path(model.name).absolute())


@contextmanager
def _quiet_about_a_loaded_model() -> Iterator[None]:
    """Silence advice to pass a name, which is meant for users of the class we build on."""
    log = logging.getLogger(HFLM.__module__)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


if __name__ == "__main__":
    main()
