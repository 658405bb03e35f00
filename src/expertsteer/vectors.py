"""Read steering vectors that others made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from expertsteer.errors import PackError
from expertsteer.pack import SteeringPack

__all__ = ["load_vector"]


def load_vector(path: str | Path) -> SteeringPack | torch.Tensor:
    """Read a steering pack or a plain vector.

    Parameters
    ----------
    path : str or Path
        A steering pack; a ``.npy`` array of shape (width,); or a ``.safetensors`` file
        with a single tensor of that shape.

    Returns
    -------
    SteeringPack or Tensor of shape (width,)

    Raises
    ------
    PackError
        If the file is none of these. Pickled arrays are refused.
    """
    path = Path(path)
    if not path.is_file():
        raise PackError(f"Got {path}, but there is no such file.")
    if path.suffix == ".npy":
        try:
            with path.open("rb") as file:
                # Not np.load: that would also open archives and pickles.
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise PackError(f"Got {path}, but it is not a plain numpy array ({error}).") from error
        if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            raise PackError(f"Got {path} of dtype {array.dtype}, but expected real numbers.")
        return torch.from_numpy(array.astype(np.float32).squeeze())
    if path.suffix != ".safetensors":
        raise PackError(f"Got {path}, but expected a pack, a .npy or a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format", "").startswith("expertsteer-"):
                return SteeringPack.load(path)
            names = list(file.keys())
            if len(names) == 1:
                return file.get_tensor(names[0]).float().squeeze()
    except (SafetensorError, OSError) as error:
        raise PackError(f"Got {path}, but it is truncated or not safetensors ({error}).") from error
    raise PackError(f"Got {path} with {len(names)} tensors, but expected a pack or one vector.")
