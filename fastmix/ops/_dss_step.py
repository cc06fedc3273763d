"""One step of a diagonal state space from a state on; whole sequences of them are `fft_conv`'s."""

import torch
from torch import Tensor

from fastmix.checks import Passed
from fastmix.fallback import _dss_step as fallback
from fastmix.ops._register import may_step, step_operator

_step = step_operator(
    "dss_step", "Tensor(a!) state, Tensor u, Tensor power, Tensor factor, Tensor c_real, "
    "Tensor c_imag, Tensor skip", fallback.step)
_passed = Passed()


def dss_step(state: Tensor, u: Tensor, power: Tensor, factor: Tensor, c_real: Tensor,
             c_imag: Tensor, skip: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
    """out_h = Re Σ_k c_hk factor_k z_hk + skip_h u_h of the state z_hk = power_k z_hk + u_h.

    state (b, h, n), u (b, 1, h), power and factor (n,), c_real and c_imag (h, n), skip (h,) →
    (b, 1, h) and the state after, which is `state` if in_place.
    """
    others = (u, power, factor, c_real, c_imag, skip)
    if (state.device.type == "cpu" and (state.is_contiguous() or not in_place)
            and may_step(_passed.key(state, *others), state, *others)):
        after = state if in_place else state.clone(memory_format=torch.contiguous_format)
        return _step(after, *others), after
    after = fallback.advanced(state, u, power, in_place)
    return fallback.outputs(after, u, factor, c_real, c_imag, skip), after
