"""The embedded server on a real chat model."""

from __future__ import annotations

import pytest
import torch

from expertsteer import SteeringPack, load_model
from expertsteer.generation import generate_side_by_side
from server_process import start_server

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("real models")]

QUESTION = "Answer with three emojis: how is the weather?"


def test_answers_are_those_of_generate(tmp_path):
    target = load_model("smollm2-135m-instruct", dtype="float32")
    vector = torch.randn(target.description.width, generator=torch.Generator().manual_seed(0))
    pack = SteeringPack({12: vector / vector.norm()}, {12: 100.0}, target.description)
    path = pack.save(tmp_path / "random")
    (expected,) = generate_side_by_side(
        *(target, [pack], [QUESTION], [0.4]),
        max_new_tokens=12,
        positions="generated",
        chat_template=True,
        progress=False,
    )
    assert len(set(expected.continuations.values())) == 2
    server = start_server("smollm2-135m-instruct", f"--pack={path}", "--dtype", "float32")
    try:
        client = server.client()
        for strength, text in expected.continuations.items():
            steering = {"pack": "random", "strength": strength, "positions": "generated"}
            options = {
                "model": "smollm2-135m-instruct",
                "messages": [{"role": "user", "content": QUESTION}],
                "max_tokens": 12,
                "temperature": 0,
                "extra_body": {"steering": steering if strength else None},
            }
            whole = client.chat.completions.create(**options)
            assert whole.choices[0].message.content == text
            pieces = client.chat.completions.create(**options, stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    finally:
        server.end()
