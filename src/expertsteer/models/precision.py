"""Which floating-point type a device is fast in."""

from __future__ import annotations

import warnings

import torch

__all__ = ["fastest_dtype", "warn_of_slow_dtype"]

# What a processor must have to compute in a type, as `torch.cpu.get_capabilities` names it;
# without, every product goes through float32 and back.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def fastest_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 where a device has instructions for it, float32 elsewhere.

    Parameters
    ----------
    device_type : str
        As in `torch.device.type`. Of others than "cpu" and "cuda" it is not known; they get
        float32.

    Returns
    -------
    torch.dtype

    Notes
    -----
    float16 is never chosen: many models overflow in it.
    """
    if device_type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_it = device_type == "cpu" and bool(_cpu_has(torch.bfloat16))
    return torch.bfloat16 if has_it else torch.float32


def warn_of_slow_dtype(model: torch.nn.Module, name: str) -> None:
    """Warn of weights on the CPU in a type that this processor has no instructions for.

    Parameters
    ----------
    model : torch.nn.Module
    name : str
        What the user calls it.
    """
    for dtype in {p.dtype for p in model.parameters() if p.device.type == "cpu"}:
        if _cpu_has(dtype) is not False:
            continue
        short = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"Got {name} in {short}, but this processor has no instructions for it, which is "
            "slow. dtype='fastest' takes float32 here, at twice the memory.",
            stacklevel=3,
        )


def _cpu_has(dtype: torch.dtype) -> bool | None:
    """Return whether the processor computes in a type; None where torch cannot say."""
    # Older versions of torch have no such function.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities or dtype not in _INSTRUCTIONS:
        return None
    return any(capabilities.get(name, False) for name in _INSTRUCTIONS[dtype])
