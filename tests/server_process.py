"""The real server in a process of its own, for all tests that talk with one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from expertsteer.models import LanguageModel, load_model
from expertsteer.pack import SteeringPack
from helpers import random_vector, tiny_model, tiny_tokenizer

# A context in which a generation takes long enough to be watched, cut and waited for.
LONG = 100_000


@dataclass
class Server:
    """A running `expertsteer serve`."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    address: str = ""

    def client(self, **options: Any) -> openai.OpenAI:
        settings: dict[str, Any] = {"api_key": "unused", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=self.address, **settings | options)

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1].split("/")[0])

    def stop(self, signal_number: int, timeout: float = 30) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(timeout)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_server(*arguments: object, env: dict[str, str] | None = None) -> Server:
    """Start a server on a free port and wait until it answers."""
    words = [sys.executable, "-m", "expertsteer", "serve", *map(str, arguments)]
    process = subprocess.Popen(
        [*words, "--engine", "transformers", "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | (env or {}),
    )
    server = Server(process)
    answers = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            server.lines.append(line)
            if found := re.search(r"answers at (http://\S+/v1)", line):
                server.address = found[1]
                answers.set()
        answers.set()

    threading.Thread(target=read, daemon=True).start()
    if not answers.wait(120) or not server.address:
        server.end()
        raise AssertionError(server.lines)
    return server


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def saved_target(folder: Path) -> LanguageModel:
    """Save a tiny model that reads text of any length; return it as loaded from there."""
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONG}))
    settings = json.loads((folder / "generation_config.json").read_text())
    # Nothing ends a text by itself, so that every test knows how long it becomes.
    settings.pop("eos_token_id", None)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return load_model(folder)


def saved_packs(target: LanguageModel, folder: Path) -> dict[str, Path]:
    """Save two packs of random vectors for a target; return their files by name."""
    saved = {}
    for seed, (name, layers) in enumerate({"happy": (0, 2), "formal": (1, 2)}.items()):
        pack = SteeringPack(
            {layer: random_vector(10 * seed + layer, length=1.0) for layer in layers},
            {layer: 4.0 + layer for layer in layers},
            target.description,
            strength=0.5,
        )
        saved[name] = pack.save(folder / name)
    return saved
