"""The dtypes in which sums, states and spectra are kept, and whether autocast may choose others."""

import torch

# As tables: torch.promote_types costs as much as a check.
_WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128,
    torch.complex64)}
_WIDE_COMPLEX = {dtype: torch.promote_types(dtype, torch.complex64) for dtype in _WIDE}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over `dtype` data: float32 or complex64 at least."""
    return _WIDE[dtype]


def wide_complex(dtype: torch.dtype) -> torch.dtype:
    """The dtype of complex states that come of `dtype` data: complex64 at least."""
    return _WIDE_COMPLEX[dtype]


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on. meta has none, and raises when it is asked.

    (torch.amp.is_autocast_available would tell, but torch 2.10 cannot compile it.)
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
