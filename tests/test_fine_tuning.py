"""Fine-tuning learns, leaves the base model alone, and is the same for the same seed."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from expertsteer import fine_tuning
from expertsteer.data import LabelledExamples, RenderedText, render
from expertsteer.errors import DataError, ExpertSteerError, ModelError, ParameterError
from expertsteer.evaluation import continuation_log_likelihoods, encode_request
from expertsteer.evaluation.scoring import token_log_likelihoods
from expertsteer.fine_tuning import ADAPTER_RECORD, adapted, fine_tune, train_on_answers
from expertsteer.pack import SteeringPack
from expertsteer.steering import Steering
from helpers import random_vector, tiny_language_model

FAMILIES = ("llama", "gemma3_text", "gpt2")
RECIPE = {"n_epochs": 4, "learning_rate": 1e-2, "batch_tokens": 64, "progress": False}


def examples(n=24, prompts=True, splits=("train", "train", "validation", "test")):
    """Questions whose right answer repeats a word of theirs, and whose wrong one does not."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(n):
        words = [f"w{j}" for j in rng.integers(0, 40, size=rng.integers(2, 6))]
        prompt = " ".join([*words, "w90"]) if prompts else ""
        for label in (1, -1):
            answer = "w7 w8 w9" if label > 0 else "w50 w51"
            answer = answer if prompts else " ".join([*words, answer])
            rows.append((prompt, answer, label, splits[k % len(splits)], f"q{k}"))
    prompts_, answers, labels, chosen, groups = zip(*rows, strict=True)
    return LabelledExamples(prompts_, answers, np.array(labels), chosen, groups)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before, trees):
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert snapshot(model) == trees


