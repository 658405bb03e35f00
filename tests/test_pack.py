"""Steering packs: files, algebra, which models they fit, and the hub."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from expertsteer.affine import Affine
from expertsteer.alignment import Alignment
from expertsteer.card import pack_card
from expertsteer.errors import ModelError, PackError, ParameterError
from expertsteer.layer_pair import LayerPair
from expertsteer.models import describe_model, find_blocks
from expertsteer.pack import SteeringPack
from helpers import WIDTH, BlockOutputs, random_ids, random_vector, tiny_language_model, tiny_model

IDS = random_ids(2, 6)


def make(layers=(0, 2), seed=0, family="llama", **fields) -> SteeringPack:
    """Return a pack of random unit vectors, its mean residual norms 1, 2, ... by layer."""
    return SteeringPack(
        {layer: random_vector(seed + layer, length=1.0) for layer in layers},
        {layer: layer + 1.0 for layer in layers},
        describe_model(tiny_model(family), "owner/target"),
        **fields,
    )


def rich() -> SteeringPack:
    """Return a pack with everything a pack may hold."""
    encoder = Affine((torch.randn(16, WIDTH),), torch.randn(WIDTH))
    thin = Affine((torch.randn(16, 3), torch.randn(3, WIDTH)), torch.randn(WIDTH))
    return make(
        expert=describe_model(tiny_model("gpt2"), "owner/expert", "abc"),
        pairs=(LayerPair(1, 0, 0.1 + 0.2, 0.5, 0.25, 1.0), LayerPair(2, 2)),
        strength=0.07,
        encoders={(1, 0): encoder, (2, 2): thin},
        provenance={"settings": {"seed": 3, "words": ["ja", "ñ", "字"]}, "data": None},
    )


def states(model, *steerings) -> list[torch.Tensor]:
    """Return the states behind every block, with some steerings attached."""
    with ExitStack() as stack:
        for steering in steerings:
            stack.enter_context(steering)
        recorded = stack.enter_context(BlockOutputs(find_blocks(model)))
        with torch.inference_mode():
            model(IDS)
    return [recorded.joined(layer) for layer in range(len(recorded.blocks))]


# Files ----------------------------------------------------------------------------------


def test_save_and_load_keep_every_bit(tmp_path):
    pack = rich()
    path = pack.save(tmp_path / "deep" / "happy")
    assert path == tmp_path / "deep" / "happy.safetensors"
    loaded = SteeringPack.load(path)
    assert loaded.summary() == pack.summary()
    assert loaded.target == pack.target
    assert loaded.expert == pack.expert
    assert loaded.layers == (0, 2)
    for layer in pack.layers:
        assert torch.equal(loaded.vectors[layer], pack.vectors[layer])
    for pair, encoder in pack.encoders.items():
        assert torch.equal(loaded.encoders[pair].weight, encoder.weight)
        assert torch.equal(loaded.encoders[pair].bias, encoder.bias)


def test_a_file_is_plain_safetensors_in_float32(tmp_path):
    pack = dataclasses.replace(make(), vectors={j: v.double() for j, v in make().vectors.items()})
    tensors = load_file(pack.save(tmp_path / "pack"))
    assert tensors.keys() == {"vectors"}
    assert tensors["vectors"].dtype == torch.float32
    assert torch.equal(tensors["vectors"][1], make().vectors[2])


def test_any_single_changed_byte_is_noticed(tmp_path):
    path = make(layers=(1,)).save(tmp_path / "pack")
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(PackError, match=r"pack\.safetensors"):
            SteeringPack.load(path)


def test_a_file_cut_anywhere_is_noticed(tmp_path):
    path = make(layers=(1,)).save(tmp_path / "pack")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PackError, match="truncated or not safetensors"):
            SteeringPack.load(path)


def test_other_files_are_told_from_packs(tmp_path):
    model = make().target
    weight, bias = torch.randn(WIDTH, WIDTH), torch.zeros(WIDTH)
    alignment = Alignment(
        {(0, 0): Affine((weight,), bias)},
        (LayerPair(0, 0),),
        {0: 1.0},
        model,
        model,
        torch.zeros(3, 3),
    )
    with pytest.raises(PackError, match="'expertsteer-alignment', but expected a steering pack"):
        SteeringPack.load(alignment.save(tmp_path / "alignment"))
    save_file({"weight": weight}, tmp_path / "weights.safetensors")
    with pytest.raises(PackError, match="format None, but expected a steering pack"):
        SteeringPack.load(tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("not a pack at all, but long enough to look like one")
    with pytest.raises(PackError, match="truncated or not safetensors"):
        SteeringPack.load(tmp_path / "notes.txt")
    with pytest.raises(PackError, match=r"no such file\. Expected a steering pack"):
        SteeringPack.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vectors": {0: torch.ones(7)}}, PackError, r"shape \(7,\) for layer 0.*\(32,\)"),
        ({"vectors": {0: torch.full((32,), torch.nan)}}, PackError, "NaN or infinity for layer 0"),
        ({"mean_residual_norms": {1: 1.0}}, PackError, "of other layers than the vectors"),
        ({"vectors": {3: torch.ones(32)}}, ModelError, "layer 3, but expected 0 to 2"),
    ],
)
def test_a_pack_that_cannot_be_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(make(layers=(0,)), **change)


# Which models it fits -------------------------------------------------------------------


def test_loading_for_a_model_checks_it(tmp_path):
    path = make().save(tmp_path / "pack")
    assert SteeringPack.load(path, tiny_language_model("llama")).layers == (0, 2)
    fine_tune = tiny_model("llama", seed=1)
    with pytest.raises(PackError) as caught:
        SteeringPack.load(path, fine_tune)
    own, other = describe_model(tiny_model("llama")), describe_model(fine_tune)
    assert f"weights {other.weights} instead of {own.weights}" in str(caught.value)
    assert "--force" in str(caught.value)
    assert SteeringPack.load(path, fine_tune, force=True).layers == (0, 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("width", 48, "width 32 instead of 48"), ("n_layers", 5, "3 blocks instead of 5")],
)
@pytest.mark.parametrize("force", [False, True])
def test_another_shape_is_refused_even_by_force(field, value, message, force):
    target = dataclasses.replace(make().target, **{field: value})
    width = target.width
    pack = SteeringPack({1: torch.ones(width)}, {1: 1.0}, target)
    with pytest.raises(PackError, match=message) as caught:
        pack.check_target(tiny_model("llama"), force=force)
    assert "--force" not in str(caught.value)
    with pytest.raises(PackError, match=message):
        pack.apply(tiny_model("llama"), force=force)


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match="Got a str"):
        make().apply("gpt2")


# Use ------------------------------------------------------------------------------------


def test_the_packs_own_strength_is_the_default():
    model = tiny_model("llama")
    pack = make(strength=0.3)
    assert torch.equal(
        states(model, pack.apply(model))[2], states(model, pack.apply(model, 0.3))[2]
    )
    with pytest.raises(ParameterError, match="strength 0: calibration"):
        make(strength=0.0).apply(model)


def test_strength_scales_by_each_layers_own_norm():
    model = tiny_model("llama")
    pack = make(layers=(0, 1, 2))
    relative, absolute = pack.apply(model, 0.5), pack.apply(model, 0.5, relative=False)
    for layer in pack.layers:
        assert torch.allclose(relative.vectors[layer], 0.5 * (layer + 1) * pack.vectors[layer])
        assert torch.allclose(absolute.vectors[layer], 0.5 * pack.vectors[layer])


def test_attached_until_detached():
    model = tiny_model("llama")
    before = states(model)
    steering = make().apply(model, 1.0).attach()
    steered = states(model)
    steering.detach()
    assert not torch.allclose(before[0], steered[0])
    assert all(map(torch.equal, states(model), before))


def test_several_packs_at_once_do_what_their_sum_does():
    model = tiny_model("llama")
    one, two = make(layers=(0, 1)), make(layers=(1, 2), seed=10)
    # The sum is of what they add, whatever the norms that each was measured with.
    two = dataclasses.replace(two, mean_residual_norms={1: 5.0, 2: 3.0})
    apart = states(model, one.apply(model, 0.4), two.apply(model, 0.4))
    for total in (one + two, two + one):
        assert total.layers == (0, 1, 2)
        for left, right in zip(states(model, total.apply(model, 0.4)), apart, strict=True):
            assert torch.allclose(left, right, atol=1e-5)
    weighted = (2 * one + two * 0.5).apply(model, 0.4)
    apart = states(model, one.apply(model, 0.8), two.apply(model, 0.2))
    assert torch.allclose(states(model, weighted)[2], apart[2], atol=1e-5)


def test_a_sum_is_of_what_each_adds_at_its_own_strength():
    model = tiny_model("llama")
    one, two = make(layers=(0, 1), strength=0.1), make(layers=(1, 2), seed=10, strength=0.3)
    apart = states(model, one.apply(model), two.apply(model))
    for total in (one + two, two + one):
        for left, right in zip(states(model, total.apply(model)), apart, strict=True):
            assert torch.allclose(left, right, atol=1e-5)
    with pytest.raises(ParameterError, match="strength 0"):
        _ = one + make(strength=0.0)


# Algebra --------------------------------------------------------------------------------


def test_scaling_a_pack_is_scaling_its_strength():
    model = tiny_model("llama")
    expected = states(model, make().apply(model, -0.3))
    for pack in (make().scale(-3), -make() * 3, 3 * -make()):
        for left, right in zip(states(model, pack.apply(model, 0.1)), expected, strict=True):
            assert torch.allclose(left, right, atol=1e-5)


def test_a_pack_and_its_opposite_leave_the_model_as_it_is():
    model = tiny_model("llama")
    pack = make()
    nothing = pack - pack
    assert all(not vector.any() for vector in nothing.vectors.values())
    assert all(map(torch.equal, states(model, nothing.apply(model, 1.0)), states(model)))
    together = states(model, pack.apply(model, 1.0), (-pack).apply(model, 1.0))
    assert torch.allclose(together[2], states(model)[2], atol=1e-5)


def test_subtracting_undoes_adding():
    one, two = make(layers=(0, 1)), make(layers=(0, 1), seed=10)
    back = one + two - two
    for layer in one.layers:
        assert torch.allclose(back.vectors[layer], one.vectors[layer], atol=1e-6)


def test_restricting_leaves_earlier_layers_alone():
    model = tiny_model("llama")
    kept = rich().restrict([2])
    assert kept.layers == (2,)
    assert kept.mean_residual_norms == {2: 3.0}
    assert [pair.target_layer for pair in kept.pairs] == [2]
    assert kept.encoders.keys() == {(2, 2)}
    before, after = states(model), states(model, kept.apply(model, 1.0))
    assert all(map(torch.equal, after[:2], before[:2]))
    added = 3.0 * kept.vectors[2]
    assert torch.allclose(after[2] - before[2], added.expand_as(after[2]), atol=1e-5)


def test_a_sum_keeps_what_it_is_made_of(tmp_path):
    one = rich()
    two = make(layers=(1,), pairs=(LayerPair(0, 1),), provenance={"name": "two"})
    loaded = SteeringPack.load((one + two).save(tmp_path / "sum"))
    assert [pair.target_layer for pair in loaded.pairs] == [0, 2, 1]
    assert loaded.provenance == {"sum_of": [one.provenance, {"name": "two"}]}
    assert loaded.expert is None
    assert (one + one).expert == one.expert


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused(factor):
    with pytest.raises(ParameterError, match=f"factor={factor}"):
        make().scale(factor)


@pytest.mark.parametrize("layers", [[], [1], [0, 1]])
def test_restricting_to_layers_it_does_not_steer_is_refused(layers):
    with pytest.raises(ParameterError, match="steers the layers 0, 2"):
        make().restrict(layers)


def test_packs_of_different_models_do_not_add_up():
    with pytest.raises(PackError, match="type gpt2 instead of llama"):
        make() + make(family="gpt2")


def test_algebra_leaves_the_original_alone():
    pack = make()
    kept = {layer: vector.clone() for layer, vector in pack.vectors.items()}
    _ = (2 * -pack + pack).restrict([0])
    assert all(torch.equal(pack.vectors[layer], kept[layer]) for layer in pack.layers)


# The hub --------------------------------------------------------------------------------


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FolderHub:
    """A hub that is a folder; it takes the place of huggingface_hub's client."""

    def __init__(self, root):
        self.root = root
        self.calls = []

    def __call__(self, token=None):
        self.calls.append(("client", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.calls.append(("create", private))

    def upload_folder(self, repo_id, folder_path, commit_message):
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id, filename, revision=None, token=None):
        self.calls.append(("download", revision, token))
        path = self.root / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError("Cannot find the file\non the hub.")
        # As the real cache: a link in a folder named after the commit.
        cached = self.root / "cache" / "snapshots" / COMMIT / filename
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.unlink(missing_ok=True)
        cached.symlink_to(path)
        return str(cached)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> FolderHub:
    made = FolderHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.download)
    return made


