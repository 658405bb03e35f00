"""What an effect is read from: neutral prompts, and words that show the behaviour."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from expertsteer.data.readers import read_text
from expertsteer.errors import DataError

__all__ = ["EffectWords"]


@dataclass(frozen=True)
class EffectWords:
    """Prompts and words that show whether steering worked, and text that shows its price.

    Attributes
    ----------
    prompts : list of str
        Neutral beginnings that end right before a telling word.
    positive_words, negative_words : list of str
        Words of the wanted behaviour and of its opposite.
    plain_sentences : list of str
        Sentences that have nothing to do with it; perplexity is measured on them.
    generation_prompts : list of str
        Neutral beginnings to continue, for people to read; may be left out.
    """

    prompts: list[str]
    positive_words: list[str]
    negative_words: list[str]
    plain_sentences: list[str]
    generation_prompts: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | Path) -> EffectWords:
        """Read a JSON (``.json``) or YAML file with these lists.

        Raises
        ------
        DataError
            If the file is missing or unreadable, a list is missing or empty, or a word
            stands on both sides.
        """
        # JSON is nearly YAML: not its tabs, nor its escapes of characters such as emojis.
        parse = json.loads if Path(path).suffix.lower() == ".json" else yaml.safe_load
        text = read_text(path)
        try:
            values = parse(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"Got {path}, but it is neither JSON nor YAML: {reason}") from error
        names = [entry.name for entry in fields(cls)]
        if not isinstance(values, dict) or set(values) - set(names):
            raise DataError(f"Got {path}, but expected the lists {', '.join(names)}.")
        for name in names:
            if name == "generation_prompts" and name not in values:
                continue
            items = values.get(name)
            if (
                not isinstance(items, list)
                or not items
                or not all(isinstance(item, str) and item.strip() for item in items)
            ):
                raise DataError(f"Got {path} with {name}={items!r}, but expected a list of texts.")
        both = set(values["positive_words"]) & set(values["negative_words"])
        if both:
            raise DataError(
                f"Got {path} with {sorted(both)[0]!r} as positive and negative word, but expected "
                "it in one of the lists. Remove it from the other."
            )
        return cls(**values)
