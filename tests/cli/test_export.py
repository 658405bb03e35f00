"""export and import on the command line."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from expertsteer import SteeringPack, load_model
from helpers import contents


@pytest.fixture(scope="module")
def pack_file(world, tmp_path_factory):
    """A pack for the target that steers blocks 1 and 2."""
    model = load_model(world.target)
    generator = torch.Generator().manual_seed(0)
    vectors = {
        layer: torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
        for layer in (1, 2)
    }
    pack = SteeringPack(vectors, {1: 4.0, 2: 5.0}, model.description, strength=0.2)
    return pack.save(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture
def refused(run, work):
    """Return a function that runs a command and checks that it is refused as it should be."""

    def check(*args: object, says: tuple[str, ...]) -> None:
        before = contents(work)
        outcome = run(*args)
        assert outcome.code == 1, outcome.err
        assert len(outcome.errors) == 1, outcome.err
        for part in says:
            assert part in outcome.errors[0]
        assert not outcome.out
        assert contents(work) == before

    return check


@pytest.mark.parametrize(
    ("to", "written"),
    [
        ("gguf", ["out.gguf"]),
        ("lm-eval", ["out.pt"]),
        ("torch", ["out.json", "out.safetensors"]),
        ("numpy", ["out.json", "out.npz"]),
        ("weights", ["out"]),
        ("peft", ["out"]),
    ],
)
def test_export_writes_every_format(run, work, pack_file, to, written):
    outcome = run("export", pack_file, "--to", to, "-o", "out", "--strength", 0.1, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["path"] in written
    assert sorted(path.name for path in work.iterdir()) == written
    if to in ("weights", "peft"):
        assert json.loads((work / "out/steering.json").read_text())["exported_strength"] == 0.1


def test_a_control_vector_comes_back_and_is_inspected(run, work, pack_file, world):
    assert run("export", pack_file, "--to", "gguf", "-o", "happy").code == 0
    options = ("-t", world.target, "--text", world.text, "--n-beginnings", 30)
    outcome = run("import", "happy.gguf", *options, "-o", "back")
    assert outcome.code == 0, outcome.err
    assert "layers 1, 2" in outcome.err
    back, pack = SteeringPack.load(work / "back.safetensors"), SteeringPack.load(pack_file)
    for layer, vector in pack.scaled_vectors().items():
        torch.testing.assert_close(back.scaled_vectors()[layer], vector)
    shown = run("inspect", "back.safetensors")
    assert shown.code == 0
    assert "steers the layers 1, 2" in shown.out
    again = run("import", "--config", "back.yaml", "happy.gguf", "-t", world.target, "-o", "b")
    assert again.code == 0, again.err
    generated = run("generate", "-t", world.target, "-p", "back.safetensors", "the day was")
    assert generated.code == 0, generated.err


def test_a_folder_is_replaced_when_told(run, work, pack_file, refused):
    (work / "out").mkdir()
    (work / "out" / "notes.txt").write_text("mine")
    export = ("export", pack_file, "--to", "peft", "-o", "out")
    refused(*export, says=("the folder out", "holds something", "--overwrite"))
    assert run(*export, "--overwrite").code == 0
    assert not (work / "out" / "notes.txt").exists()


def test_no_command_replaces_what_it_reads(run, work, pack_file, refused, world):
    own = work / "happy.safetensors"
    own.write_bytes(pack_file.read_bytes())
    says = ("replace happy.safetensors", "the pack,", "another --output")
    refused("export", own.name, "--to", "torch", "-o", "happy", says=says)
    assert run("export", own.name, "--to", "gguf", "-o", "happy").code == 0
    (work / "vector.safetensors").write_bytes(pack_file.read_bytes())
    carry = ("transfer", "vector.safetensors", "-a", "alignment.safetensors", "-o", "vector")
    refused(*carry, says=("replace vector.safetensors", "the vector,"))
    # A configuration in the user's words stays in them, and is no longer true with other options.
    config = work / "back.yaml"
    words = f"# mine\nfile: happy.gguf\ntarget: {world.target}\ntext: {world.text}\noutput: back\n"
    config.write_text(words + "n_beginnings: 30\n")
    assert run("import", "--config", "back.yaml").code == 0
    assert config.read_text().startswith("# mine")
    again = ("import", "--config", "back.yaml", "--seed", 1)
    refused(*again, says=("replace back.yaml", "the config,"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strength", "0"), ("strength=0",)),
        (("--strength", "nan"), ("strength=nan", "finite")),
        (("-o", "file/deep"), ("Cannot write", "Not a directory")),
    ],
)
def test_exports_that_are_refused(refused, work, pack_file, options, says):
    (work / "file").write_text("mine")
    refused("export", pack_file, "--to", "gguf", "-o", "out", *options, says=says)


def test_a_pack_that_is_none_or_for_another_model(refused, work, pack_file, world):
    (work / "cut.safetensors").write_bytes(pack_file.read_bytes()[:200])
    refused("export", "none.safetensors", "--to", "gguf", "-o", "a", says=("no such file",))
    refused("export", "cut.safetensors", "--to", "gguf", "-o", "a", says=("cut.safetensors",))
    for to in ("weights", "peft"):
        export = ("export", pack_file, "--to", to, "-o", "a", "-t", world.expert)
        refused(*export, says=("4 blocks instead of 3", "width 24 instead of 32"))


def test_wrong_usage(run, pack_file):
    outcome = run("export", pack_file, "--to", "onnx", "-o", "a")
    assert outcome.code == 2
    assert "onnx" in outcome.errors[0]


def write(path, tensors):
    writer = gguf.GGUFWriter(path, "controlvector")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONE = np.ones(32, np.float32)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"direction.0": ONE}, ("direction.0", "N from 1 up")),
        ({"direction.1": ONE[:24]}, ("width 24", "width 32")),
        ({"direction.1": ONE.astype(np.float16)}, ("F16", "F32")),
        ({"direction.1": ONE, "extra": ONE}, ("'extra'", "only direction.N")),
        ({"direction.7": ONE}, ("layer 7", "layers 0 to 2")),
    ],
)
def test_imports_that_are_refused(refused, work, world, tensors, says):
    write(work / "v.gguf", tensors)
    refused("import", "v.gguf", "-t", world.target, "-o", "a", says=("v.gguf", *says))


def test_files_that_are_none(refused, work, world):
    write(work / "v.gguf", {"direction.1": ONE})
    (work / "v.gguf").write_bytes((work / "v.gguf").read_bytes()[:-40])
    (work / "v.svec").write_text("{")
    (work / "v.pt").write_text("")
    for file, says in (("v.gguf", "whole"), ("v.svec", "JSON"), ("v.pt", ".gguf or .svec")):
        refused("import", file, "-t", world.target, "-o", "a", says=(file, says))
