"""Compare the throughput of vLLM with the plugin, steering, against vLLM without.

Three engines on one model live in this process: a stock one, one that holds four packs
and steers every request, each by another mixture of strengths and positions, and a second
stock one, whose ratio to the first is noise alone. All answer the same prompts, in turn and
in changing order, so that a machine whose speed drifts does not favour any. Time is counted
twice: by the clock, and as processor time of this process, which other programs on the
machine disturb less. Runs in the environment that `make test-vllm` builds:
.venv-vllm/bin/python benchmarks/vllm_throughput.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

# One process: the processor time of an engine in another one would not be seen.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import vllm
from rich.console import Console
from vllm import LLM, SamplingParams

from expertsteer import LanguageModel, SteeringPack, load_model
from expertsteer.evaluation.intervals import statistic_interval
from expertsteer.provenance import describe_machine, package_versions

MODEL = "smollm2-135m-instruct"
LAYERS = ((9, 14), (14, 20), (5,), tuple(range(10, 20)))
POSITIONS = ("all", "generated", "last", "prompt")


def make_packs(target: LanguageModel, folder: Path) -> dict[str, str]:
    packs = {}
    width = target.description.width
    for number, layers in enumerate(LAYERS):
        torch.manual_seed(number)
        vectors = {
            layer: torch.nn.functional.normalize(torch.randn(width), dim=0) for layer in layers
        }
        pack = SteeringPack(vectors, dict.fromkeys(layers, 60.0), target.description)
        packs[f"pack{number}"] = str(pack.save(folder / f"pack{number}"))
    return packs


def make_engine(model: str, packs: dict[str, str], arguments: argparse.Namespace) -> LLM:
    return LLM(
        model,
        dtype="float32",
        enforce_eager=not arguments.compile,
        max_model_len=256,
        max_num_seqs=arguments.requests,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        additional_config={"expertsteer": {"packs": packs}} if packs else {},
    )


def steering_of(request: int) -> dict[str, Any]:
    return {
        "pack": f"pack{request % len(LAYERS)}",
        "strength": 0.05 + 0.01 * request,
        "positions": POSITIONS[request // len(LAYERS) % len(POSITIONS)],
    }


def timed(engine: LLM, arguments: argparse.Namespace, *, steered: bool) -> dict[str, float]:
    prompts: Any = [
        {"prompt_token_ids": list(range(100 + n, 100 + n + arguments.prompt_tokens))}
        for n in range(arguments.requests)
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=arguments.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"steering": steering_of(n)} if steered else None,
        )
        for n in range(arguments.requests)
    ]
    clock, processor = time.perf_counter(), time.process_time()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    seconds = {
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - processor,
    }
    assert all(len(o.outputs[0].token_ids) == arguments.tokens for o in outputs)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=32, help="at once")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="generated, by request")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/vllm_throughput.json"
    )
    arguments = parser.parse_args()
    # Apart from each other: vLLM takes every .safetensors file beside a model for weights.
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as beside:
        target = load_model(MODEL, dtype="float32")
        target.model.save_pretrained(scratch)
        target.tokenizer.save_pretrained(scratch)
        packs = make_packs(target, Path(beside))
        engines = {
            "stock": make_engine(scratch, {}, arguments),
            "steered": make_engine(scratch, packs, arguments),
            # What differs between two engines that are the same.
            "stock again": make_engine(scratch, {}, arguments),
        }
        rounds = []
        for number in range(-1, arguments.rounds):  # the first one warms up
            names = list(engines)
            names = names[number % len(names) :] + names[: number % len(names)]
            times = {
                name: timed(engines[name], arguments, steered=name == "steered") for name in names
            }
            if number >= 0:
                rounds.append(times)
    result = {
        "machine": describe_machine(),
        "versions": package_versions() | {"vllm": vllm.__version__},
        "threads": torch.get_num_threads(),
        "model": MODEL,
        "dtype": "float32",
        "compiled": arguments.compile,
        "requests": arguments.requests,
        "prompt_tokens": arguments.prompt_tokens,
        "generated_tokens": arguments.tokens,
        "packs": len(LAYERS),
        "steered_layers": len(set().union(*LAYERS)),
        "rounds": rounds,
    }
    for kind in ("seconds", "processor_seconds"):
        medians = {name: median(one[name][kind] for one in rounds) for name in engines}
        ratios = {
            name: sorted(one[name][kind] / one["stock"][kind] for one in rounds)
            for name in ("steered", "stock again")
        }
        result[kind] = {
            **medians,
            "over_stock": {name: median(values) for name, values in ratios.items()},
            "over_stock_interval": {
                name: statistic_interval(
                    lambda places, values=values: median(values[n] for n in places), len(values)
                )
                for name, values in ratios.items()
            },
            "over_stock_by_round": ratios,
        }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Console().print_json(data={k: result[k] for k in ("seconds", "processor_seconds")})


if __name__ == "__main__":
    main()
