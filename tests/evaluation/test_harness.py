"""The adapter for the lm-evaluation-harness against the harness's own model "hf"."""

from __future__ import annotations

import functools
import json
import logging
import math

import pytest
import torch
import yaml

from expertsteer.errors import DataError, ParameterError
from expertsteer.models import load_model
from expertsteer.pack import SteeringPack
from helpers import CONTEXT, WORDS, random_vector, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from expertsteer.evaluation.harness import SteeredHarnessModel, main

LONG = " ".join(WORDS[n % 89] for n in range(150))
ROWS = [
    # Answers of one token and of several, and a question that is longer than another.
    {"q": "w1 w2 w3", "choices": ["w4", "w5 w6", "w7 w8 w9"], "label": 1, "text": "w1 w2 w3"},
    {"q": "w9 w8 w7 w6 w5 w4", "choices": ["w1", "w2", "w1 w2"], "label": 0, "text": LONG},
    {"q": "w20", "choices": ["w21 w22", "w23", "w24"], "label": 2, "text": "w5 w6 w7 w8"},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["w1"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Write the tasks and their data; return the folder."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.json").write_text("\n".join(map(json.dumps, ROWS)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "doc_to_text": "q",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def save(family, chat=False):
        folder = tmp_path_factory.getbasetemp() / f"{family}-{chat}"
        if not folder.exists():
            tiny_model(family).save_pretrained(folder)
            tiny_tokenizer(chat).save_pretrained(folder)
        return folder

    return save


def pack_for(folder):
    model = load_model(folder)
    return SteeringPack({1: random_vector()}, {1: 1.0}, model.description, strength=2.0)


def run(kind, folder, tasks, name, chat=False):
    return simple_evaluate(
        kind,
        model_args=f"pretrained={folder},device=cpu,dtype=float32",
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
        apply_chat_template=chat,
        verbosity=None,
    )


def likelihoods(results):
    return [resps[0] for row in results["samples"]["choice"] for resps in row["resps"]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mamba"])
def test_choices_are_as_likely_as_to_the_harness_itself(family, checkpoint, tasks):
    folder = checkpoint(family)
    ours, theirs = (run(kind, folder, tasks, "choice") for kind in ("expertsteer", "hf"))
    found, expected = likelihoods(ours), likelihoods(theirs)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["choice"][metric] == theirs["results"]["choice"][metric]


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_perplexity_over_several_windows_is_the_harness_s(family, checkpoint, tasks):
    ours, theirs = (
        run(kind, checkpoint(family), tasks, "rolling")["results"]["rolling"]
        for kind in ("expertsteer", "hf")
    )
    key = "word_perplexity,none"
    assert math.log(ours[key]) == pytest.approx(math.log(theirs[key]), rel=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_greedy_continuations_are_the_harness_s(chat, checkpoint, tasks):
    ours, theirs = (
        run(kind, checkpoint("llama", chat), tasks, "written", chat)["samples"]["written"]
        for kind in ("expertsteer", "hf")
    )
    assert [row["arguments"] for row in ours] == [row["arguments"] for row in theirs]
    assert ("<user>" in ours[0]["arguments"][0][0]) == chat
    answers = [row["resps"][0][0] for row in ours]
    assert answers == [row["resps"][0][0] for row in theirs]
    assert len(set(answers)) == len(ROWS)


def pair(folder, **options):
    """Return our model and the harness's, of the same weights."""
    model = load_model(folder)
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=2)
    return SteeredHarnessModel(model, batch_size=2, **options), theirs


def asked(kind, *arguments):
    return [Instance(kind, {}, argument, n) for n, argument in enumerate(arguments)]


def test_steering_reaches_every_kind_of_request_and_ends_with_it(checkpoint):
    folder = checkpoint("llama")
    pack = pack_for(folder)
    ours, theirs = pair(folder, pack=pack)
    choices = asked("loglikelihood", ("w1 w2", " w3"), ("w1 w2", " w4 w5"), ("w6", " w7"))
    texts = asked("loglikelihood_rolling", ("w1 w2 w3",), ("w4 w5",))
    settings = {"until": [], "max_gen_toks": 8}
    prompts = asked("generate_until", ("w1 w2 w3", settings), ("w4", settings))
    for kind, requests in (
        ("loglikelihood", choices),
        ("loglikelihood_rolling", texts),
        ("generate_until", prompts),
    ):
        found, unsteered = (getattr(model, kind)(requests) for model in (ours, theirs))
        with pack.apply(theirs.model):
            expected = getattr(theirs, kind)(requests)
        assert expected != unsteered
        if kind == "generate_until":
            assert found == expected
        else:
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_a_context_is_the_prompt_and_a_continuation_is_generated(checkpoint):
    folder = checkpoint("llama")
    requests = asked("loglikelihood", ("w1 w2", " w3"), ("w1 w2", " w4 w5"))
    plain = pair(folder)[0].loglikelihood(requests)
    steered = pair(folder, pack=pack_for(folder), positions="generated")[0].loglikelihood(requests)
    assert steered[0] == plain[0]  # its one token is predicted from the prompt alone
    assert abs(steered[1][0] - plain[1][0]) > 1e-3


@pytest.mark.parametrize(
    "texts",
    [
        ("", "w1 w2"),
        ("", "<bos> w1 w2"),
        ("w1 w2  ", "w3"),
        ("<bos> w1 w2", " w3"),
        (LONG, " w3 w4"),
        ("w1", " " + " ".join(WORDS[:CONTEXT])),
    ],
    ids=["empty", "empty with bos", "spaces at the end", "bos", "too long", "long answer"],
)
@pytest.mark.parametrize("add_bos_token", [None, False])
def test_the_seam_and_the_window_are_the_harness_s(texts, add_bos_token, checkpoint):
    ours, theirs = pair(checkpoint("llama"))
    ours.add_bos_token = theirs.add_bos_token = add_bos_token
    found, expected = (model.loglikelihood(asked("", texts)) for model in (ours, theirs))
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-3)


def test_sampling_is_the_harness_s_under_the_same_seed(checkpoint):
    settings = {"until": ["w1"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    prompts = asked("generate_until", ("w1 w2 w3", settings), ("w4", settings), ("w5", settings))
    answers = []
    for model in pair(checkpoint("llama")):
        torch.manual_seed(1)
        answers.append(model.generate_until(prompts))
    assert answers[0] == answers[1]


def test_lost_beginnings_are_counted_in_one_warning(checkpoint, caplog):
    ours, theirs = pair(checkpoint("llama"))
    settings = {"until": [], "max_gen_toks": 4}
    prompts = asked("", (LONG, settings), ("w1", settings), (LONG + " w9", settings))
    contexts = asked("", (LONG, " w1"), (LONG, " w2"), ("w1", " w2"))
    expected = theirs.generate_until(prompts)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert ours.generate_until(prompts) == expected
        ours.loglikelihood(contexts)
    messages = [record.getMessage() for record in caplog.records]
    beginning = "2 of 3 requests are longer than the model's window of 64 tokens"
    assert [message.startswith(beginning) for message in messages] == [True, True]


def test_an_answer_that_cannot_be_scored_is_refused(checkpoint):
    ours, _ = pair(checkpoint("llama"))
    with pytest.raises(DataError, match="a continuation of 0, but expected"):
        ours.loglikelihood(asked("", ("w1", " ")))


def test_every_finished_answer_goes_to_the_harness_s_cache(checkpoint):
    ours, _ = pair(checkpoint("llama"))
    kept = {}

    class Hook:
        def add_partial(self, kind, arguments, answer):
            kept[kind, arguments] = answer

    ours.set_cache_hook(Hook())
    requests = asked("", ("w1", " w2"), ("w1", " w3"), ("w1", " w2"), ("w4", " w5"))
    answers = ours.loglikelihood(requests)
    totals = ours.loglikelihood_rolling(asked("", ("w1 w2",)))
    assert kept == {
        **{("loglikelihood", r.args): a for r, a in zip(requests, answers, strict=True)},
        ("loglikelihood_rolling", ("w1 w2",)): totals[0],
    }


@pytest.fixture
def command_line(tasks, monkeypatch):
    """Run the harness's command line on the choices, without reading its thousands of tasks."""
    few = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    # Set up once a process, its logging outlives the stream that pytest gives to a test.
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)

    def call(model_args, *more):
        command = ["lm_eval", "--model", "expertsteer", "--model_args", model_args]
        command += ["--tasks", str(tasks / "choice.yaml"), *more]
        monkeypatch.setattr("sys.argv", command)
        main()

    return call


def test_the_harness_s_command_line(checkpoint, command_line, tmp_path, capsys):
    folder = checkpoint("llama")
    pack = pack_for(folder).save(tmp_path / "pack")
    arguments = f"pretrained={folder},pack={pack},strength=-1.5,positions=prompt,dtype=float32"
    command_line(arguments, "--output_path", str(tmp_path / "results"))
    assert "acc_norm" in capsys.readouterr().out
    (file,) = (tmp_path / "results").rglob("results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["steering_strength"] == -1.5
    assert config["steering_positions"] == "prompt"
    assert config["steering_layers"] == [1]


def test_an_error_is_one_line_on_the_command_line(checkpoint, command_line):
    with pytest.raises(SystemExit, match=r"^Error: Got .*missing.safetensors"):
        command_line(f"pretrained={checkpoint('llama')},pack=missing.safetensors")


def test_steering_options_need_a_pack(checkpoint):
    with pytest.raises(ParameterError, match="without a pack"):
        SteeredHarnessModel(str(checkpoint("llama")), strength=0.1)
