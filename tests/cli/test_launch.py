"""Commands in several processes: the bits of one process, and what the loss of one costs."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from expertsteer import States, SteeringPack, processes
from expertsteer.cli import launch as launching
from expertsteer.cli import running
from expertsteer.errors import ExpertSteerError, ParameterError
from expertsteer.states.saved import load_tensor_file

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not torch.distributed.is_gloo_available(), reason="needs gloo and signals"
)

COLLECT = ("collect", "-o", "states", "--batch-tokens", "64")

# Runs the command line, writes a shard a batch, and loses a process in the middle.
LOSING = """
    import os, signal, sys, time
    from expertsteer.cli.app import main
    from expertsteer.states import saved
    from expertsteer.states.reading import BlockReader

    saved._SHARD_BYTES = 1
    read, passes = BlockReader._read_texts, []

    def counted(reader, batch):
        passes.append(batch)
        if os.environ["RANK"] == os.environ.get("LOST") and len(passes) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(passes) == 4:
            time.sleep(float(os.environ.get("LATE", "0")))
        return read(reader, batch)

    BlockReader._read_texts = counted
    main()
"""


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Port 0: one that is free.
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
)


def launch(
    *command: object, by: tuple[str, ...] = TORCHRUN, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module or script in two processes by a launcher."""
    return subprocess.run(
        [sys.executable, "-m", *by, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def start_by_hand(script: Path, *command: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Start two processes without a launcher that would end the one that is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *command],
            env=os.environ
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture
def losing(work: Path) -> Path:
    script = work / "losing.py"
    script.write_text(textwrap.dedent(LOSING))
    return script


def test_two_processes_make_the_pack_of_one(world, run, work):
    rng = random.Random(0)
    rows = [json.loads(line) for line in Path(world.data).read_text().splitlines()]
    many = [
        row | {"text": f"{' '.join(rng.choices(row['text'].split(), k=20))} {row['text']}"}
        for row in rows * 4
    ]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    fit = ["fit", *world.models, "-d", "many.jsonl", "--cache-dir"]
    assert run(*fit, "one", "-o", "one").code == 0
    both = launch("-m", "expertsteer", *fit, "two", "-o", "two")
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("pack written to two.safetensors") == 1
    assert both.stdout.count("Layer pairs") == 1

    one, two = SteeringPack.load("one.safetensors"), SteeringPack.load("two.safetensors")
    assert one.summary() == two.summary()
    for layer in one.layers:
        assert torch.equal(one.vectors[layer], two.vectors[layer])
    folders = sorted(path.name for path in Path("one").iterdir())
    assert folders == sorted(path.name for path in Path("two").iterdir())
    for name in folders:
        alone, shared = States.load(Path("one") / name), States.load(Path("two") / name)
        assert torch.equal(alone.values, shared.values)
        shards = sorted(Path("two", name).glob("shard-*"))
        writers = {shard.stem.rpartition("-")[2] for shard in shards}
        rows = [set(load_tensor_file(s, "states-shard")[0]["rows"].tolist()) for s in shards]
        assert writers == {"0", "1"}
        assert sum(map(len, rows)) == len(set.union(*rows)) == len(alone.values)


def test_two_processes_answer_as_one(world, run, work):
    pack = ["fit", *world.models, "-d", world.data, "-o", "pack", "--strategy", "lowest_mi"]
    assert run(*pack).code == 0
    lines = Path(world.text).read_text().splitlines()
    rows = [
        {"question": line, "choices": ["good", "bad day", "a nice trip"], "answer": n % 3}
        for n, line in enumerate(lines)
    ]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = ["evaluate", "-t", world.target, "-p", "pack.safetensors", "-s", 0.5]
    evaluate += ["-d", "questions.jsonl", "--text", world.text, "--letters", "-o"]
    assert run(*evaluate, "one").code == 0
    both = launch("-m", "expertsteer", *evaluate, "two", by=ACCELERATE)
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("rows and summary: two") == 1
    for name in ("rows.jsonl", "plain.jsonl", "run.json"):
        assert Path("two", name).read_bytes() == Path("one", name).read_bytes()
    one, two = (json.loads(Path(name, "summary.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert {path.name for path in Path("two").iterdir()} - {".lock"} == {
        *("rows.jsonl", "plain.jsonl", "run.json", "summary.json", "evaluate.yaml")
    }


def test_a_lost_process_is_reported_and_its_share_done_on_restart(world, run, work, losing):
    collect = [*COLLECT, "-m", world.target, "-d", world.data]
    first = launch(losing, *collect, LOST="1")
    assert first.returncode != 0
    # Not at the start of a line where the signal came in the midst of drawing a progress bar.
    said = [line for line in first.stderr.splitlines() if "process 1 of 2: error:" in line]
    assert len(said) == 1, first.stderr
    assert "process 2 of 2, which ended early" in said[0] or "Got SIGTERM from the" in said[0]
    assert "start the same command again" in said[0]
    before = {shard.name for shard in Path("states").glob("shard-*")}
    assert before
    assert not Path("states/collect.yaml").exists()

    second = launch(losing, *collect)
    assert second.returncode == 0, second.stderr
    assert before < {shard.name for shard in Path("states").glob("shard-*")}
    assert run("collect", "-o", "alone", *collect[3:]).code == 0
    assert torch.equal(States.load("states").values, States.load("alone").values)


# Late: the connection is closed before the process that is left begins to wait.
@pytest.mark.parametrize("late", ["0", "3"])
@pytest.mark.parametrize("lost", [0, 1])
def test_the_process_that_is_left_names_the_other(world, work, losing, lost, late):
    collect = [*COLLECT, "-m", world.target, "-d", world.data]
    started = start_by_hand(losing, *collect, LOST=str(lost), LATE=late)
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    left = 1 - lost
    assert started[lost].returncode == -9
    assert started[left].returncode == 1
    assert (
        f"process {left + 1} of 2: error: Got no answer from process {lost + 1} of 2, which ended"
        in ended[left][1]
    )
    assert "Traceback" not in ended[left][1]


def test_sigterm_is_one_line_wherever_it_arrives(monkeypatch, capsys):
    # By the module's name, which the package's attribute of the same name does not shadow.
    app_module = importlib.import_module("expertsteer.cli.app")
    failing = typer.Typer()

    @failing.command()
    def command() -> None:
        raise ExpertSteerError("Got no answer from process 2 of 2.")

    monkeypatch.setattr(app_module, "app", failing)
    monkeypatch.setattr(sys, "argv", ["expertsteer"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    main = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr(processes, "_joined", lambda: main)
    traced = {app_module.__file__, running.__file__, launching.__file__, __file__}
    codes = []
    for at in itertools.count():
        monkeypatch.setattr(launching, "_terminated", False)
        lines = itertools.count()

        def trace(frame, event, _, at=at, lines=lines):
            if frame.f_code.co_filename not in traced:
                return None
            listening = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            if event == "line" and listening and next(lines) == at:
                signal.raise_signal(signal.SIGTERM)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with pytest.raises(SystemExit) as stop:
                app_module.main()
        finally:
            sys.settrace(before)
        codes.append(stop.value.code)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        expected = "Got SIGTERM" if codes[-1] == launching.TERMINATED else "Got no answer"
        assert said[0].startswith(f"process 1 of 2: error: {expected}")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if next(lines) <= at:
            break
    # Until the outcome is settled a signal decides it, and nothing after.
    assert codes == sorted(codes, reverse=True)
    assert set(codes) == {launching.TERMINATED, 1}


def test_a_command_that_is_not_shared_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    main = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr(processes, "_joined", lambda: main)
    outcome = run("generate", "-t", "x", "-p", "y", "z")
    assert outcome.code == 1
    message = "Got 2 processes for generate, but expected one: only fit, align, evaluate, collect"
    assert message in outcome.err


def test_several_processes_need_a_folder(monkeypatch):
    from expertsteer import collect_states
    from helpers import tiny_language_model

    monkeypatch.setenv("WORLD_SIZE", "2")
    main = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr(processes, "_joined", lambda: main)
    with pytest.raises(ParameterError, match=r"^Got 2 processes and no folder for their states"):
        collect_states(tiny_language_model("llama"), ["w1"], progress=False)


def test_shares_are_equal_parts_of_the_same_items(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for index in range(3):
        state = SimpleNamespace(num_processes=3, process_index=index)
        monkeypatch.setattr(processes, "_joined", lambda state=state: state)
        shares.append(processes.share(range(8)))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
