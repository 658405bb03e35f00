"""One run at a time in a folder: the second waits, says for whom, and uses what it finds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from expertsteer.errors import ExpertSteerError
from expertsteer.evaluation.row_file import RowFile, SharedRows
from expertsteer.locks import locked
from expertsteer.states import collect_states
from helpers import tiny_language_model

TEXTS = [" ".join(f"w{(7 * n + k) % 90}" for k in range(1 + n % 9)) for n in range(20)]

# Holds a folder until its standard input ends, and says when it has it.
HOLDER = """
import sys
from pathlib import Path
from expertsteer.locks import locked

with locked(Path(sys.argv[1]), "states"):
    print("held", flush=True)
    sys.stdin.read()
    for file in Path(sys.argv[2]).iterdir():
        file.rename(Path(sys.argv[1]) / file.name)
"""


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds a folder, and leaves finished states in it when let go."""
    folder, finished = tmp_path / "shared", tmp_path / "finished"
    folder.mkdir()
    collect_states(tiny_language_model("llama"), TEXTS, save_to=finished, progress=False)
    (finished / ".lock").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(finished)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process, folder
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        pipe.close()


def test_a_second_run_waits_says_for_whom_and_uses_the_result(holder, monkeypatch):
    process, folder = holder
    said = []

    def let_go(message, *_args, **_options):
        said.append(str(message))
        process.stdin.close()

    def no_pass(*_args):
        raise AssertionError("the result of the first run was not used")

    monkeypatch.setattr(warnings, "showwarning", let_go)
    monkeypatch.setattr("expertsteer.states.reading.BlockReader._read_texts", no_pass)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", let_go)
        states = collect_states(tiny_language_model("llama"), TEXTS, save_to=folder, progress=False)
    assert said == [
        f"{folder} is in use: process {process.pid} on {socket.gethostname()} (-c {folder} "
        f"{folder.parent / 'finished'}) works on the states. Waiting for it to end."
    ]
    monkeypatch.undo()
    alone = collect_states(tiny_language_model("llama"), TEXTS, progress=False)
    assert torch.equal(states.values, alone.values)
    assert not (folder / ".holder.json").exists()


def test_a_run_that_was_killed_leaves_nothing_locked(holder):
    process, folder = holder
    process.kill()
    process.wait()
    assert json.loads((folder / ".holder.json").read_text())["pid"] == process.pid
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(folder, "states"):
            pass


def test_a_lock_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / ".lock").mkdir()
    message = rf"^Cannot lock {tmp_path}: Is a directory .*Name a folder that you can write"
    with pytest.raises(ExpertSteerError, match=message), locked(tmp_path, "states"):
        pass


def _fill(path: Path, *rows: int) -> None:
    with RowFile(path) as file:
        file.add({"n": n} for n in rows)


def test_rows_of_processes_that_died_are_taken_over_and_put_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    _fill(path, 4, 0)
    _fill(tmp_path / "rows.2.jsonl", 1, 5)
    _fill(tmp_path / "rows.3.jsonl", 2)
    with (tmp_path / "rows.3.jsonl").open("a") as file:
        file.write('{"n": 9')  # cut short by the kill
    with SharedRows(path, keep=lambda row: row["n"] != 5) as rows:
        assert sorted(row["n"] for row in rows.rows) == [0, 1, 2, 4]
        rows.add([{"n": 3}])
        gathered = rows.gather(lambda row: row["n"], "counting")
        assert [row["n"] for row in gathered] == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_rows_that_find_no_room_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.symlink_to("/dev/full")
    message = r"^Cannot write .*rows.jsonl: No space left on device\. Rows that were written"
    rows = RowFile.__new__(RowFile)
    rows.rows, rows._file = [], path.open("ab")
    with pytest.raises(ExpertSteerError, match=message), rows:
        rows.add([{"n": 1}])
