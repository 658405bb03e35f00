"""Ctrl-C in the middle of collecting states: what is done is kept and used."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from expertsteer import States
from expertsteer.states.reading import BlockReader
from helpers import interruptible

N_TEXTS = 8000
BATCH_TOKENS = 2048


def saved_rows(folder: Path) -> int:
    total = 0
    for path in folder.glob("shard-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += len(file.get_tensor("rows"))
    return total


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_an_interrupted_collection_is_kept_and_continued(world, run, work, monkeypatch):
    rng = random.Random(0)
    words = Path(world.text).read_text().split()
    rows = [
        {"text": " ".join(rng.choices(words, k=12)), "label": n % 2, "split": "train"}
        for n in range(N_TEXTS)
    ]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    collect = ["collect", "-m", world.target, "-d", "many.jsonl", "-o", "states"]

    # One text a batch, so that the work goes on for long after its bar has appeared.
    command = [sys.executable, "-m", "expertsteer", *collect, "--batch-tokens", "1"]
    process = interruptible(command)
    try:
        assert process.stderr is not None
        shown = b""
        while b"states of" not in shown and (more := process.stderr.read1()):
            shown += more
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    shown = (shown + rest).decode()
    assert process.returncode == 130, shown
    assert not out
    assert "Traceback" not in shown
    assert "error:" not in shown
    assert "what is saved is kept" in shown
    n_saved = saved_rows(work / "states")
    assert 0 < n_saved < N_TEXTS
    assert not list(Path("states").glob("*.partial"))
    shards = sorted(Path("states").glob("shard-*"))
    before = [shard.read_bytes() for shard in shards]

    read = 0
    original = BlockReader.read

    def counting(reader, batches):
        nonlocal read
        read += sum(len(batch.spans) for batch in batches)
        return original(reader, batches)

    monkeypatch.setattr(BlockReader, "read", counting)
    assert run(*collect).code == 0
    # A text that occurs twice is read once, a batch of which a part is there as a whole.
    assert read <= N_TEXTS - n_saved + BATCH_TOKENS // 13
    assert [shard.read_bytes() for shard in shards] == before
    assert saved_rows(work / "states") == N_TEXTS
    assert States.load("states").values.isfinite().all()
