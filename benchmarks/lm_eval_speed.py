"""Time the lm-evaluation-harness's own model "hf" against ours on multiple-choice questions.

Both score the same loaded model in one process, in turn and in changing order, so that a
machine whose speed drifts does not favour either. "hf" runs with the batch size that is
quickest for it on the first items; the time of "auto" includes its search, whose length does
not depend on the number of items. The questions are a JSON-lines file with the keys
"split", "question", "choices" and "answer" (an index), such as ARC-easy. Run with:
python benchmarks/lm_eval_speed.py arc_easy.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console

from expertsteer.evaluation.harness import SteeredHarnessModel
from expertsteer.models import load_model
from expertsteer.provenance import describe_machine, package_versions

MODEL = "gemma-3-270m"
BATCH_SIZES = (1, 8, 16, "auto")


def read_items(path: Path, count: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == "test"][:count]


def requests_of(items: list[dict[str, Any]]) -> list[Instance]:
    texts = [
        (f"Question: {item['question']}\nAnswer:", f" {choice}")
        for item in items
        for choice in item["choices"]
    ]
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(texts)]


def timed(model: Any, items: list[dict[str, Any]]) -> tuple[float, list[tuple[float, bool]]]:
    requests = requests_of(items)
    begun = time.perf_counter()
    answers = model.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - begun, answers


def accuracy(items: list[dict[str, Any]], answers: list[tuple[float, bool]]) -> float:
    values = iter(value for value, _ in answers)
    right = 0
    for item in items:
        scores = [next(values) for _ in item["choices"]]
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="questions, JSON lines")
    parser.add_argument("--items", type=int, default=50, help="first ones of the test split")
    parser.add_argument("--tuning-items", type=int, default=8, help="to choose a batch size")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--max-batch-size", type=int, default=32, help='where the search of "auto" begins'
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "lm_eval_speed.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    items = read_items(options.path, options.items)
    model = load_model(MODEL, dtype="float32")
    ours = SteeredHarnessModel(model)

    def theirs(batch_size: int | str) -> HFLM:
        return HFLM(
            pretrained=model.model,
            tokenizer=model.tokenizer,
            batch_size=batch_size,
            max_batch_size=options.max_batch_size,
        )

    few = items[: options.tuning_items]
    timed(theirs(1), few[:2])  # warm-up
    timed(ours, few[:2])
    tuning = {str(size): timed(theirs(size), few)[0] for size in BATCH_SIZES}
    best = min(BATCH_SIZES, key=lambda size: tuning[str(size)])
    quickest = theirs(best)

    rounds = []
    found: list[tuple[float, bool]] = []
    expected: list[tuple[float, bool]] = []
    for n in range(options.rounds):
        if n % 2:
            seconds, found = timed(ours, items)
            hf_seconds, expected = timed(quickest, items)
        else:
            hf_seconds, expected = timed(quickest, items)
            seconds, found = timed(ours, items)
        rounds.append({"seconds": seconds, "hf_seconds": hf_seconds, "ratio": hf_seconds / seconds})
    pairs = list(zip(found, expected, strict=True))
    ratios = [one["ratio"] for one in rounds]
    result = {
        "machine": describe_machine(),
        "versions": package_versions() | {"lm_eval": version("lm_eval")},
        "threads": options.threads,
        "model": MODEL,
        "dtype": "float32",
        "items": len(items),
        "continuations": len(pairs),
        "hf_batch_size": best,
        "hf_seconds_by_batch_size": tuning,
        "tuning_items": len(few),
        "auto_max_batch_size": options.max_batch_size,
        "rounds": rounds,
        "seconds": median(one["seconds"] for one in rounds),
        "hf_seconds": median(one["hf_seconds"] for one in rounds),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "largest_log_likelihood_difference": max(abs(a - b) for (a, _), (b, _) in pairs),
        "greedy_differences": sum(a != b for (_, a), (_, b) in pairs),
        "accuracy": accuracy(items, found),
        "hf_accuracy": accuracy(items, expected),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    Console().print_json(data=result)


if __name__ == "__main__":
    main()