def test_to_the_hub_and_back(hub):
    pack = rich()
    address = pack.push_to_hub("owner/happy", private=True, token="secret")
    assert address == "https://hub/owner/happy/commit/1"
    assert hub.calls == [("client", "secret"), ("create", True)]
    assert {path.name for path in (hub.root / "owner/happy").iterdir()} == {
        "README.md",
        "steering_pack.safetensors",
    }
    card = (hub.root / "owner/happy/README.md").read_text(encoding="utf-8")
    assert card == pack_card(pack, "owner/happy")
    back = SteeringPack.from_hub("owner/happy", revision="v1", token="secret")
    assert hub.calls[-1] == ("download", "v1", "secret")
    assert torch.equal(back.vectors[2], pack.vectors[2])
    source = {"repo_id": "owner/happy", "revision": "v1", "commit": COMMIT}
    assert back.provenance == pack.provenance | {"hub": source}
    assert dataclasses.replace(back, provenance=pack.provenance).summary() == pack.summary()


def evaluation(pack, folder, **fields):
    """Write the summary of an evaluation of a pack."""
    found = {"mean": 0.5, "interval": [0.4, 0.6], "change": 0.125, "change_interval": [0.0, 0.25]}
    summary = {
        "measurements": {"0.0": {"accuracy": found}, "0.2": {"accuracy": found}},
        "perplexity": {"0.0": 20.0, "0.2": 25.0},
        "divergence": {"0.0": 0.0, "0.2": 0.03125},
        "n_questions": 40,
        "provenance": {
            "pack": pack.summary() if pack else None,
            "task": {"kind": "multiple choice", "data": "arc_easy"},
            "settings": {"positions": "all"},
        },
    }
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary | fields))
    return folder


