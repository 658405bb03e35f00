"""Saved states survive interruptions, and nothing damaged or foreign is taken for them."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from expertsteer.data import RenderedText
from expertsteer.errors import ExpertSteerError, StatesError
from expertsteer.models import LanguageModel
from expertsteer.states import States, collect_states, save_states, saved, states_key
from expertsteer.tensor_file import load_tensor_file, save_tensor_file
from helpers import tiny_language_model, tiny_model, tiny_tokenizer

TEXTS = [" ".join(f"w{(7 * n + k) % 90}" for k in range(1 + n % 9)) for n in range(20)]


def _collect(folder, model=None, texts=TEXTS, **options):
    model = model or tiny_language_model("llama")
    options = {"batch_tokens": 20, "progress": False} | options
    return collect_states(model, texts, save_to=folder, **options)


def _files(folder):
    """Return the content of the files in a folder, the lock left out."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".lock")}


def _shards(folder):
    return sorted(folder.glob("shard-*"))


class _Interrupting:
    """A model of one's own whose pass is interrupted after some batches, as by Ctrl-C."""

    def __init__(self) -> None:
        model = copy.deepcopy(tiny_model("llama"))
        self.model = LanguageModel(model, tiny_tokenizer(), "tiny-llama")
        self.passes = 0
        self.stop_after: int | None = None
        model.register_forward_pre_hook(self._count)

    def _count(self, _model, _inputs) -> None:
        if self.passes == self.stop_after:
            raise KeyboardInterrupt
        self.passes += 1


@pytest.fixture
def many_shards(monkeypatch):
    """Have every batch flushed to a shard of its own."""
    monkeypatch.setattr(saved, "_SHARD_BYTES", 1)


def test_saved_states_are_loaded_as_they_were(tmp_path):
    states = _collect(tmp_path / "states")
    loaded = States.load(tmp_path / "states")
    assert torch.equal(loaded.values, states.values)
    assert loaded.description == states.description
    assert loaded.summary()["layers"] == [0, 1, 2]


def test_bfloat16_states_are_saved_as_bfloat16(tmp_path):
    half = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)
    states = _collect(tmp_path, LanguageModel(half, tiny_tokenizer(), "half"))
    (shard,) = _shards(tmp_path)
    assert load_file(shard)["values"].dtype == torch.bfloat16
    assert torch.equal(States.load(tmp_path).values, states.values)


def test_finished_states_are_read_without_a_pass(tmp_path):
    interrupting = _Interrupting()
    first = _collect(tmp_path, interrupting.model)
    files = _files(tmp_path)
    interrupting.passes = 0
    again = _collect(tmp_path, interrupting.model)
    assert interrupting.passes == 0
    assert torch.equal(again.values, first.values)
    assert _files(tmp_path) == files


@pytest.mark.parametrize("batches_before", [0, 1, 4])
def test_an_interrupted_collection_continues_to_the_same_bits(tmp_path, batches_before):
    interrupting = _Interrupting()
    whole = _collect(None, interrupting.model)
    n_batches, interrupting.passes = interrupting.passes, 0
    interrupting.stop_after = batches_before
    with pytest.raises(KeyboardInterrupt):
        _collect(tmp_path, interrupting.model)
    interrupting.passes, interrupting.stop_after = 0, None
    continued = _collect(tmp_path, interrupting.model)
    assert interrupting.passes == n_batches - batches_before
    assert torch.equal(continued.values, whole.values)
    assert torch.equal(States.load(tmp_path).values, whole.values)


def test_unfinished_states_are_not_loaded(tmp_path):
    interrupting = _Interrupting()
    interrupting.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        _collect(tmp_path, interrupting.model)
    n_rows = len(load_file(_shards(tmp_path)[0])["rows"])
    message = rf"^Got .* states of {n_rows} of 20 texts, but expected all of them. Run the same"
    with pytest.raises(StatesError, match=message):
        States.load(tmp_path)


