"""Strength and layers chosen by validation effect within a damage budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertsteer import SteeringPack
from expertsteer.calibration import calibrate
from expertsteer.data import LabelledExamples
from expertsteer.errors import DataError, ParameterError
from helpers import tiny_language_model

WORDS = ("w5", "w6")
PLAIN = [f"w{n} w{n + 1} w{n + 2} w{n + 3} w{n + 4}" for n in range(30, 50)]


def examples(split: str = "validation") -> LabelledExamples:
    """Texts that end in one of two words; the first word is what is wanted."""
    labels = np.array([1, -1] * 12)
    return LabelledExamples(
        prompts=("",) * 24,
        answers=tuple(f"w{10 + n // 2} {WORDS[int(y < 0)]}" for n, y in enumerate(labels)),
        labels=labels,
        splits=(split,) * 24,
        groups=tuple(f"row {n}" for n in range(24)),
    )


def pack(sign: float = 1.0) -> SteeringPack:
    """The last layer pushed from the second word's output embedding to the first's."""
    model = tiny_language_model("llama")
    head = model.model.get_output_embeddings().weight.detach()
    first, second = (model.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in WORDS)
    vector = sign * (head[first] - head[second])
    noise = torch.randn(len(vector), generator=torch.Generator().manual_seed(0))
    return SteeringPack(
        vectors={0: noise / noise.norm(), 2: vector / vector.norm()},
        mean_residual_norms={0: 1.0, 2: 5.0},
        target=model.description,
        expert=None,
        pairs=(),
        strength=0.1,
        encoders={},
        provenance={"made": "by hand"},
    )


def run(which: SteeringPack, **settings):
    options = {"budget": 1.5, "n_trials": 10, "max_strength": 1.0, "progress": False} | settings
    return calibrate(tiny_language_model("llama"), which, examples(), PLAIN, **options)


def test_the_choice_is_the_largest_clear_effect_within_the_budget():
    result = run(pack())
    assert result.chosen is not None
    assert result.chosen.damage <= 1.5
    assert result.chosen.effect_interval[0] > 0
    allowed = [t.effect for t in result.trials if t.effect is not None and t.effect_interval[0] > 0]
    assert result.chosen.effect == max(allowed)
    assert result.pack.strength == result.chosen.strength
    assert result.pack.layers == result.chosen.layers
    assert result.pack.provenance["calibration"]["chosen"]["strength"] == result.chosen.strength
    assert result.pack.provenance["made"] == "by hand"


def test_a_tighter_budget_leaves_weaker_steering():
    loose, tight = run(pack(), budget=2.0), run(pack(), budget=1.02)
    assert all(t.effect is None for t in tight.trials if t.damage > 1.02)
    assert tight.chosen is None or tight.chosen.strength < loose.chosen.strength


def test_where_nothing_beats_zero_it_writes_zero(tmp_path):
    result = run(pack(-1.0).restrict([2]))
    assert result.chosen is None
    assert result.pack.strength == 0
    saved = SteeringPack.load(result.pack.save(tmp_path / "zero"))
    with pytest.raises(ParameterError, match="strength 0"):
        saved.apply(tiny_language_model("llama"))
    with saved.apply(tiny_language_model("llama"), 0.1):
        pass


def test_divergence_can_be_the_budget_and_a_seed_repeats_the_search():
    first = run(pack(), damage="divergence", budget=0.2)
    again = run(pack(), damage="divergence", budget=0.2)
    assert first.to_dict() == again.to_dict()
    assert {t.within_budget for t in first.trials if t.damage > 0.2} <= {False}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": 1.0}, "budget=1.0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"damage": "harm"}, "damage='harm'"),
        ({"max_strength": 0.0}, "max_strength=0.0"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(ParameterError, match=says):
        run(pack(), **settings)


def test_only_the_validation_split_is_read():
    with pytest.raises(DataError, match="validation"):
        calibrate(tiny_language_model("llama"), pack(), examples("test"), PLAIN, progress=False)
