"""A step of a diagonal state space, in plain differentiable torch."""

import torch
from torch import Tensor


def step(state: Tensor, u: Tensor, power: Tensor, factor: Tensor, c_real: Tensor, c_imag: Tensor,
         skip: Tensor) -> Tensor:
    return outputs(advanced(state, u, power, True), u, factor, c_real, c_imag, skip)


def advanced(state: Tensor, u: Tensor, power: Tensor, in_place: bool) -> Tensor:
    """z_hk = power_k z_hk + u_h"""
    inputs = u.to(power.real.dtype).mT
    return state.mul_(power).add_(inputs) if in_place else state * power + inputs


def outputs(state: Tensor, u: Tensor, factor: Tensor, c_real: Tensor, c_imag: Tensor,
            skip: Tensor) -> Tensor:
    """Re Σ_k c_hk factor_k z_hk + skip_h u_h"""
    inputs = u.to(factor.real.dtype)
    gains = torch.complex(c_real.to(inputs.dtype), c_imag.to(inputs.dtype))
    sums = ((gains * state) @ factor).real
    return torch.addcmul(sums.unsqueeze(1), skip.to(inputs.dtype), inputs).to(u.dtype)