def snapshot(model):
    """Return identities of modules and parameters and what else a careless guest changes."""
    modules = [
        (name, id(module), module.training, sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    return modules, [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]


def loss(model, data, split="train", label=1):
    """Return the mean loss of the answers' tokens, by another way than training takes."""
    rows = [n for n, name in enumerate(data.splits) if name == split and data.labels[n] * label > 0]
    chosen = data.subset(rows)
    total, count = 0.0, 0
    for prompt, answer in zip(chosen.prompts, chosen.answers, strict=True):
        ids = model.tokenizer(f"{prompt} {answer}".strip(), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = model.model(ids).logits[0, :-1].log_softmax(-1)
        values = scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        own = values[-len(answer.split()) :]
        total, count = total - float(own.sum()), count + len(own)
    return total / count


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / family
    return fine_tune(tiny_language_model(family), examples(), output=folder, **RECIPE)


def read_record(folder):
    return json.loads((folder / ADAPTER_RECORD).read_text())


def test_training_lowers_the_loss_and_leaves_the_base_alone(family, tmp_path):
    model = tiny_language_model(family)
    before, trees, random = state_of(model.model), snapshot(model.model), torch.get_rng_state()
    unadapted = loss(model, examples()), loss(model, examples(), "validation")
    folder = fine_tune(model, examples(), output=tmp_path / "deep" / "adapter", **RECIPE)
    assert torch.equal(torch.get_rng_state(), random)
    assert_untouched(model.model, before, trees)
    assert (loss(model, examples()), loss(model, examples(), "validation")) == unadapted

    done = read_record(folder)["training"]
    assert done["validation_loss"][0] == pytest.approx(unadapted[1], rel=1e-4)
    with adapted(model, folder):
        assert loss(model, examples()) < 0.7 * unadapted[0]
        kept = done["validation_loss"][done["best_epoch"]]
        assert loss(model, examples(), "validation") == pytest.approx(kept, rel=1e-4)
    assert done["train_loss"][-1] < done["train_loss"][0]
    assert len(done["validation_loss"]) == RECIPE["n_epochs"] + 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]


def test_the_context_manager_leaves_nothing(family, adapter):
    model = tiny_language_model(family)
    next(model.model.parameters()).requires_grad_(False)
    before, trees, random = state_of(model.model), snapshot(model.model), torch.get_rng_state()
    plain = loss(model, examples())
    with adapted(model, adapter) as same:
        assert same is model
        assert loss(model, examples()) != plain
    assert_untouched(model.model, before, trees)
    assert torch.equal(torch.get_rng_state(), random)
    assert loss(model, examples()) == plain

    def fail():
        with adapted(model, adapter):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert_untouched(model.model, before, trees)
    next(model.model.parameters()).requires_grad_(True)


def test_scores_are_those_of_peft_on_a_fresh_copy(family, adapter):
    model = tiny_language_model(family)
    fresh = replace(model, model=copy.deepcopy(model.model))
    PeftModel.from_pretrained(fresh.model, str(adapter))
    requests = [
        encode_request(model, "w1 w2 w90", (" w7 w8 w9", " w3"))[0],
        encode_request(model, "w5 w90", (" w7", " w30 w31"))[0],
    ]
    texts = [RenderedText("w1 w2 w3", 0, False), RenderedText("w4 w5 w6 w7 w8", 0, False)]

    def scores(of):
        found = continuation_log_likelihoods(of, requests, progress=False)
        return [one.log_likelihood for row in found for one in row] + [
            float(values.sum()) for values in token_log_likelihoods(of, texts)
        ]

    plain = scores(model)
    with adapted(model, adapter):
        inside = scores(model)
        ids = model.tokenizer("w1 w2 w90", return_tensors="pt")["input_ids"]
        generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert inside == pytest.approx(scores(fresh), rel=1e-5)
    assert not np.allclose(inside, plain, rtol=1e-2)
    assert scores(model) == plain
    wanted = fresh.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, wanted)


def test_it_nests_with_steering(family, adapter):
    model = replace(tiny_language_model(family))
    pack = SteeringPack(
        vectors={1: random_vector(length=1.0)},
        mean_residual_norms={1: 5.0},
        target=model.description,
        strength=1.0,
    )
    before, trees = state_of(model.model), snapshot(model.model)
    with pack.apply(model, positions="prompt"):
        steered = loss(model, examples())
        with adapted(model, adapter):
            both = loss(model, examples())
        assert loss(model, examples()) == steered
    with adapted(model, adapter):
        alone = loss(model, examples())
        with pack.apply(model, positions="prompt"):
            assert loss(model, examples()) == both
        assert loss(model, examples()) == alone
    assert len({steered, both, alone}) == 3
    assert_untouched(model.model, before, trees)


def test_an_adapter_trained_under_steering_knows_it(tmp_path):
    model = tiny_language_model("llama")
    with Steering(model.model, {1: random_vector(length=20.0)}):
        steered = loss(model, examples(), "validation")
        folder = fine_tune(model, examples(), output=tmp_path / "a", **RECIPE | {"n_epochs": 1})
    assert read_record(folder)["training"]["validation_loss"][0] == pytest.approx(steered, rel=1e-4)


def test_the_same_seed_gives_the_same_adapter(family, adapter, tmp_path):
    model = tiny_language_model(family)
    torch.manual_seed(5)
    again = fine_tune(model, examples(), output=tmp_path / "again", **RECIPE)
    other = fine_tune(model, examples(), output=tmp_path / "other", seed=1, **RECIPE)
    weights = [
        (folder / "adapter_model.safetensors").read_bytes() for folder in (adapter, again, other)
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_plain_texts_are_learned_whole(tmp_path):
    model, data = tiny_language_model("llama"), examples(prompts=False)
    folder = fine_tune(model, data, output=tmp_path / "a", **RECIPE | {"n_epochs": 1})
    texts = render(data, model.tokenizer)
    rows = [n for n, s in enumerate(data.splits) if s == "validation" and data.labels[n] > 0]
    scores = torch.cat(token_log_likelihoods(model, [texts[n] for n in rows]))
    wanted = -float(scores.mean())
    assert read_record(folder)["training"]["validation_loss"][0] == pytest.approx(wanted, rel=1e-4)


def test_a_chat_template_is_used_where_asked(tmp_path):
    model = tiny_language_model("llama", chat=True)
    recipe = RECIPE | {"n_epochs": 1}
    plain = fine_tune(model, examples(), output=tmp_path / "a", **recipe)
    chat = fine_tune(model, examples(), output=tmp_path / "b", chat_template=True, **recipe)
    first = [read_record(folder)["training"]["validation_loss"][0] for folder in (plain, chat)]
    assert first[0] != first[1]


def test_the_best_epoch_is_kept(tmp_path):
    # Validation answers contradict what is learned, so every epoch makes them less likely.
    data = examples()
    answers = [
        "w60 w61" if split == "validation" and label > 0 else answer
        for answer, split, label in zip(data.answers, data.splits, data.labels, strict=True)
    ]
    data = replace(data, answers=tuple(answers))
    model = tiny_language_model("llama")
    folder = fine_tune(model, data, output=tmp_path / "a", **RECIPE)
    done = read_record(folder)["training"]
    losses = done["validation_loss"][1:]
    assert done["best_epoch"] == 1 + losses.index(min(losses)) < len(losses)
    with adapted(model, folder):
        assert loss(model, data, "validation") == pytest.approx(min(losses), rel=1e-4)


def test_without_validation_rows_the_last_epoch_is_kept(tmp_path):
    model, data = tiny_language_model("llama"), examples(splits=("train",))
    folder = fine_tune(model, data, output=tmp_path / "a", **RECIPE)
    done = read_record(folder)["training"]
    assert done["validation_loss"] == []
    assert done["best_epoch"] == RECIPE["n_epochs"]


def test_what_is_reported(adapter, family):
    record = read_record(adapter)
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == f"tiny-{family}"
    done = record["training"]
    model = PeftModel.from_pretrained(
        copy.deepcopy(tiny_language_model(family).model), str(adapter), is_trainable=True
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert done["n_trained_parameters"] == trained
    assert (done["n_texts"], done["n_validation_texts"]) == (12, 6)
    assert done["seconds"] > 0
    assert done["tokens_per_second"] > 0
    assert record["settings"]["learning_rate"] == RECIPE["learning_rate"]


def test_a_finished_adapter_is_reused_and_another_refused(family, adapter, monkeypatch):
    model = tiny_language_model(family)

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(fine_tuning, "train_on_answers", never)
    assert fine_tune(model, examples(), output=adapter, **RECIPE) == adapter
    with pytest.raises(ExpertSteerError, match="rank: 8 instead of 4"):
        fine_tune(model, examples(), output=adapter, rank=4, **RECIPE)
    with pytest.raises(ExpertSteerError, match="train: "):
        fine_tune(model, examples(n=20), output=adapter, **RECIPE)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    model = tiny_language_model("llama")
    before, trees = state_of(model.model), snapshot(model.model)
    steps = iter(range(5))

    def stop(*args, **options):
        if next(steps, None) is None:
            raise error
        return original(*args, **options)

    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(error):
        fine_tune(model, examples(), output=tmp_path / "a", **RECIPE)
    assert list(tmp_path.iterdir()) == []
    assert_untouched(model.model, before, trees)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"n_epochs": 0},
        {"batch_tokens": 0},
        {"rank": 0},
    ],
)
def test_unusable_settings_are_named(tmp_path, wrong):
    with pytest.raises(ParameterError, match=f"Got {next(iter(wrong))}="):
        fine_tune(tiny_language_model("llama"), examples(), output=tmp_path / "a", **RECIPE | wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_loss_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"loss of nan in epoch \d.*Lower learning_rate"):
        fine_tune(
            tiny_language_model("llama"),
            examples(),
            output=tmp_path / "a",
            **RECIPE | {"learning_rate": 1e30},
        )
    assert list(tmp_path.iterdir()) == []


