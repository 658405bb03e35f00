"""What clients send under `steering`, and what they are told when it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

from expertsteer.errors import ParameterError
from expertsteer.serving.request import SteeringRequest, read_steering
from expertsteer.steering import STEERED_POSITIONS


@pytest.mark.parametrize("value", [None, []])
def test_nothing_is_unsteered(value):
    assert read_steering(value) == ()


def test_one_object_or_a_list():
    one = {"pack": "happy", "strength": -1, "positions": "generated"}
    assert read_steering(one) == (
        SteeringRequest(pack="happy", strength=-1.0, positions="generated"),
    )
    first, second = read_steering([one, {"pack": "formal"}])
    assert first == read_steering(one)[0]
    assert (second.pack, second.strength, second.positions) == ("formal", None, "all")


def test_positions_are_those_of_steering():
    known = get_args(SteeringRequest.model_fields["positions"].annotation)
    assert known == STEERED_POSITIONS


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            '{"pack": "happy", "colour": 1}',
            "Got the unknown field steering.colour, but expected some of pack, strength, "
            "positions.",
        ),
        ('{"strength": 0.1}', "Got no steering.pack, but expected one."),
        (
            '{"pack": "happy", "strength": NaN}',
            "Got steering.strength=nan, but it should be a finite number.",
        ),
        (
            '{"pack": "happy", "strength": "0.1"}',
            "Got steering.strength='0.1', but it should be a valid number.",
        ),
        (
            '{"pack": "happy", "strength": true}',
            "Got steering.strength=True, but it should be a valid number.",
        ),
        (
            '{"pack": "happy", "strength": 0}',
            "Got steering.strength=0, but expected another number. To generate unsteered, leave "
            "steering out.",
        ),
        (
            '[{"pack": "happy"}, {"pack": "happy", "positions": "some"}]',
            "Got steering[1].positions='some', but it should be 'all', 'prompt', 'generated' or "
            "'last'.",
        ),
        (
            '"happy"',
            "Got steering='happy', but expected an object such as "
            '{"pack": "happy", "strength": 0.1}, a list of them, or null.',
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(sent, message):
    with pytest.raises(ParameterError) as caught:
        read_steering(json.loads(sent))
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [["happy"], [None], [[]], {"pack": ""}, {"pack": 3}, 1e400])
def test_other_shapes_are_refused(value):
    with pytest.raises(ParameterError, match=r"^Got steering"):
        read_steering(value)


def test_long_input_is_not_sent_back_whole():
    with pytest.raises(ParameterError) as caught:
        read_steering({"pack": "happy", "strength": "x\n" * 10_000})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_reading_needs_no_torch():
    code = (
        "import sys; import expertsteer.serving.request; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'starlette')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