def test_evaluations_go_on_the_card(hub, tmp_path):
    pack = rich()
    # Calibrated to another strength, the vectors are the same.
    folder = evaluation(dataclasses.replace(pack, strength=0.9), tmp_path / "arc")
    found = {"mean": 0.5, "interval": [0.4, 0.6], "change": 0.1, "change_interval": [0.0, 0.2]}
    task = {"measurements": {"0.2": {"acc": found}}, "n_questions": 7}
    harness = evaluation(pack, tmp_path / "harness", tasks={"piqa": task}, perplexity={})
    pack.push_to_hub("owner/happy", evaluations=[folder, harness])
    card = (hub.root / "owner/happy/README.md").read_text(encoding="utf-8")
    assert "| arc_easy (40 items) | 0 | accuracy | 0.500 (0.400 to 0.600) |  |" in card
    changed = "0.500 (0.400 to 0.600) | +0.125 (+0.000 to +0.250)"
    assert f"| arc_easy (40 items) | 0.2 | accuracy | {changed} |" in card
    assert "| piqa (lm-eval, 7 items) | 0.2 | acc |" in card
    assert "| 0.2 | 25.0 | 1.25 | 0.0312 |" in card
    assert "Strengths other than 0.2, and positions other than all." in card
    assert "No evaluation" not in card
    assert "No damage measured" not in card