def test_unusable_data_is_named(tmp_path):
    model, data = tiny_language_model("llama"), examples()
    negative = data.subset(n for n, label in enumerate(data.labels) if label < 0)
    for wrong in (negative, data.split("validation")):
        with pytest.raises(DataError, match="no positive rows in the train split"):
            fine_tune(model, wrong, output=tmp_path / "a", **RECIPE)
    # Without a first token of its own, a text of one token has nothing to predict.
    one = LabelledExamples(("",), ("w1",), np.array([1]), ("train",), ("a",))
    bare = tiny_tokenizer_without_start(model)
    with pytest.raises(DataError, match="of one token"):
        fine_tune(bare, one, output=tmp_path / "a", **RECIPE)
    assert list(tmp_path.iterdir()) == []


def tiny_tokenizer_without_start(model):
    from helpers import tiny_tokenizer

    return replace(model, tokenizer=tiny_tokenizer(bos=False))


def test_unusable_outputs_are_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "train_on_answers", None)
    model = tiny_language_model("llama")
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output, message in (
        (file, "it is a file"),
        (file / "a", "Not a directory"),
        (tmp_path / "full", "holds something else"),
    ):
        with pytest.raises(ExpertSteerError, match=message):
            fine_tune(model, examples(), output=output, **RECIPE)
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def enter(model, folder):
    with adapted(model, folder):
        pass


def test_unusable_adapters_are_named(family, adapter, tmp_path):
    model = tiny_language_model(family)
    before, trees = state_of(model.model), snapshot(model.model)
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        enter(model, tmp_path)
    other = tiny_language_model("qwen2")
    with pytest.raises(ModelError, match="is for 'tiny-"):
        enter(other, adapter)
    with adapted(model, adapter), pytest.raises(ModelError, match="expected it without one"):
        enter(model, adapter)
    with adapted(model, adapter), pytest.raises(ModelError, match="expected it without one"):
        fine_tune(model, examples(), output=tmp_path / "b", **RECIPE)

    # One made by others, for a model of other layers, does not say so itself.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    enter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be put on tiny-"):
        enter(model, tmp_path)
    assert_untouched(model.model, before, trees)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_language_model("llama")
    with pytest.raises(ExpertSteerError, match=r"the package peft .*expertsteer\[lora\]"):
        fine_tune(model, examples(), output=tmp_path / "a", **RECIPE)
    with pytest.raises(ExpertSteerError, match=r"expertsteer\[lora\]"):
        enter(model, tmp_path)


def test_training_in_place_trains_what_requires_a_gradient():
    model = replace(tiny_language_model("llama"))
    model = replace(model, model=copy.deepcopy(model.model))
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    before = state_of(model.model)
    first = loss(model, examples())
    training = train_on_answers(model, examples(), **RECIPE)
    assert loss(model, examples()) < first
    changed = {n for n, v in model.model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert all("layers.2" in name for name in changed)
    assert training.n_trained_parameters == sum(
        p.numel() for p in model.model.parameters() if p.requires_grad
    )
    assert not model.model.training
    assert all(p.grad is None for p in model.model.parameters())
    model.model.requires_grad_(False)
    with pytest.raises(ParameterError, match="none of whose parameters"):
        train_on_answers(model, examples(), **RECIPE)
