"""llama.cpp itself, through what the shared library in the package xllamacpp exports.

The package's own classes take no control vectors, so its functions are called as llama.cpp's
programs call them. Structures are those of Linux on 64 bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Settings(ctypes.Structure):
    # Only ever passed on as llama.cpp returned it; larger than any release's.
    _fields_ = (("content", ctypes.c_uint64 * 64),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
# Result and arguments, as in llama.h.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_model_default_params": (_Settings,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p, _Settings),
    "llama_context_default_params": (_Settings,),
    "llama_init_from_model": (_POINTER, _POINTER, _Settings),
    "llama_set_n_threads": (None, _POINTER, _INT, _INT),
    "llama_model_n_embd": (_INT, _POINTER),
    "llama_model_n_layer": (_INT, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, ctypes.c_bool),
    "llama_batch_init": (_Batch, _INT, _INT, _INT),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (_INT, _POINTER, _Batch),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), _POINTER, _INT),
    "llama_set_adapter_cvec": (_INT, _POINTER, _POINTER, ctypes.c_size_t, _INT, _INT, _INT),
    "llama_free": (None, _POINTER),
    "llama_model_free": (None, _POINTER),
}


_LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    (path,) = Path(folder).glob("xllamacpp.*.so")
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class LlamaCpp:
    """A model in llama.cpp, on one thread."""

    def __init__(self, path: Path) -> None:
        self.lib = _library()
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model
        settings = self.lib.llama_context_default_params()
        self.context = self.lib.llama_init_from_model(self.model, settings)
        assert self.context
        self.lib.llama_set_n_threads(self.context, 1, 1)
        self.n_words = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def steer(self, path: Path | None) -> None:
        """Add a control vector as ``--control-vector`` does; None takes it away."""
        width = self.lib.llama_model_n_embd(self.model)
        depth = self.lib.llama_model_n_layer(self.model)
        # As many rows as there can be: what is not given stays from the vector before.
        data = np.zeros((depth - 1, width), np.float32)
        if path is not None:
            loaded = load_control_vector(path)
            assert loaded is not None
            data[: len(loaded)] = loaded
        code = self.lib.llama_set_adapter_cvec(
            self.context, data.ctypes.data, data.size, width, 1, depth
        )
        assert code == 0

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the log-probabilities behind every token of a text, (tokens, vocabulary)."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        assert self.lib.llama_decode(self.context, batch) == 0
        rows = [
            np.ctypeslib.as_array(
                self.lib.llama_get_logits_ith(self.context, place), (self.n_words,)
            ).copy()
            for place in range(len(ids))
        ]
        self.lib.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows)).log_softmax(-1)


class _LoadInfo(ctypes.Structure):
    # A std::string of the ABI that manylinux2014 is built with is one pointer.
    _fields_ = (("strength", ctypes.c_float), ("name", ctypes.c_char_p))


class _Vector(ctypes.Structure):
    _fields_ = (("begin", _POINTER), ("end", _POINTER), ("capacity", _POINTER))


class _Loaded(ctypes.Structure):
    _fields_ = (("width", ctypes.c_int), ("data", _Vector))


def load_control_vector(path: Path) -> np.ndarray | None:
    """Return what llama.cpp's own loader reads: a row a layer from 1 up; None if it refuses."""
    load = getattr(_library(), _LOADER)
    load.restype, load.argtypes = None, [_POINTER, _POINTER]
    info, loaded = _LoadInfo(1.0, str(path).encode()), _Loaded()
    start = ctypes.addressof(info)
    end = start + ctypes.sizeof(info)
    load(ctypes.byref(loaded), ctypes.byref(_Vector(start, end, end)))
    if loaded.width <= 0:
        return None
    size = (loaded.data.end - loaded.data.begin) // ctypes.sizeof(ctypes.c_float)
    values = (ctypes.c_float * size).from_address(loaded.data.begin)
    return np.array(values, dtype=np.float32).reshape(-1, loaded.width)
