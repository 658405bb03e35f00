"""One run on several processes, started by torchrun or accelerate launch.

Every process works off a share of the same batches; the first one, called the main
process, says what happens and writes results. A run that no launcher started is one
process, and nothing here does anything then.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from expertsteer.errors import ExpertSteerError

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = [
    "is_launched",
    "is_main_process",
    "leave",
    "local_share",
    "made_by_main",
    "n_local_processes",
    "n_processes",
    "process_index",
    "process_name",
    "share",
    "wait_for_all",
]

# A process may wait for the slowest as long as that one lives: who dies is noticed by its
# closed connection.
_PATIENCE = timedelta(days=7)

_T = TypeVar("_T")


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def n_processes() -> int:
    """Return how many processes work on this run."""
    state = _state()
    return 1 if state is None else state.num_processes


def is_main_process() -> bool:
    """Return whether this process says what happens and writes results."""
    state = _state()
    return state is None or bool(state.is_main_process)


def process_index() -> int:
    """Return the number of this process, from 0, which is the main process."""
    state = _state()
    return 0 if state is None else state.process_index


def process_name() -> str:
    """Return the place of this process among all, such as "process 2 of 8"."""
    return _name(process_index(), n_processes())


def share(items: Sequence[_T]) -> list[_T]:
    """Return this process's share: every n-th of what all processes have in equal order."""
    state = _state()
    return list(items) if state is None else list(items[state.process_index :: state.num_processes])


def local_share(items: Sequence[_T]) -> list[_T]:
    """Return this process's share of what belongs to its machine, such as GPUs."""
    state = _state()
    if state is None:
        return list(items)
    return list(items[state.local_process_index :: n_local_processes()])


def n_local_processes() -> int:
    """Return how many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", n_processes()))


def wait_for_all(doing: str) -> None:
    """Wait until every process has come this far.

    Parameters
    ----------
    doing : str
        What they have done until here, for the message.

    Raises
    ------
    ExpertSteerError
        If another process has ended; it is named where it is known.
    """
    if _state() is None:
        return
    import torch.distributed as dist

    try:
        # Of all the barriers the one that knows who is missing.
        dist.monitored_barrier(_group(), timeout=_PATIENCE)
    except RuntimeError as error:
        raise _ended(doing, error) from error


def made_by_main(
    make: Callable[[], _T],
    save: Callable[[_T, Path], object],
    load: Callable[[Path], _T],
    doing: str,
) -> _T:
    """Make something in the main process and give it to all.

    Parameters
    ----------
    make : callable
        Called in the main process alone.
    save, load : callable
        To and from the bytes of a file with the suffix ".safetensors".
    doing : str
        As in `wait_for_all`.

    Returns
    -------
    What ``make`` returned; in the other processes what ``load`` made of it.

    Raises
    ------
    ExpertSteerError
        If another process has ended.
    """
    if _state() is None:
        return make()
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "made.safetensors"
        content = torch.empty(0, dtype=torch.uint8)
        made = make() if is_main_process() else None
        if made is not None:
            save(made, path)
            content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        size = torch.tensor([len(content)])
        try:
            dist.broadcast(size, 0, _group())
            if made is None:
                content = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(content, 0, _group())
        except RuntimeError as error:
            raise _ended(doing, error) from error
        if made is not None:
            return made
        path.write_bytes(content.numpy().tobytes())
        return load(path)


def leave() -> None:
    """End the connections to the other processes, if any."""
    if is_launched():
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@lru_cache(maxsize=1)
def _joined() -> PartialState:
    import torch
    from accelerate import PartialState

    # gloo also on GPUs: processes only meet and pass small files, never states.
    return PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=_PATIENCE)


def _state() -> PartialState | None:
    return _joined() if is_launched() else None


@lru_cache(maxsize=1)
def _group() -> Any:
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        return None
    # The caller's own process group may be of another kind.
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _name(index: int, count: int) -> str:
    return f"process {index + 1} of {count}"


def _ended(doing: str, error: RuntimeError) -> ExpertSteerError:
    found = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
    indices = [int(number) for number in found[1].split(",")] if found else []
    if not indices and n_processes() == 2:
        # gloo names nobody when the connection was closed before it began to wait.
        indices = [1 - process_index()]
    names = " and ".join(_name(index, n_processes()) for index in indices)
    return ExpertSteerError(
        f"Got no answer from {names or 'another process'}, which ended early, but expected all "
        f"{n_processes()} to finish {doing}. What is done is kept; start the same command again, "
        "and it goes on from there."
    )
