"""The method from end to end on tiny models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from expertsteer import Alignment, ExpertSteer, SteeringPack, collect_states, fit_alignment
from expertsteer.alignment import AutoEncoder, Ridge
from expertsteer.data import LabelledExamples
from expertsteer.directions import MeanDifference, RecursiveFeatureMachine
from expertsteer.errors import DataError, PackError, ParameterError
from expertsteer.pipeline import fit_directions, render_corpus
from helpers import tiny_language_model


def labelled(n=120, seed=0):
    """Texts of random words; the label is the kind of word they end with."""
    rng = np.random.default_rng(seed)
    answers, labels = [], []
    for row in range(n):
        label = 1 if row % 2 else -1
        words = rng.integers(20, 90, size=rng.integers(2, 6)).tolist()
        words.append(int(rng.integers(0, 8)) if label > 0 else int(rng.integers(8, 16)))
        answers.append(" ".join(f"w{word}" for word in words))
        labels.append(label)
    splits = ["train"] * (n // 2) + ["validation"] * (n // 4)
    splits += ["test"] * (n - len(splits))
    return LabelledExamples(
        prompts=("",) * n,
        answers=tuple(answers),
        labels=np.array(labels, dtype=np.int8),
        splits=tuple(splits),
        groups=tuple(map(str, range(n))),
    )


def plain(n=80, seed=1):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{w}" for w in rng.integers(0, 90, size=5)) for _ in range(n)]


@pytest.fixture(scope="module")
def target():
    return tiny_language_model("gpt2")


@pytest.fixture(scope="module")
def expert():
    return tiny_language_model("llama")


STEER = ExpertSteer(strategy="same_depth", n_pairs=2)


def test_fit_returns_a_pack_with_everything_a_user_may_ask(target, expert):
    pack = STEER.fit(target, expert, labelled(), progress=False)
    assert pack.layers == (0, 2)
    for layer in pack.layers:
        assert float(pack.vectors[layer].norm()) == pytest.approx(1, rel=1e-4)
        assert pack.mean_residual_norms[layer] > 0
    assert pack.target == target.description
    assert pack.expert == expert.description
    for pair in pack.pairs:
        assert np.isfinite([pair.mutual_information, pair.r2, pair.reconstruction_error]).all()
        assert 0 <= pair.auc <= 1
    assert pack.provenance["data"]["n_examples"] == 90
    assert pack.provenance["settings"]["strategy"] == "same_depth"
    assert pack.provenance["versions"]["torch"] == torch.__version__
    assert not pack.encoders


def test_fit_is_deterministic_and_ignores_the_test_split(target, expert):
    examples = labelled()
    first = STEER.fit(target, expert, examples, progress=False)
    spoilt = list(examples.answers)
    for row, split in enumerate(examples.splits):
        if split == "test":
            spoilt[row] = "w1 w2"
    other = dataclasses.replace(examples, answers=tuple(spoilt))
    second = STEER.fit(target, expert, other, progress=False)
    for layer in first.layers:
        assert torch.equal(first.vectors[layer], second.vectors[layer])


def test_the_mean_residual_norm_is_the_targets_own(target, expert):
    examples = labelled()
    pack = STEER.fit(target, expert, examples, progress=False)
    states = collect_states(target, render_corpus(examples.for_fitting(), target), progress=False)
    for layer in pack.layers:
        expected = states.layer(layer).norm(dim=1).mean()
        assert pack.mean_residual_norms[layer] == pytest.approx(float(expected), rel=1e-5)


def test_the_papers_method(target, expert):
    steer = ExpertSteer.paper(n_pairs=2, seed=3)
    assert isinstance(steer.aligner, AutoEncoder)
    assert steer.aligner.solver == "gradient"
    assert steer.aligner.random_state == 3
    assert steer.strategy == "lowest_mi"
    assert isinstance(steer.direction, RecursiveFeatureMachine)
    assert steer.direction.bandwidth_mode == "constant"
    quick = dataclasses.replace(steer, aligner=AutoEncoder(solver="gradient", n_steps=20))
    pack = quick.fit(target, expert, labelled(), progress=False)
    assert len(pack.layers) == 2


def test_lowest_mi_takes_the_lowest(target, expert):
    examples = labelled()
    steer = ExpertSteer(strategy="lowest_mi", n_pairs=1)
    alignment = steer.align(target, expert, examples.for_fitting(), progress=False)
    (pair,) = alignment.pairs
    assert pair.mutual_information == pytest.approx(
        float(alignment.mutual_information.min()), rel=1e-4
    )


def test_validated_keeps_the_pair_that_moves_the_target_most(target, expert):
    pack = ExpertSteer(strength=0.5).fit(target, expert, labelled(), progress=False)
    gains = pack.provenance["validated"]
    assert len(gains) == 3
    assert max(gains, key=gains.get) == str(pack.layers[0])
    assert len(pack.pairs) == 1


def test_several_layers_share_the_default_strength(target, expert):
    for n_pairs, strength in ((1, 0.1), (2, 0.05), (3, 0.033)):
        steer = dataclasses.replace(STEER, n_pairs=n_pairs)
        pack = steer.fit(target, expert, labelled(), progress=False)
        assert (len(pack.layers), pack.strength) == (n_pairs, strength)
        given = dataclasses.replace(steer, strength=0.2)
        assert given.fit(target, expert, labelled(), progress=False).strength == 0.2


def test_states_in_place_of_models_give_the_same_pack(target, expert, tmp_path):
    examples = labelled()
    states = []
    for model in (target, expert):
        folder = tmp_path / model.name
        texts = render_corpus(examples.for_fitting(), model)
        collect_states(model, texts, save_to=folder, progress=False)
        states.append(type(collect_states(model, texts, progress=False)).load(folder))
    from_states = STEER.fit(*states, examples, progress=False)
    from_models = STEER.fit(target, expert, examples, progress=False)
    for layer in from_models.layers:
        assert torch.equal(from_states.vectors[layer], from_models.vectors[layer])
    with pytest.raises(ParameterError, match="collected states with strategy='validated'"):
        ExpertSteer().fit(*states, examples, progress=False)
    with pytest.raises(DataError, match="same file"):
        STEER.fit(*states, labelled(seed=5), progress=False)
    with pytest.raises(ParameterError, match="expected a model"):
        STEER.fit(*states, examples, alignment_text=plain(), progress=False)


def test_a_second_run_reads_its_states_from_the_cache(target, expert, tmp_path, monkeypatch):
    examples = labelled()
    first = STEER.fit(target, expert, examples, cache_dir=tmp_path, progress=False)
    from expertsteer.states.reading import BlockReader

    def refuse(*_):
        raise AssertionError("a forward pass was run although the states are cached")

    monkeypatch.setattr(BlockReader, "read", refuse)
    second = STEER.fit(target, expert, examples, cache_dir=tmp_path, progress=False)
    for layer in first.layers:
        assert torch.equal(first.vectors[layer], second.vectors[layer])


def test_an_alignment_on_plain_text_replaces_the_target(target, expert, tmp_path):
    alignment = fit_alignment(target, expert, plain(), progress=False)
    assert [(p.expert_layer, p.target_layer) for p in alignment.pairs] == [(0, 0), (1, 1), (2, 2)]
    saved = Alignment.load(alignment.save(tmp_path / "alignment"))
    name = f"elsewhere/{target.description.name}"
    pack = STEER.fit(name, expert, labelled(), alignment=saved, progress=False)
    assert pack.target == target.description
    assert pack.provenance["settings"]["aligner"] == alignment.provenance["aligner"]
    for other in ("no such model", expert):
        with pytest.raises(PackError, match=r"with an alignment to .* but expected that one"):
            STEER.fit(other, expert, labelled(), alignment=saved, progress=False)
    with pytest.raises(ParameterError, match="asks for"):
        ExpertSteer(strategy="explicit", pairs=((0, 2),)).fit(
            target, expert, labelled(), alignment=saved, progress=False
        )
    with pytest.raises(PackError, match="expected one expert"):
        STEER.fit(target, target, labelled(), alignment=saved, progress=False)


def test_transfer_carries_packs_and_plain_vectors(target, expert):
    alignment = fit_alignment(target, expert, plain(), pairs=[(1, 2), (0, 1)], progress=False)
    own = ExpertSteer(
        aligner=Ridge(), strategy="explicit", pairs=((1, 1),), direction=MeanDifference()
    ).fit(expert, expert, labelled(), progress=False)
    carried = alignment.transfer(own)
    plain_vector = alignment.transfer(own.vectors[1].numpy(), expert_layer=1)
    assert carried.layers == plain_vector.layers == (2,)
    assert torch.allclose(carried.vectors[2], plain_vector.vectors[2])
    expected = own.vectors[1] @ alignment.encoders[1, 2].weight
    assert torch.allclose(carried.vectors[2], expected / expected.norm(), atol=1e-6)
    assert carried.target == target.description

    longer = dataclasses.replace(own, vectors={1: 3.0 * own.vectors[1]})
    torch.testing.assert_close(alignment.transfer(longer).vectors[2], 3.0 * carried.vectors[2])
    both = SteeringPack(
        {1: own.vectors[1], 2: own.vectors[1]}, {1: 1.0, 2: 1.0}, expert.description
    )
    with pytest.raises(ParameterError, match=r"layers \[1, 2\], .* leaves out \[2\]"):
        alignment.transfer(both)
    assert alignment.transfer(both, target_layers=[2]).layers == (2,)
    with pytest.raises(ParameterError, match=r"target_layers=\[2, 0\].* leaves out \[0\]"):
        alignment.transfer(both, target_layers=[2, 0])
    with pytest.raises(ParameterError, match="pairs only 1->2, 0->1"):
        alignment.transfer(own.vectors[1], expert_layer=2)
    with pytest.raises(ParameterError, match="without expert_layer"):
        alignment.transfer(own.vectors[1])
    with pytest.raises(DataError, match=r"shape \(7,\)"):
        alignment.transfer(torch.ones(7), expert_layer=1)
    with pytest.raises(DataError, match="zero or not finite"):
        alignment.transfer(torch.zeros(32), expert_layer=1)
    packed_for_target = SteeringPack({1: torch.ones(32)}, {1: 1.0}, target.description)
    with pytest.raises(PackError, match="starts from"):
        alignment.transfer(packed_for_target)


def test_kept_encoders_are_those_of_the_chosen_pairs(target, expert, tmp_path):
    steer = dataclasses.replace(STEER, keep_encoders=True)
    pack = steer.fit(target, expert, labelled(), progress=False)
    assert set(pack.encoders) == {(p.expert_layer, p.target_layer) for p in pack.pairs}
    loaded = SteeringPack.load(pack.save(tmp_path / "pack"))
    for pair, encoder in pack.encoders.items():
        assert torch.equal(loaded.encoders[pair].weight, encoder.weight)
        assert torch.equal(loaded.encoders[pair].bias, encoder.bias)


def test_fit_directions_uses_train_rows_and_scores_validation_rows():
    rng = np.random.default_rng(0)
    examples = labelled().for_fitting()
    states = torch.from_numpy(rng.normal(size=(90, 12)).astype("float32"))
    train = torch.tensor([split == "train" for split in examples.splits])
    labels = torch.from_numpy(examples.labels.astype("float32"))
    states[train, 4] += 5 * labels[train]  # the classes differ here in training rows
    states[~train, 7] += 5 * labels[~train]  # and here, which must not be seen, in the others
    other = torch.from_numpy(rng.normal(size=(90, 12)).astype("float32"))
    other[:, 2] += 2 * labels
    layers = torch.stack([states, other], 1)
    (finder, score), (second, its_score) = fit_directions(
        RecursiveFeatureMachine(), layers, examples
    )
    assert int(np.abs(second.direction_).argmax()) == 2
    assert its_score > 0.9
    assert int(np.abs(finder.direction_).argmax()) == 4
    assert score < 0.75


def test_alignment_text_and_labelled_text_may_differ(target, expert):
    pack = STEER.fit(target, expert, labelled(), alignment_text=plain(), progress=False)
    other = STEER.fit(target, expert, labelled(), progress=False)
    assert not torch.equal(pack.vectors[0], other.vectors[0])
    assert pack.provenance["alignment"]["n_texts"] == 80


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategy": "explicit"}, ParameterError, "without pairs"),
        ({"strategy": "explicit", "pairs": ((9, 0),)}, ParameterError, "9"),
        ({"strategy": "same_depth", "n_pairs": 9}, ParameterError, "n_pairs=9"),
        ({"estimator": "guess"}, ParameterError, "estimator='guess'"),
        ({"position": "first"}, ParameterError, "position='first'"),
        ({"strategy": "best"}, ParameterError, "strategy='best'"),
        ({"strength": 0.0}, ParameterError, "strength=0"),
    ],
)
def test_settings_out_of_range(target, expert, change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(STEER, **change).fit(target, expert, labelled(), progress=False)


def test_unusable_data(target, expert):
    examples = labelled()
    one_class = dataclasses.replace(examples, labels=np.ones(len(examples), dtype=np.int8))
    with pytest.raises(DataError, match="0 negative rows in the train split"):
        STEER.fit(target, expert, one_class, progress=False)
    with pytest.raises(DataError, match="at least 8 of each"):
        STEER.fit(target, expert, examples.subset(range(10)), progress=False)
    with pytest.raises(DataError, match="chat_template=True"):
        dataclasses.replace(STEER, chat_template=True).fit(target, expert, examples, progress=False)
