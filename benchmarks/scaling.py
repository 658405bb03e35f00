"""Count the operations and bytes of collecting from large models, and the operations of `fit`.

Models of public shapes are built without memory for their weights (on torch's "meta" device),
and torch.utils.flop_counter counts a pass through a block; all blocks of a model are alike, and
collecting computes nothing behind the last. It also counts what `fit` does for a pair of layers
more, on states of small widths: an eigendecomposition as 9 n^3, a Cholesky decomposition as
n^3 / 3. The formulas of docs/scaling.md must agree. Nothing is timed. Run with:
python benchmarks/scaling.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from synthetic import layered_states
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig
from whole_fit import examples_of, states_of

from expertsteer import ExpertSteer

RESULTS = Path(__file__).parent / "results" / "scaling.json"
# As published with Llama 3.1: width, blocks, heads, key-value heads, inner width of the MLP.
SHAPES = {
    "8B": (4096, 32, 32, 8, 14336),
    "70B": (8192, 80, 64, 8, 28672),
    "405B": (16384, 126, 128, 8, 53248),
}
VOCABULARY = 128256
BYTES = 2  # bfloat16
LENGTHS = (64, 256, 1024)
# Texts, width of the expert, width of the target.
FITS = ((500, 1000, 2000), (500, 2000, 1000), (1000, 2000, 2000))
DECOMPOSITIONS = {
    torch.ops.aten._linalg_eigh: lambda shape, *_, **__: 9 * math.prod(shape) * shape[-1],
    torch.ops.aten.linalg_cholesky_ex: lambda shape, *_, **__: math.prod(shape) * shape[-1] // 3,
}


def operations(block_parameters: int, width: int, blocks: int, batch: int, length: int) -> int:
    """Return multiplications and additions of a pass over a batch of texts of equal length."""
    tokens = batch * length
    return 2 * block_parameters * tokens + 4 * blocks * width * tokens * length


def pair_operations(n: int, expert_width: int, target_width: int) -> float:
    """Return the operations of the alignment and the direction of one pair of layers."""
    return n**2 * (5.4 * expert_width + 6.2 * target_width) + 129 * n**3


def count_fit(n: int, widths: tuple[int, int], n_pairs: int) -> int:
    examples = examples_of(n)
    expert, target = (
        states_of(name, examples, layered_states(n, 2, width, seed))
        for seed, (name, width) in enumerate(zip(("expert", "target"), widths, strict=True), 1)
    )
    steer = ExpertSteer(strategy="highest_mi", n_pairs=n_pairs)
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS) as counter:
        steer.fit(target, expert, examples, progress=False)
    return counter.get_total_flops()


def measure_pair(n: int, expert_width: int, target_width: int) -> dict[str, Any]:
    widths = (expert_width, target_width)
    return {
        "n": n,
        "expert_width": expert_width,
        "target_width": target_width,
        "counted": count_fit(n, widths, 2) - count_fit(n, widths, 1),
        "formula": pair_operations(n, *widths),
    }


def measure(name: str) -> dict[str, Any]:
    width, blocks, heads, groups, inner = SHAPES[name]
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder = model.get_decoder()
    in_blocks = sum(p.numel() for p in decoder.layers.parameters() if p.ndim > 1)
    parameters = sum(p.numel() for p in model.parameters())
    counts = {}
    for length in LENGTHS:
        batch = 2048 // length
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            states = torch.empty(batch, length, width, dtype=torch.bfloat16, device="meta")
            places = torch.arange(length, device="meta")[None]
            decoder.layers[0](states, position_embeddings=decoder.rotary_emb(states, places))
        formula = operations(in_blocks, width, blocks, batch, length)
        counted = blocks * counter.get_total_flops()
        counts[length] = {
            "counted": counted,
            "formula": formula,
            "counted_a_token": counted / (batch * length),
        }
    return {
        "width": width,
        "blocks": blocks,
        "parameters": parameters,
        "matrix_parameters_in_blocks": in_blocks,
        "weight_bytes": BYTES * parameters,
        "state_bytes_a_text": BYTES * blocks * width,
        "cache_bytes_a_token": BYTES * 2 * blocks * groups * (width // heads),
        "largest_in_block_bytes_of_2048_tokens": BYTES * 2048 * (3 * inner + 4 * width),
        "operations_by_length": counts,
    }


def main() -> None:
    found = {name: measure(name) for name in SHAPES}
    for name, row in found.items():
        for length, count in row["operations_by_length"].items():
            ratio = count["counted"] / count["formula"]
            print(f"{name} {length} tokens: {count['counted']:.4e} counted / formula {ratio:.4f}")
            if abs(ratio - 1) > 0.01:
                raise SystemExit("the formula of docs/scaling.md does not hold")
    pairs = [measure_pair(*sizes) for sizes in FITS]
    for row in pairs:
        ratio = row["counted"] / row["formula"]
        print(f"{row}: counted / formula {ratio:.4f}")
        if abs(ratio - 1) > 0.02:
            raise SystemExit("the formula of docs/scaling.md for a pair does not hold")
    about = {"torch": torch.__version__, "dtype": "bfloat16", "models": found, "pairs": pairs}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
