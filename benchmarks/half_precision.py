"""What collecting in bfloat16 takes and loses, against float32.

The loss is that of the states, and of the mean-difference direction of the shipped texts'
two classes, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timing import OURS, Case, Goal, main

from expertsteer import collect_states, load_examples, load_model
from expertsteer.data.shipped import shipped_file

HALF = "expertsteer, bfloat16"
COSINE = "least cosine of a direction"


def balanced(n: int) -> tuple[list[str], torch.Tensor]:
    """Return texts of both classes in turn, and their labels."""
    examples = load_examples(shipped_file("sentiment.jsonl"))
    sides = [
        [t for t, y in zip(examples.answers, examples.labels, strict=True) if y == side]
        for side in (1, -1)
    ]
    texts = [text for pair in zip(*sides, strict=False) for text in pair][:n]
    return texts, torch.tensor([1.0, -1.0]).repeat(len(texts) // 2)


def prepare(name: str, n: int) -> Mapping[str, Callable[[], Any]]:
    texts, _ = balanced(n)
    return {
        way: partial(collect_states, load_model(name, dtype=dtype), texts, progress=False)
        for way, dtype in ((OURS, "float32"), (HALF, "bfloat16"))
    }


def compare(n: int, returned: dict[str, Any]) -> dict[str, float]:
    full, half = (returned[way].values.float() for way in (OURS, HALF))
    _, labels = balanced(n)
    directions = [torch.einsum("n,nld->ld", labels, values) for values in (full, half)]
    relative = (half - full).norm(dim=-1) / full.norm(dim=-1)
    return {
        "median relative difference of a state": float(relative.median()),
        COSINE: float(torch.nn.functional.cosine_similarity(*directions, dim=-1).min()),
    }


def cases(quick: bool) -> list[Case]:
    n = 8 if quick else 64
    return [
        Case(
            name=name,
            title=f"States of {n} texts in bfloat16, `{name}`",
            sizes={"texts": n, "layers": "all"},
            prepare=partial(prepare, name, n),
            goals=(Goal(COSINE, at_least=0.99),),
            compare=partial(compare, n),
            helpers=(HALF,),
        )
        for name in (
            ["smollm2-135m-instruct"] if quick else ["gemma-3-270m", "smollm2-135m-instruct"]
        )
    ]


if __name__ == "__main__":
    main(__file__, __doc__, cases)
