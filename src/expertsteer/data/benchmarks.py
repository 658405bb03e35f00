"""The benchmark sets by name: where each is found and how its rows become ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertsteer.data.splits import Row, draw_splits
from expertsteer.errors import DataError

__all__ = ["BENCHMARKS", "Benchmark", "HubSource", "complete_splits"]

_Convert = Callable[[Mapping[str, Any]], dict[str, Any] | None]

# The division of a benchmark is the same in every run, whatever the run's own seed.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class HubSource:
    """A benchmark's place on the Hugging Face hub.

    Attributes
    ----------
    repository : str
        "owner/name".
    convert : callable
        From a row of the hub to one of ours; None leaves the row out.
    configs : tuple of str
        Configurations that make up the benchmark; empty for the default one.
    file : str
        The file of the repository to read, where it has no configuration of its own.
    splits : mapping of str to str
        From a split of the hub to the one it serves as; others are not read.
    """

    repository: str
    convert: _Convert
    configs: tuple[str, ...] = ()
    file: str = ""
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )

    def convert_rows(
        self, name: str, config: str, split: str, rows: Iterable[Mapping[str, Any]]
    ) -> list[Row]:
        """Return the rows of one split of the hub in our columns.

        Raises
        ------
        DataError
            If a column is missing.
        """
        if split not in self.splits:
            return []
        origin = "-".join(part for part in (name, config, split) if part)
        found: list[Row] = []
        for number, row in enumerate(rows):
            place = f"{self.repository}, {f'{config}, ' if config else ''}{split} row {number + 1}"
            try:
                converted = self.convert(row)
            except KeyError as error:
                raise DataError(
                    f"{place}: got no column {error}, but expected the columns that {name} had "
                    f"when this version was written. Give a file {name}.jsonl in their place."
                ) from error
            if converted is not None:
                ours = {"id": f"{origin}-{number}", "split": self.splits[split]}
                found.append((place, ours | converted))
        return found


@dataclass(frozen=True)
class Benchmark:
    """A benchmark set.

    Attributes
    ----------
    name : str
    domain : {"medical", "financial", "mathematical", "general", "behaviour"}
    kind : str
        What its rows are where questions are asked for, one of `KINDS`.
    hub : HubSource or None
        None where no place on the hub is known.
    columns : mapping of str to str
        From a field to the column of its rows that stands for it.
    """

    name: str
    domain: str
    kind: str = "multiple_choice"
    hub: HubSource | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def complete_splits(rows: list[Row]) -> list[Row]:
    """Return rows with train, validation and test among them, the hub's own division kept.

    Where there is one split only, 40, 20 and 40 % of it are train, validation and test.
    Where validation alone is missing, it is 20 % of train. The draw has a fixed seed.
    """
    present = {row["split"] for _, row in rows}
    if len(present) == 1:
        divided, fractions = present.pop(), (0.4, 0.2, 0.4)
    elif "validation" not in present:
        divided, fractions = "train", (0.8, 0.2, 0.0)
    else:
        return rows
    members = [index for index, (_, row) in enumerate(rows) if row["split"] == divided]
    drawn = draw_splits(len(members), fractions, np.random.default_rng(_SPLIT_SEED))
    completed = list(rows)
    for index, split in zip(members, drawn, strict=True):
        place, row = rows[index]
        completed[index] = (place, row | {"split": split})
    return completed


def _lettered_choices(row: Mapping[str, Any]) -> dict[str, Any] | None:
    key, labels = row["answerKey"], list(row["choices"]["label"])
    if not key:  # hidden in CommonsenseQA's test split
        return None
    return {
        "question": row["question"],
        "choices": list(row["choices"]["text"]),
        "answer": labels.index(key) if key in labels else key,
    }


def _mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("subject", "question", "choices", "answer")}


def _medqa(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": row["sent1"],
        "choices": [row[f"ending{n}"] for n in range(4)],
        "answer": row["label"],
    }


def _medmcqa(row: Mapping[str, Any]) -> dict[str, Any] | None:
    if row["cop"] is None or row["cop"] < 0:  # hidden in the test split
        return None
    return {
        "id": f"medmcqa-{row['id']}",
        "question": row["question"],
        "choices": [row[f"op{letter}"] for letter in "abcd"],
        "answer": row["cop"],
    }


def _pubmedqa(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, decision = ["yes", "no", "maybe"], row["final_decision"]
    return {
        "id": f"pubmedqa-{row['pubid']}",
        "context": " ".join(row["context"]["contexts"]),
        "question": row["question"],
        "choices": choices,
        "answer": choices.index(decision) if decision in choices else decision,
    }


def _twitter(row: Mapping[str, Any]) -> dict[str, Any]:
    # The hub counts bearish, bullish, neutral.
    return {
        "context": row["text"],
        "question": "What is the sentiment of this financial news?",
        "choices": ["negative", "neutral", "positive"],
        "answer": {0: 0, 1: 2, 2: 1}.get(row["label"], row["label"]),
    }


def _xfinbench(row: Mapping[str, Any]) -> dict[str, Any] | None:
    key = str(row["ground_truth"]).strip()
    if row["task"] == "bool":
        choices = ["True", "False"]
        answer = {"1": 0, "0": 1}.get(key.removesuffix(".0"))
    elif row["task"] == "mcq":
        lines = re.split(r"\n|\\n", str(row["choice"]).strip())
        choices = [re.sub(r"^[A-Z]\.\s*", "", line.strip()) for line in lines if line.strip()]
        answer = "ABCDEFGH".find(key) if len(key) == 1 else None
    else:
        return None  # a calculation
    if row["figure"] or answer is None or not 0 <= answer < len(choices):
        return None
    return {
        "id": f"xfinbench-{row['id']}",
        "subject": row["task"],
        "question": row["question"],
        "choices": choices,
        "answer": answer,
    }


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    rationale, _, answer = row["answer"].rpartition("####")
    return {
        "question": row["question"],
        # Without the marks of the calculator: <<48/2=24>>.
        "rationale": re.sub(r"<<[^<>]*>>", "", rationale).strip(),
        "answer": answer.strip().replace(",", ""),
    }


def _aqua_rat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": row["question"],
        "choices": [re.sub(r"^\s*[A-E]\s*\)\s*", "", option) for option in row["options"]],
        "answer": "ABCDE".find(row["correct"]),
    }


def _math500(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": row["problem"],
        "rationale": row["solution"],
        "answer": row["answer"],
        "subject": row["subject"],
        "level": row["level"],
    }


def _persona(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": row["statement"],
        "prompt": row["question"],
        "matches": row["answer_matching_behavior"].strip(),
    }


def _mmlu_set(domain: str, *subjects: str) -> Benchmark:
    splits = {"dev": "train", "validation": "validation", "test": "test"}
    hub = HubSource("cais/mmlu", _mmlu, configs=subjects, splits=splits)
    return Benchmark(f"mmlu_{domain}", domain, hub=hub)


def _persona_set(behaviour: str) -> Benchmark:
    file = f"persona/{behaviour.replace('_', '-')}.jsonl"
    hub = HubSource("Anthropic/model-written-evals", _persona, file=file)
    return Benchmark(f"persona_{behaviour}", "behaviour", "statement", hub)


# The test split's answers are hidden, or there is none; figures come from validation, as is
# usual for these sets.
_VALIDATION_AS_TEST = {"train": "train", "validation": "test"}

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("medqa", "medical", hub=HubSource("GBaker/MedQA-USMLE-4-options-hf", _medqa)),
        Benchmark(
            "medmcqa",
            "medical",
            hub=HubSource("openlifescienceai/medmcqa", _medmcqa, splits=_VALIDATION_AS_TEST),
        ),
        Benchmark(
            "pubmedqa",
            "medical",
            hub=HubSource("qiaojin/PubMedQA", _pubmedqa, configs=("pqa_labeled",)),
        ),
        _mmlu_set(
            "medical",
            "anatomy",
            "clinical_knowledge",
            "college_biology",
            "college_medicine",
            "medical_genetics",
            "nutrition",
            "professional_medicine",
            "virology",
        ),
        Benchmark(
            "twitter_financial_news_sentiment",
            "financial",
            hub=HubSource(
                "zeroshot/twitter-financial-news-sentiment", _twitter, splits=_VALIDATION_AS_TEST
            ),
        ),
        Benchmark(
            "xfinbench",
            "financial",
            hub=HubSource(
                "Zhihan/XFinBench", _xfinbench, splits={"validation": "train", "test": "test"}
            ),
        ),
        _mmlu_set(
            "financial",
            "business_ethics",
            "econometrics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "management",
            "marketing",
            "professional_accounting",
        ),
        Benchmark(
            "gsm8k",
            "mathematical",
            "open_answer",
            HubSource("openai/gsm8k", _gsm8k, configs=("main",)),
        ),
        Benchmark(
            "aqua_rat",
            "mathematical",
            hub=HubSource("deepmind/aqua_rat", _aqua_rat, configs=("raw",)),
        ),
        Benchmark(
            "math500",
            "mathematical",
            "open_answer",
            HubSource("HuggingFaceH4/MATH-500", _math500),
        ),
        _mmlu_set(
            "mathematical",
            "abstract_algebra",
            "college_mathematics",
            "elementary_mathematics",
            "high_school_mathematics",
            "high_school_statistics",
        ),
        Benchmark(
            "arc_easy",
            "general",
            hub=HubSource("allenai/ai2_arc", _lettered_choices, configs=("ARC-Easy",)),
        ),
        Benchmark(
            "arc_challenge",
            "general",
            hub=HubSource("allenai/ai2_arc", _lettered_choices, configs=("ARC-Challenge",)),
        ),
        Benchmark(
            "commonsenseqa",
            "general",
            hub=HubSource("tau/commonsense_qa", _lettered_choices, splits=_VALIDATION_AS_TEST),
        ),
        _mmlu_set(
            "general",
            "global_facts",
            "high_school_geography",
            "high_school_world_history",
            "international_law",
            "logical_fallacies",
            "philosophy",
            "sociology",
            "us_foreign_policy",
        ),
        Benchmark("true_false_facts", "behaviour", "true_false"),
        Benchmark("emotions", "behaviour", "labelled", columns={"label": "emotion"}),
        *map(_persona_set, ("agreeableness", "extraversion", "interest_in_math", "risk_averse")),
    )
}
