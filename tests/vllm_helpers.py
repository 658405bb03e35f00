"""Ask the same of transformers, with our hooks, and of vLLM, with the plugin."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from expertsteer import LanguageModel, SteeringPack

TOLERANCE = 1e-3
MOST_TOKENS = 12
# Of log-probabilities, over all comparisons of the run.
differences: list[float] = []

Answer = tuple[list[int], list[float]]


def random_vectors(layers: tuple[int, ...], width: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(width, generator=generator) for layer in layers}
    return {layer: vector / vector.norm() for layer, vector in vectors.items()}


def save_pack(target: LanguageModel, path: Path, layers: tuple[int, ...], seed: int) -> str:
    """Write a pack of random directions that changes what the target says."""
    pack = SteeringPack(
        vectors=random_vectors(layers, target.description.width, seed),
        mean_residual_norms={layer: 60.0 + layer for layer in layers},
        target=target.description,
        strength=0.4,
    )
    return str(pack.save(path))


@contextlib.contextmanager
def steered(model: Any, packs: dict[str, str], steering: Any) -> Iterator[None]:
    """Steer a transformers model as a request asks."""
    requests = steering if isinstance(steering, list) else [steering] if steering else []
    with contextlib.ExitStack() as stack:
        for request in requests:
            pack = SteeringPack.load(packs[request["pack"]])
            positions = request.get("positions", "all")
            stack.enter_context(pack.apply(model, request.get("strength"), positions))
        yield


@torch.no_grad()
def answer_of_transformers(
    model: Any,
    packs: dict[str, str],
    prompt: list[int],
    steering: Any,
    max_tokens: int = MOST_TOKENS,
) -> Answer:
    """Return greedy tokens and their log-probabilities."""
    inputs = torch.tensor([prompt])
    with steered(model, packs, steering):
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    tokens = output.sequences[0, len(prompt) :].tolist()
    logits = torch.stack(output.logits)[:, 0].double()
    chosen = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    return tokens, chosen.tolist()


def params_of(steering: Any = None, max_tokens: int = MOST_TOKENS, **others: Any) -> Any:
    """Return the parameters of a greedy request of a fixed length."""
    from vllm import SamplingParams

    # As transformers' min_new_tokens: the end of the text does not come early.
    settings = {
        "temperature": 0,
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "logprobs": 1,
        "extra_args": {"steering": steering} if steering is not None else None,
    }
    return SamplingParams(**(settings | others))


def ask(llm: Any, prompts: list[list[int]], steerings: list[Any], **others: Any) -> list[Any]:
    """Run requests in one batch, each with its own steering."""
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = [params_of(steering, **others) for steering in steerings]
    return llm.generate(inputs, params, use_tqdm=False)


def check_same(output: Any, expected: Answer, tolerance: float = TOLERANCE) -> None:
    """Compare one request's answer: tokens equal, log-probabilities within the tolerance."""
    completion = output.outputs[0]
    tokens, logprobs = expected
    assert list(completion.token_ids) == tokens
    found = [
        entry[token].logprob
        for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    difference = max(abs(a - b) for a, b in zip(found, logprobs, strict=True))
    assert difference < tolerance
    differences.append(difference)


@contextlib.contextmanager
def running(
    model: str, packs: dict[str, str] | None, *, force: bool = False, **options: Any
) -> Iterator[Any]:
    """Run an engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: Any = {"expertsteer": {"packs": packs, "force": force}} if packs else {}
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "distributed_executor_backend": "uni",
    }
    llm = LLM(model, **{"additional_config": settings} | engine | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