def test_an_interruption_while_writing_leaves_no_half_shard(tmp_path, monkeypatch):
    def interrupted(_tensors, path, _metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _collect(tmp_path)
    assert _shards(tmp_path) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _collect(tmp_path)
    assert _files(tmp_path).keys() == {"states.json", _shards(tmp_path)[0].name}


@pytest.mark.usefixtures("many_shards")
def test_a_damaged_shard_is_told_and_collected_again(tmp_path):
    interrupting = _Interrupting()
    first = _collect(tmp_path, interrupting.model)
    shards = _shards(tmp_path)
    assert len(shards) == interrupting.passes > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    interrupting.passes = 0
    with pytest.warns(UserWarning, match=rf"{shards[1].name} is damaged .* collected again"):
        again = _collect(tmp_path, interrupting.model)
    assert interrupting.passes == 1
    assert torch.equal(again.values, first.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _collect(tmp_path, interrupting.model)
    assert interrupting.passes == 1
    assert torch.equal(States.load(tmp_path).values, first.values)


@pytest.mark.usefixtures("many_shards")
def test_loading_names_a_damaged_shard_and_deletes_nothing(tmp_path):
    _collect(tmp_path)
    shard = _shards(tmp_path)[1]
    shard.write_bytes(b"")
    files = _files(tmp_path)
    with pytest.raises(StatesError, match=rf"^Got .* \(damaged: {shard.name}\), but expected all"):
        States.load(tmp_path)
    assert _files(tmp_path) == files


@pytest.mark.parametrize(
    "change",
    [
        {"texts": TEXTS[::-1]},
        {"texts": TEXTS[:-1]},
        {"layers": [0, 2]},
        {"position": "answer_mean"},
        {"model": tiny_language_model("qwen2")},
    ],
)
def test_states_of_something_else_are_kept_and_refused(tmp_path, change):
    _collect(tmp_path)
    files = _files(tmp_path)
    message = r"^Got the folder .*, which holds states of tiny-llama \(20 texts\), but expected an "
    with pytest.raises(StatesError, match=message):
        _collect(tmp_path, **change)
    assert _files(tmp_path) == files


def test_shards_without_their_manifest_are_not_taken_for_this_collection(tmp_path):
    _collect(tmp_path)
    (tmp_path / "states.json").unlink()
    with pytest.raises(StatesError, match=r"^Got the folder .* without states.json, but expected"):
        _collect(tmp_path, texts=TEXTS[::-1])
    with pytest.raises(StatesError, match=r"^Got .*, but expected saved states .no states.json"):
        States.load(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_manifest_is_refused(tmp_path, share):
    _collect(tmp_path)
    manifest = tmp_path / "states.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[: int(share * len(content))])
    for again in (States.load, _collect):
        with pytest.raises(StatesError, match=r"^Got .*states.json, but expected a readable man"):
            again(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"^Got .*'version': 2.*, but expected .*'version': 3.* Another release"),
        ({"version": 4}, r"^Got .*'version': 4.*, but expected .*'version': 3.* Another release"),
        ({"format": "other"}, r"^Got .*'format': 'other'.*, but expected"),
        ({"n_layers": 3}, r"^Got .*states.json, but expected a readable manifest"),
        ({"model": "tiny"}, r"^Got .*states.json, but expected a readable manifest"),
        ({"dtype": "float99"}, r"^Got .*states.json, but expected a readable manifest"),
        ({"dtype": "load"}, r"^Got .*states.json, but expected a readable manifest"),
        ({"n_texts": "many"}, r"^Got .*states.json, but expected a readable manifest"),
        ({"n_texts": -1}, r"^Got .*states.json, but expected a readable manifest"),
        ({"layers": [0, "b"]}, r"^Got .*states.json, but expected a readable manifest"),
    ],
)
def test_a_manifest_with_other_content_is_refused(tmp_path, change, message):
    _collect(tmp_path)
    manifest = tmp_path / "states.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(StatesError, match=message):
        States.load(tmp_path)


def test_a_manifest_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "states.json").write_text("[1, 2]")
    with pytest.raises(StatesError, match=r"^Got .*states.json, but expected a readable manifest"):
        States.load(tmp_path)


def _rewrite(shard, **changes):
    """Change tensors of a shard and sign it anew, as no damage could."""
    tensors, about = load_tensor_file(shard, "states-shard")
    save_tensor_file(shard, "states-shard", tensors | changes, about)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {"values": tensors["values"][..., :1]},
        lambda tensors: {"values": tensors["values"].double()},
        lambda tensors: {"rows": tensors["rows"] + 1},
        lambda tensors: {"rows": tensors["rows"] - 1},
        lambda tensors: {"rows": tensors["rows"].float()},
    ],
)
def test_a_shard_that_does_not_fit_the_manifest_is_damaged(tmp_path, change):
    _collect(tmp_path)
    (shard,) = _shards(tmp_path)
    _rewrite(shard, **change(load_file(shard)))
    with pytest.raises(StatesError, match=rf"states of 0 of 20 texts \(damaged: {shard.name}\)"):
        States.load(tmp_path)


@pytest.mark.usefixtures("many_shards")
def test_a_changed_bit_is_found_by_the_fingerprint_and_collected_again(tmp_path):
    interrupting = _Interrupting()
    first = _collect(tmp_path, interrupting.model).values
    shard = _shards(tmp_path)[2]
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StatesError, match=rf"damaged: {shard.name}"):
        States.load(tmp_path)
    interrupting.passes = 0
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged .* collected again"):
        again = _collect(tmp_path, interrupting.model)
    assert interrupting.passes == 1
    assert torch.equal(again.values, first)


@pytest.mark.usefixtures("many_shards")
def test_a_shard_of_another_collection_is_not_taken_for_one_of_this(tmp_path):
    _collect(tmp_path / "here")
    _collect(tmp_path / "there", texts=[text + " w91" for text in TEXTS])
    here, there = _shards(tmp_path / "here")[0], _shards(tmp_path / "there")[0]
    here.write_bytes(there.read_bytes())
    with pytest.raises(StatesError, match=rf"damaged: {here.name}"):
        States.load(tmp_path / "here")