@pytest.mark.parametrize("other", [None, make(layers=(1,))])
def test_an_evaluation_of_another_pack_is_refused_before_anything_is_uploaded(hub, tmp_path, other):
    folder = evaluation(other, tmp_path / "arc")
    with pytest.raises(PackError, match="expected an evaluation of this pack"):
        rich().push_to_hub("owner/happy", evaluations=[folder])
    with pytest.raises(PackError, match="expected a folder that expertsteer evaluate has finished"):
        rich().push_to_hub("owner/happy", evaluations=[tmp_path / "none"])
    assert hub.calls == []


def test_a_pack_that_is_not_on_the_hub(hub):
    with pytest.raises(PackError) as caught:
        SteeringPack.from_hub("owner/none")
    assert str(caught.value) == (
        "Cannot get a steering pack from 'owner/none': Cannot find the file on the hub."
    )


def test_a_name_that_cannot_be_on_the_hub():
    with pytest.raises(PackError, match="Cannot get a steering pack from 'no/such/name'"):
        SteeringPack.from_hub("no/such/name")


# The card -------------------------------------------------------------------------------


def _header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_tells_models_layers_and_provenance():
    card = pack_card(rich(), "owner/happy")
    assert _header(card)["base_model"] == "owner/target"
    assert 'SteeringPack.from_hub("owner/happy")' in card
    assert "strength=0.07" in card
    assert "owner/expert" in card
    assert "| 1 | 0 | 1.0 |\n| 2 | 2 | 3.0 |" in card
    assert rich().target.weights in card
    shown = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == rich().provenance


