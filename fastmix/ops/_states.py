"""Checks of the states that operators are handed."""

from typing import Any

import torch
from torch import Tensor

from fastmix.checks import check_shape, check_tensor


def check_state(where: str, state: Any, kind: type, x: Tensor, layouts: dict[str, str],
                dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """Checks that `state` is a `kind` whose fields have these layouts and `dtype`, and whose
    `steps` (b,) is int64."""
    if not isinstance(state, kind):
        raise TypeError(f"{where}: initial_state must be a {kind.__name__}, as {where} returns it "
                        f"with return_state=True, got {type(state).__name__}")
    for name, layout in {**layouts, "steps": "b"}.items():
        value = getattr(state, name)
        wanted = (torch.int64,) if name == "steps" else (dtype,)
        check_tensor(where, f"initial_state.{name}", value, wanted, like=("x", x))
        check_shape(where, f"initial_state.{name}", value, layout, sizes)