def test_a_cache_of_another_version_is_refused_and_kept(tmp_path):
    _collect(tmp_path)
    manifest = tmp_path / "states.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 1}))
    files = _files(tmp_path)
    with pytest.raises(StatesError, match=r"'version': 1.* Another release wrote it: name another"):
        _collect(tmp_path)
    assert _files(tmp_path) == files


def test_another_version_has_another_place_in_a_cache(monkeypatch):
    model, texts = tiny_language_model("llama"), [RenderedText("w1", 0, False)]
    key = states_key(model, texts, "last")
    monkeypatch.setattr("expertsteer.states.collecting.SAVED_VERSION", 99)
    assert states_key(model, texts, "last") != key


def test_another_tokenizer_is_noticed(tmp_path):
    _collect(tmp_path)
    files = _files(tmp_path)
    model = tiny_language_model("llama")
    texts = [RenderedText(text, 0, False) for text in TEXTS]
    key = states_key(model, texts, "last")
    # The same texts in other tokens: without the one that begins a text.
    other = dataclasses.replace(model, tokenizer=tiny_tokenizer(bos=False))
    assert states_key(other, texts, "last") != key
    with pytest.raises(StatesError, match="which holds states of tiny-llama"):
        _collect(tmp_path, model=other)
    assert _files(tmp_path) == files


def test_saving_alone_keeps_no_states_in_memory(tmp_path, monkeypatch):
    model = tiny_language_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
        description = save_states(model, TEXTS, tmp_path, batch_tokens=20, progress=False)
    loaded = States.load(tmp_path)
    assert loaded.description == description
    assert torch.equal(loaded.values, _collect(None).values)


def test_missing_folder_is_refused_and_not_made(tmp_path):
    with pytest.raises(StatesError, match=r"^Got .*/none, but expected saved states"):
        States.load(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_too_small_a_disk_is_told_before_the_first_pass(tmp_path, monkeypatch):
    interrupting = _Interrupting()
    asked = []

    def full(folder, n_bytes, what):
        asked.append(n_bytes)
        if n_bytes:
            raise ExpertSteerError(f"{folder} is too small for {what}")

    monkeypatch.setattr(saved, "require_disk", full)
    with pytest.raises(ExpertSteerError, match="too small for states"):
        _collect(tmp_path, interrupting.model, layers=[0, 2])
    assert asked == [20 * 2 * 32 * 4]
    assert interrupting.passes == 0
    assert _files(tmp_path) == {}


@pytest.mark.usefixtures("many_shards")
def test_a_disk_that_fills_up_costs_the_newest_batch_alone(tmp_path, monkeypatch):
    interrupting = _Interrupting()
    whole = _collect(None, interrupting.model).values
    n_batches, interrupting.passes = interrupting.passes, 0
    save_file = safetensors.torch.save_file
    written = []

    def full(tensors, scratch, metadata):
        if len(written) == 2:
            scratch.write_bytes(b"half of a")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(scratch)
        save_file(tensors, scratch, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        message = r"^Cannot write .*: No space left on device\. Free some room; states that were"
        with pytest.raises(ExpertSteerError, match=message):
            _collect(tmp_path, interrupting.model)
    assert len(_files(tmp_path)) == 1 + 2
    interrupting.passes = 0
    again = _collect(tmp_path, interrupting.model)
    assert interrupting.passes == n_batches - 2
    assert torch.equal(again.values, whole)


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a file system of its own that holds 100 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "expertsteer-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("many_shards")
def test_a_small_disk_is_filled_and_after_more_room_the_collection_goes_on(small_disk, monkeypatch):
    # What another program takes meanwhile cannot be foreseen by the check before the start.
    monkeypatch.setattr(saved, "require_disk", lambda *_: None)
    interrupting = _Interrupting()
    texts = [f"{text} w{n}" for text in TEXTS for n in range(20)]
    with pytest.raises(ExpertSteerError, match=r"^Cannot write .*No space left on device"):
        _collect(small_disk, interrupting.model, texts=texts)
    assert 0 < len(_shards(small_disk)) < interrupting.passes
    assert not [path for path in small_disk.iterdir() if ".shard" in path.name]
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    again = _collect(small_disk, interrupting.model, texts=texts)
    assert torch.equal(again.values, _collect(None, texts=texts).values)


def test_a_disk_that_may_only_be_read_is_told(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ExpertSteerError, match=r"can be written \(no permission to write there"):
        _collect(small_disk)


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "states").touch()
    for folder in (tmp_path / "states", tmp_path / "states" / "below"):
        with pytest.raises(ExpertSteerError, match=r"but expected one that can be written"):
            _collect(folder)


def test_a_folder_without_rights_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda _path, mode: mode != os.W_OK)
    with pytest.raises(ExpertSteerError, match=r"can be written \(no permission to write there"):
        _collect(tmp_path)
    assert _files(tmp_path) == {}