def test_the_card_names_no_local_folder_as_base_model(tmp_path):
    for name in (str(tmp_path), "gemma-3-270m"):
        target = dataclasses.replace(make().target, name=name)
        card = pack_card(dataclasses.replace(make(), target=target), "owner/happy")
        assert "base_model" not in _header(card)


def test_the_card_says_what_was_not_tested():
    card = pack_card(rich(), "owner/happy")
    assert "No evaluation" in card
    assert "No damage measured" in card
    assert "Not calibrated: its strength 0.07 is a default" in card
    assert "Other languages" in card
    chosen = {"chosen": {"strength": 0.07}, "damage": "perplexity", "budget": 1.2}
    calibrated = dataclasses.replace(rich(), provenance={"calibration": chosen})
    card = pack_card(calibrated, "owner/happy")
    assert "Strengths beyond the calibrated 0.07: that one is within a perplexity budget" in card
    failed = dataclasses.replace(
        rich(), strength=0.0, provenance={"calibration": chosen | {"chosen": None}}
    )
    card = pack_card(failed, "owner/happy")
    assert "any strength is beyond what was calibrated" in card


def test_the_header_is_the_hubs():
    card = ModelCard(pack_card(rich(), "owner/happy"))
    assert card.data.base_model == "owner/target"
    assert card.data.library_name == "expertsteer"
    assert "steering-vectors" in card.data.tags


def test_the_code_on_the_card_runs(hub):
    rich().push_to_hub("owner/happy")
    card = (hub.root / "owner/happy/README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace("...", "inputs, max_new_tokens=2")
    exec(code, {"model": tiny_model("llama"), "inputs": IDS})
