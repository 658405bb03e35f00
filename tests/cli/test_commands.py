"""Every command from end to end on two tiny saved models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from expertsteer import SteeringPack
from expertsteer.alignment import Alignment
from expertsteer.cli.app import app
from expertsteer.states import States

# Chosen by the table alone, so that the target does not have to run.
LOWEST = ["--strategy", "lowest_mi"]


def vectors(path: str) -> torch.Tensor:
    pack = SteeringPack.load(path)
    return torch.stack([pack.vectors[layer] for layer in pack.layers])


def test_help_and_version_run_as_a_program():
    def program(*args: str) -> str:
        command = [sys.executable, "-m", "expertsteer", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert program("--version").startswith("expertsteer 0.")
    assert "fit" in program("--help")


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_every_command_has_help_with_an_example(run, command):
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert "Example: expertsteer" in outcome.out or command == "demo"


def test_help_breaks_its_lines_where_the_terminal_ends(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    described = run("calibrate", "--help").out.partition("╭")[0]
    lines = [line.strip() for line in described.splitlines()]
    start = next(n for n, line in enumerate(lines) if line.startswith("The test split"))
    for line, following in zip(lines[start:], lines[start + 1 :], strict=False):
        if following:
            assert len(f"{line} {following.split()[0]}") > 60 - 2
    assert " ".join(lines[start:]).rstrip().endswith("strength 0.")


def test_no_command_shows_the_help_and_is_wrong_usage(run):
    assert run().code == 2
    assert run("nonsense").code == 2
    assert run("fit").code == 2


def test_fit_writes_a_pack_its_configuration_and_a_table(world, run, work):
    outcome = run("fit", *world.models, "-d", world.data, "-o", "happy")
    assert outcome.code == 0
    assert "Layer pairs" in outcome.out
    assert "80 labelled texts" in outcome.err
    assert sorted(path.name for path in work.iterdir()) == ["happy.safetensors", "happy.yaml"]
    pack = SteeringPack.load("happy.safetensors")
    assert pack.target.name == world.target
    assert pack.expert is not None
    assert pack.expert.name == world.expert
    assert set(pack.provenance["validated"]) == {"0", "1", "2"}
    assert vectors("happy.safetensors").norm(dim=1) == pytest.approx(1.0, abs=1e-5)


def test_a_configuration_reproduces_the_same_bits(world, run):
    options = ["--n-pairs", 2, "--seed", 3, "--strength", 0.2, "--bandwidth", 5, "--bandwidth", 50]
    options += ["--aligner-option", "weight=3", "--direction-option", "ridge=1e-2"]
    first = run("fit", *world.models, "-d", world.data, "-o", "one", "--json", *options)
    assert first.code == 0
    assert first.json["path"] == "one.safetensors"
    settings = first.json["provenance"]["settings"]
    assert settings["aligner"]["weight"] == 3
    assert settings["direction"]["ridge"] == 1e-2
    assert settings["bandwidths"] == [5.0, 50.0]
    # The command line wins over the file; nothing else needs to be named.
    again = run("fit", "--config", "one.yaml", "-o", "two", "--no-cache")
    assert again.code == 0
    assert torch.equal(vectors("one.safetensors"), vectors("two.safetensors"))
    assert vectors("one.safetensors").shape == (2, 32)
    one, two = (yaml.safe_load(Path(name).read_text()) for name in ("one.yaml", "two.yaml"))
    assert {key for key in one if one[key] != two[key]} == {"output", "no_cache"}


def test_explicit_pairs_survive_a_configuration(world, run):
    explicit = ["--strategy", "explicit", "--pair", "3:1", "--pair", "0:2", "--keep-encoders"]
    assert run("fit", *world.models, "-d", world.data, "-o", "one", *explicit).code == 0
    assert run("fit", "--config", "one.yaml", "-o", "two").code == 0
    pack = SteeringPack.load("two.safetensors")
    assert {(p.expert_layer, p.target_layer) for p in pack.pairs} == {(3, 1), (0, 2)}
    assert pack.encoders[3, 1].weight.shape == (24, 32)
    assert torch.equal(vectors("one.safetensors"), vectors("two.safetensors"))


def test_fit_as_in_the_paper(world, run):
    outcome = run("fit", *world.models, "-d", world.data, "--paper", "--n-pairs", 1, "--json")
    assert outcome.code == 0
    settings = outcome.json["provenance"]["settings"]
    assert settings["aligner"]["name"] == "AutoEncoder"
    assert settings["aligner"]["solver"] == "gradient"
    assert settings["strategy"] == "lowest_mi"
    assert settings["direction"]["bandwidth_mode"] == "constant"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--aligner", "cca"),
        ("--direction", "probe"),
        ("--direction", "pca"),
        ("--estimator", "ksg"),
        ("--position", "answer_mean"),
        ("--strategy", "same_depth"),
        ("--aligner", "procrustes"),
    ],
)
def test_fit_takes_every_kind_of_step(world, run, option, value):
    chosen = [*LOWEST, option, value]
    assert run("fit", *world.models, "-d", world.data, *chosen).code == 0


def test_fit_through_chat_templates_that_differ(world, run):
    models = ["--target", world.target, "--expert", world.templated_expert]
    outcome = run("fit", *models, "-d", world.data, "--chat-template")
    assert outcome.code == 0, outcome.err


def test_fit_on_plain_text_for_the_alignment(world, run):
    text = ["--text", world.text, "--n-beginnings", 60]
    outcome = run("fit", *world.models, "-d", world.data, *text, *LOWEST, "--json")
    assert outcome.code == 0
    assert outcome.json["provenance"]["alignment"]["n_texts"] == 60


def test_collected_states_give_the_same_pack_as_the_models(world, run):
    for role, model in (("target", world.target), ("expert", world.expert)):
        outcome = run("collect", "-m", model, "-d", world.data, "-o", f"states/{role}", "--json")
        assert outcome.code == 0
        assert outcome.json["n_texts"] == 64
    states = ["--expert-states", "states/expert", "--target-states", "states/target"]
    assert run("fit", *states, "-d", world.data, "-o", "saved", *LOWEST).code == 0
    assert run("fit", *world.models, "-d", world.data, "-o", "loaded", *LOWEST).code == 0
    assert torch.equal(vectors("saved.safetensors"), vectors("loaded.safetensors"))


def test_collecting_again_from_its_configuration_only_reads(world, run, monkeypatch):
    assert run("collect", "-m", world.target, "-d", world.data, "-o", "states").code == 0
    shards = sorted(Path("states").glob("shard-*"))
    monkeypatch.setattr("expertsteer.states.reading.BlockReader.read", None)
    outcome = run("collect", "--config", "states/collect.yaml")
    assert outcome.code == 0
    assert "64 texts x 3 layers x 32" in outcome.err
    assert sorted(Path("states").glob("shard-*")) == shards


def test_collect_plain_text(world, run):
    text = ["--text", world.text, "--n-beginnings", 30]
    assert run("collect", "-m", world.expert, *text, "-o", "states").code == 0
    assert States.load("states").values.shape == (30, 4, 24)


def test_align_then_fit_and_transfer_without_the_target(world, run):
    text = ["--text", world.text, "--n-beginnings", 80]
    outcome = run("align", *world.models, *text, "-o", "a-to-b", "--plot", "table.png")
    assert outcome.code == 0
    assert "Layer pairs" in outcome.out
    assert Path("table.png").read_bytes().startswith(b"\x89PNG")
    alignment = Alignment.load("a-to-b.safetensors")
    assert next((p.expert_layer, p.target_layer) for p in alignment.pairs) == (0, 0)
    assert len(alignment.pairs) == 4

    # No --target: the alignment stands for it.
    known = ["-e", world.expert, "-d", world.data, "--alignment", "a-to-b.safetensors"]
    outcome = run("fit", *known, "-o", "fitted", *LOWEST, "--json")
    assert outcome.code == 0
    assert outcome.json["target"]["name"] == world.target

    # The expert's own pack, carried over.
    own = ["-t", world.expert, "-e", world.expert, "-d", world.data]
    assert run("fit", *own, "-o", "own", "--aligner", "ridge", *LOWEST).code == 0
    carry = ["transfer", "own.safetensors", "--alignment", "a-to-b.safetensors"]
    layer = SteeringPack.load("own.safetensors").layers[0]
    targets = [p.target_layer for p in alignment.pairs if p.expert_layer == layer]
    outcome = run(*carry, "--target-layer", targets[0], "-o", "carried", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["layers"] == targets[:1]
    assert run("transfer", "--config", "carried.yaml", "-o", "again").code == 0
    assert torch.equal(vectors("carried.safetensors"), vectors("again.safetensors"))


def test_align_by_explicit_pairs(world, run):
    text = ["--text", world.text, "--n-beginnings", 40]
    outcome = run("align", *world.models, *text, "--pair", "3:0", "--aligner", "cca", "--json")
    assert outcome.code == 0
    assert [(p["expert_layer"], p["target_layer"]) for p in outcome.json["pairs"]] == [(3, 0)]
    assert outcome.json["path"] == "alignment.safetensors"


def test_transfer_of_plain_vectors(made, run):
    vector = np.random.default_rng(0).standard_normal(24)
    np.save("vector.npy", vector)
    alignment = ["--alignment", made / "alignment.safetensors"]
    outcome = run("transfer", "vector.npy", *alignment, "--layer", 3, "-o", "carried")
    assert outcome.code == 0
    assert "Layer pairs" in outcome.out
    known = Alignment.load(made / "alignment.safetensors")
    expected = torch.from_numpy(vector).float() @ known.encoders[3, 2].weight
    assert torch.allclose(vectors("carried.safetensors")[0], expected / expected.norm(), atol=1e-6)


def test_generate_side_by_side(world, made, run):
    steered = ["-p", made / "pack.safetensors", "-s", 0.5, "-s", -20, "--max-new-tokens", 5]
    outcome = run("generate", "-t", world.target, *steered, "the meal was", "a film")
    assert outcome.code == 0
    for column in ("unsteered", "strength +0.5", "strength -20"):
        assert column in outcome.out
    Path("prompts.txt").write_text("the meal was\n\na film\n")
    from_file = ["--prompt-file", "prompts.txt", "--json"]
    outcome = run("generate", "-t", world.target, *steered, *from_file)
    rows = outcome.json
    assert [(row["prompt"], row["strength"]) for row in rows] == [
        (prompt, strength) for prompt in ("the meal was", "a film") for strength in (0, 0.5, -20)
    ]
    unsteered, _, pushed = (row["text"] for row in rows[:3])
    assert unsteered != pushed
    piped = run("generate", "-t", world.target, *steered, "--json", "-", stdin="the meal was\n")
    assert piped.json == rows[:3]


def test_generate_samples_reproducibly_with_several_packs(world, made, run):
    packs = ["-p", made / "pack.safetensors", "-p", made / "pack.safetensors"]
    settings = ["--temperature", 1.5, "--repetition-penalty", 1.2, "--json", "--chat-template"]

    def sample(seed: int):
        options = [*packs, *settings, "--positions", "generated", "--seed", seed]
        return run("generate", "-t", world.target, *options, "we").json

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert [row["strength"] for row in sample(1)] == [0, 0.1]


def test_generation_reads_a_configuration(world, made, run):
    Path("generate.yaml").write_text(
        yaml.safe_dump(
            {
                "command": "generate",
                "target": world.target,
                "packs": [str(made / "pack.safetensors")],
                "prompts": ["we"],
                "strengths": [0.3],
                "max_new_tokens": 2,
            }
        )
    )
    outcome = run("generate", "--config", "generate.yaml", "--json")
    assert [row["strength"] for row in outcome.json] == [0, 0.3]


def test_what_a_model_writes_is_not_markup(world, made, run):
    outcome = run("generate", "-t", world.target, "-p", made / "pack.safetensors", "[/bold] [red]")
    assert outcome.code == 0
    assert "[/bold] [red]" in outcome.out


def test_chat_follows_its_commands(world, made, run):
    lines = ["we was", "/strength 0.3", "/strength 0", "/strength much", "/off", "the meal", "/on"]
    lines += ["/new", "/help", "", "a trip", "/quit", "never said"]
    chat = ["chat", "-t", world.target, "-p", made / "pack.safetensors", "--max-new-tokens", 4]
    outcome = run(*chat, "--temperature", 0, stdin="\n".join(lines))
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 3
    assert outcome.errors == [
        "error: Got strength=0, but expected another number. To generate unsteered, use the model "
        "without a pack.",
        "error: Got strength='much', but expected a number such as 0.1.",
    ]
    assert outcome.err.count("/strength X steers by X") == 2


def test_chat_ends_with_its_input_and_continues_where_there_is_no_template(world, run):
    own = ["-t", world.expert, "-e", world.expert, "-d", world.data, *LOWEST]
    assert run("fit", *own, "-o", "own").code == 0
    chat = ["chat", "-t", world.expert, "-p", "own.safetensors", "--max-new-tokens", 3]
    outcome = run(*chat, stdin="we was")
    assert outcome.code == 0
    assert outcome.out.strip()


def test_a_chat_that_outgrows_the_context_says_so_and_goes_on(world, made, run):
    chat = ["chat", "-t", world.target, "-p", made / "pack.safetensors", "--max-new-tokens", 4]
    outcome = run(*chat, stdin=f"{'we ' * 80}\nthe meal\n")
    assert outcome.code == 0
    assert len(outcome.errors) == 1
    assert "the context" in outcome.errors[0]
    assert outcome.out.strip()


def test_compare_every_baseline(world, made, run):
    text = ["--text", world.text, "--n-beginnings", 40]
    outcome = run(
        *["compare", *world.models, "-d", world.data, "-w", world.words, *text],
        *["-p", made / "pack.safetensors", "-o", "table.json", "--json", "--seed", 1],
    )
    assert outcome.code == 0
    rows = {row["method"]: row for row in outcome.json["rows"]}
    assert list(rows) == [
        "unsteered",
        "random vector",
        "target RFM, shuffled labels",
        "target mean difference (CAA)",
        "target RFM",
        "paper's auto-encoder, seed 1",
        "paper's auto-encoder, seed 2",
        "ExpertSteer",
        "transferred, plain text only",
    ]
    assert rows["target mean difference (CAA)"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert all(row["perplexity"] > 1 for row in rows.values())
    for row in rows.values():
        low, high = row["effect_interval"]
        assert low <= row["effect"] <= high
    assert json.loads(Path("table.json").read_text()) == outcome.json
    assert yaml.safe_load(Path("table.yaml").read_text())["command"] == "compare"


def test_compare_fits_a_pack_itself_and_prints_a_table(world, run):
    models = ["-t", world.target, "-e", world.expert, "-d", world.data, "-w", world.words]
    text = ["--text", world.text, "--n-beginnings", 40]
    outcome = run("compare", *models, *text, *LOWEST, "--aligner", "ridge", "--plot", "rows.png")
    assert outcome.code == 0
    for shown in ("unsteered", "ExpertSteer", "95 % interval"):
        assert shown in outcome.out
    assert Path("rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pack.safetensors", "steering pack"),
        ("alignment.safetensors", "alignment"),
        ("target", "saved states"),
    ],
)
def test_inspect_tells_what_there_is(world, made, run, name, kind):
    outcome = run("inspect", made / name)
    assert outcome.code == 0
    assert kind in outcome.out
    assert world.target in outcome.out
    summary = run("inspect", made / name, "--json").json
    assert summary.get("target", summary.get("model"))["width"] == 32


def test_evaluate_questions_unsteered_and_steered(world, made, run, work):
    rows = [
        {"question": f"{word} day", "choices": ["good", "bad", "sad"], "answer": n % 3}
        for n, word in enumerate(["book", "meal", "film", "news", "trip", "house"] * 5)
    ]
    Path("questions.json").write_text(json.dumps([row | {"split": "test"} for row in rows]))
    asks = ["evaluate", "-t", world.target, "-d", "questions.json", "-o", "out", "--text"]
    asks += [world.text, "--n-plain", 5, "-p", made / "pack.safetensors", "-s", 0.3]
    outcome = run(*asks)
    assert outcome.code == 0, outcome.err
    for shown in ("30 questions", "acc_norm", "+0.3", "5 plain texts"):
        assert shown in outcome.out
    files = {path.name for path in Path("out").iterdir()}
    assert files == {
        *("rows.jsonl", "plain.jsonl", "run.json", "summary.json", "evaluate.yaml", ".lock")
    }
    again = run("evaluate", "--config", "out/evaluate.yaml", "--json").json
    assert again["n_questions"] == 30
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 60
    assert run(*asks, "--letters").code == 1
    assert run("evaluate", "-t", world.target, "-d", world.data, "-o", "x").code == 1
    assert run("evaluate", "-t", world.target, "-d", "questions.json", "-s", 1).code == 1


def test_evaluate_generations_by_judges_that_know_nothing_of_the_pack(world, made, run, work):
    effect = json.loads(Path(world.words).read_text())
    rows = [
        {"comment": f"{word} {noun}", "mood": mood, "split": split}
        for mood, words in (("up", effect["positive_words"]), ("down", effect["negative_words"]))
        for word in words
        for noun, split in zip(
            ["book", "day", "meal", "film", "news"],
            ["train"] * 3 + ["validation", "test"],
            strict=True,
        )
    ]
    Path("moods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks = ["evaluate", "-t", world.target, "--prompts", world.words, "-o", "out"]
    asks += ["-p", made / "pack.safetensors", "-s", 0.3, "--n-plain", 0, "--max-new-tokens", 5]
    asks += ["--judge", "vader", "--judge", "moods.jsonl", "--judge-encoder", world.encoder]
    asks += ["--column", "text=comment", "--column", "label=mood", "--positive", "up"]
    asks += ["--fluency-model", world.expert, "--n-samples", 2, "--temperature", 1]
    outcome = run(*asks)
    assert outcome.code == 0, outcome.err
    assert "data.jsonl, which is not here" in outcome.err
    for shown in ("2 prompts", "vader", "classifier", "perplexity", "rep_4", "held-out"):
        assert shown in outcome.out
    files = {path.name for path in Path("out").iterdir()}
    assert {"rows.jsonl", "run.json", "summary.json", "blind.md", "blind_key.json"} <= files
    rows = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2
    assert all(0 <= row["classifier"] <= 1 and -1 <= row["vader"] <= 1 for row in rows)
    # The judge tells texts apart, and only a text can have a perplexity.
    assert len({row["classifier"] for row in rows}) > 1
    assert all((row["perplexity"] is None) == (not row["text"]) for row in rows)
    again = run("evaluate", "--config", "out/evaluate.yaml", "--json").json
    assert again["n_questions"] == 2


def test_evaluate_a_benchmark_by_name_from_a_folder(world, run, work, monkeypatch):
    folder = work / "benchmarks"
    folder.mkdir()
    rows = [{"text": f"the {n}", "label": n % 2, "split": "test"} for n in range(6)]
    rows = rows[:4] + [row | {"split": "validation"} for row in rows[4:]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "true_false_facts.jsonl").write_text(text)
    monkeypatch.setenv("EXPERTSTEER_BENCHMARKS", str(folder))
    asks = ["evaluate", "-t", world.target, "-d", "true_false_facts", "--n-plain", 0, "--json"]
    assert run(*asks, "-o", "a").json["n_questions"] == 4
    assert run(*asks, "-o", "b", "--role", "test=validation").json["n_questions"] == 2
    as_text = run(*asks, "-o", "c", "--kind", "labelled")
    assert as_text.code == 1
    assert "expected a question" in as_text.err


def test_open_answers_are_examples_to_fit_on(world, run, work):
    rows = [{"question": f"w{n}", "answer": str(n), "rationale": "so"} for n in range(80)]
    Path("open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run("collect", "-m", world.target, "-d", "open.jsonl", "-o", "out", "--json")
    assert outcome.json["n_texts"] == 2 * 64  # train and validation
    asked = run("collect", "-m", world.target, "-d", "open.jsonl", "-o", "b", "--kind", "pairs")
    assert asked.code == 1
    assert "pairs: positive, negative" in asked.err


def test_kinds_of_the_command_line_are_those_of_the_library():
    from expertsteer.cli.options import KindName
    from expertsteer.data import KINDS

    assert [kind.value for kind in KindName] == ["auto", *KINDS]


def test_evaluate_runs_tasks_of_the_harness(world, made, run, work, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)
    words = ["book", "meal", "film"]
    rows = [{"q": f"{'the ' * 70 * (n == 0)}{word} day"} for n, word in enumerate(words)]
    Path("rows.json").write_text("\n".join(map(json.dumps, rows)))
    Path("mine").mkdir()
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(work / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": ["good", "bad"],
        "doc_to_target": 0,
    }
    Path("mine/mine.yaml").write_text(yaml.safe_dump(task))
    asks = ["evaluate", "-t", world.target, "--lm-eval", "mine", "--include-path", "mine"]
    asks += ["-o", "out", "--text", world.text, "--n-plain", 5]
    outcome = run(*asks, "-p", made / "pack.safetensors", "-s", 0.3)
    assert outcome.code == 0, outcome.err
    shown = ("mine, 3 questions (1 lost their beginning", "acc_norm", "+0.3", "5 plain texts")
    assert all(text in outcome.out for text in shown), outcome.out
    again = run("evaluate", "--config", "out/evaluate.yaml", "--json").json
    assert again["tasks"]["mine"]["n_cut"] == 1
    assert len(Path("out/rows.jsonl").read_text().splitlines()) == 6
    for more, message in (
        (["-d", world.data], "Got --data and --lm-eval of"),
        (["--letters"], "Got --letters with --lm-eval"),
        (["--column", "a=b"], "Got --column with --lm-eval"),
    ):
        refused = run(*asks, *more)
        assert refused.code == 1
        assert message in refused.err
    alone = run("evaluate", "-t", world.target, "-d", "rows.json", "--include-path", "mine")
    assert "--include-path with --data" in alone.err


def test_calibrate_writes_a_pack_with_its_own_strength(world, made, run, work):
    asks = ["calibrate", "-t", world.target, "-p", made / "pack.safetensors", "-d", world.data]
    asks += ["--text", world.text, "--n-plain", 8, "--n-trials", 4, "--budget", 2]
    outcome = run(*asks, "-o", "tuned", "--plot", "trade.png", "--json")
    assert outcome.code == 0, outcome.err
    chosen = outcome.json["chosen"]
    expected = chosen["strength"] if chosen else 0
    assert SteeringPack.load("tuned.safetensors").strength == expected
    assert Path("trade.png").read_bytes().startswith(b"\x89PNG")
    again = run("calibrate", "--config", "tuned.yaml", "-o", "again")
    assert "budget 2" in again.out
    assert SteeringPack.load("again.safetensors").strength == expected
    assert run(*asks, "--budget", 1).code == 1


def test_inspect_draws_the_table_of_an_alignment(made, run):
    outcome = run("inspect", made / "alignment.safetensors", "--plot", "deep/table.svg")
    assert outcome.code == 0
    assert "<svg" in Path("deep/table.svg").read_text()


def test_demo_on_given_models(world, run, monkeypatch):
    from expertsteer.data import shipped

    # The world's words in place of the shipped ones, which tiny tokenizers do not know.
    places = {
        "sentiment.jsonl": world.data,
        "sentiment_effect.json": world.words,
        "plain.txt": world.text,
    }
    monkeypatch.setattr("expertsteer.data.shipped_file", places.__getitem__)
    monkeypatch.setattr("expertsteer.data.plain.shipped_file", places.__getitem__)
    monkeypatch.setattr("expertsteer.data.sentence_beginnings", _few_beginnings)
    assert shipped.shipped_file("plain.txt") != world.text
    outcome = run("demo", *world.models, "-o", "out")
    assert outcome.code == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "pack.safetensors",
        "mutual_information.png",
        "comparison.json",
        "comparison.png",
    }
    for shown in ("Layer pairs", "unsteered", "transferred, plain text only"):
        assert shown in outcome.out
    assert "done in" in outcome.err


def _few_beginnings(sentences: list[str], n: int, seed: int) -> list[str]:
    from expertsteer.data.plain import sentence_beginnings

    return sentence_beginnings(sentences, n // 30, seed=seed)


def test_study_runs_reports_and_plans(world, run, work):
    study = {
        "targets": [{"model": world.target, "name": "small"}],
        "experts": [{"model": world.expert, "name": "large"}],
        "benchmarks": [{"name": "mine", "data": world.data}],
        "methods": ["random", "expertsteer"],
        "n_train": 16,
        "n_validation": 6,
        "n_test": 8,
        "n_plain": 5,
        "n_beginnings": 30,
        "plain_text": world.text,
    }
    Path("study.yaml").write_text(yaml.safe_dump(study))
    asks = ["study", "study.yaml", "-o", "out", "--cache-dir", work / "cache"]
    planned = run(*asks, "--dry-run")
    assert planned.code == 0
    assert "4 cells, 4 to do: about " in planned.err
    assert not Path("out/report.md").exists()
    outcome = run(*asks)
    assert outcome.code == 0, outcome.err
    rows = Path("out/cells.jsonl").read_text().splitlines()
    assert {json.loads(row)["method"] for row in rows} == {"none", "random", "expertsteer"}
    for name in ("report.md", "report.tex", "averages.png", "cells.png"):
        assert f"out/{name}" in outcome.err
        Path(f"out/{name}").unlink()
    again = run(*asks, "--report", "--json")
    assert Path("out/report.md").exists()
    assert "out/report.json" in again.json["files"]
    assert Path("out/cells.jsonl").read_text().splitlines() == rows
    Path("study.yaml").write_text(yaml.safe_dump(study | {"methods": ["expertster"]}))
    wrong = run(*asks)
    assert wrong.code == 1
    assert "study.yaml: got methods.0.method='expertster'" in wrong.err
    assert "expertsteer" in wrong.err
