"""Bad input: one line that names the value and what was expected, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertsteer import States
from expertsteer.tensor_file import PACK_KIND, save_tensor_file
from helpers import contents

ROWS = [
    {"text": f"the day was {word}", "label": n % 2} for n, word in enumerate(["good", "bad"] * 40)
]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def refused(run, work):
    """Return a function that runs a command and checks that it is refused as it should be."""

    def check(*args: object, says: tuple[str, ...], code: int = 1) -> None:
        before = contents(work)
        outcome = run(*args)
        assert outcome.code == code, outcome.err
        assert len(outcome.errors) == 1, outcome.err
        for part in says:
            assert part in outcome.errors[0]
        assert not outcome.out
        assert contents(work) == before

    return check


@pytest.fixture
def no_models(monkeypatch):
    """Let a test fail if a model is loaded: what is wrong could be told before."""

    def load(*_, **__):
        pytest.fail("a model was loaded first")

    monkeypatch.setattr("expertsteer.models.loading.AutoModelForCausalLM.from_pretrained", load)


# Labelled data --------------------------------------------------------------------------

ONE_CLASS = [row | {"label": 1} for row in ROWS]
LABEL_7 = [*ROWS[:4], {"text": "so", "label": 7}]


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("missing.jsonl", None, (), ("missing.jsonl", "no such file")),
        ("binary.jsonl", b"\xff\xfe\x00{}", (), ("binary.jsonl", "UTF-8")),
        ("empty.jsonl", "", (), ("empty.jsonl", "empty", "at least one row")),
        ("notes.txt", "good\n", (), ("notes.txt", ".jsonl", ".csv", ".parquet")),
        ("bad.jsonl", lines(ROWS[:2]) + '{"text": \n', (), ("bad.jsonl:3", "JSON")),
        ("bad.csv", "text,label\nso,1\nso,1,2\n", (), ("bad.csv:3",)),
        ("one.jsonl", lines(ONE_CLASS), (), ("0 negative rows", "at least 8 of each")),
        ("few.jsonl", lines(ROWS[:12]), (), ("4 positive and 4 negative", "at least 8 of each")),
        ("label.jsonl", lines(LABEL_7), (), ("label.jsonl:5", "label 7", "1 or 0")),
        ("other.jsonl", lines([{"body": "so"}]), (), ("columns body", "text, label")),
        (
            "column.jsonl",
            lines(ROWS),
            ("--column", "label=mood"),
            ("column 'mood'", "columns label, text"),
        ),
        ("field.jsonl", lines(ROWS), ("--column", "mood=label"), ("'mood'", "expected one of")),
        ("equals.jsonl", lines(ROWS), ("--column", "label"), ("--column label", "FIELD=COLUMN")),
        (
            "kind.jsonl",
            lines(ROWS),
            ("--kind", "pairs"),
            ("columns label, text", "pairs: positive"),
        ),
        ("role.jsonl", lines(ROWS), ("--role", "test"), ("--role test", "ROLE=SPLIT")),
        ("split.jsonl", lines(ROWS), ("--role", "test=dev"), ("split 'dev' as test", "none")),
        ("twice.jsonl", lines(ROWS), ("--role", "test=a", "--role", "test=b"), ("test=... twice",)),
        ("arc_esy", None, (), ("arc_esy", "no such file", "medqa", "arc_easy")),
        (
            "value.jsonl",
            lines(ROWS),
            ("--positive", "joy"),
            ("0 positive and 48 negative rows", "at least 8"),
        ),
        (
            "values.jsonl",
            lines(ROWS),
            ("--positive", "joy", "--negative", "fear"),
            ("'joy'", "'fear'", "labels are 0, 1"),
        ),
        ("lone.jsonl", lines(ROWS), ("--negative", "0"), ("negative='0' without positive",)),
    ],
)
def test_labelled_data_that_cannot_be_used(world, refused, work, name, content, options, says):
    if content is not None:
        (work / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (work / "pack.safetensors").write_text("the pack of an earlier run")
    refused("fit", *world.models, "-d", name, *options, says=says)


def test_a_benchmark_without_a_place_on_the_hub(world, refused, monkeypatch):
    monkeypatch.delenv("EXPERTSTEER_BENCHMARKS", raising=False)
    refused("fit", *world.models, "-d", "emotions", says=("emotions", "no known place", ".jsonl"))


def test_a_folder_in_place_of_data(world, refused, work):
    refused("fit", *world.models, "-d", work, says=(str(work), "folder", "expected a file"))


# Plain text, words and prompts ----------------------------------------------------------


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ("text.txt", "no such file")),
        ("\n \n", ("text.txt", "empty", "expected some text")),
        ("We was so happy then.\n", ("1 sentences", "expected 1500")),
    ],
)
@pytest.mark.parametrize("command", ["align", "fit", "collect", "compare"])
def test_plain_text_that_cannot_be_used(world, refused, work, command, content, says):
    if content is not None:
        (work / "text.txt").write_text(content)
    args = {
        "align": ["align", *world.models],
        "fit": ["fit", *world.models, "-d", world.data],
        "collect": ["collect", "-m", world.target, "-o", "states"],
        "compare": ["compare", *world.models, "-d", world.data, "-w", world.words],
    }[command]
    refused(*args, "--text", "text.txt", says=says)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ("words.json", "no such file")),
        ("{", ("words.json", "neither JSON nor YAML")),
        ("{}", ("words.json", "prompts=None", "list of texts")),
        ('{"words": []}', ("words.json", "lists prompts, positive_words")),
    ],
)
def test_effect_words_that_cannot_be_used(world, refused, work, content, says):
    if content is not None:
        (work / "words.json").write_text(content)
    refused("compare", *world.models, "-d", world.data, "-w", "words.json", says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), ("no prompts", "--prompt-file")),
        (("--prompt-file", "nowhere.txt"), ("nowhere.txt", "no such file")),
        (("we", " "), ("an empty one", "some text in each")),
        (("we " * 70,), ("tokens of text", "holds 64")),
        (("we", "--temperature", "inf"), ("temperature=inf", "finite number")),
        (("we", "--repetition-penalty", 0), ("repetition_penalty=0", "positive finite")),
    ],
)
def test_prompts_and_sampling_that_cannot_be_used(world, made, refused, options, says):
    pack = made / "pack.safetensors"
    refused("generate", "-t", world.target, "-p", pack, *options, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], ("none of --data, --prompts",)),
        (["--data", "{data}", "--prompts", "{words}"], ("Got --data and --prompts of",)),
        (["--data", "{data}", "--judge", "vader"], ("--judge with --data",)),
        (["--data", "{data}", "--temperature", 1], ("--temperature with --data",)),
        (["--prompts", "{words}", "--letters"], ("--letters with --prompts",)),
        (["--prompts", "empty.txt"], ("empty.txt", "empty")),
        (["--prompts", "missing.txt"], ("missing.txt", "no such file")),
        (["--prompts", "{words}", "--judge", "mood"], ("'mood'", "vader")),
        (["--prompts", "{words}", "--judge", "one.jsonl"], ("0 negative", "one.jsonl")),
        (
            ["--prompts", "{words}", "--judge", "{data}", "--judge-encoder", "{encoder}"],
            ("judge trained on", "the same data"),
        ),
        (["--prompts", "{words}", "--fluency-model", "{target}"], ("which is the target",)),
        (["--prompts", "{words}", "--n-samples", 2], ("temperature=0",)),
        (["--prompts", "{words}", "--top-p", 2, "--temperature", 1], ("top_p=2",)),
        (["--prompts", "{words}", "--max-new-tokens", 64], ("max_new_tokens=64", "holds 64")),
    ],
)
def test_generations_that_cannot_be_judged(world, made, refused, work, options, says):
    (work / "empty.txt").write_text("\n")
    (work / "one.jsonl").write_text(lines([row | {"label": 1} for row in ROWS]))
    filled = [str(option).format(**vars(world)) for option in options]
    pack = made / "pack.safetensors"
    refused("evaluate", "-t", world.target, "-p", pack, "--n-plain", 0, *filled, says=says)


def test_texts_longer_than_the_context_are_counted_and_cut(world, run, work):
    long = [
        {"text": f"{'we was ' * 40} {n % 7}", "label": n % 2, "split": "train"} for n in range(3)
    ]
    short = [row | {"split": "train"} for row in ROWS[:5]]
    (work / "long.jsonl").write_text(lines([*long, *short]))
    outcome = run("collect", "-m", world.target, "-d", "long.jsonl", "-o", "states")
    assert outcome.code == 0
    (warning,) = [line for line in outcome.err.splitlines() if line.startswith("warning:")]
    assert "3 of 8 texts are longer than the 64 tokens" in warning
    assert len(States.load("states").values) == 8


# Models ---------------------------------------------------------------------------------


def collects(world, model, *options):
    return ("collect", "-m", model, "-d", world.data, "-o", "states", *options)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./nowhere", ("./nowhere", "expected a folder that exists")),
        ("no-such-model", ("no-such-model", "hub id", "gemma-3-270m")),
        ("nowhere.gguf", ("nowhere.gguf", "expected a file that exists")),
        ("work", ("/work", "expected one that transformers")),
        ("encoder", ("encoder-only model 'bert'", "decoder-only")),
    ],
)
def test_models_that_cannot_be_used(world, refused, work, model, says):
    name = {"work": str(work), "encoder": world.encoder}.get(model, model)
    refused(*collects(world, name), says=says)


def test_a_chat_template_that_a_model_does_not_have(world, refused, made):
    refused(*collects(world, world.expert, "--chat-template"), says=("chat template", world.expert))
    templates = ["--target", world.fine_tune, "--expert", world.templated_expert, "--chat-template"]
    refused("fit", *templates, "-d", world.data, says=("chat template", world.fine_tune))
    tuned = ["-t", world.fine_tune, "-p", made / "pack.safetensors", "--force", "--chat-template"]
    refused("generate", *tuned, "we", says=("chat template", world.fine_tune))


def test_a_model_and_its_states_at_once_or_neither(world, made, refused):
    data = ["-d", world.data]
    both = [*world.models, "--expert-states", made / "expert"]
    refused("fit", *both, *data, says=("--expert and --expert-states", "one of them"))
    refused("fit", "-e", world.expert, *data, says=("--target and --target-states",))
    refused("collect", "-m", world.target, "-o", "states", says=("--data and --text",))


# States ---------------------------------------------------------------------------------


def test_states_that_are_not_finite(world, refused, work, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world.target)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(world.target).save_pretrained(tmp_path / "broken")
    broken = ["--target", tmp_path / "broken", "--expert", world.expert, "-d", world.data]
    refused("fit", *broken, says=("NaN or infinite states", "layer 0", "expected finite"))


def test_states_that_do_not_exist(world, refused):
    states = ["-e", world.expert, "--target-states", "nowhere", "--strategy", "lowest_mi"]
    refused("fit", *states, "-d", world.data, says=("nowhere", "expected saved states"))


def test_states_of_another_model_than_the_alignment(world, made, refused):
    alignment = ["--alignment", made / "alignment.safetensors", "--strategy", "lowest_mi"]
    refused(
        *["fit", "--expert-states", made / "target", *alignment, "-d", world.data],
        says=("expected one expert", "3 blocks instead of 4, width 32 instead of 24"),
    )


def test_states_of_another_file(world, made, refused, work):
    (work / "other.jsonl").write_text(lines(ROWS))
    states = ["--expert-states", made / "expert", "--target-states", made / "target"]
    refused(
        *["fit", *states, "-d", "other.jsonl", "--strategy", "lowest_mi"],
        says=("states of 64 texts", "same file"),
    )


def test_validating_needs_the_target_to_run(world, made, refused):
    states = ["--expert-states", made / "expert", "--target-states", made / "target"]
    refused("fit", *states, "-d", world.data, says=("strategy='validated'", "lowest_mi"))


@pytest.mark.parametrize("command", ["fit", "study"])
def test_a_cache_that_cannot_be_written_is_told(world, refused, work, command):
    (work / "file").touch()
    cache = ("--cache-dir", work / "file" / "below")
    says = ("file/below", "for states", "can be written", "Not a directory")
    if command == "fit":
        refused("fit", *world.models, "-d", world.data, *cache, "-o", "pack", says=says)
        return
    benchmark = f"{{name: texts, data: {world.data}, kind: labelled}}"
    study = f"targets: [{world.target}]\nbenchmarks: [{benchmark}]\nmethods: [mean_difference]"
    Path("study.yaml").write_text(f"{study}\nplain_text: {world.text}\nn_plain: 4\n")
    refused("study", "study.yaml", *cache, "-o", "out", says=says)


def test_too_little_memory_is_told_before_the_work(world, refused, monkeypatch):
    memory = SimpleNamespace(available=1000)
    psutil = SimpleNamespace(virtual_memory=lambda: memory)
    monkeypatch.setattr("expertsteer.states.collecting.psutil", psutil)
    # What is saved while it is collected needs none.
    fit = ("fit", *world.models, "-d", world.data, "--no-cache", "-o", "pack")
    refused(*fit, says=("free memory", "64 texts at"))


# Layers, strengths, options -------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("4:0", ("4", "3")),
        ("0:3", ("3", "2")),
    ],
)
@pytest.mark.parametrize("command", ["fit", "align"])
def test_layers_out_of_range(world, refused, command, pair, says):
    args = {
        "fit": ["fit", "-d", world.data, "--strategy", "explicit"],
        "align": ["align", "--text", world.text, "--n-beginnings", 30],
    }[command]
    refused(*args, *world.models, "--pair", pair, "-o", "out", says=says)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("pair", ["3", "3:1:2", "a:b", ":", "-1:2", "3-1", "1.5:2"])
@pytest.mark.parametrize("command", ["fit", "align"])
def test_pairs_that_are_none(world, refused, command, pair):
    options = {"fit": ["-d", world.data, "--strategy", "explicit"], "align": []}[command]
    refused(
        *[command, *world.models, *options, f"--pair={pair}"],
        says=(f"--pair {pair}", "EXPERT:TARGET, such as 18:9"),
    )


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strategy", "explicit"), ("strategy='explicit' without pairs",)),
        (("--pair", "0:0"), ("with pairs", "strategy='explicit'")),
        (("--strength", 0), ("strength=0", "another number")),
        (("--strength", "nan"), ("strength=nan", "finite")),
        (("--strength", "-inf"), ("strength=-inf", "finite")),
        (("--bandwidth", 0), ("bandwidth=0", "positive")),
        (("--aligner-option", "weight"), ("'weight'", "NAME=VALUE")),
        (("--aligner-option", "wieght=3"), ("'wieght=3'", "AlignedAutoEncoder", "weight")),
        (("--aligner-option", "weight=heavy"), ("'weight=heavy'", "value like that of weight=")),
        (("--aligner-option", "weight=-1"), ("weight=-1",)),
        (("--aligner-option", "weight=nan"), ("weight=nan",)),
        (("--direction-option", "n_iterations=0"), ("n_iterations=0",)),
        (("--direction-option", "center=perhaps"), ("'center=perhaps'", "center=")),
        (("--direction", "pca", "--direction-option", "x=1"), ("'x=1'", "PrincipalComponent")),
    ],
)
def test_settings_out_of_range_are_told_before_the_work(world, refused, options, says):
    refused("fit", *world.models, "-d", world.data, *options, says=says)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("strength", ["0", "nan", "inf"])
def test_strengths_that_steer_nothing(world, made, refused, strength):
    pack = ["-p", made / "pack.safetensors", f"--strength={strength}"]
    says = (f"strength={strength}", "expected")
    refused("generate", "-t", world.target, *pack, "we", says=says)
    refused("compare", *world.models, "-d", world.data, "-w", world.words, *pack, says=says)


@pytest.mark.parametrize(
    ("command", "option", "says"),
    [
        ("fit", ("--aligner", "best"), ("'--aligner': 'best' is not", "'procrustes'")),
        ("fit", ("--strategy", "all"), ("--strategy", "'all'", "'same_depth'")),
        ("fit", ("--position", "first"), ("--position", "'first'", "'answer_mean'")),
        ("fit", ("--dtype", "float8"), ("--dtype", "'float8'", "'bfloat16'")),
        ("fit", ("--n-pairs", 0), ("--n-pairs", "1")),
        ("fit", ("--seed", "many"), ("--seed", "valid int")),
        ("fit", ("--strength", "much"), ("--strength", "valid float")),
        ("fit", ("--strenght", 1), ("--strenght", "--strength")),
        ("align", ("extra",), ("extra",)),
        ("collect", ("--batch-tokens", 0), ("--batch-tokens", "1")),
        ("generate", ("--positions", "first"), ("--positions", "'first'", "'generated'")),
        ("generate", ("--max-new-tokens", 0), ("--max-new-tokens", "1")),
        ("chat", ("--temperature", -1), ("--temperature", "0")),
        ("colect", (), ("'colect'", "'collect'")),
        ("generate", (), ("Missing option", "--target")),
    ],
)
def test_wrong_usage(refused, command, option, says):
    models = {
        "fit": ["-t", "a", "-e", "b", "-d", "c"],
        "align": ["-t", "a", "-e", "b"],
        "collect": ["-m", "a", "-o", "b"],
        "generate": ["-t", "a", "-p", "b"] if option else [],
        "chat": ["-t", "a", "-p", "b"],
    }
    refused(command, *models.get(command, []), *option, says=says, code=2)


# Packs, alignments, vectors -------------------------------------------------------------


def change(path: Path, kind: str, made: Path) -> None:
    """Write a file that is not quite a pack."""
    whole = (made / "pack.safetensors").read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[:-40])
    elif kind == "tampered":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif kind == "text":
        path.write_text("not a pack")
    elif kind == "empty":
        path.touch()
    elif kind == "weights":
        save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    elif kind == "alignment":
        path.write_bytes((made / "alignment.safetensors").read_bytes())


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated or not safetensors"),
        ("empty", "truncated or not safetensors"),
        ("text", "truncated or not safetensors"),
        ("tampered", "content was altered"),
        ("weights", "expected a steering pack"),
        ("alignment", "expected a steering pack"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat", "compare"])
def test_files_that_are_no_packs(world, made, refused, work, command, kind, says):
    change(work / "odd.safetensors", kind, made)
    args = {
        "generate": ["generate", "-t", world.target, "we"],
        "chat": ["chat", "-t", world.target],
        "compare": ["compare", *world.models, "-d", world.data, "-w", world.words],
    }[command]
    refused(*args, "-p", "odd.safetensors", says=("odd.safetensors", says))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated or not"),
        ("tampered", "content was altered"),
        ("text", "truncated or not"),
        ("weights", "expected a"),
    ],
)
def test_other_commands_refuse_odd_files_too(world, made, refused, work, kind, says):
    change(work / "odd.safetensors", kind, made)
    says = ("odd.safetensors", says)
    refused("inspect", "odd.safetensors", says=says)
    alignment = ["--alignment", made / "alignment.safetensors"]
    refused("transfer", "odd.safetensors", *alignment, "--layer", 1, says=says)
    aligned = ["-e", world.expert, "-d", world.data, "--alignment", "odd.safetensors"]
    refused("fit", *aligned, says=("odd.safetensors", "alignment"))


def test_a_pack_that_says_too_little(world, refused, work):
    save_tensor_file(work / "bare", PACK_KIND, {"vectors": torch.ones(1, 32)}, {"layers": [1]})
    says = ("bare.safetensors", "description is incomplete")
    refused("inspect", "bare.safetensors", says=says)
    refused("generate", "-t", world.target, "-p", "bare.safetensors", "we", says=says)


def test_a_pack_in_place_of_an_alignment(made, refused):
    pack = made / "pack.safetensors"
    says = ("'expertsteer-steering-pack'", "expected an alignment")
    refused("transfer", pack, "--alignment", pack, says=says)
    refused("inspect", pack, "--plot", "a.png", says=("--plot", "only alignments"))


def test_a_pack_of_another_model(world, made, refused):
    steered = ["-p", made / "pack.safetensors", "we"]
    shape = ("4 blocks instead of 3", "width 24 instead of 32")
    for force in ((), ("--force",)):
        refused("generate", "-t", world.expert, *steered, *force, says=shape)
    tuned = ("weights", "instead of", "same shape", "--force")
    refused("generate", "-t", world.fine_tune, *steered, says=tuned)


def test_force_takes_a_fine_tune_of_the_same_shape(world, made, run):
    steered = ["-p", made / "pack.safetensors", "--max-new-tokens", 2, "--force", "we"]
    assert run("generate", "-t", world.fine_tune, *steered).code == 0


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (np.ones(7), ("--layer", 1), ("shape (7,)", "24")),
        (np.ones((2, 24)), ("--layer", 1), ("shape (2, 24)", "24")),
        (np.zeros(24), ("--layer", 1), ("zero",)),
        (np.full(24, np.nan), ("--layer", 1), ("not finite",)),
        (np.ones(24), (), ("without expert_layer",)),
        (np.ones(24), ("--layer", 9), ("[9]", "pairs only")),
        (np.ones(24), ("--layer", 1, "--target-layer", 9), ("pairs only",)),
        (np.array(["a"]), ("--layer", 1), ("vector.npy", "expected real numbers")),
    ],
)
def test_vectors_that_cannot_be_carried(made, refused, work, values, options, says):
    np.save(work / "vector.npy", values)
    alignment = ["--alignment", made / "alignment.safetensors"]
    refused("transfer", "vector.npy", *alignment, *options, says=says)


# Configurations -------------------------------------------------------------------------


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ("Cannot read the configuration run.yaml", "No such file")),
        ("target: [a", ("run.yaml", "not valid YAML")),
        (b"\xff\xfe\x00", ("run.yaml", "not valid YAML")),
        ("", ("run.yaml", "mapping of option names")),
        ("- target", ("run.yaml", "mapping of option names")),
        ("n_pair: 2", ("run.yaml", "unknown option 'n_pair'", "n_pairs")),
        ("n-pairs: 2", ("run.yaml", "unknown option 'n-pairs'", "n_pairs")),
        ("3: 2", ("run.yaml", "unknown option 3")),
        ("command: generate", ("run.yaml", "'generate'", "expected one of 'fit'")),
        ("target: [a, b]", ("run.yaml", "target=['a', 'b']", "one value")),
        ("target: {a: b}", ("run.yaml", "target={'a': 'b'}", "one value")),
    ],
)
def test_configurations_that_cannot_be_used(world, refused, work, content, says):
    if content is not None:
        (work / "run.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    refused("fit", "--config", "run.yaml", *world.models, "-d", world.data, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("n_pairs: many", ("--n-pairs", "valid int")),
        ("n_pairs: 0", ("--n-pairs", "1")),
        ("aligner: best", ("--aligner", "'best'", "'ridge'")),
        ("no_cache: perhaps", ("--no-cache", "boolean")),
    ],
)
def test_values_of_a_configuration_are_checked_like_options(world, refused, work, content, says):
    (work / "run.yaml").write_text(content)
    fit = ["fit", "--config", "run.yaml", *world.models, "-d", world.data]
    refused(*fit, says=says, code=2)


def test_one_value_in_a_configuration_is_a_list_of_one(world, refused, work):
    (work / "run.yaml").write_text("pairs: 3-1\nstrategy: explicit\n")
    fit = ["fit", "--config", "run.yaml", *world.models, "-d", world.data]
    refused(*fit, says=("--pair 3-1", "EXPERT:TARGET"))


# Outputs --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/deep/out", "Not a directory"),
        ("folder", "folder"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "align", "transfer", "compare"])
def test_outputs_that_cannot_be_written(world, made, refused, work, command, place, reason):
    (work / "file").write_text("old")
    (work / "folder").mkdir()
    args = {
        "fit": ["fit", *world.models, "-d", world.data],
        "align": ["align", *world.models],
        "transfer": ["transfer", "nowhere.npy", "--alignment", made / "alignment.safetensors"],
        "compare": ["compare", *world.models, "-d", world.data, "-w", world.words],
    }[command]
    refused(*args, "--output", place, says=(f"Cannot write {place}", reason))


@pytest.mark.usefixtures("no_models")
def test_a_file_is_written_under_its_full_name_or_not_at_all(world, refused, work):
    (work / "happy.safetensors").mkdir()
    fit = ["fit", *world.models, "-d", world.data]
    refused(*fit, "-o", "happy", says=("Cannot write happy.safetensors", "folder"))
    compare = ["compare", *world.models, "-d", world.data, "-w", world.words]
    refused(*compare, "-o", "table.yaml", says=("--output table.yaml", ".json"))


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("place", ["file", "file/states"])
def test_states_cannot_be_written_into_a_file(world, refused, work, place):
    (work / "file").write_text("old")
    refused("collect", "-m", world.target, "-d", world.data, "-o", place, says=(place,))


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("picture", "says"),
    [("table.gif", "expected .png, .svg or .pdf"), ("file/table.png", "Cannot write")],
)
@pytest.mark.parametrize("command", ["align", "compare"])
def test_pictures_that_cannot_be_drawn(world, refused, work, command, picture, says):
    (work / "file").write_text("old")
    options = {"align": [], "compare": ["-d", world.data, "-w", world.words]}[command]
    refused(command, *world.models, *options, "--plot", picture, says=(picture, says))


def test_states_of_something_else_are_kept(world, made, refused, work):
    for path in (made / "expert").iterdir():
        (work / "states").mkdir(exist_ok=True)
        (work / "states" / path.name).write_bytes(path.read_bytes())
    says = ("states", world.expert, "same collection")
    refused("collect", "-m", world.target, "-d", world.data, "-o", "states", says=says)
