from __future__ import annotations


def test_probe(world, made, run, work):
    print(run("fit", *world.models, "-d", world.data, "-o", "p"))
    print(run("inspect", "p.safetensors"))
