"""Turn a GGUF file into an ordinary checkpoint, once.

transformers reads GGUF by dequantising every tensor, which takes half a minute or
more each time. The result is kept in the cache under the hash of the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from expertsteer.errors import ExpertSteerError, ModelError
from expertsteer.files import replacing_folder
from expertsteer.models.cache import cache_root, require_disk

__all__ = ["converted_checkpoint", "converted_folder", "file_hash", "require_gguf_package"]

# Raise when the conversion itself changes, so that old results are not reused.
_CONVERSION = 1


def require_gguf_package(file_name: str) -> None:
    """Raise ModelError unless GGUF files can be read and written."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"Got {file_name}, but expected the package gguf to be installed. Install it with: "
            'pip install "expertsteer[gguf]"'
        )


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def converted_folder(sha256: str) -> Path:
    """Return where the checkpoint of the GGUF file with this hash is, or will be."""
    return cache_root() / "models" / f"gguf-{sha256[:16]}-v{_CONVERSION}"


def converted_checkpoint(path: Path, sha256: str | None = None) -> Path:
    """Return an ordinary checkpoint with the content of a GGUF file.

    Parameters
    ----------
    path : Path
        The ``.gguf`` file.
    sha256 : str, optional
        Its hash, where already known.

    Returns
    -------
    Path
        A folder for ``from_pretrained``, float32; made by the first call, found by
        later ones.

    Raises
    ------
    ModelError
        If the file is no GGUF, is truncated, or the ``gguf`` package is missing.
    """
    folder = converted_folder(sha256 or file_hash(path))
    if folder.exists():
        return folder
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(
                f"Got {path}, but expected a GGUF file (its first bytes differ). Download it again."
            )
    require_gguf_package(path.name)
    require_disk(folder.parent, _float32_bytes(path), f"the converted checkpoint of {path.name}")
    try:
        with replacing_folder(folder) as scratch:
            _convert(path, scratch)
    except ExpertSteerError:
        if not folder.exists():  # otherwise another process finished the same conversion
            raise
    return folder


def _float32_bytes(path: Path) -> int:
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except Exception as error:
        raise ModelError(
            f"Got {path}, but expected a whole GGUF file ({error}). Download it again."
        ) from error
    return 4 * sum(int(tensor.n_elements) for tensor in tensors)


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    except Exception as error:  # of any kind: the tokenizers library raises bare Exception
        reason = " ".join(str(error).split())
        raise ModelError(
            f"Got {path}, but expected a GGUF file that transformers can convert: {reason[:1000]}"
        ) from error
    # The weights are plain float32 now; left in place these two would have the
    # saved checkpoint loaded as a quantised one.
    vars(model)["hf_quantizer"] = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
