"""Engines set up otherwise: little memory, several processes, other models, no packs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from expertsteer import SteeringPack
from expertsteer.errors import ExpertSteerError, PackError, ParameterError
from expertsteer.export import export_pack
from expertsteer.models import LanguageModel
from helpers import tiny_model, tiny_tokenizer
from vllm_helpers import (
    TOLERANCE,
    answer_of_transformers,
    ask,
    check_same,
    running,
    save_pack,
)

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm


def preemptions(llm) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_preempted_requests_go_on_as_they_were(checkpoint, packs, prompts, reference):
    steerings = [
        {"pack": "first", "strength": 0.5, "positions": positions}
        for positions in ("all", "prompt", "generated", "last")
    ]
    steerings.append(None)
    asked = [prompts[1]] * len(steerings)
    with running(
        checkpoint,
        packs,
        block_size=32,
        num_gpu_blocks_override=12,
        max_model_len=160,
        enable_prefix_caching=False,
        disable_log_stats=False,
    ) as llm:
        outputs = ask(llm, asked, steerings, max_tokens=60)
        assert preemptions(llm) > 0
    for output, prompt, steering in zip(outputs, asked, steerings, strict=True):
        check_same(output, reference(prompt, steering, 60))


def test_packs_from_the_environment(checkpoint, packs, prompts, reference, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_PACKS", ",".join(f"{n}={p}" for n, p in packs.items()))
    with running(checkpoint, None) as llm:
        (output,) = ask(llm, prompts[:1], [{"pack": "second"}])
    check_same(output, reference(prompts[0], {"pack": "second"}))


def test_an_engine_without_packs_refuses_steering(checkpoint, prompts, reference):
    with running(checkpoint, None) as llm:
        with pytest.raises(ParameterError, match="holds: none"):
            ask(llm, prompts[:1], [{"pack": "first"}])
        (output,) = ask(llm, prompts[:1], [None])
    check_same(output, reference(prompts[0]))


def test_a_compiled_model_is_steered(checkpoint, packs, prompts, reference):
    steerings = [None, {"pack": "first"}, {"pack": "second", "positions": "generated"}]
    with running(checkpoint, packs, enforce_eager=False, max_num_batched_tokens=64) as llm:
        outputs = ask(llm, prompts[:3], steerings)
    for output, prompt, steering in zip(outputs, prompts, steerings, strict=False):
        check_same(output, reference(prompt, steering))


def test_an_exported_checkpoint_needs_no_plugin(target, packs, prompts, reference, tmp_path):
    pack = SteeringPack.load(packs["first"])
    path = export_pack(pack, tmp_path / "out", "weights", strength=0.5, target=target).path
    with running(str(path), None) as llm:
        outputs = ask(llm, prompts, [None] * len(prompts))
    for output, prompt in zip(outputs, prompts, strict=True):
        check_same(output, reference(prompt, {"pack": "first", "strength": 0.5}))


# Width and heads that vLLM's attention takes.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
GPT2_SIZES = {"n_embd": 128}
PROMPTS = [list(range(10, 10 + length)) for length in (5, 9, 13)]


FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2"),
    *("granite", "stablelm", "starcoder2", "smollm3"),
)
# The same weights as another architecture, and an added block.
EXPORTED = ("mistral", "qwen2", "qwen3", "gemma3_text", "olmo2")
STEERINGS = [
    {"pack": "first", "strength": 0.3},
    [{"pack": "first", "positions": "last"}, {"pack": "second", "positions": "prompt"}],
    None,
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a small random model a family, with two packs and what transformers answers.

    All at once, since vLLM alters the classes of transformers whose models it runs.
    """
    return {family: make_small(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def make_small(family, folder):
    config = copy.deepcopy(tiny_model(family).config)
    for name, value in (GPT2_SIZES if family == "gpt2" else SIZES).items():
        setattr(config, name, value)
    if family == "gemma2":  # vLLM knows it with tied embeddings alone, as all releases are
        config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = type(tiny_model(family))._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder / "model")
    # As a user's: the description is that of the saved model.
    target = LanguageModel(model, tiny_tokenizer(), family)
    # Apart from the model: vLLM takes every .safetensors file in its folder for weights.
    packs = {
        name: save_pack(target, folder / name, layers, seed)
        for seed, (name, layers) in enumerate({"first": (0, 1), "second": (1, 2)}.items())
    }
    made = SimpleNamespace(
        model=str(folder / "model"),
        packs=packs,
        answers=[
            answer_of_transformers(model, packs, prompt, steering, 8)
            for prompt, steering in zip(PROMPTS, STEERINGS, strict=True)
        ],
    )
    if family in EXPORTED:
        pack = SteeringPack.load(packs["first"])
        exported = export_pack(pack, folder / "out", "weights", strength=0.3, target=target)
        made.exported = str(exported.path)
        made.answers_exported = [
            answer_of_transformers(model, packs, prompt, STEERINGS[0], 8) for prompt in PROMPTS
        ]
    return made


def check_small_model(made, tolerance=TOLERANCE, **options):
    sizes = {"skip_tokenizer_init": True, "max_model_len": 64}
    with running(made.model, made.packs, **sizes, **options) as llm:
        outputs = ask(llm, PROMPTS, STEERINGS, max_tokens=8, detokenize=False)
    for output, answer in zip(outputs, made.answers, strict=True):
        check_same(output, answer, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(small, family):
    # vLLM's attention for CPUs caps logits roughly: unsteered it differs by up to 0.002 as well.
    check_small_model(small[family], tolerance=5e-3 if family == "gemma2" else TOLERANCE)


@pytest.mark.parametrize("family", EXPORTED)
def test_exported_checkpoints_of_other_families(small, family):
    made = small[family]
    with running(made.exported, None, skip_tokenizer_init=True, max_model_len=64) as llm:
        outputs = ask(llm, PROMPTS, [None] * len(PROMPTS), max_tokens=8, detokenize=False)
    for output, answer in zip(outputs, made.answers_exported, strict=True):
        check_same(output, answer)


@pytest.mark.parametrize(
    "parallel",
    [
        "tensor_parallel_size",
        pytest.param(
            "pipeline_parallel_size",
            marks=pytest.mark.xfail(
                raises=KeyError,
                strict=True,
                reason="vLLM 0.32 on a CPU fails so with two stages, without packs as well",
            ),
        ),
    ],
)
def test_a_model_on_two_processes_is_steered(small, parallel, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    check_small_model(small["llama"], distributed_executor_backend="mp", **{parallel: 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "0" * 16}, "weights f08fe50acbe8494e instead of 0000000000000000"),
        ({"n_layers": 31}, "30 blocks and width 576, but this pack is for .* 31 blocks"),
        ({"model_type": "qwen2"}, "type llama instead of qwen2"),
    ],
)
def test_a_pack_for_another_model_is_refused_at_start(checkpoint, packs, change, message, tmp_path):
    import dataclasses

    from expertsteer import SteeringPack

    pack = SteeringPack.load(packs["first"])
    other = dataclasses.replace(pack, target=dataclasses.replace(pack.target, **change))
    path = str(other.save(tmp_path / "other"))
    with pytest.raises(PackError, match=message), running(checkpoint, {"other": path}):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packs": {}}, "packs"),
        ({"pack": {"first": "x"}}, "unknown field|no expertsteer.packs"),
        ({"packs": {"first": "nowhere.safetensors"}}, "no such file"),
    ],
)
def test_bad_settings_are_refused_at_start(checkpoint, settings, message):
    with (
        pytest.raises(ExpertSteerError, match=message),
        running(checkpoint, None, additional_config={"expertsteer": settings}),
    ):
        pass


def test_speculative_decoding_is_refused(checkpoint, packs):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with (
        pytest.raises(ParameterError, match="speculative decoding"),
        running(checkpoint, packs, speculative_config=speculative),
    ):
        pass


def test_another_version_of_vllm_is_refused(checkpoint, packs):
    code = (
        "import vllm; vllm.__version__ = '0.99.0'\n"
        f"vllm.LLM({checkpoint!r}, additional_config="
        f"{json.dumps({'expertsteer': {'packs': packs}})})"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert shown.returncode != 0
    assert "Got vLLM 0.99.0, but expected 0.32.x" in shown.stderr
