"""States: what a model's residual stream holds at one position of each text."""

from expertsteer.states.collecting import (
    collect_states,
    corpus_fingerprint,
    save_states,
    states_key,
)
from expertsteer.states.positions import TOKEN_POSITIONS
from expertsteer.states.states import States, StatesDescription

__all__ = [
    "TOKEN_POSITIONS",
    "States",
    "StatesDescription",
    "collect_states",
    "corpus_fingerprint",
    "save_states",
    "states_key",
]
