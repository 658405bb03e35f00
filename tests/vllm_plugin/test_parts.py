"""The plugin's parts that need no engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from expertsteer.errors import ModelError, PackError, ParameterError
from expertsteer.models import ModelDescription
from expertsteer.pack import SteeringPack
from expertsteer.vllm_plugin.admission import Admission
from expertsteer.vllm_plugin.coefficients import Coefficients
from expertsteer.vllm_plugin.layers import find_layers, steer_layers
from expertsteer.vllm_plugin.loading import digests_of, load_shelf
from expertsteer.vllm_plugin.prefix_caching import steering_keys
from expertsteer.vllm_plugin.settings import PluginSettings, read_settings

TARGET = ModelDescription("tiny", None, "llama", 3, 4, 10, "0123456789abcdef")


def save_pack(path, layer=1, value=0.5, strength=0.1):
    pack = SteeringPack({layer: torch.full((4,), value)}, {layer: 2.0}, TARGET, strength=strength)
    return str(pack.save(path))


@pytest.fixture
def settings(tmp_path):
    packs = {name: save_pack(tmp_path / name, n) for n, name in enumerate(("happy", "formal"))}
    given = PluginSettings(packs=packs)
    return given.model_copy(update={"digests": digests_of(load_shelf(given).packs)})


# Settings -------------------------------------------------------------------------------


def test_settings_come_from_the_configuration_or_the_environment():
    configured = read_settings({"expertsteer": {"packs": {"a": "x"}, "force": True}}, {})
    assert configured == PluginSettings(packs={"a": "x"}, force=True)
    variable = {"EXPERTSTEER_PACKS": "a=x, b=y=z"}
    assert read_settings({"other": 1}, variable) == PluginSettings(packs={"a": "x", "b": "y=z"})
    assert read_settings({"other": 1}, {}) is None
    with pytest.raises(ParameterError, match="in one place"):
        read_settings({"expertsteer": {"packs": {"a": "x"}}}, variable)


@pytest.mark.parametrize("variable", ["a", "a=", "=x", "a=x,a=y", "a=x,"])
def test_a_bad_variable_is_refused(variable):
    with pytest.raises(ParameterError, match=r"expected NAME=PATH,NAME=PATH"):
        read_settings({}, {"EXPERTSTEER_PACKS": variable})


@pytest.mark.parametrize("value", [{}, {"packs": {}}, {"packs": ["x"]}, {"packs": {"a": 1}}, 3])
def test_bad_settings_are_refused(value):
    with pytest.raises(ParameterError, match="--additional-config"):
        read_settings({"expertsteer": value}, {})


def test_a_pack_that_changed_since_the_engine_was_configured_is_refused(settings, tmp_path):
    changed = settings.model_copy(update={"digests": {"happy": "0" * 64}})
    with pytest.raises(PackError, match="another file than when the engine was configured"):
        load_shelf(changed)


# Admission ------------------------------------------------------------------------------


def test_admission_tells_strengths_and_keys_by_stage(settings):
    admission = Admission(settings)
    assert admission.admit(None) is None
    assert admission.admit([]) is None
    steering = [
        {"pack": "happy", "positions": "prompt"},
        {"pack": "formal", "strength": 2, "positions": "last"},
        {"pack": "happy", "strength": 0.5, "positions": "generated"},
    ]
    admitted = admission.admit(steering)
    assert admitted["strengths"] == {"happy": [0.1, 0.1, 0.5], "formal": [0.0, 2.0, 2.0]}
    assert len(set(admitted["keys"])) == 3
    assert admission.admit(steering[::-1]) == admitted


def test_keys_are_equal_exactly_where_the_steering_is(settings, tmp_path):
    admission = Admission(settings)

    def keys(**request):
        return admission.admit(request)["keys"]

    everywhere, generated = keys(pack="happy"), keys(pack="happy", positions="generated")
    assert everywhere == [everywhere[0]] * 3
    assert generated == ["", "", everywhere[2]]
    assert keys(pack="happy", strength=0.2)[0] != everywhere[0]
    assert keys(pack="formal")[0] != everywhere[0]
    # The same name for other vectors.
    other = PluginSettings(packs={"happy": save_pack(tmp_path / "other", 0, 0.7)})
    other = other.model_copy(update={"digests": digests_of(load_shelf(other).packs)})
    assert Admission(other).admit({"pack": "happy"})["keys"][0] != everywhere[0]


def test_opposite_strengths_at_one_token_are_no_steering(settings):
    admission = Admission(settings)
    both = [{"pack": "happy", "strength": 1}, {"pack": "happy", "strength": -1}]
    assert admission.admit(both)["keys"] == ["", "", ""]


# Prefix caching -------------------------------------------------------------------------


def test_blocks_tell_how_their_tokens_are_steered():
    keys = ["a", "b", "c"]  # of a prompt of 10 tokens
    assert steering_keys(keys, 10, 0, 8) == [("expertsteer", "0-8:a")]
    assert steering_keys(keys, 10, 8, 16) == [("expertsteer", "0-1:a,1-2:b,2-8:c")]
    assert steering_keys(keys, 10, 16, 24) == [("expertsteer", "0-8:c")]
    assert steering_keys(["", "b", "c"], 10, 0, 8) == []
    assert steering_keys(["", "", "c"], 10, 8, 16) == [("expertsteer", "2-8:c")]


def test_where_the_prompt_ends_keeps_blocks_of_equal_steering_together():
    keys = ["a", "a", "a"]
    found = {str(steering_keys(keys, length, 8, 16)) for length in range(1, 30)}
    assert found == {str([("expertsteer", "0-8:a")])}


# Coefficients ---------------------------------------------------------------------------


def runner(**requests):
    """Return a runner whose batch holds (computed, prompt length) by request, in order."""
    batch = SimpleNamespace(
        req_id_to_index={name: n for n, name in enumerate(requests)},
        num_computed_tokens_cpu=np.array([computed for computed, _ in requests.values()]),
        num_prompt_tokens=np.array([length for _, length in requests.values()]),
    )
    return SimpleNamespace(requests=dict.fromkeys(requests), input_batch=batch)


def new_request(name, strengths):
    admitted = {"strengths": strengths, "keys": ["x", "y", "z"]}
    params = SimpleNamespace(extra_args={"expertsteer": admitted} if strengths else None)
    return SimpleNamespace(req_id=name, sampling_params=params)


def test_coefficients_follow_the_tokens_index_in_its_request():
    coefficients = Coefficients(("p", "q"), 16, torch.device("cpu"))
    place = coefficients.tensor.data_ptr()
    new = [new_request("a", {"p": [1.0, 2.0, 3.0]}), new_request("b", None)]
    # A prompt of 5 tokens in chunks of 2, beside an unsteered request.
    coefficients.prepare(runner(b=(0, 4), a=(0, 5)), new, np.array([3, 2]))
    assert coefficients.tensor[:6, 0].tolist() == [0, 0, 0, 1, 1, 0]
    coefficients.prepare(runner(b=(3, 4), a=(2, 5)), [], np.array([1, 2]))
    assert coefficients.tensor[:6, 0].tolist() == [0, 1, 1, 0, 0, 0]
    coefficients.prepare(runner(a=(4, 5), b=(4, 4)), [], np.array([1, 1]))
    assert coefficients.tensor[:6, 0].tolist() == [2, 0, 0, 0, 0, 0]
    coefficients.prepare(runner(a=(5, 5), b=(5, 4)), [], np.array([1, 1]))
    assert coefficients.tensor[:6, 0].tolist() == [3, 0, 0, 0, 0, 0]
    # Preempted, then read again from the start together with what it had generated.
    absent = runner(b=(6, 4))
    absent.requests["a"] = None
    coefficients.prepare(absent, [], np.array([1]))
    assert coefficients.tensor.abs().sum() == 0
    coefficients.prepare(runner(b=(7, 4), a=(0, 5)), [], np.array([1, 7]))
    assert coefficients.tensor[:9, 0].tolist() == [0, 1, 1, 1, 1, 2, 3, 3, 0]
    # Finished: nothing of it stays.
    coefficients.prepare(runner(b=(8, 4)), [], np.array([1]))
    assert coefficients.tensor.abs().sum() == 0
    assert coefficients.tensor.data_ptr() == place
    assert coefficients.tensor[:, 1].abs().sum() == 0


# Layers ---------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.pair = pair

    def forward(self, hidden):
        return (hidden * self.weight, hidden) if self.pair else hidden * self.weight


def model_of(layers):
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4)])
def test_layers_add_coefficients_times_vectors(pair, shape):
    model = model_of([Layer(pair) for _ in range(3)])
    coefficients = torch.zeros(8, 2)
    packs = [{1: torch.arange(4.0)}, {1: torch.ones(4), 2: torch.ones(4)}]
    steer_layers(model, 3, packs, coefficients)
    hidden = torch.randn(shape)
    coefficients[1] = torch.tensor([2.0, 0.0])
    coefficients[3] = torch.tensor([1.0, -1.0])
    output = model.layers[1](hidden)
    if pair:
        output, residual = output
        assert residual is hidden
    added = (output - hidden).reshape(5, 4)
    expected = torch.zeros(5, 4)
    expected[1] = 2 * torch.arange(4.0)
    expected[3] = torch.arange(4.0) - 1
    torch.testing.assert_close(added, expected)
    unsteered = model.layers[0](hidden)
    assert torch.equal(unsteered[0] if pair else unsteered, hidden)


def test_layers_of_another_stage_are_left_out():
    model = model_of([nn.Identity(), Layer(True), Layer(True)])
    steer_layers(model, 3, [{0: torch.ones(4), 1: torch.ones(4)}], torch.zeros(8, 1))
    assert [len(layer._forward_hooks) for layer in model.layers] == [0, 1, 0]


def test_vectors_that_are_not_finite_are_refused():
    model = model_of([Layer(True)])
    with pytest.raises(PackError, match="layer 0"):
        steer_layers(model, 1, [{0: torch.full((4,), torch.inf)}], torch.zeros(8, 1))


def test_the_layers_are_the_outermost_list_of_their_number():
    layers = [Layer(True) for _ in range(3)]
    layers[0].experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = model_of(layers)
    assert find_layers(model, 3) is model.layers
    model.others = nn.ModuleList(Layer(True) for _ in range(3))
    with pytest.raises(ModelError, match="2 lists of 3 layers"):
        find_layers(model, 3)
    model.get_language_model = lambda: SimpleNamespace(named_modules=lambda: [("l", model.layers)])
    assert find_layers(model, 3) is model.layers
