"""Two tiny saved models with tokenizers of their own, files they can read, and a way to run."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from expertsteer.cli import show
from expertsteer.cli.app import main
from helpers import CHAT_TEMPLATE

POSITIVE = ["good", "great", "happy", "lovely", "nice", "fine"]
NEGATIVE = ["bad", "poor", "sad", "awful", "nasty", "ugly"]
NEUTRAL = [
    "the",
    "a",
    "of",
    "in",
    "was",
    "is",
    "he",
    "she",
    "it",
    "we",
    "book",
    "day",
    "meal",
    "film",
    "news",
    "trip",
    "house",
    "very",
    "then",
    "so",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
N_TEXTS = 80


def word_tokenizer(words: list[str], bos: bool, template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a word."""
    raw = Tokenizer(
        WordLevel({word: n for n, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece(prefix="")
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if bos:
        tokenizer.pad_token = "<pad>"
    tokenizer.chat_template = template
    return tokenizer


def save_model(
    folder: Path,
    family: str,
    words: list[str],
    *,
    width: int,
    layers: int,
    seed: int = 0,
    template: str | None = None,
    context: int = 64,
) -> str:
    """Save a tiny random model with a tokenizer of these words; return the folder's name."""
    config = AutoConfig.for_model(
        family,
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    word_tokenizer(words, bos=family == "llama", template=template).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class World:
    """Saved models and files that all tests of the command line read and none changes."""

    target: str
    expert: str
    fine_tune: str
    templated_expert: str
    encoder: str
    data: str
    words: str
    text: str

    @property
    def models(self) -> list[str]:
        return ["--target", self.target, "--expert", self.expert]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    vocabulary = sorted({*POSITIVE, *NEGATIVE, *NEUTRAL})

    def sentence(last: str | None = None) -> str:
        words = rng.choices(NEUTRAL, k=rng.randint(4, 9))
        return " ".join([*words, last] if last else words)

    rows = []
    for n in range(N_TEXTS):
        label = n % 2
        rows.append({"text": sentence(rng.choice(POSITIVE if label else NEGATIVE)), "label": label})
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = root / "words.json"
    words.write_text(
        json.dumps(
            {
                "prompts": [sentence() for _ in range(6)],
                "positive_words": POSITIVE,
                "negative_words": NEGATIVE,
                "plain_sentences": [sentence() for _ in range(6)],
                "generation_prompts": [sentence() for _ in range(2)],
            }
        )
    )
    text = root / "plain.txt"
    text.write_text("\n".join(sentence() for _ in range(60)))

    bert_words = word_tokenizer(vocabulary, bos=True, template=None)
    bert = BertConfig(
        vocab_size=len(bert_words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(bert).save_pretrained(root / "bert")
    bert_words.save_pretrained(root / "bert")

    shape = {"width": 32, "layers": 3}
    shuffled = rng.sample(vocabulary, len(vocabulary))
    other_template = CHAT_TEMPLATE.replace("<assistant>", "then so") + " "
    return World(
        target=save_model(root / "llama", "llama", vocabulary, **shape, template=CHAT_TEMPLATE),
        expert=save_model(root / "gpt2", "gpt2", shuffled, width=24, layers=4),
        fine_tune=save_model(root / "tuned", "llama", vocabulary, **shape, seed=1),
        templated_expert=save_model(
            root / "gpt2-chat", "gpt2", shuffled, width=24, layers=4, template=other_template
        ),
        encoder=str(root / "bert"),
        data=str(data),
        words=str(words),
        text=str(text),
    )


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left behind."""

    code: int | None
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Run = Callable[..., Outcome]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """Return a function that runs a command line in this process, in an empty folder."""
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for console in (show.answer, show.progress):
        monkeypatch.setattr(console, "width", 200)

    def runner(*args: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["expertsteer", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(stop.value.code, captured.out, captured.err)

    return runner


@pytest.fixture
def work(run: Run) -> Path:
    """Return the folder that runs happen in, empty before the first."""
    return Path.cwd()


@pytest.fixture(scope="session")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pack, an alignment and saved states, made once for all tests."""
    from expertsteer import ExpertSteer, collect_states, fit_alignment, load_examples, load_model
    from expertsteer.data import load_plain_text, render

    folder = tmp_path_factory.mktemp("made")
    examples = load_examples(world.data)
    target, expert = load_model(world.target), load_model(world.expert)
    steer = ExpertSteer(strategy="lowest_mi")
    steer.fit(target, expert, examples, progress=False).save(folder / "pack.safetensors")
    alignment = fit_alignment(target, expert, load_plain_text(world.text), progress=False)
    alignment.save(folder / "alignment.safetensors")
    for name, model in (("target", target), ("expert", expert)):
        texts = render(examples.for_fitting(), model.tokenizer)
        collect_states(model, texts, save_to=folder / name, progress=False)
    return folder
