"""gate_loop on a GPU: a scan per channel for head dim 1, chunks of matrix products beyond.

The scan is in gate_loop_diagonal.py, the chunks are in gate_loop_heads.py, both with the
arguments and results of `forward` and `backward` here, which are the fallback's.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmix._triton import gate_loop_diagonal, gate_loop_heads
from fastmix._triton.target import is_amd

LARGEST_HEAD = 256


def why_not(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> str | None:
    """Why neither file has kernels for these arguments, or None."""
    largest = max(q.shape[-1], v.shape[-1])
    if largest > LARGEST_HEAD:
        return f"head dims go up to {LARGEST_HEAD}, got {largest}"
    if largest > 1 and q.dtype == torch.float64 and is_amd():
        return "Triton compiles no products of float64 for AMD GPUs"
    return None


def _kernels(q: Tensor, v: Tensor) -> ModuleType:
    return gate_loop_diagonal if q.shape[-1] == v.shape[-1] == 1 else gate_loop_heads


def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, gate_logits: Tensor | None,
            initial_state: Tensor | None, carry_every: int) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(q, v).forward(q, k, v, gates, gate_logits, initial_state, carry_every)


def backward(grad: Tensor, grad_state: Tensor, carries: Tensor, q: Tensor, k: Tensor, v: Tensor,
             gates: Tensor | None, gate_logits: Tensor | None, initial_state: Tensor | None,
             carry_every: int) -> tuple[Tensor | None, ...]:
    return _kernels(q, v).backward(grad, grad_state, carries, q, k, v, gates, gate_logits,
                                   initial_state, carry_every)
